"""`SelfImitation`: an actor that also learns from the best episodes it has seen.

A search of a hundred episodes gives a critic few returns to learn from, and a deterministic actor that
follows an unfinished critic drifts to the ends of the action range. Regressing the actor on the actions
of the best episodes so far keeps it where good candidates are, so that exploration noise searches around
them (self-imitation learning: Oh et al., ICML 2018; behaviour cloning beside the critic: Fujimoto and
Gu, NeurIPS 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

#: Regression steps each time, their minibatch and learning rate.
STEPS, BATCH, LEARNING_RATE = 24, 128, 1e-3


class SelfImitation:
    """Regresses the actor on episodes.

    :param model: agent with an actor on the continuous environment.
    :param seed: seed of the minibatches.
    """

    #: Distinct episodes that are worth imitating.
    ELITES: ClassVar[int] = 6

    def __init__(self, model: Any, seed: int) -> None:
        self._model = model
        self._generator = np.random.default_rng((seed, 3))
        self._optimizer = torch.optim.Adam(model.actor.parameters(), lr=LEARNING_RATE)

    def learn(self, episodes: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> None:
        """Some regression steps.

        :param episodes: observations (steps, features) and actions (steps, 1) of each.
        """
        observations = np.concatenate([episode[0] for episode in episodes])
        actions = np.concatenate([episode[1] for episode in episodes])
        for _ in range(STEPS):
            rows = self._generator.integers(len(observations), size=BATCH)
            wanted = torch.from_numpy(actions[rows])
            loss = (_mean_action(self._model, torch.from_numpy(observations[rows])) - wanted).square().mean()
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()


def _mean_action(model: Any, observations: torch.Tensor) -> torch.Tensor:
    """The actor's action without exploration, with its gradient."""
    if hasattr(model.actor, "log_std"):
        mean, _, _ = model.actor.get_action_dist_params(observations)
        return torch.tanh(mean)
    return model.actor(observations)  # type: ignore[no-any-return]
