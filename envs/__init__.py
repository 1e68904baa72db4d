"""Gymnasium environments that assign bit-widths; importing this package registers them.

>>> import gymnasium, arqsearch.envs
>>> gymnasium.make("arqsearch/BitWidth-v0").action_space
Discrete(49)
"""

from __future__ import annotations

import gymnasium

from arqsearch.envs.bitwidth import BitWidthEnv
from arqsearch.envs.bitwidth_continuous import BitWidthContinuousEnv
from arqsearch.envs.evaluator import BatchEvaluator, Evaluation, Evaluator
from arqsearch.envs.feasibility import Allocation, Feasibility

__all__ = [
    "Allocation",
    "BatchEvaluator",
    "BitWidthContinuousEnv",
    "BitWidthEnv",
    "Evaluation",
    "Evaluator",
    "Feasibility",
]

gymnasium.register(id=BitWidthEnv.id, entry_point="arqsearch.envs.bitwidth:BitWidthEnv")
gymnasium.register(id=BitWidthContinuousEnv.id, entry_point="arqsearch.envs.bitwidth_continuous:BitWidthContinuousEnv")
