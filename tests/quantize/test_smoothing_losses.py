"""Losses for smoothed networks against their formulas written out, and the attack's two promises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor, nn

from arqsearch.errors import ArqError
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.quantize.objectives import COPIES, needs_teacher, objective_loss, smoothing_loss
from arqsearch.quantize.smoothing_losses import (
    distillation_loss,
    gaussian_loss,
    integer_noise,
    macer_loss,
    smoothed_attack,
    stability_loss,
)
from arqsearch.quantize.training import train
from arqsearch.recipe import Objective, Train
from tests.quantize.nets import Residual, build
from tests.quantize.test_training import IMAGES, LABELS


def objective(**values: Any) -> Objective:
    return Objective.model_validate(values)


def logits(seed: int, copies: int = 3) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 4, generator=generator) for _ in range(copies)], torch.tensor([0, 1, 2, 3, 1, 0])


def test_gaussian_is_the_mean_cross_entropy() -> None:
    copies, labels = logits(0)
    expected = np.mean([-F.log_softmax(z, 1)[i, y].item() for z in copies for i, y in enumerate(labels)])
    assert gaussian_loss(copies, labels).item() == pytest.approx(expected, rel=1e-5)


def test_stability_penalises_what_noise_changes() -> None:
    (clean, same, other), labels = logits(1)
    target = F.softmax(clean, 1).numpy()
    drift = -(target * F.log_softmax(other, 1).numpy()).sum(1).mean()
    expected = F.cross_entropy(clean, labels).item() + 2.0 * drift
    assert stability_loss(clean, [other], labels, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert stability_loss(clean, [clean], labels, 2.0) < stability_loss(clean, [same], labels, 2.0)


def test_macer_is_its_formula() -> None:
    copies, labels = logits(2)
    mean = np.mean([F.softmax(z, 1).numpy() for z in copies], axis=0)
    soft = np.mean([F.softmax(2.0 * z, 1).numpy() for z in copies], axis=0)
    hinges = []
    for row, label in zip(soft, labels.tolist(), strict=True):
        second, first = sorted(row)[-2:]
        radius = norm.ppf(first) - norm.ppf(second)
        hinges.append(max(0.0, 3.0 - radius) if row.argmax() == label else 0.0)
    expected = -np.log(mean[np.arange(6), labels]).mean() + 12.0 * 0.25 / 2 * np.mean(hinges)
    assert max(hinges) > 0
    assert macer_loss(copies, labels, 0.25, 12.0, 3.0, 2.0).item() == pytest.approx(expected, rel=1e-4)


def test_macer_stays_finite_for_certain_predictions() -> None:
    sure = [(50.0 * F.one_hot(torch.tensor([0, 1]), 3)).float().requires_grad_() for _ in range(2)]
    loss = macer_loss(sure, torch.tensor([0, 1]), 0.5, 12.0, 8.0, 16.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert math.isfinite(loss.item()) and all(torch.isfinite(z.grad).all() for z in sure if z.grad is not None)


def test_distillation_is_the_squared_distance_of_softmaxes() -> None:
    (a, b, c), _ = logits(3)
    expected = ((F.softmax(a, 1) - F.softmax(b, 1)) ** 2).sum(1).mean()
    assert distillation_loss([a], [b]).item() == pytest.approx(expected.item(), rel=1e-6)
    assert distillation_loss([a, c], [a, c]).item() == 0.0


def network() -> QuantizedNet:
    net = QuantizedNet(build(Residual), (2, 8, 8), (0.5, 0.5), (0.25, 0.25), QuantizeSettings())
    net.calibrate([torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float()])
    return net


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(IMAGES[:count]).permute(0, 3, 1, 2).float(), torch.from_numpy(LABELS[:count])


@pytest.mark.parametrize("quantized", [False, True])
def test_attack_stays_in_its_ball_and_raises_the_loss(quantized: bool) -> None:
    net = network().eval()
    net.quantized = quantized
    pixels, labels = batch()
    noise = integer_noise((4, *pixels.shape), 0.1, torch.Generator().manual_seed(0))
    delta = smoothed_attack(net, pixels, labels, noise, radius=60.0, steps=4)
    norms = delta.flatten(1).norm(dim=1)
    assert norms.max() <= 60.0 * (1 + 1e-5) and norms.min() > 10.0

    def loss(offset: Tensor) -> float:
        with torch.no_grad():
            mean = F.softmax(net((pixels + offset + noise).flatten(0, 1)), 1).unflatten(0, (4, -1)).mean(0)  # type: ignore[no-untyped-call]
            return F.nll_loss(mean.log(), labels).item()

    assert loss(delta) > loss(torch.zeros_like(delta))


@pytest.mark.parametrize("kind", sorted(COPIES))
@pytest.mark.parametrize("quantized", [False, True])
def test_every_objective_trains_float_and_quantized_networks(kind: str, quantized: bool) -> None:
    net, teacher = network(), network()
    net.quantized, teacher.quantized = quantized, False
    before = {name: value.clone() for name, value in net.state_dict().items()}
    settings = Train(epochs=0.5, batch_size=16, lr=0.02, objective=objective(smoothing=kind, copies=2))  # type: ignore[call-arg]
    train(net, IMAGES, LABELS, settings, 0.1, teacher=teacher)
    after = net.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_attacking_leaves_batch_norm_statistics_alone() -> None:
    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = nn.BatchNorm2d(2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.norm.training
            return self.norm(x).mean((2, 3))

    spy = Spy().train()
    spy.norm.eval()
    pixels, labels = batch()
    smoothing_loss(
        spy, pixels, labels % 2, objective(smoothing="smoothadv", attack_steps=3), 0.1, 1.0,
        torch.Generator().manual_seed(0), None,
    )  # fmt: skip
    assert spy.calls == 0, "a frozen batch norm must not be thawed by the attack"
    spy.norm.train()
    smoothing_loss(
        spy, pixels, labels % 2, objective(smoothing="smoothadv", attack_steps=3), 0.1, 1.0,
        torch.Generator().manual_seed(0), None,
    )  # fmt: skip
    assert spy.calls == 1, "only the training pass itself updates statistics"


def test_distillation_needs_a_teacher() -> None:
    assert needs_teacher(objective(smoothing="distillation")) and needs_teacher(objective(distillation=0.5))
    assert not needs_teacher(objective(smoothing="macer"))
    pixels, labels = batch()
    with pytest.raises(ArqError, match="teacher"):
        objective_loss(
            network(), pixels, labels, objective(distillation=1.0), 0.1, 0.0, torch.Generator().manual_seed(0)
        )


def test_distillation_draws_the_student_towards_the_teacher() -> None:
    student, teacher = network(), network()
    teacher.quantized = False
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    pixels, _ = batch(96)
    teacher.eval()

    def distance() -> float:
        with torch.no_grad():
            return distillation_loss([student.eval()(pixels)], [teacher(pixels)]).item()

    before = distance()
    settings = Train(epochs=10, batch_size=16, lr=0.05, objective=objective(smoothing="distillation"))  # type: ignore[call-arg]
    train(student, IMAGES, LABELS, settings, 0.05, teacher=teacher)
    assert distance() < 0.5 * before
