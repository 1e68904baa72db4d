"""Training: resumes to the same weights, keeps steps positive, and the losses are what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.quantize.quantizers import LogAdam
from arqsearch.quantize.smoothing_losses import consistency_loss, integer_noise
from arqsearch.quantize.training import augment, schedule, train, training_device
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


def test_precision_and_device_are_checked() -> None:
    with pytest.raises(ArqError, match="float16 needs a GPU"):
        training_device(Train(precision="float16", device="cpu"))  # type: ignore[call-arg]
    if not torch.cuda.is_available():
        with pytest.raises(ArqError, match="no GPU"):
            training_device(Train(device="cuda"))  # type: ignore[call-arg]
    assert training_device(Train(device="cpu")).type == "cpu"  # type: ignore[call-arg]


def test_mixed_precision_trains_close_to_float32() -> None:
    results = []
    for precision in ("float32", "bfloat16"):
        net = network()
        net.quantized = False
        train(net, IMAGES, LABELS, SETTINGS.model_copy(update={"precision": precision, "epochs": 1.0}), 0.1)
        results.append(torch.cat([p.flatten() for p in net.parameters()]).detach())
    assert not torch.equal(*results)
    torch.testing.assert_close(results[0], results[1], rtol=0.0, atol=0.05)


@pytest.mark.parametrize("quantized", ["quantized", pytest.param("", marks=pytest.mark.slow)])
def test_two_processes_train_one_network(tmp_path: Path, quantized: str) -> None:
    """`torchrun` with gloo: both ranks end with the same weights, near those of one process; a kill resumes."""

    def launch(ranks: int, stop: int = 0) -> list[dict[str, torch.Tensor]]:
        port = str(20000 + os.getpid() % 20000 + ranks)
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
        script = [str(Path(__file__).parent / "train_ranks.py"), str(tmp_path / f"{ranks}"), str(stop), quantized]
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=240)
        assert (done.returncode == 0) == (stop == 0), done.stderr[-2000:]
        return [] if stop else [torch.load(tmp_path / f"{ranks}.rank{r}", weights_only=True) for r in range(ranks)]

    launch(2, stop=4)
    assert (tmp_path / "2.checkpoint").is_file()
    first, second = launch(2)
    (alone,) = launch(1)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if value.is_floating_point():
            torch.testing.assert_close(value, alone[name], rtol=0.05, atol=0.05)
