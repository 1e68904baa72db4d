"""The searchers that are no agents, against exhaustive enumeration and against their own description."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from arqsearch.errors import ArqError
from arqsearch.policies import create
from arqsearch.policies.arq_style import ARQStylePolicy, lowered
from arqsearch.policies.front import hypervolume, losses
from arqsearch.policies.greedy import allocate
from arqsearch.policies.ilp import Knapsack
from arqsearch.policies.recorder import Recorder
from arqsearch.policies.sensitivity import measure
from arqsearch.policies.space import ChoiceSpace
from tests.policies import problems


def test_measured_sensitivities_are_those_of_an_additive_reward() -> None:
    task = problems.problem(4)
    recorder, space = Recorder(task, 20), ChoiceSpace(task)
    known = measure(recorder, space)
    evaluator = task.evaluator
    assert isinstance(evaluator, problems.AdditiveEvaluator)
    # 4/4 costs exactly the budget, so every part could be lowered.
    assert known.measured.all()
    assert len(recorder.history) == 1 + 2 * 4
    np.testing.assert_allclose(known.scale, evaluator._sensitivities, rtol=1e-9)


def test_measurement_stops_at_its_limit_and_uses_the_median_for_the_rest() -> None:
    task = problems.problem(4)
    recorder = Recorder(task, 20)
    known = measure(recorder, ChoiceSpace(task), limit=4)
    assert len(recorder.history) == 4
    assert known.measured.sum() == 3
    assert set(known.scale[~known.measured]) == {float(np.median(known.scale[known.measured]))}


def test_measurement_is_one_batch() -> None:
    task = problems.problem(4, batch=True)
    measure(Recorder(task, 20), ChoiceSpace(task))
    assert task.evaluator.calls == [9]  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(5))
def test_the_integer_program_gives_the_best_of_all_assignments(seed: int) -> None:
    task = problems.problem(3, seed=seed)
    space = ChoiceSpace(task)
    gains = np.random.default_rng(seed).normal(size=(3, 9))
    points = [space.point(bitwidths) for bitwidths in problems.everything(task)]
    values = sorted((sum(gains[i, 3 * w + a] for i, (w, a) in enumerate(p)) for p in points), reverse=True)
    knapsack, excluded = Knapsack(space), []
    for expected in values[:4]:
        solution = knapsack.solve(gains, excluded)
        assert solution is not None and space.met(solution)
        assert sum(gains[i, 3 * w + a] for i, (w, a) in enumerate(solution)) == pytest.approx(expected)
        excluded.append(solution)
    assert knapsack.solve(gains, points) is None


@pytest.mark.parametrize("seed", range(2))
def test_ilp_solves_an_additive_reward_with_its_first_solution(seed: int) -> None:
    task = problems.problem(3, choices=(2, 3, 4, 5, 6), seed=seed)
    outcome = create("ilp").search(task, 8, seed)
    assert outcome.history[7].reward == pytest.approx(problems.optimum(task))
    assert outcome.history[7].reward > max(e.reward for e in outcome.history[:7])


def test_ilp_solves_a_coupled_reward_after_some_fits() -> None:
    task = problems.problem(3, seed=1, coupling=2.0)
    outcome = create("ilp").search(task, 40, 0)
    assert outcome.best.reward == pytest.approx(problems.optimum(task))
    assert len({e.bitwidths for e in outcome.history[7:]}) == 33  # Cuts: none is evaluated again.


@pytest.mark.parametrize("seed", range(4))
def test_greedy_comes_close_and_then_improves(seed: int) -> None:
    task = problems.problem(3, seed=seed)
    best = problems.optimum(task)
    baseline = create("uniform").search(task, 1, 0).best.reward
    first = create("greedy").search(task, 8, seed).best.reward
    later = create("greedy").search(task, 60, seed).best.reward
    assert baseline <= first <= later <= best + 1e-12
    assert best - later <= 0.25 * (best - baseline)


def test_greedy_allocation_leaves_no_room() -> None:
    task = problems.problem(5)
    space = ChoiceSpace(task)
    point = allocate(space, measure(Recorder(task, 11), space))
    for index in np.ndindex(5, 2):
        raised = point.copy()
        raised[index] += 1
        assert raised[index] >= len(space.choices) or not space.met(raised)


def test_the_projection_keeps_feasible_points_and_proportions() -> None:
    task = problems.problem(4, choices=range(2, 9))
    space = ChoiceSpace(task)
    generator = np.random.default_rng(0)
    for _ in range(50):
        point = generator.integers(0, 7, size=(4, 2))
        found = space.shrunk(point)
        assert space.met(found) and (found <= point).all()
        assert not space.met(point) or (found == point).all()
        # No larger factor fits: every scaling above the one found is over budget.
        factors = [t for t in np.linspace(0, 1, 400) if space.met(np.floor(point * t + 0.5).astype(np.int64))]
        assert space.costs(found)[0] >= space.costs(np.floor(point * max(factors) + 0.5).astype(np.int64))[0]


@pytest.mark.parametrize("name", ["nsga2", "tpe"])
def test_optuna_searchers_beat_random_candidates(name: str) -> None:
    task = problems.problem(6, choices=range(2, 9))
    found = [create(name).search(task, 60, seed).best.reward for seed in range(2)]
    floor = [create("random", sweeps=10).search(task, 60, seed).best.reward for seed in range(2)]
    assert np.mean(found) > np.mean(floor)


def test_generations_go_to_the_evaluator_as_a_whole() -> None:
    task = problems.problem(4, batch=True)
    create("nsga2", population=6).search(task, 15, 0)
    assert task.evaluator.calls == [6, 6, 3]  # type: ignore[attr-defined]


def test_several_objectives_spread_over_the_front() -> None:
    task = problems.problem(5, choices=range(2, 9))
    infos, objectives = task.evaluator.layers, ("bops", "reward")

    def volume(searched: tuple[str, ...], seed: int) -> float:
        outcome = create("nsga2").search(replace(task, objectives=searched), 96, seed)
        points = [losses(evaluation, objectives, infos) for evaluation in outcome.history]
        return hypervolume(points, (task.budget.limits[0][1] + 1.0, 10.0))

    assert all(volume(objectives, seed) > volume(("reward",), seed) for seed in range(3))


def test_the_dashboard_study_is_a_view_that_a_resumed_search_completes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna.db"
    task = problems.problem(3)
    plain = create("tpe", startup=4).search(task, 10, 0)
    viewed = create("tpe", startup=4, storage=url)
    with pytest.raises(KeyboardInterrupt):
        viewed.search(task, 10, 0, on_evaluation=_interrupt_at(5))
    assert viewed.search(task, 10, 0) == plain
    assert viewed.search(task, 10, 0) == plain
    (study,) = optuna.get_all_study_summaries(url)
    trials = optuna.load_study(study_name=study.study_name, storage=url).trials
    assert [t.user_attrs["bitwidths"] for t in trials] == [e.bitwidths.to_json() for e in plain.history]
    assert [t.values for t in trials] == [[e.reward] for e in plain.history]
    with pytest.raises(ArqError, match="other objectives"):
        viewed.search(replace(task, objectives=("bops", "reward")), 10, 0)


def _interrupt_at(number: int):  # type: ignore[no-untyped-def]
    def interrupt(index: int, evaluation: object) -> None:
        if index == number:
            raise KeyboardInterrupt

    return interrupt


def test_a_storage_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArqError, match="cannot be used"):
        create("tpe", storage="nonsense://x").search(problems.problem(3), 2, 0)


@pytest.mark.parametrize("seed", range(3))
def test_adaqat_improves_on_its_uniform_start(seed: int) -> None:
    task = problems.problem(6, choices=range(2, 9), seed=seed)
    history = create("adaqat").search(task, 100, 0).history
    assert max(e.reward for e in history) > history[0].reward


def test_haq_lowers_from_the_last_layer() -> None:
    task = problems.problem(3, choices=range(2, 9))
    space = ChoiceSpace(task)
    feasible = np.full((3, 2), 2)
    assert (lowered(space, feasible) == feasible).all()
    point = lowered(space, np.full((3, 2), 3))
    assert space.met(point)
    # One pass: what was lowered is a tail of the order first layer .. last layer, activations before weights.
    flat = point[:, ::-1].reshape(-1)
    assert (np.diff(flat) <= 0).all() and set(flat.tolist()) <= {2, 3}
    previous = flat.copy()
    previous[np.flatnonzero(flat == 2)[0]] = 3
    assert not space.met(previous.reshape(3, 2)[:, ::-1])


def test_arq_style_has_the_settings_of_haq() -> None:
    policy = ARQStylePolicy()
    model = policy._agent(problems_env(), 0)
    model._update_learning_rate([model.actor.optimizer, model.critic.optimizer])
    assert model.actor.optimizer.param_groups[0]["lr"] == 1e-4
    assert model.critic.optimizer.param_groups[0]["lr"] == 1e-3
    assert model.tau == 0.01 and model.gamma == 1.0 and model.batch_size == 64
    assert model.replay_buffer.buffer_size == 128 * 6  # type: ignore[union-attr]


def problems_env():  # type: ignore[no-untyped-def]
    from arqsearch.envs import BitWidthContinuousEnv

    return BitWidthContinuousEnv()


def test_arq_style_gives_every_step_the_gain_less_the_average_of_earlier_ones() -> None:
    model = ARQStylePolicy()._agent(problems_env(), 0)
    buffer = model.replay_buffer
    size = model.observation_space.shape[0]  # type: ignore[index]
    for reward in (-0.2, -0.1):
        buffer.observe(np.zeros((4, size), np.float32), np.zeros((3, 1), np.float32), reward)  # type: ignore[union-attr]
    baseline = 0.95 * -0.2 + 0.05 * -0.1
    samples = buffer._get_samples(np.arange(6))  # type: ignore[union-attr]
    expected = [-0.2 - baseline] * 3 + [-0.1 - baseline] * 3
    np.testing.assert_allclose(samples.rewards.numpy().reshape(-1), expected, rtol=1e-5)
    assert samples.dones.reshape(-1).tolist() == [0, 0, 1, 0, 0, 1]
