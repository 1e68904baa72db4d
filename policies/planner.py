"""`Planner`: what the replay-buffer agents know between evaluations: a surrogate, and an expert that climbs it.

Two ideas from the literature, both counted in real evaluations alone:

- *Surrogate episodes.* A model of the reward is fitted to the evaluations, and the agent plays many cheap episodes
  against it (model-based learning: DyNA-PPO, Angermueller et al., ICLR 2020).
- *Expert iteration* (Anthony et al., NeurIPS 2017). A search that starts from the agent's episodes finds better ones in
  the model, and the agent learns to imitate these.

Proposals are of three kinds in turn: a climb of the model's mean; the best neighbour of the best candidate so far, one
move away from what is known; and two climbs of draws from the posterior with half of its standard deviation, which
explore (Thompson sampling).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arqsearch.policies.local_search import Climber
from arqsearch.policies.recorder import Recorder
from arqsearch.policies.space import ChoiceSpace, Point
from arqsearch.policies.surrogate import Quadratic, Surrogate

MEAN, NEIGHBOUR, DRAW = "mean", "neighbour", "draw"
#: Kinds of proposals, in turn.
KINDS = (MEAN, NEIGHBOUR, DRAW, DRAW)
#: Share of the posterior's standard deviation that draws keep.
TEMPER = 0.5


@dataclass(frozen=True)
class Plan:
    """Proposals for evaluation, and what the agent learns from.

    :param proposals: distinct assignments, none of them evaluated before where any other is in reach.
    :param imagined: assignments with no evaluation: the agent's episodes.
    :param values: the model's mean at `proposals`, then at `imagined`.
    """

    proposals: list[Point]
    imagined: list[Point]
    values: NDArray[np.float64]


class Planner:
    """Fits the model and climbs it.

    :param space: the feasible set.
    :param recorder: the evaluations.
    :param generator: source of randomness.
    """

    def __init__(self, space: ChoiceSpace, recorder: Recorder, generator: np.random.Generator) -> None:
        self._space = space
        self._recorder = recorder
        self._generator = generator
        self._climber = Climber(space)

    def plan(self, imagined: list[Point], generation: int) -> Plan:
        """Fit the model to all evaluations so far and propose.

        :param imagined: the agent's episodes; the best of them under a function is one start of its climb, the
            evaluated assignment that is best under it the other.
        :param generation: proposals wanted.
        """
        history = self._recorder.history
        points = self._space.points(evaluation.bitwidths for evaluation in history)
        rewards = np.array([evaluation.reward for evaluation in history])
        model = Surrogate(self._space.choices, points, rewards)
        mean = model.mean()
        seen = {Climber.key(point) for point in points}
        proposals: list[Point] = []
        for number in range(generation):
            kind = KINDS[(len(history) + number) % len(KINDS)]
            if kind == NEIGHBOUR:
                chosen = self._climber.neighbour(mean, points[int(np.argmax(rewards))], frozenset(seen))
            else:
                function = mean if kind == MEAN else _between(mean, model.sample(self._generator))
                starts = [_best(function, list(points)), *([_best(function, imagined)] if imagined else [])]
                chosen = _best(function, [self._climber.climb(function, start, frozenset(seen)) for start in starts])
            seen.add(Climber.key(chosen))
            proposals.append(chosen)
        return Plan(proposals, imagined, mean.values(np.array([*proposals, *imagined])))


def _best(function: Quadratic, points: list[Point]) -> Point:
    return points[int(np.argmax(function.values(np.array(points))))]


def _between(mean: Quadratic, drawn: Quadratic) -> Quadratic:
    """The draw with its deviation from the mean made smaller."""
    a, b = mean.times(1 - TEMPER), drawn.times(TEMPER)
    return Quadratic(a.constant + b.constant, a.linear + b.linear, a.pairs + b.pairs)
