"""Everything that chooses bit-widths, by name.

>>> from arqsearch import policies
>>> policies.available()[:4]
('adaqat', 'arq_style', 'ddpg', 'dqn')
>>> policies.create("random", sweeps=10)
RandomPolicy(sweeps=10)
"""

from __future__ import annotations

from arqsearch.policies.base import OnEvaluation, Policy, SearchOutcome, SearchProblem
from arqsearch.policies.registry import available, create, hyperparameters

__all__ = [
    "OnEvaluation",
    "Policy",
    "SearchOutcome",
    "SearchProblem",
    "available",
    "create",
    "hyperparameters",
]
