"""`tpe`: tree-structured Parzen estimator, through Optuna."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, TPESampler

from arqsearch.policies.agent import PositiveInt
from arqsearch.policies.optuna_search import OptunaPolicy


@dataclass(frozen=True)
class TPEPolicy(OptunaPolicy):
    """Tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011; several objectives: Ozaki et al., 2022).

    Each parameter has densities of its own (univariate). Within a generation, candidates that are not scored yet count
    as bad ones, so that they differ ("constant liar").

    :param batch: candidates of a generation, evaluated together.
    :param startup: random candidates at the start.
    :param storage: URL of an Optuna storage that shows the search to dashboards; default: none.
    :param study: name of the study there; default: policy and seed.
    """

    batch: PositiveInt = 4
    startup: PositiveInt = 10
    storage: str | None = None
    study: str | None = None
    name: ClassVar[str] = "tpe"

    @property
    def generation(self) -> int:
        """The batch."""
        return self.batch

    def sampler(self, seed: int, parameters: int) -> BaseSampler:
        """Optuna's TPE."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return TPESampler(n_startup_trials=self.startup, constant_liar=True, seed=seed)
