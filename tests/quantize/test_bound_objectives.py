"""The interval part of the loss, small boxes, the initialisation and the monitor."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arqsearch import models
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.initialization import initialize_for_intervals
from arqsearch.quantize.intervals import BoundedPass, bounded_forward, interval_margins
from arqsearch.quantize.monitor import BoundsMonitor
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.quantize.objectives import bound_loss, objective_loss
from arqsearch.quantize.small_boxes import attack, small_boxes
from arqsearch.quantize.training import augment, train
from arqsearch.recipe import Monitor, Objective, Train
from arqsearch.search.weights import state_hash
from tests.quantize.nets import NETS, Plain, Residual, build

GENERATOR = np.random.default_rng(0)
LABELS = np.arange(96, dtype=np.int64) % 5
#: Brighter classes: something to learn.
IMAGES = (GENERATOR.integers(0, 56, (96, 8, 8, 2)) + 50 * LABELS[:, None, None, None]).astype(np.uint8)


def network(kind: type[torch.nn.Module] = Plain) -> QuantizedNet:
    net = QuantizedNet(build(kind), (2, 8, 8), (0.5, 0.5), (0.25, 0.25), QuantizeSettings(input_mode="clip"))
    net.calibrate([pixels()])
    return net


def pixels() -> Tensor:
    return torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float()


def objective(**options: object) -> Objective:
    return Objective.model_validate({"smoothing": "none", "interval": 0.4, "epsilon": 3.0, "ramp": 0.5, **options})


# ---- losses ----------------------------------------------------------------------------------


def test_bound_losses_are_what_they_say() -> None:
    margins = torch.tensor([[0.0, 0.5, -1.0], [0.1, 0.0, 0.3]])
    labels, other = torch.tensor([0, 1]), torch.tensor(2.0)
    bounds = BoundedPass(None, margins, [torch.tensor(3.0), torch.tensor(4.0)])
    short = [(0.0) + (0.2 + 1.0), (0.2 - 0.1) + 0.0]
    hinge = bound_loss(bounds, labels, objective(bound_loss="hinge", width=0.01), 0.5, other)
    assert float(hinge) == pytest.approx(2.0 + 0.5 * 0.4 * np.mean(short) / 10 + 0.5 * 0.01 * 7.0)
    worst = np.mean([np.log(1 + np.exp(-0.5) + np.exp(1.0)), np.log(1 + np.exp(-0.1) + np.exp(-0.3))])
    crossed = bound_loss(bounds, labels, objective(), 1.0, other)
    assert float(crossed) == pytest.approx(0.6 * 2.0 + 0.4 * worst, rel=1e-6)


@pytest.mark.parametrize("kind", ["cross-entropy", "hinge"])
def test_the_schedule_warms_up_ramps_and_holds(kind: str) -> None:
    net, x, labels = network().eval(), pixels(), torch.from_numpy(LABELS)
    settings = objective(warmup=0.2, bound_loss=kind, width=0.1)

    def loss(progress: float) -> float:
        with torch.no_grad():
            return float(objective_loss(net, x, labels, settings, 0.1, progress, torch.Generator()))

    def expected(ramp: float) -> float:
        with torch.no_grad():
            radius = 3.0 * ramp
            found = bounded_forward(net, (x - radius).clamp(0, 255), (x + radius).clamp(0, 255), labels, x)
            return float(bound_loss(found, labels, settings, ramp, F.cross_entropy(net(x), labels)))

    with torch.no_grad():
        clean = float(F.cross_entropy(net(x), labels))
    assert loss(0.0) == loss(0.2) == pytest.approx(clean)
    for progress, ramp in ((0.3, 0.2), (0.45, 0.5), (0.7, 1.0), (1.0, 1.0)):
        assert loss(progress) == pytest.approx(expected(ramp), rel=1e-5), progress
    assert loss(0.45) != pytest.approx(clean)


def test_it_joins_a_smoothing_objective() -> None:
    net, x, labels = network().eval(), pixels(), torch.from_numpy(LABELS)

    def loss(**options: object) -> float:
        settings = objective(ramp=0.01, smoothing="consistency", consistency=1.0, **options)
        with torch.no_grad():
            return float(objective_loss(net, x, labels, settings, 0.1, 1.0, torch.Generator().manual_seed(3)))

    with torch.no_grad():
        margins = interval_margins(net, (x - 3).clamp(0, 255), (x + 3).clamp(0, 255), labels)
        worst = float(F.cross_entropy(-margins, labels))
    assert loss() == pytest.approx(0.6 * loss(interval=0.0) + 0.4 * worst, rel=1e-5)


@pytest.mark.parametrize("settings", [objective(ramp=0.1), objective(ramp=0.1, bound_loss="hinge", interval=1.0)])
@pytest.mark.parametrize(("kind", "quantized", "lr", "gain"), [(Residual, False, 0.01, 0.5), (Plain, True, 0.03, 0.9)])
def test_training_with_bounds_proves_more(
    settings: Objective, kind: type[torch.nn.Module], quantized: bool, lr: float, gain: float
) -> None:
    """The same steps with and without the interval part, measured by the worst-case loss at ε = 8."""

    def worst(chosen: Objective) -> float:
        net = network(kind)
        net.quantized = quantized
        recipe = Train(epochs=20, batch_size=32, lr=lr, optimizer="adamw", objective=chosen)  # type: ignore[call-arg]
        train(net, IMAGES, LABELS, recipe, 0.1)
        x, labels = pixels(), torch.from_numpy(LABELS)
        with torch.no_grad():
            margins = interval_margins(net, (x - 8).clamp(0, 255), (x + 8).clamp(0, 255), labels)
        return float(F.cross_entropy(-margins, labels))

    wide = settings.model_copy(update={"epsilon": 8.0})
    assert worst(wide) < gain * worst(settings.model_copy(update={"interval": 0.0}))


# ---- small boxes -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETS)
def test_small_boxes_stay_inside_and_keep_their_radius(kind: type[torch.nn.Module]) -> None:
    net, x, labels = network(kind).train(), pixels(), torch.from_numpy(LABELS)
    before = state_hash(net.state_dict())
    low, high = (x - 5).clamp(0, 255), (x + 5).clamp(0, 255)
    inner_low, inner_high = small_boxes(net, low, high, labels, 1.5, 4, torch.Generator().manual_seed(0))
    assert (inner_low >= low).all() and (inner_high <= high).all() and (inner_high >= inner_low).all()
    inside = (low > 0) & (high < 255)
    torch.testing.assert_close((inner_high - inner_low)[inside], torch.full_like(x, 3.0)[inside])
    assert net.training and state_hash(net.state_dict()) == before  # the attack leaves batch norm alone
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_attack_raises_the_loss_of_a_quantized_network() -> None:
    net, x, labels = network().eval(), pixels(), torch.from_numpy(LABELS)
    low, high = (x - 6).clamp(0, 255), (x + 6).clamp(0, 255)
    points = attack(net, low, high, labels, 8, torch.Generator().manual_seed(0))
    assert ((points >= low) & (points <= high)).all()
    with torch.no_grad():
        random = low + (high - low) * torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
        attacked, clean, noisy = (float(F.cross_entropy(net(p.round()), labels)) for p in (points, x, random))
    assert attacked > clean + 3 * abs(noisy - clean) + 0.01


def test_a_small_box_is_easier_than_the_whole_ball() -> None:
    net, x, labels = network().eval(), pixels(), torch.from_numpy(LABELS)
    losses = []
    for share in (1.0, 0.3):
        settings = objective(ramp=0.01, interval=1.0, small_box=share, epsilon=8.0)
        found = objective_loss(net, x, labels, settings, 0.1, 1.0, torch.Generator().manual_seed(0))
        losses.append(found.item())
    assert losses[1] < losses[0]


# ---- initialisation --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn_medium", "cnn_qaibp"])
def test_interval_widths_neither_explode_nor_vanish(name: str) -> None:
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 1, 28, 28))).float()
    growth = {}
    for kind in ("default", "ibp"):
        torch.manual_seed(0)
        model = models.build(name, 10, in_channels=1, image_size=28, batch_norm=False)
        net = QuantizedNet(model, (1, 28, 28), (0.5,), (0.25,), QuantizeSettings(input_mode="clip"))
        net.quantized = False
        if kind == "ibp":
            initialize_for_intervals(net, 0)
        with torch.no_grad():
            widths = bounded_forward(net, x - 4, x + 4, torch.zeros(8, dtype=torch.int64)).widths
        growth[kind] = float((widths[-1] / widths[0]) ** (1 / (len(widths) - 1)))
    assert 0.6 < growth["ibp"] < 1.6
    assert growth["default"] > 5


def test_a_deep_residual_network_starts_as_its_shortcuts() -> None:
    """ResNet-20 with live batch norm: bounds of usual weights reach 1e15 times the widths of the first layer."""
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16))).float()
    growth = {}
    for kind in ("default", "ibp"):
        torch.manual_seed(0)
        net = QuantizedNet(models.build("resnet20", 10), (3, 16, 16), (0.5,) * 3, (0.25,) * 3, QuantizeSettings())
        net.quantized = False
        if kind == "ibp":
            initialize_for_intervals(net, 0)
        with torch.no_grad():
            widths = bounded_forward(net.train(), x - 1, x + 1, torch.zeros(4, dtype=torch.int64), x).widths
        growth[kind] = float(widths[-1] / widths[0])
    assert growth["ibp"] < 1e5 < 1e12 < growth["default"]


def test_initialisation_is_a_function_of_the_seed_and_resets_batch_norm() -> None:
    hashes = []
    for seed in (1, 1, 2):
        net = network(Residual)
        initialize_for_intervals(net, seed)
        hashes.append(state_hash(net.state_dict()))
        norm = net.layer("stem").batch_norm
        assert isinstance(norm, torch.nn.BatchNorm2d) and norm.running_var is not None
        assert (norm.weight == 1).all() and (norm.running_var == 1).all() and (norm.bias == 0).all()
    assert hashes[0] == hashes[1] != hashes[2]


# ---- monitor ---------------------------------------------------------------------------------

MONITORED = Train.model_validate(
    {
        "epochs": 3, "batch_size": 16, "lr": 0.02, "objective": objective().model_dump(),
        "monitor": {"every": 0.5, "images": 90, "epsilons": [1, 4]},
    }
)  # fmt: skip


def run_monitored(folder: Path, settings: Train = MONITORED) -> str:
    """Train to the end, from the folder's checkpoint if there is one; the hash of the weights."""
    net = network()
    monitor = BoundsMonitor(settings.monitor, IMAGES, LABELS, folder / "bounds.csv") if settings.monitor.every else None
    train(net, IMAGES, LABELS, settings, 0.1, checkpoint=folder / "checkpoint", monitor=monitor)
    return state_hash(net.state_dict())


def test_a_killed_training_continues_its_table_and_ends_at_the_same_weights(tmp_path: Path) -> None:
    """`kill -9` at step 10, behind the row of step 9; an earlier checkpoint has it written again."""
    script = str(Path(__file__).parent / "train_killed.py")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = run_monitored(whole)
    done = subprocess.run([sys.executable, script, str(killed)], env=environment, timeout=240)
    assert done.returncode == -signal.SIGKILL
    assert len((killed / "bounds.csv").read_text().splitlines()) == 1 + 3
    (killed / "early").replace(killed / "checkpoint")
    assert run_monitored(killed) == expected
    table = (whole / "bounds.csv").read_text()
    assert (killed / "bounds.csv").read_text() == table
    assert [int(row["step"]) for row in csv.DictReader(table.splitlines())] == [3, 6, 9, 12, 15, 18]
    assert run_monitored(tmp_path / "unwatched", MONITORED.model_copy(update={"monitor": Monitor()})) == expected


def test_estimates_are_counted_right(tmp_path: Path) -> None:
    net = network()
    wide = BitWidths.uniform(net.bitwidths.names, 8, 8)
    net.set_bitwidths(BitWidths.uniform(net.bitwidths.names, 2, 2))
    monitor = BoundsMonitor(MONITORED.monitor, IMAGES, LABELS, tmp_path / "x.csv", wide)
    shares = monitor.estimate(net)
    assert net.bitwidths == BitWidths.uniform(net.bitwidths.names, 2, 2)
    net.set_bitwidths(wide)
    net.eval()
    x, labels = pixels()[:90], torch.from_numpy(LABELS[:90])
    with torch.no_grad():
        assert shares[0] == pytest.approx(float((net(x).argmax(1) == labels).float().mean()))
        for share, epsilon in zip(shares[1:], (1, 4), strict=True):
            margins = interval_margins(net, (x - epsilon).clamp(0, 255), (x + epsilon).clamp(0, 255), labels)
            proven = [all(m > 0 for j, m in enumerate(row) if j != y) for row, y in zip(margins, labels, strict=True)]
            assert share == pytest.approx(np.mean(proven))


def test_augmentation_modes() -> None:
    x = torch.arange(2 * 1 * 8 * 8).reshape(2, 1, 8, 8).float()
    flipped = augment(torch.cat([x] * 20), "flip", torch.Generator().manual_seed(0))
    kinds = {bool(torch.equal(a, x[i % 2].flip(2))) for i, a in enumerate(flipped)}
    assert kinds == {True, False}
    assert all(torch.equal(a, x[i % 2]) or torch.equal(a, x[i % 2].flip(2)) for i, a in enumerate(flipped))
    shifted = augment(torch.ones(64, 1, 32, 32), "crop", torch.Generator().manual_seed(0), shift=2)
    assert 28 * 28 <= shifted.sum((1, 2, 3)).min() <= 31 * 31
