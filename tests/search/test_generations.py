"""Generations: the same evaluations for any number of workers and any executor, computed once, raced or in full."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from arqsearch import models
from arqsearch.data import load
from arqsearch.envs.evaluator import BatchEvaluator, Evaluation
from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.quantize.training import to_pixels
from arqsearch.recipe import EarlyStop, Recipe, parse_recipe
from arqsearch.search.evaluator import ProgramEvaluator
from arqsearch.search.executor import Executor, LocalExecutor, open_executor
from arqsearch.search.race import Race
from arqsearch.search.record import Record
from arqsearch.search.scorer import Rival, Scorer
from arqsearch.search.terms import smoothed_values
from tests.search.tiny import tiny_recipe

NAMES = ("conv1", "conv2", "fc1")
IMAGES = 60


def candidates(count: int) -> list[BitWidths]:
    """Different assignments, in no order of quality."""
    source = random.Random(3)
    pairs = [(weight, activation) for weight in (2, 3, 4, 6, 8) for activation in (2, 3, 4, 6, 8)]
    drawn = [BitWidths.from_mapping({name: source.choice(pairs) for name in NAMES}) for _ in range(count)]
    return list(dict.fromkeys(drawn))


CANDIDATES = candidates(14)
RULES = EarlyStop(delta=0.3, block=5)


@lru_cache
def trained() -> dict[str, torch.Tensor]:
    """A digits network after a few steps on clean images: good enough to be harmed by few bits."""
    data = load("digits", "train")
    net = blank()
    net.quantized = False
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    torch.manual_seed(0)
    images, labels = to_pixels(data.images[:512]), torch.from_numpy(data.labels[:512])
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images + 32 * torch.randn_like(images)), labels).backward()
        optimizer.step()
    net.calibrate([images[:128]])
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def blank() -> QuantizedNet:
    torch.manual_seed(0)
    return QuantizedNet(models.build("cnn_tiny", 10, in_channels=1, image_size=8), (1, 8, 8), (0.5,), (0.25,),
                        QuantizeSettings())  # fmt: skip


def open_scorer(recipe: Recipe, weights: Path, first: int = 600) -> Scorer:
    """What a worker opens; as in a run, the weights come from a file."""
    torch.set_num_threads(1)
    net = blank()
    net.load_state_dict(torch.load(weights, weights_only=True))
    net.quantized = True
    return Scorer(net.eval(), load("digits", "train").subset(slice(first, first + IMAGES)), recipe)


def make_recipe(folder: Path, delta: float = 0.0, **evaluate: Any) -> Recipe:
    settings = {"smoothed": {"images": IMAGES, "samples": 8}, "interval": {"weight": 0.2, "measure": "margin",
                "images": 10}, "early_stop": {"delta": delta, "block": 5, "generation": 4}}  # fmt: skip
    return tiny_recipe(folder, evaluate=settings | evaluate)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(trained(), path)
    return path


def evaluator(
    folder: Path, weights: Path, name: str, delta: float = 0.0, executor: Executor | None = None, **named: Any
) -> ProgramEvaluator:
    recipe = make_recipe(folder, delta)
    reopen = partial(open_scorer, recipe, weights)
    return ProgramEvaluator(
        reopen(), Record(f"sqlite:///{folder / name}.sqlite"), executor=executor, reopen=reopen, **named
    )


def rows(evaluator: ProgramEvaluator) -> dict[BitWidths, Any]:
    """What the record holds of each candidate, but for the time it took."""
    record, key = evaluator.record, evaluator.key
    found = {bits: (record.get(key, bits), record.get_partial(key, bits)) for bits in CANDIDATES}
    return {bits: [entry and (entry.program_hash, entry.counts) for entry in pair] for bits, pair in found.items()}


@pytest.fixture(scope="module")
def executors() -> Iterator[dict[str, Executor]]:
    with LocalExecutor(2) as two:
        yield {"1": LocalExecutor(1), "2": two}


@pytest.mark.parametrize("delta", [0.0, 0.2])
def test_evaluations_and_record_do_not_depend_on_the_workers(
    delta: float, tmp_path: Path, weights: Path, executors: dict[str, Executor]
) -> None:
    found: dict[str, tuple[list[Evaluation], Any, int]] = {}
    for name, executor in executors.items():
        one = evaluator(tmp_path, weights, name, delta, executor)
        assert isinstance(one, BatchEvaluator)
        found[name] = (one.evaluate_many([*CANDIDATES, CANDIDATES[0]]), rows(one), one.computed)
    assert found["1"] == found["2"]
    evaluations, _, computed = found["1"]
    assert computed == len(CANDIDATES) + 1, "each candidate once, and the reference"
    assert [evaluation.bitwidths for evaluation in evaluations] == [*CANDIDATES, CANDIDATES[0]]
    assert evaluations[-1] == evaluations[0]
    stopped = [evaluation for evaluation in evaluations if evaluation.stopped is not None]
    assert bool(stopped) == (delta > 0)
    if delta == 0:
        alone = evaluator(tmp_path, weights, "alone")
        assert [alone.evaluate(bits) for bits in CANDIDATES] == evaluations[:-1]


def test_ray_gives_the_same(tmp_path: Path, weights: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'arqsearch[ray]'")
    here = evaluator(tmp_path, weights, "here", 0.2)
    expected = here.evaluate_many(CANDIDATES)
    with open_executor("ray", 2) as executor:
        there = evaluator(tmp_path, weights, "ray", 0.2, executor)
        assert there.evaluate_many(CANDIDATES) == expected
    assert rows(there) == rows(here) and there.computed == here.computed


def test_a_stopped_candidate_is_below_the_incumbent_and_its_score_is_the_paired_estimate(
    tmp_path: Path, weights: Path
) -> None:
    raced, full = evaluator(tmp_path, weights, "raced", 0.2), evaluator(tmp_path, weights, "full")
    evaluations, truth = raced.evaluate_many(CANDIDATES), full.evaluate_many(CANDIDATES)
    best: Evaluation | None = None
    incumbent: Evaluation | None = None
    for index, (evaluation, true) in enumerate(zip(evaluations, truth, strict=True)):
        if index % 4 == 0:
            incumbent = best
        if evaluation.stopped is None:
            assert evaluation == true
            best = true if best is None or true.reward > best.reward else best
            continue
        assert incumbent is not None and evaluation.reward < incumbent.reward
        assert 0 < evaluation.stopped < IMAGES and evaluation.stopped % 5 == 0
        assert evaluation.terms["interval_margin"] == true.terms["interval_margin"], "that one is never cut short"
        rows = [full.record.get(full.key, bits) for bits in (evaluation.bitwidths, incumbent.bitwidths)]
        assert rows[0] is not None and rows[1] is not None
        seen = raced.scorer.order(evaluation.bitwidths)[: evaluation.stopped]
        own, other = (smoothed_values(row.counts["votes"], raced.recipe.evaluate.smoothed, 0.25)[seen]
                      for row in rows if row is not None)  # fmt: skip
        estimate = incumbent.terms["smoothed_radius"] + (own - other).mean()
        assert evaluation.terms["smoothed_radius"] == pytest.approx(estimate)
    assert max(evaluations, key=lambda e: e.reward).reward == max(truth, key=lambda e: e.reward).reward


def test_what_another_search_left_in_the_record_changes_no_answer(tmp_path: Path, weights: Path) -> None:
    """Full evaluations, or longer partial ones, are used as far as the race would have gone; nothing is computed."""
    expected = evaluator(tmp_path, weights, "alone", 0.2).evaluate_many(CANDIDATES)
    full = evaluator(tmp_path, weights, "shared")
    full.evaluate_many(CANDIDATES)
    second = evaluator(tmp_path, weights, "shared", 0.2)
    assert second.evaluate_many(CANDIDATES) == expected and second.computed == 0
    again = evaluator(tmp_path, weights, "alone", 0.2)
    assert again.evaluate_many(CANDIDATES) == expected and again.computed == 0


def test_a_partial_evaluation_goes_on_where_it_stopped(tmp_path: Path, weights: Path) -> None:
    scorer = open_scorer(make_recipe(tmp_path, 0.3), weights)
    best = scorer.compute(BitWidths.uniform(NAMES, 8, 8))
    worst = BitWidths.uniform(NAMES, 2, 2)
    terms = {"smoothed_radius": 0.2, "interval_margin": 0.0}
    partial_entry = scorer.compute(worst, Rival(tuple(best.counts["votes"]), terms, RULES))
    votes = partial_entry.counts["votes"]
    assert len(votes) < IMAGES
    full = scorer.compute(worst)
    assert votes == [full.counts["votes"][position] for position in scorer.order(worst)][: len(votes)]
    # A lie in what is known shows that it is not computed again.
    marked = partial_entry.counts | {"votes": [-1, *votes[1:]]}
    resumed = scorer.compute(worst, known=type(full)(full.program_hash, marked, 5.0))
    assert resumed.counts["votes"].index(-1) == scorer.order(worst)[0]
    resumed.counts["votes"][scorer.order(worst)[0]] = votes[0]
    assert resumed.counts == full.counts and resumed.seconds > 5.0


def test_the_interval_term_moves_the_goal_of_the_race(tmp_path: Path, weights: Path) -> None:
    """A candidate that is ahead there by 0.1 · 0.2 may lose 0.02 / 1 of the smoothing term."""
    scorer = open_scorer(make_recipe(tmp_path, 0.3), weights)
    counts = scorer.compute(CANDIDATES[0]).counts
    own = sum(counts["margins"]["1"]) / 10 / 1000
    rival = Rival((4,) * IMAGES, {"smoothed_radius": 0.1, "interval_margin": own - 0.1}, RULES)
    race = scorer.race(rival, counts)
    assert isinstance(race, Race) and race.goal == pytest.approx(-0.02)
    assert race.high == pytest.approx(smoothed_values([8], scorer.recipe.evaluate.smoothed, 0.25)[0])


def test_two_searches_at_once_compute_nothing_twice(tmp_path: Path, weights: Path) -> None:
    """Each with its own workers, on one record: together they compute every candidate and the reference once."""
    from tests.search.record_conformance import in_processes

    folder = tmp_path / "record"
    folder.mkdir()
    in_processes(_search, str(folder), (str(weights),) * 2, (0, 1))
    computed = [int(path.read_text()) for path in sorted(folder.glob("computed-*"))]
    assert sum(computed) == len(CANDIDATES) + 1, computed
    alone = evaluator(tmp_path, weights, "alone").evaluate_many(CANDIDATES)
    rewards = [path.read_text() for path in sorted(folder.glob("rewards-*"))]
    assert rewards == [repr([evaluation.reward for evaluation in alone])] * 2


def _search(folder: str, barrier: Any, weights: str, number: int) -> None:
    torch.set_num_threads(1)
    recipe = make_recipe(Path(folder))
    scorer = open_scorer(recipe, Path(weights))
    barrier.wait()
    one = ProgramEvaluator(scorer, Record(f"sqlite:///{folder}/record.sqlite"))
    found = [evaluation for bits in CANDIDATES for evaluation in one.evaluate_many([bits])]
    (Path(folder) / f"computed-{number}").write_text(str(one.computed))
    (Path(folder) / f"rewards-{number}").write_text(repr([evaluation.reward for evaluation in found]))


def test_a_worker_that_sees_other_data_is_refused(
    tmp_path: Path, weights: Path, executors: dict[str, Executor]
) -> None:
    # Settings of its own, so that the workers have not opened it before.
    recipe = make_recipe(tmp_path, smoothed={"images": IMAGES, "samples": 3})
    other = partial(open_scorer, recipe, weights, 700)
    one = ProgramEvaluator(
        open_scorer(recipe, weights), Record(f"sqlite:///{tmp_path}/r.sqlite"), executor=executors["2"], reopen=other
    )
    with pytest.raises(ArqError, match=r"A worker sees other data or settings.*same run folder"):
        one.evaluate_many(CANDIDATES[:2])
    assert one.record.count(one.key) == 1, "the reference"


def test_a_race_needs_the_smoothing_term() -> None:
    wrong = {"smoothed": {"weight": 0}, "interval": {"weight": 1}, "early_stop": {"delta": 0.05}}
    with pytest.raises(ArqError, match=r"early_stop needs the smoothing term.*early_stop\.delta=0"):
        parse_recipe({"evaluate": wrong})


def test_progress_counts_the_candidates_of_a_generation(
    tmp_path: Path, weights: Path, executors: dict[str, Executor]
) -> None:
    updates: list[tuple[str, int, int, str]] = []
    one = evaluator(tmp_path, weights, "p", executor=executors["2"], on_progress=lambda *update: updates.append(update))
    one.evaluate_many(CANDIDATES[:3])
    assert [update[1:3] for update in updates] == [(1, 3), (2, 3), (3, 3)]
