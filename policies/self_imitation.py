"""`SelfImitation`: an actor that also learns from the best episodes it has seen.

A search of a hundred episodes gives a critic few returns to learn from, and a deterministic actor that
follows an unfinished critic drifts to the ends of the action range. Regressing the actor on the actions
of the best episodes so far keeps it where good candidates are, so that exploration noise searches around
them (self-imitation learning: Oh et al., ICML 2018; behaviour cloning beside the critic: Fujimoto and
Gu, NeurIPS 2021).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback

from arqsearch.envs.bitwidth_continuous import BitWidthContinuousEnv
from arqsearch.policies.recorder import Recorder
from arqsearch.quantize.bitwidths import BitWidths

#: Distinct episodes that are imitated, and regression steps after each episode.
ELITES, STEPS, BATCH, LEARNING_RATE = 6, 24, 128, 1e-3


class SelfImitation(BaseCallback):
    """Regress the actor on the best distinct episodes before each new one.

    :param recorder: the evaluations so far.
    :param env: the bare environment, which knows the actions behind bit-widths.
    :param seed: seed of the minibatches.
    """

    def __init__(self, recorder: Recorder, env: BitWidthContinuousEnv, seed: int) -> None:
        super().__init__()
        self._recorder = recorder
        self._env = env
        self._generator = np.random.default_rng((seed, 3))
        self._episodes: dict[BitWidths, tuple[float, NDArray[np.float32], NDArray[np.float32]]] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    def _on_rollout_start(self) -> None:
        # The buffer holds whole episodes, in the order of the history.
        self._remember()
        if not self._episodes:
            return
        model: Any = self.model
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(model.actor.parameters(), lr=LEARNING_RATE)
        best = sorted(self._episodes.values(), key=lambda episode: -episode[0])[:ELITES]
        observations = np.concatenate([episode[1] for episode in best])
        actions = np.concatenate([episode[2] for episode in best])
        for _ in range(STEPS):
            rows = self._generator.integers(len(observations), size=BATCH)
            wanted = torch.from_numpy(actions[rows])
            loss = (_mean_action(model, torch.from_numpy(observations[rows])) - wanted).square().mean()
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

    def _remember(self) -> None:
        buffer: Any = self.model.replay_buffer  # type: ignore[attr-defined]
        steps = self._env.steps_per_episode
        for index, evaluation in enumerate(self._recorder.history):
            if evaluation.bitwidths not in self._episodes and (index + 1) * steps <= buffer.pos:
                seen = np.asarray(buffer.observations[index * steps : (index + 1) * steps, 0], dtype=np.float32)
                actions = self._env.actions_of(evaluation.bitwidths)
                self._episodes[evaluation.bitwidths] = (evaluation.reward, seen, actions)

    def _on_step(self) -> bool:
        return True


def _mean_action(model: Any, observations: torch.Tensor) -> torch.Tensor:
    """The actor's action without exploration, with its gradient."""
    if hasattr(model.actor, "log_std"):
        mean, _, _ = model.actor.get_action_dist_params(observations)
        return torch.tanh(mean)
    return model.actor(observations)  # type: ignore[no-any-return]
