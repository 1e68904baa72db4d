"""`masked_ppo`: proximal policy optimization that only ever sees feasible actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sb3_contrib import MaskablePPO
from stable_baselines3.common.base_class import BaseAlgorithm

from arqsearch.policies.ppo import PPOPolicy


@dataclass(frozen=True)
class MaskedPPOPolicy(PPOPolicy):
    """`ppo` with the infeasible actions' probability set to 0 (Huang and Ontañón, 2022).

    Hyper-parameters as :class:`PPOPolicy`.
    """

    name: ClassVar[str] = "masked_ppo"
    algorithm: ClassVar[type[BaseAlgorithm]] = MaskablePPO
