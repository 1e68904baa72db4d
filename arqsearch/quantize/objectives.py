"""One training loss from the recipe's choice: a smoothing part, distillation, and worst-case interval loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arqsearch.errors import ArqError
from arqsearch.quantize.intervals import interval_margins, worst_case_logits
from arqsearch.quantize.network import QuantizedNet
from arqsearch.quantize.smoothing_losses import (
    consistency_loss,
    distillation_loss,
    gaussian_loss,
    integer_noise,
    macer_loss,
    smoothed_attack,
    stability_loss,
)
from arqsearch.recipe import Objective

#: Noisy copies of each image when the recipe does not say.
COPIES = {"none": 1, "gaussian": 1, "stability": 1, "consistency": 2, "macer": 16, "smoothadv": 2, "distillation": 1}
#: Part of training over which SmoothAdv's radius grows to its value.
ATTACK_RAMP = 0.1


def objective_loss(
    net: QuantizedNet,
    pixels: Tensor,
    labels: Tensor,
    objective: Objective,
    sigma: float,
    progress: float,
    generator: torch.Generator,
    teacher: nn.Module | None = None,
) -> Tensor:
    """Loss of one batch.

    :param pixels: float ``(N, C, H, W)`` in grey levels, integers.
    :param labels: ``(N,)``.
    :param sigma: noise level in the unit of [0,1] pixels.
    :param progress: part of the training done, 0..1 (ramps of ε, κ and the attack).
    :param generator: source of the training noise, on the device of `pixels`.
    :param teacher: float network that distillation follows.
    """
    smoothing = smoothing_loss(net, pixels, labels, objective, sigma, progress, generator, teacher)
    ramp = min(1.0, progress / objective.ramp)
    kappa = objective.interval * ramp
    if kappa == 0.0:
        return smoothing
    epsilon = objective.epsilon * ramp
    low, high = (pixels - epsilon).clamp(0, 255), (pixels + epsilon).clamp(0, 255)
    margins = interval_margins(net, low, high, labels)
    worst = F.cross_entropy(worst_case_logits(margins), labels)
    return (1.0 - kappa) * smoothing + kappa * worst


@contextmanager
def _statistics_kept(net: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Batch norm in inference mode meanwhile: the attack's forward passes leave its statistics alone."""
    modules = [m for m in net.modules() if m.training] if isinstance(net, nn.Module) else []
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def needs_teacher(objective: Objective) -> bool:
    """Whether the loss compares with a teacher's answers."""
    return objective.smoothing == "distillation" or objective.distillation > 0


def smoothing_loss(
    net: Callable[[Tensor], Tensor],
    pixels: Tensor,
    labels: Tensor,
    objective: Objective,
    sigma: float,
    progress: float,
    generator: torch.Generator,
    teacher: nn.Module | None,
) -> Tensor:
    """The smoothing part, on fresh noisy copies; parameters as for :func:`objective_loss`.

    :raises ArqError: when distillation has no teacher.
    """
    kind = objective.smoothing
    if kind == "none" and not needs_teacher(objective):
        return F.cross_entropy(net(pixels), labels)
    copies = objective.copies or COPIES[kind]
    noise = integer_noise((copies, *pixels.shape), sigma, generator).to(pixels.device)
    centre = pixels
    if kind == "smoothadv":
        radius = 255.0 * objective.attack_radius * min(1.0, progress / ATTACK_RAMP)
        with _statistics_kept(net):
            centre = pixels + smoothed_attack(net, pixels, labels, noise, radius, objective.attack_steps)
    noisy = (centre + noise).flatten(0, 1)
    logits = list(net(noisy).chunk(copies))
    if kind == "none":
        loss = F.cross_entropy(net(pixels), labels)
    elif kind in ("gaussian", "smoothadv"):
        loss = gaussian_loss(logits, labels)
    elif kind == "stability":
        loss = stability_loss(net(pixels), logits, labels, objective.stability)
    elif kind == "consistency":
        loss = consistency_loss(logits, labels, objective.consistency, objective.entropy)
    elif kind == "macer":
        loss = macer_loss(logits, labels, sigma, objective.macer, objective.macer_margin, objective.macer_temperature)
    else:
        loss = logits[0].new_zeros(())
    weight = 1.0 if kind == "distillation" else objective.distillation
    if weight > 0:
        if teacher is None:
            raise ArqError(
                "The objective distils, but there is no teacher; name its float weights in teacher=..., "
                "or set objective.distillation=0."
            )
        with torch.no_grad():
            answers = list(teacher(noisy).chunk(copies))
        loss = loss + weight * distillation_loss(logits, answers)
    return loss
