"""The evaluator: votes by an independent loop, nothing computed twice, and no memory of what came before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arqsearch import models
from arqsearch.certify.noise import SEARCH, NoiseTable, noise
from arqsearch.data import load
from arqsearch.envs.evaluator import Evaluator
from arqsearch.integer.lowering import lower
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.quantize.training import to_pixels, train
from arqsearch.recipe import Recipe, Train
from arqsearch.search.evaluator import ProgramEvaluator
from arqsearch.search.record import Record
from arqsearch.search.scorer import Scorer, count_votes
from tests.integer.interpreter import interpret
from tests.search.tiny import tiny_recipe

DATA = load("digits", "train")
TRAIN, HOLDOUT = DATA.subset(slice(0, 256)), DATA.subset(slice(300, 340))
A = BitWidths.from_mapping({"conv1": (8, 8), "conv2": (3, 4), "fc1": (8, 8)})
B = BitWidths.from_mapping({"conv1": (4, 4), "conv2": (2, 2), "fc1": (4, 6)})
SHORT = {"epochs": 0.5, "batch_size": 64, "lr": 0.02, "objective": {"smoothing": "gaussian"}}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A digits network, trained for a moment so that votes are neither none nor all."""
    net = network()
    net.quantized = False
    train(net, TRAIN.images, TRAIN.labels, Train.model_validate({**SHORT, "epochs": 12}), 0.25)
    net.calibrate([to_pixels(TRAIN.images[:128])])
    return {name: value.clone() for name, value in net.state_dict().items()}


def network(state: dict[str, torch.Tensor] | None = None) -> QuantizedNet:
    torch.manual_seed(0)
    model = models.build("cnn_tiny", 10, in_channels=1, image_size=8)
    net = QuantizedNet(model, (1, 8, 8), (0.5,), (0.25,), QuantizeSettings())
    if state is not None:
        net.load_state_dict(state)
    return net.eval()


def recipe(folder: Path, **changes: Any) -> Recipe:
    """The tiny recipe with changes in its section `evaluate`."""
    smoothed = {"images": 20, "samples": 6}
    interval = {"weight": 0.5, "measure": "margin", "images": 10, "epsilons": [1, 3]}
    return tiny_recipe(folder, evaluate={"training": SHORT, "smoothed": smoothed, "interval": interval, **changes})


@pytest.fixture
def make(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Iterator[Any]:
    """Makes evaluators; those with the same `record` name share it."""

    def evaluator(record: str = "record", **changes: Any) -> ProgramEvaluator:
        scorer = Scorer(network(weights), HOLDOUT, recipe(tmp_path, **changes), TRAIN)
        return ProgramEvaluator(scorer, Record(f"sqlite:///{tmp_path / record}.sqlite"))

    yield evaluator


def test_votes_are_those_of_a_plain_loop_over_the_stated_noise(weights: dict[str, torch.Tensor]) -> None:
    """Image by image, sample by sample, with the interpreter for a few and the program for all."""
    table, net = NoiseTable.for_sigma(0.25), network(weights)
    net.set_bitwidths(A)
    program = lower(net, noise_limit=table.hi)
    part = HOLDOUT.subset(slice(0, 6))
    expected = []
    for image, label, identity in zip(part.images, part.labels, part.ids, strict=True):
        votes = 0
        for sample in range(5):
            drawn = noise(table, seed=9, stage=SEARCH, image_ids=[int(identity)], sample_start=sample, sample_count=1,
                          coordinates=64)  # fmt: skip
            noisy = image.astype(np.int16) + drawn.numpy().reshape(8, 8, 1)
            logits = program.run(noisy[None])[0].tolist()
            if identity < part.ids[2]:
                assert logits == interpret(program, noisy[None])[0]
            votes += logits.index(max(logits)) == label
        expected.append(votes)
    assert part.ids.tolist() == list(range(300, 306)), "noise belongs to the image, not to its place in a batch"
    for batch in (1, 7, 400):
        assert count_votes(program, part, table, 5, seed=9, batch=batch) == expected
    assert 0 < sum(expected) < 30


def test_a_second_evaluation_computes_nothing(make: Any) -> None:
    evaluator: ProgramEvaluator = make()
    assert evaluator.computed == 1, "the reference"
    first = evaluator.evaluate(A)
    assert evaluator.computed == 2
    assert evaluator.evaluate(A) == first
    assert evaluator.computed == 2 and evaluator.record.count(evaluator.key) == 2
    again: ProgramEvaluator = make()
    assert again.evaluate(A) == first
    assert again.computed == 0, "another evaluator on the same record finds the reference and the candidate"


def test_the_reward_is_relative_to_w8a8(make: Any) -> None:
    evaluator: ProgramEvaluator = make()
    protocol: Evaluator = evaluator
    names = [layer.name for layer in protocol.layers]
    assert names == ["conv1", "conv2", "fc1"]
    reference = evaluator.evaluate(BitWidths.uniform(names, 8, 8))
    assert reference.reward == 0.0 and reference.terms == evaluator.reference
    found = evaluator.evaluate(B)
    assert set(found.terms) == {"smoothed_radius", "interval_margin"}
    difference = {name: found.terms[name] - reference.terms[name] for name in found.terms}
    assert found.reward == pytest.approx(difference["smoothed_radius"] + 0.5 * difference["interval_margin"])
    assert found.reward != 0.0


@pytest.mark.parametrize("mode", ["shared", "finetune"])
def test_evaluations_do_not_depend_on_their_order(make: Any, mode: str) -> None:
    forth: ProgramEvaluator = make("forth", mode=mode)
    back: ProgramEvaluator = make("back", mode=mode)
    found = [forth.evaluate(A), forth.evaluate(B)]
    torch.manual_seed(99)
    assert [back.evaluate(B), back.evaluate(A)][::-1] == found
    for bits in (A, B):
        one, other = forth.record.get(forth.key, bits), back.record.get(back.key, bits)
        assert one is not None and other is not None
        assert one.program_hash == other.program_hash and one.counts == other.counts


def test_fine_tuning_is_part_of_the_evaluation(make: Any) -> None:
    shared: ProgramEvaluator = make("one", mode="shared")
    tuned: ProgramEvaluator = make("one", mode="finetune")
    assert shared.key.weights_hash == tuned.key.weights_hash and shared.key != tuned.key
    assert tuned.computed == 1, "the reference is fine-tuned like every candidate"
    shared.evaluate(A)
    tuned.evaluate(A)
    rows = [evaluator.record.get(evaluator.key, A) for evaluator in (shared, tuned)]
    assert rows[0] is not None and rows[1] is not None and rows[0].program_hash != rows[1].program_hash
    longer: ProgramEvaluator = make("one", mode="finetune", training={**SHORT, "epochs": 0.25})
    assert longer.key != tuned.key


def test_what_the_counts_depend_on_is_in_the_key(make: Any, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    base: ProgramEvaluator = make()
    smoothed, interval = (
        {"images": 20, "samples": 6},
        {"weight": 0.5, "measure": "margin", "images": 10, "epsilons": [1, 3]},
    )
    for changed in (
        {"smoothed": {**smoothed, "samples": 7}},
        {"smoothed": {**smoothed, "images": 19}},
        {"interval": {**interval, "epsilons": [1]}},
        {"interval": {**interval, "margin_clip": 1.0}},
    ):
        other: ProgramEvaluator = make(**changed)
        assert other.key.settings_hash != base.key.settings_hash and other.computed == 1, changed
    # Weights of the terms are applied after the record; so are the shared training's settings, seen in the weights.
    for same in (
        {"smoothed": {**smoothed, "weight": 3.0}},
        {"allow_constant_term": True},
        {"training": {**SHORT, "epochs": 3}},
    ):
        assert make(**same).key == base.key and make(**same).computed == 0, same
    settings = recipe(tmp_path)
    louder = settings.model_copy(update={"sigma": 0.5})
    other_images = HOLDOUT.subset(slice(1, 40))
    moved = {**weights, "layers.fc1.layer.bias": weights["layers.fc1.layer.bias"] + 1}
    keys = {
        base.key,
        Scorer(network(weights), HOLDOUT, louder).key,
        Scorer(network(weights), HOLDOUT, settings.model_copy(update={"seed": 1})).key,
        Scorer(network(weights), other_images, settings).key,
        Scorer(network(moved), HOLDOUT, settings).key,
    }
    assert len(keys) == 5
