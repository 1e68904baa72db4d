"""Training losses: cross-entropy under the deployed noise, consistency, and worst-case interval loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arqsearch.quantize.intervals import interval_margins, worst_case_logits
from arqsearch.quantize.network import QuantizedNet
from arqsearch.recipe import Objective


def integer_noise(shape: tuple[int, ...], sigma: float, generator: torch.Generator) -> Tensor:
    """Rounded Gaussian noise in grey levels as float32 integers; σ in the unit of [0,1] pixels.

    The distribution is the deployed one; the stream is a training stream, disjoint from certificates.
    """
    return (torch.randn(shape, generator=generator) * (255.0 * sigma)).round_()


def consistency_loss(logits: list[Tensor], labels: Tensor, weight: float, entropy: float) -> Tensor:
    """Consistency regularization (Jeong and Shin, NeurIPS 2020, eq. 6-8).

    Mean cross-entropy + weight * mean KL(mean F || F_i) + entropy * H(mean F).

    :param logits: m tensors ``(N, K)``, one for each noisy copy.
    :param labels: ``(N,)``.
    """
    log_probs = [F.log_softmax(z, dim=1) for z in logits]
    mean = torch.stack([p.exp() for p in log_probs]).mean(0)
    log_mean = mean.clamp_min(1e-20).log()
    cross_entropy = torch.stack([F.nll_loss(p, labels) for p in log_probs]).mean()
    divergence = torch.stack([(mean * (log_mean - p)).sum(1).mean() for p in log_probs]).mean()
    mean_entropy = -(mean * log_mean).sum(1).mean()
    return cross_entropy + weight * divergence + entropy * mean_entropy


def objective_loss(
    net: QuantizedNet,
    pixels: Tensor,
    labels: Tensor,
    objective: Objective,
    sigma: float,
    progress: float,
    generator: torch.Generator,
) -> Tensor:
    """Loss of one batch.

    :param pixels: float ``(N, C, H, W)`` in grey levels, integers.
    :param labels: ``(N,)``.
    :param sigma: noise level in the unit of [0,1] pixels.
    :param progress: part of the training done, 0..1 (ramps of ε and κ).
    :param generator: source of the training noise.
    """
    smoothing = _smoothing_loss(net, pixels, labels, objective, sigma, generator)
    ramp = min(1.0, progress / objective.ramp)
    kappa = objective.interval * ramp
    if kappa == 0.0:
        return smoothing
    epsilon = objective.epsilon * ramp
    low, high = (pixels - epsilon).clamp(0, 255), (pixels + epsilon).clamp(0, 255)
    margins = interval_margins(net, low, high, labels)
    worst = F.cross_entropy(worst_case_logits(margins), labels)
    return (1.0 - kappa) * smoothing + kappa * worst


def _smoothing_loss(
    net: QuantizedNet, pixels: Tensor, labels: Tensor, objective: Objective, sigma: float, generator: torch.Generator
) -> Tensor:
    if objective.smoothing == "none":
        return F.cross_entropy(net(pixels), labels)
    copies = objective.copies if objective.smoothing == "consistency" else 1
    noise = integer_noise((copies, *pixels.shape), sigma, generator).to(pixels.device)
    logits = net((pixels + noise).flatten(0, 1)).chunk(copies)
    if objective.smoothing == "gaussian":
        return F.cross_entropy(logits[0], labels)
    return consistency_loss(list(logits), labels, objective.consistency, objective.entropy)
