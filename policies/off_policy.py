"""What the policies with a replay buffer share: warm-up by measurement, generations, learning after each."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from arqsearch.policies.agent import AgentPolicy, Run
from arqsearch.policies.base import OnEvaluation, SearchOutcome, SearchProblem
from arqsearch.policies.determinism import blas_threads, preserved_random_state, torch_threads
from arqsearch.policies.episodes import Stage, refill
from arqsearch.policies.greedy import allocate
from arqsearch.policies.planner import Planner
from arqsearch.policies.recorder import Recorder
from arqsearch.policies.self_imitation import SelfImitation
from arqsearch.policies.sensitivity import measure
from arqsearch.policies.space import ChoiceSpace, Point
from arqsearch.policies.surrogate import Scale
from arqsearch.quantize.bitwidths import BitWidths

#: Largest share of the search that the warm-up may take.
WARMUP_SHARE = 0.45
#: Episodes of the replay buffer, the latest of those below.
BUFFER_EPISODES = 1_000
#: Uniform assignments played in a warm-up without measurement, at most half of it.
UNIFORM_EPISODES = 5


class OffPolicyAgent(AgentPolicy):
    """Base of the replay-buffer agents.

    A search goes in generations of fixed size: proposals are evaluated together, and the agent learns after each
    generation, so the history does not depend on how many are evaluated at a time.

    The warm-up does not act at random (that spends the budget on the first layers and starves the last ones). It
    measures sensitivities and plays the greedy allocation that follows from them (`sensitivity.py`, `greedy.py`),
    with at most 45 % of the evaluations. A search that has not seen its baseline cannot be trusted to beat it.

    Between generations the agent plays `imagined` episodes with exploration, a model of the reward scores them, and the
    planner improves them in the model to proposals (`planner.py`). Real and imagined episodes fill the replay buffer;
    actors of the continuous environment are also regressed on the best evaluated ones. With ``imagined = 0`` there is
    no model: the warm-up plays the fullest uniform assignments and uniform samples of the feasible set, and the
    agent's own episodes are evaluated.

    The only reward comes with the last step, and a search has few episodes: returns are taken over the rest of the
    episode (n-step with n = its length), so that every step sees the reward at once instead of after as many updates
    as there are steps.
    """

    learning_rate: float
    hidden: tuple[int, ...]
    batch_size: int
    warmup_episodes: int
    updates_per_step: int
    generation: int
    imagined: int

    @abstractmethod
    def explore(
        self,
        model: OffPolicyAlgorithm,
        observations: NDArray[np.float32],
        progress: float,
        generator: np.random.Generator,
    ) -> NDArray[Any]:
        """Actions with exploration, one for each observation.

        :param model: the agent.
        :param observations: (n, features).
        :param progress: share of the search after the warm-up that is done.
        :param generator: source of randomness.
        """

    def search(
        self, problem: SearchProblem, evaluations: int, seed: int, on_evaluation: OnEvaluation | None = None
    ) -> SearchOutcome:
        """Warm up, then propose, evaluate and learn; see :class:`arqsearch.policies.base.Policy`."""
        recorder = Recorder(problem, evaluations, on_evaluation)
        stage, space = Stage(self.environment, problem), ChoiceSpace(problem)
        run = Run(evaluations, stage.env.steps_per_episode, seed)
        generator = np.random.default_rng((seed, 5))
        with preserved_random_state(), torch_threads(1), blas_threads(1):
            model = self.build(stage.env, run)
            assert isinstance(model, OffPolicyAlgorithm)
            # Without a logger of its own, the agent would make a new folder in the system's temporary one.
            model.set_logger(Logger(folder=None, output_formats=[]))
            imitation = SelfImitation(model, seed) if hasattr(model, "actor") else None
            planner = Planner(space, recorder, generator)
            self.warm_up(recorder, space, run)
            warm = len(recorder.history)
            scored: dict[BitWidths, float] = {}
            while not recorder.done:
                self._learn(model, stage, recorder, scored, run, imitation)
                progress = (len(recorder.history) - warm) / max(evaluations - warm, 1)
                count = min(self.generation, recorder.left)
                acted = stage.act(
                    lambda observations, p=progress: self.explore(model, observations, p, generator),  # type: ignore[misc]
                    self.imagined or count,
                )
                if self.imagined:
                    plan = planner.plan([space.point(bitwidths) for bitwidths in acted], count)
                    proposals = [space.bitwidths(point) for point in plan.proposals]
                    scored = dict(zip([*proposals, *acted], plan.values.tolist(), strict=True))
                else:
                    proposals = acted
                recorder.evaluate_many(proposals)
        return recorder.outcome()

    def warm_up(self, recorder: Recorder, space: ChoiceSpace, run: Run) -> None:
        """The evaluations before the agent acts.

        :param recorder: where they are counted.
        :param space: the feasible set.
        :param run: sizes of the search.
        """
        if self.imagined:
            limit = max(int(WARMUP_SHARE * run.evaluations), 1)
            known = measure(recorder, space, limit)
            if not recorder.done:
                recorder.evaluate(space.bitwidths(allocate(space, known)))
            return
        episodes = max(run.warmup_episodes(self.warmup_episodes), 1)
        source = random.Random(run.seed)
        points: list[Point] = space.uniform()[: min(UNIFORM_EPISODES, (episodes + 1) // 2)]
        while len(points) < episodes:
            points.append(space.sample(source))
        recorder.evaluate_many([space.bitwidths(point) for point in points])

    def _learn(
        self,
        model: OffPolicyAlgorithm,
        stage: Stage,
        recorder: Recorder,
        scored: dict[BitWidths, float],
        run: Run,
        imitation: SelfImitation | None,
    ) -> None:
        """Learn from all evaluated episodes and the latest imagined ones."""
        real = {evaluation.bitwidths: evaluation.reward for evaluation in recorder.history}
        both = {**{key: value for key, value in scored.items() if key not in real}, **real}
        rewards = np.array(list(both.values()))
        standardized = Scale.of(np.array(list(real.values()))).standardized(rewards)
        refill(model.replay_buffer, [stage.episode(bitwidths) for bitwidths in both], standardized)
        model.train(gradient_steps=run.steps * self.updates_per_step, batch_size=self.batch_size)
        if imitation is not None:
            imitation.learn(_elites(real, stage))

    def off_policy_arguments(self, run: Run) -> dict[str, Any]:
        """Constructor arguments common to the replay-buffer agents.

        :param run: sizes of the search.
        """
        return {
            "learning_rate": self.learning_rate,
            "policy_kwargs": {"net_arch": list(self.hidden)},
            "batch_size": self.batch_size,
            "buffer_size": min(2 * run.evaluations + 100, BUFFER_EPISODES) * run.steps,
            "learning_starts": 0,
            "train_freq": (1, "episode"),
            "gradient_steps": run.steps * self.updates_per_step,
            "gamma": 1.0,
            "n_steps": run.steps,
        }


def _elites(real: dict[BitWidths, float], stage: Stage) -> Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Observations and actions of the best distinct evaluated episodes, the best first."""
    best = sorted(real, key=lambda bitwidths: -real[bitwidths])
    episodes = [stage.episode(bitwidths) for bitwidths in best[: SelfImitation.ELITES]]
    return [(episode.observations[:-1], episode.actions) for episode in episodes]
