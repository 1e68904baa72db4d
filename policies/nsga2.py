"""`nsga2`: evolution by non-dominated sorting, through Optuna."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optuna.samplers import BaseSampler, NSGAIISampler

from arqsearch.policies.agent import UnitFloat
from arqsearch.policies.optuna_search import OptunaPolicy, Population


@dataclass(frozen=True)
class NSGA2Policy(OptunaPolicy):
    """NSGA-II (Deb et al., 2002) with Optuna's uniform crossover.

    With one objective it is an elitist genetic algorithm, with several (for example ``bops`` and ``reward``) it spreads
    over the front. The population is small, as a search has about a hundred evaluations.

    :param population: individuals of a generation, evaluated together.
    :param crossover: probability that a child has two parents.
    :param mutation: probability that a parameter is drawn anew; default: 1 / number of parameters.
    :param storage: URL of an Optuna storage that shows the search to dashboards; default: none.
    :param study: name of the study there; default: policy and seed.
    """

    population: Population = 16
    crossover: UnitFloat = 0.9
    mutation: UnitFloat | None = None
    storage: str | None = None
    study: str | None = None
    name: ClassVar[str] = "nsga2"

    @property
    def generation(self) -> int:
        """The population."""
        return self.population

    def sampler(self, seed: int, parameters: int) -> BaseSampler:
        """Optuna's NSGA-II."""
        return NSGAIISampler(
            population_size=self.population, crossover_prob=self.crossover, mutation_prob=self.mutation, seed=seed
        )
