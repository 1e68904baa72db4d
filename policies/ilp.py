"""`ilp`: integer linear programming on measured sensitivities, fitted again after every solution."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array, vstack

from arqsearch.policies.base import OnEvaluation, SearchOutcome, SearchProblem
from arqsearch.policies.determinism import blas_threads
from arqsearch.policies.recorder import Recorder
from arqsearch.policies.sensitivity import Sensitivities, measure
from arqsearch.policies.space import ChoiceSpace, Point
from arqsearch.policies.surrogate import Surrogate

#: Branch-and-bound nodes of one solution: a limit that does not depend on the machine's speed, as seconds would.
NODES = 2_000
#: Relative gap at which a solution counts as optimal.
GAP = 1e-4


@dataclass(frozen=True)
class ILPPolicy:
    """Multiple-choice knapsack over an additive model of the reward, solved by HiGHS.

    As HAWQ-V3 (Yao et al., ICML 2021) and LIMPQ (Tang et al., ECCV 2022): one binary variable for each layer and pair
    of bits, one pair a layer, every limit a linear constraint, the sum of the layers' gains maximised. Their
    sensitivities are second derivatives or learned step sizes; here they are measured in the reward itself, by
    lowering one part at a time (`sensitivity.py`; these evaluations count).

    The first solution follows the sensitivities alone. From then on the additive model is fitted
    again to *all* evaluations before each generation (Bayesian ridge regression on the bits of every part:
    `surrogate.py` without pairs), and candidates that were evaluated are cut off (Σ of their variables ≤ layers − 1).

    :param generation: solutions between two fits, each cutting off the ones before; evaluated together.
    """

    generation: Annotated[int, Field(ge=1)] = 4
    name: ClassVar[str] = "ilp"

    def search(
        self, problem: SearchProblem, evaluations: int, seed: int, on_evaluation: OnEvaluation | None = None
    ) -> SearchOutcome:
        """Measure, then solve and fit in turn; see :class:`arqsearch.policies.base.Policy`."""
        recorder = Recorder(problem, evaluations, on_evaluation)
        space = ChoiceSpace(problem)
        knapsack = Knapsack(space)
        generator = random.Random(seed)
        with blas_threads(1):
            known = measure(recorder, space)
            tables = sensitivity_tables(space, known)
            while not recorder.done:
                seen = list(space.points(evaluation.bitwidths for evaluation in recorder.history))
                found: list[Point] = []
                for _ in range(min(self.generation, recorder.left)):
                    solution = knapsack.solve(tables, [*seen, *found])
                    found.append(solution if solution is not None else space.sample(generator))
                recorder.evaluate_many([space.bitwidths(point) for point in found])
                tables = fitted_tables(space, recorder)
        return recorder.outcome()


def sensitivity_tables(space: ChoiceSpace, known: Sensitivities) -> NDArray[np.float64]:
    """Predicted gain of every layer and pair, (layers, pairs), from measured sensitivities.

    :param space: the feasible set.
    :param known: measured sensitivities.
    """
    losses = known.scale[:, :, None] * known.noise
    return -(losses[:, 0, :, None] + losses[:, 1, None, :]).reshape(space.layers, -1)


def fitted_tables(space: ChoiceSpace, recorder: Recorder) -> NDArray[np.float64]:
    """The same from an additive model of all evaluations so far.

    :param space: the feasible set.
    :param recorder: evaluations.
    """
    points = space.points(evaluation.bitwidths for evaluation in recorder.history)
    rewards = np.array([evaluation.reward for evaluation in recorder.history])
    linear = Surrogate(space.choices, points, rewards, pairs=False).mean().linear
    linear = linear.reshape(space.layers, 2, len(space.choices))
    return (linear[:, 0, :, None] + linear[:, 1, None, :]).reshape(space.layers, -1)


class Knapsack:
    """The integer program of a feasible set.

    :param space: the feasible set.
    """

    def __init__(self, space: ChoiceSpace) -> None:
        self._space = space
        self._pairs = len(space.choices) ** 2
        variables = space.layers * self._pairs
        layer = np.repeat(np.arange(space.layers), self._pairs)
        self._one_each = coo_array((np.ones(variables), (layer, np.arange(variables))), dtype=float).tocsr()
        # Costs in units of the limit, so that the solver's tolerances mean the same for all.
        scale = np.maximum(space.slack, 1).astype(float)
        self._costs = csr_array((space.excess.reshape(variables, -1) / scale).T)

    def solve(self, gains: NDArray[np.float64], excluded: Sequence[Point]) -> Point | None:
        """The assignment of the largest summed gain within every limit, None when all are excluded.

        :param gains: gain of every layer and pair, (layers, pairs).
        :param excluded: assignments that may not be given.
        """
        space, variables = self._space, self._one_each.shape[1]
        rows = [self._one_each]
        low, high = [np.ones(space.layers)], [np.ones(space.layers)]
        if len(space.slack):
            rows.append(self._costs)
            low.append(np.full(len(space.slack), -np.inf))
            high.append(np.where(space.slack > 0, 1.0, 0.0))
        if excluded:
            columns = np.stack([self._columns(point) for point in excluded])
            cut = np.repeat(np.arange(len(excluded)), space.layers)
            rows.append(
                coo_array((np.ones(columns.size), (cut, columns.reshape(-1))), (len(excluded), variables)).tocsr()
            )
            low.append(np.full(len(excluded), -np.inf))
            high.append(np.full(len(excluded), space.layers - 1.0))
        spread = float(np.ptp(gains)) or 1.0
        result = milp(
            -gains.reshape(-1) / spread,
            integrality=np.ones(variables),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(vstack(rows), np.concatenate(low), np.concatenate(high)),
            options={"node_limit": NODES, "mip_rel_gap": GAP},
        )
        if result.x is None:
            return None
        pair = np.argmax(result.x.reshape(space.layers, self._pairs), axis=1)
        # The solver's tolerance may overdraw a limit by a hair; integers decide.
        return space.shrunk(np.stack(np.divmod(pair, len(space.choices)), axis=1).astype(np.int64))

    def _columns(self, point: Point) -> NDArray[np.int64]:
        pair = point[:, 0] * len(self._space.choices) + point[:, 1]
        columns: NDArray[np.int64] = np.arange(self._space.layers) * self._pairs + pair
        return columns
