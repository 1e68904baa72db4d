"""`adaqat`: bit-widths as real numbers that follow a stochastic gradient of reward and cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from arqsearch.policies.base import OnEvaluation, SearchOutcome, SearchProblem
from arqsearch.policies.recorder import Recorder
from arqsearch.policies.sensitivity import balanced
from arqsearch.policies.space import ChoiceSpace

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

#: Half of the distance between the two evaluated sides, in choices: rounding sends them to neighbouring choices.
HALF_STEP = 0.5
#: Decay of the running mean of squared gradients.
MEMORY = 0.9


@dataclass(frozen=True)
class AdaQATPolicy:
    """AdaQAT-like: real-valued bit-widths adapted by gradients (Gernigon et al., AdaQAT, 2024).

    Kept of AdaQAT: every part (weights, activations of a layer) has a real-valued bit-width n that is rounded for use;
    its gradient is a finite difference between the network at fewer and at more bits; a cost weighted by λ pulls n
    down.

    Not kept: AdaQAT adapts bit-widths *while* training the weights, on the loss of single batches, with the floor and
    the ceiling of each n alone. Here the weights are whatever the evaluator uses, a gradient costs two evaluations
    for all parts at once (simultaneous perturbation: Spall, 1992), and candidates over budget are shrunk into it
    (`ChoiceSpace.shrunk`), which AdaQAT leaves to λ. So this is named after its idea and proves nothing about AdaQAT.

    Starts from the balanced uniform assignment. The gradient is scaled by its own running magnitude (RMSprop), because
    the reward's unit is not that of the bits.

    :param cost_weight: λ: weight of the largest share of any limit's slack, in units of the reward.
    :param rate: step size of a bit-width, in choices.
    """

    cost_weight: NonNegative = 0.01
    rate: Positive = 0.2
    name: ClassVar[str] = "adaqat"

    def search(
        self, problem: SearchProblem, evaluations: int, seed: int, on_evaluation: OnEvaluation | None = None
    ) -> SearchOutcome:
        """Follow the gradient; see :class:`arqsearch.policies.base.Policy`."""
        recorder = Recorder(problem, evaluations, on_evaluation)
        space = ChoiceSpace(problem)
        generator = np.random.default_rng((seed, 11))
        top = len(space.choices) - 1
        start = balanced(space)
        relaxed = start.astype(np.float64)
        recorder.evaluate(space.bitwidths(start))
        squares = np.zeros_like(relaxed)
        while not recorder.done:
            direction = generator.choice([-1.0, 1.0], size=relaxed.shape)
            # A random offset makes the rounded sides right on average: E[⌊n + u⌋] = n for u uniform on [0, 1).
            offset = generator.random(relaxed.shape)
            rounded = [np.floor(relaxed + sign * HALF_STEP * direction + offset) for sign in (1, -1)]
            sides = [space.shrunk(np.clip(side, 0, top).astype(np.int64)) for side in rounded]
            found = recorder.evaluate_many([space.bitwidths(side) for side in sides[: recorder.left]])
            if len(found) == 2:
                more, less = (
                    evaluation.reward - self.cost_weight * float(space.shares(side).max(initial=0.0))
                    for evaluation, side in zip(found, sides, strict=True)
                )
                gradient = (more - less) * direction
                squares = MEMORY * squares + (1 - MEMORY) * gradient**2
                relaxed = _stepped(relaxed, gradient, squares, self.rate, top)
        return recorder.outcome()


def _stepped(
    relaxed: NDArray[np.float64], gradient: NDArray[np.float64], squares: NDArray[np.float64], rate: float, top: int
) -> NDArray[np.float64]:
    """One scaled ascent step, kept within the choices."""
    scale = np.sqrt(squares)
    step = np.divide(gradient, scale, out=np.zeros_like(gradient), where=scale > 0)
    return np.clip(relaxed + rate * step, 0, top)
