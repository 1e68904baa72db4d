"""Training: resumes to the same weights, keeps steps positive, and the losses are what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.quantize.objectives import consistency_loss, integer_noise
from arqsearch.quantize.quantizers import LogAdam
from arqsearch.quantize.training import augment, schedule, train
from arqsearch.recipe import Objective, Train
from arqsearch.search.weights import state_hash
from tests.quantize.nets import Plain, build

GENERATOR = np.random.default_rng(0)
LABELS = np.arange(96, dtype=np.int64) % 5
#: Brighter classes: something to learn.
IMAGES = (GENERATOR.integers(0, 56, (96, 8, 8, 2)) + 50 * LABELS[:, None, None, None]).astype(np.uint8)
JOINT = Objective(smoothing="consistency", consistency=1.0, interval=0.3, epsilon=2.0)  # type: ignore[call-arg]
SETTINGS = Train(epochs=2, batch_size=16, lr=0.02, objective=JOINT)  # type: ignore[call-arg]


def network() -> QuantizedNet:
    net = QuantizedNet(build(Plain), (2, 8, 8), (0.5, 0.5), (0.25, 0.25), QuantizeSettings())
    net.calibrate([torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float()])
    return net


def choose(step: int, generator: np.random.Generator) -> list[BitWidths]:
    bits = [(int(w), int(a)) for w, a in generator.integers(2, 9, (3, 2))]
    return [BitWidths.from_mapping(zip(network().bitwidths.names, bits, strict=True))]


class _Killed(Exception):
    pass


@pytest.mark.parametrize("quantized", [False, True])
def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path, quantized: bool) -> None:
    def run(net: QuantizedNet, stop: int | None, checkpoint: Path | None) -> str:
        net.quantized = quantized

        def on_step(done: int, total: int, loss: float) -> None:
            if done == stop:
                raise _Killed

        train(
            net, IMAGES, LABELS, SETTINGS, 0.1, seed=3, choose=choose if quantized else None, checkpoint=checkpoint,
            checkpoint_seconds=0.0, on_step=on_step,
        )  # fmt: skip
        return state_hash(net.state_dict())

    whole = run(network(), None, None)
    with pytest.raises(_Killed):
        run(network(), 7, tmp_path / "checkpoint")
    assert run(network(), None, tmp_path / "checkpoint") == whole


def test_a_checkpoint_of_another_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    net = network()
    train(net, IMAGES, LABELS, SETTINGS, 0.1, checkpoint=path, checkpoint_seconds=0.0)
    with pytest.raises(ArqError, match="delete it"):
        train(net, IMAGES, LABELS, SETTINGS.model_copy(update={"epochs": 3.0}), 0.1, checkpoint=path)


def test_training_lowers_the_loss() -> None:
    net = network()
    pixels, labels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float(), torch.from_numpy(LABELS)
    settings = SETTINGS.model_copy(update={"epochs": 12.0, "lr": 0.1, "objective": Objective(smoothing="none")})

    def loss() -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(net.eval()(pixels), labels))

    before = loss()
    train(net, IMAGES, LABELS, settings, 0.1)
    assert loss() < 0.7 * before


def test_steps_stay_positive_under_huge_gradients() -> None:
    step = torch.nn.Parameter(torch.tensor([1e-6, 1.0, 100.0]))
    optimizer = LogAdam([step], lr=0.1)
    for _ in range(50):
        step.grad = torch.tensor([1e6, 1e6, -1e6])
        optimizer.step()
    assert (step > 0).all()
    assert step[0] < 1e-7 and step[1] < 0.1 and step[2] > 1000


def test_consistency_loss_is_cross_entropy_for_equal_copies() -> None:
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    loss = consistency_loss([logits, logits], labels, weight=10.0, entropy=0.0)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
    other = consistency_loss([logits, logits.flip(1)], labels, weight=10.0, entropy=0.0)
    assert other > loss


def test_training_noise_is_integer_with_the_stated_spread() -> None:
    noise = integer_noise((100_000,), 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(noise, noise.round())
    assert noise.std() == pytest.approx(63.75, rel=0.01)


def test_schedule_and_augmentation() -> None:
    assert schedule(0.03) == pytest.approx(1.0) and schedule(1.0) == pytest.approx(0.0)
    pixels = torch.arange(2 * 1 * 8 * 8).reshape(2, 1, 8, 8).float()
    shifted = augment(pixels, "crop-flip", torch.Generator().manual_seed(0))
    assert shifted.shape == pixels.shape
    assert set(shifted.flatten().tolist()) <= set(pixels.flatten().tolist())
    assert torch.equal(augment(pixels, "none", torch.Generator()), pixels)
