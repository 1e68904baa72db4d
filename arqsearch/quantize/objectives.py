"""One training loss from the recipe's choice: a smoothing part, distillation, and a part from interval bounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arqsearch.errors import ArqError
from arqsearch.quantize.intervals import BoundedPass, bounded_forward, worst_case_logits
from arqsearch.quantize.network import QuantizedNet
from arqsearch.quantize.small_boxes import small_boxes, statistics_kept
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
    ramp = min(1.0, max(0.0, (progress - objective.warmup) / objective.ramp))
    if objective.interval == 0.0 or ramp == 0.0:
        return smoothing_loss(net, pixels, labels, objective, sigma, progress, generator, teacher)
    radius = objective.epsilon * ramp
    low, high = (pixels - radius).clamp(0, 255), (pixels + radius).clamp(0, 255)
    if objective.small_box < 1.0:
        low, high = small_boxes(
            net, low, high, labels, objective.small_box * radius, objective.box_attack_steps, generator
        )
    if objective.smoothing == "none" and not needs_teacher(objective):
        # The clean images ride in the same pass, and give the bounds their batch norm statistics.
        bounds = bounded_forward(net, low, high, labels, pixels)
        assert bounds.logits is not None
        other = F.cross_entropy(bounds.logits, labels)
    else:
        bounds = bounded_forward(net, low, high, labels)
        other = smoothing_loss(net, pixels, labels, objective, sigma, progress, generator, teacher)
    return bound_loss(bounds, labels, objective, ramp, other)


def bound_loss(bounds: BoundedPass, labels: Tensor, objective: Objective, ramp: float, other: Tensor) -> Tensor:
    """Join the loss of the bounds with the rest.

    ``cross-entropy``: (1 - κ) · other + κ · CE(worst-case logits) (Gowal et al. 2018). ``hinge``: other +
    λ · Σ_{j≠y} max(0, margin - lb(z_y - z_j)) / 10 (Lechner et al., AAAI 2023). Both: + μ · Σ mean(u - l).
    κ, λ and μ grow with `ramp`.

    :param ramp: part of the weights that is in force, 0..1.
    :param other: the loss without bounds.
    """
    weight = objective.interval * ramp
    if objective.bound_loss == "cross-entropy":
        loss = (1.0 - weight) * other + weight * F.cross_entropy(worst_case_logits(bounds.margins), labels)
    else:
        short = F.relu(objective.margin - bounds.margins).scatter(1, labels[:, None], 0.0)
        loss = other + weight * short.sum(1).mean() / 10.0
    if objective.width > 0.0:
        loss = loss + objective.width * ramp * torch.stack(bounds.widths).sum()
    return loss


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
        with statistics_kept(net):
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
