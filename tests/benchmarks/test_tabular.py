"""The tabular benchmark: the committed table, its evaluator, its tasks, and the tree that built it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arqsearch.benchmarks.tabular import TASKS, Table, TabularEvaluator, task
from arqsearch.benchmarks.tabular.table import DIGITS5, RADIUS_UNIT, Facts, shared_table
from arqsearch.benchmarks.tabular.tree import Inputs, PrefixTree
from arqsearch.certify.linf.boxes import IntervalBounds, box
from arqsearch.errors import ArqError
from arqsearch.integer.lowering import lower
from arqsearch.policies import create
from arqsearch.quantize.bitwidths import BitWidths, LayerBits
from arqsearch.quantize.cost import Budget, LayerInfo, total_cost
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings

NOISE = 40


@pytest.fixture(scope="module")
def table() -> Table:
    return shared_table()


def small_facts(limit: int) -> Facts:
    layers = (LayerInfo("one", "linear", 4, 3), LayerInfo("two", "linear", 3, 2))
    return Facts(layers, (2, 3, 8), limit, (4, 8), 0.25, 8, 10, (5000, 3, 7), ("made up",), "w", "s", 1, 0.0)


def small_table(limit: int = 500) -> Table:
    facts = small_facts(limit)
    layers = facts.layers
    pairs = [LayerBits(w, a) for w in facts.choices for a in facts.choices]
    every = [
        BitWidths.from_mapping([("one", first), ("two", second)]) for first in pairs for second in pairs
    ]  # fmt: skip
    inside = sum(total_cost("bops", layers, bits) <= limit for bits in every)
    generator = np.random.default_rng(0)
    radius = generator.integers(0, 6000, inside).astype(np.uint16)
    return Table(facts, radius, generator.integers(0, 11, (inside, 2)).astype(np.uint16))


def test_the_committed_table_is_small_and_complete(table: Table) -> None:
    assert DIGITS5.stat().st_size < 1_000_000
    assert 10_000 < len(table) < 1_000_000
    facts = table.facts
    assert table.robust.max() <= facts.images
    assert (table.robust[:, -1] <= table.robust[:, 0]).all()  # A larger box is never proved more often.
    generator = random.Random(0)
    for _ in range(50):
        number = int(table.numbers[generator.randrange(len(table))])
        bits = table.bitwidths(number)
        assert table.number(bits) == number
        assert total_cost("bops", facts.layers, bits) <= facts.bops_limit


def test_both_terms_vary(table: Table) -> None:
    for name, values in table.terms().items():
        assert len(np.unique(values)) > 30, name


def test_numbers_are_those_of_exhaustive_enumeration() -> None:
    made = small_table()
    layers, choices = made.facts.layers, made.facts.choices
    pairs = [LayerBits(w, a) for w in choices for a in choices]
    position = 0
    for first in pairs:
        for second in pairs:
            bits = BitWidths.from_mapping([("one", first), ("two", second)])
            if total_cost("bops", layers, bits) > made.facts.bops_limit:
                continue
            assert made.bitwidths(int(made.numbers[position])) == bits
            position += 1
    assert position == len(made) == len(made.numbers)


def test_rewards_and_the_optimum_against_a_loop() -> None:
    made = small_table()
    evaluator = TabularEvaluator(made, {"smoothed_radius": 1.0, "interval_accuracy": 0.5})
    budget = Budget((("bops", 400), ("weight_bytes", 60)))
    best = None
    for position in range(len(made)):
        bits = made.bitwidths(int(made.numbers[position]))
        found = evaluator.evaluate(bits)
        radius, proved = made.radius[position] * RADIUS_UNIT, made.robust[position, 1] / 10
        assert found.terms == {"smoothed_radius": pytest.approx(radius), "interval_accuracy": pytest.approx(proved)}
        assert found.reward == pytest.approx(radius - 0.05 + 0.5 * (proved - 0.7))
        if budget.met(evaluator.layers, bits) and (best is None or found.reward > best.reward):
            best = found
    assert best is not None
    assert evaluator.optimum(budget) == best


def test_what_the_table_does_not_hold_is_refused() -> None:
    made = small_table()
    evaluator = TabularEvaluator(made)
    with pytest.raises(ArqError, match="exceed the 500 bit operations"):
        evaluator.evaluate(BitWidths.uniform(["one", "two"], 8, 8))
    with pytest.raises(ArqError, match="knows"):
        evaluator.evaluate(BitWidths.uniform(["one", "two"], 4, 2))
    with pytest.raises(ArqError, match="layers one, two"):
        evaluator.evaluate(BitWidths.uniform(["one", "three"], 2, 2))
    with pytest.raises(ArqError, match="up to bops = 500"):
        evaluator.optimum(Budget((("bops", 501),)))
    with pytest.raises(ArqError, match="no term 'speed'"):
        TabularEvaluator(made, {"speed": 1.0})
    with pytest.raises(ArqError, match="Did you mean"):
        task("bops-0.9-booth")


def test_a_table_survives_its_file_and_damage_is_noticed(tmp_path: Path) -> None:
    made = small_table()
    made.save(tmp_path / "t.npz")
    again = Table.load(tmp_path / "t.npz")
    assert again.facts == made.facts
    assert np.array_equal(again.radius, made.radius) and np.array_equal(again.robust, made.robust)
    with pytest.raises(ArqError, match="damaged"):
        Table(replace(made.facts, bops_limit=499), made.radius[:-1], made.robust[:-1])
    with pytest.raises(ArqError, match="No table at"):
        Table.load(tmp_path / "absent.npz")
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(ArqError, match="no table of this version"):
        Table.load(tmp_path / "bad.npz")


@pytest.mark.parametrize("known", TASKS, ids=lambda known: known.name)
def test_tasks_have_room_to_search(known: object) -> None:
    problem = task(known.name).problem()  # type: ignore[attr-defined]
    within = known.evaluator.within(known.budget)  # type: ignore[attr-defined]
    assert len(within) > 2_000
    assert problem.feasibility().searched == problem.evaluator.layers
    best = known.evaluator.optimum(known.budget)  # type: ignore[attr-defined]
    assert known.score(best.reward) == pytest.approx(1.0)  # type: ignore[attr-defined]
    assert best.reward == known.evaluator.rewards[within].max()  # type: ignore[attr-defined]
    assert known.budget.met(problem.evaluator.layers, best.bitwidths)  # type: ignore[attr-defined]


def test_a_policy_never_beats_the_optimum_and_random_rarely_meets_it() -> None:
    known = task("bops-0.7-both")
    scores = [known.score(create("random").search(known.problem(), 30, seed).best.reward) for seed in range(8)]
    assert max(scores) <= 1.0 and min(scores) < 0.999


# ---- the tree -------------------------------------------------------------------------------


def chain(seed: int, input_mode: str) -> tuple[QuantizedNet, Inputs]:
    """An untrained network of four layers on made-up images, and everything it is scored on."""
    import torch

    from arqsearch import models

    torch.manual_seed(seed)
    options = {"batch_norm": False, "convs": [[3, 3, 2], [4, 3, 1]], "dense": [6]}
    model = models.build("cnn_small", 5, in_channels=2, image_size=6, **options)
    settings = QuantizeSettings(input_mode=input_mode)  # type: ignore[arg-type]
    net = QuantizedNet(model, (2, 6, 6), (0.4, 0.5), (0.2, 0.3), settings)
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (9, 6, 6, 2)).astype(np.uint8)
    labels = generator.integers(0, 5, 9).astype(np.int64)
    noisy = images[:, None].astype(np.int16) + generator.integers(-NOISE, NOISE + 1, (9, 7, 6, 6, 2))
    net.calibrate([torch.from_numpy(noisy[:, 0].astype(np.float32)).permute(0, 3, 1, 2)])
    net.quantized = True
    corners = [box(images, epsilon) for epsilon in (1, 6)]
    boxes = [lo for lo, _ in corners] + [hi for _, hi in corners]
    flat = noisy.reshape(-1, 6, 6, 2).astype(np.int16)
    return net.eval(), Inputs(flat, np.concatenate(boxes).astype(np.int16), labels, 7, 2)


@pytest.mark.parametrize("input_mode", ["clip", "wide"])
def test_the_tree_counts_what_single_programs_count(input_mode: str) -> None:
    """Every assignment of a subtree against programs that are lowered and run one at a time."""
    net, inputs = chain(3, input_mode)
    choices = (2, 3, 8)
    tree = PrefixTree(net, choices, inputs, NOISE)
    seen = 0
    for first in (LayerBits(2, 8), LayerBits(8, 2)):
        allowed = {(3, 3), (8, 2), (2, 8)}
        wanted = lambda prefix, allowed=allowed: all(tuple(bits) in allowed for bits in prefix[1:])  # noqa: E731
        for bits, counts in tree.walk(wanted, [first]):
            net.set_bitwidths(BitWidths.from_mapping(list(zip(tree.names, bits, strict=True))))
            program = lower(net, noise_limit=NOISE)
            logits = program.run(inputs.noisy).numpy().reshape(9, 7, -1)
            hits = logits.argmax(-1) == inputs.labels[:, None]  # numpy's argmax is the first maximum
            assert np.array_equal(counts.votes, hits.sum(1))
            bounds, half = IntervalBounds(program), len(inputs.boxes) // 2
            for which in range(2):
                lo = inputs.boxes[which * 9 : which * 9 + 9]
                hi = inputs.boxes[half + which * 9 : half + which * 9 + 9]
                margins = bounds.margins(lo, hi, inputs.labels).numpy()
                needed = np.arange(margins.shape[1])[None] < inputs.labels[:, None]
                proved = ((margins >= needed) | (np.arange(margins.shape[1])[None] == inputs.labels[:, None])).all(1)
                assert counts.robust[which] == proved.sum()
            seen += 1
    assert seen == 2 * 27


def test_ties_go_to_the_first_class() -> None:
    """With all weights zero every logit is equal: class 0 wins, and proves itself; class 1 never does."""
    import torch

    net, inputs = chain(4, "clip")
    with torch.no_grad():
        last = list(net.source.parameters())[-2:]
        for parameter in last:
            parameter.zero_()
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
    tree = PrefixTree(net, (2, 8), replace(inputs, labels=labels), NOISE)
    ((_, counts),) = tree.walk(lambda prefix: True, [LayerBits(2, 2)] * 4)
    assert counts.votes.tolist() == [7, 0, 0] * 3
    assert counts.robust.tolist() == [3, 3]


def test_networks_that_are_no_chain_are_refused() -> None:
    import torch

    from arqsearch import models

    torch.manual_seed(0)
    net = QuantizedNet(models.build("resnet20", 10), (3, 32, 32), (0.5,) * 3, (0.2,) * 3, QuantizeSettings())
    net.calibrate([torch.rand(2, 3, 32, 32) * 255])
    net.quantized = True
    _, inputs = chain(5, "wide")
    with pytest.raises(ArqError, match="plain chain"):
        PrefixTree(net.eval(), (2, 8), inputs, NOISE)
