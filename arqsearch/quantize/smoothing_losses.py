"""Losses for networks that will be smoothed, all on the deployed integer noise.

Each takes the logits of noisy copies; none knows whether the network is the float base or fake-quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

#: Pixels in grey levels ``(N, C, H, W)`` to logits ``(N, K)``.
Network: TypeAlias = Callable[[Tensor], Tensor]
#: MACER's probabilities are kept this far from 0 and 1, where the Gaussian quantile has no gradient left.
_PROBABILITY_MARGIN = 1e-6


def integer_noise(shape: tuple[int, ...], sigma: float, generator: torch.Generator) -> Tensor:
    """Rounded Gaussian noise in grey levels as float32 integers; σ in the unit of [0,1] pixels.

    The distribution is the deployed one; the stream is a training stream, disjoint from certificates.
    """
    return (torch.randn(shape, generator=generator, device=generator.device) * (255.0 * sigma)).round_()


def gaussian_loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy of the noisy copies (Cohen et al., ICML 2019).

    :param logits: m tensors ``(N, K)``, one for each noisy copy.
    :param labels: ``(N,)``.
    """
    return torch.stack([F.cross_entropy(z, labels) for z in logits]).mean()


def stability_loss(clean: Tensor, noisy: list[Tensor], labels: Tensor, weight: float) -> Tensor:
    """Stability training (Li et al., NeurIPS 2019): CE(clean) + weight · CE(softmax of clean, noisy).

    :param clean: logits of the images ``(N, K)``.
    :param noisy: logits of each noisy copy.
    """
    target = F.softmax(clean, dim=1)
    drift = torch.stack([-(target * F.log_softmax(z, dim=1)).sum(1).mean() for z in noisy]).mean()
    return F.cross_entropy(clean, labels) + weight * drift


def consistency_loss(logits: list[Tensor], labels: Tensor, weight: float, entropy: float) -> Tensor:
    """Consistency regularization (Jeong and Shin, NeurIPS 2020, eq. 6-8).

    Mean cross-entropy + weight · mean KL(mean F ‖ F_i) + entropy · H(mean F).

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


def macer_loss(
    logits: list[Tensor], labels: Tensor, sigma: float, weight: float, margin: float, temperature: float
) -> Tensor:
    """MACER (Zhai et al., ICLR 2020): NLL of the mean softmax + weight · σ/2 · hinge on the certified radius.

    The hinge, max(0, margin − (Φ⁻¹(p₁) − Φ⁻¹(p₂))), counts images that the mean classifies right; p₁ and p₂ are the
    two largest entries of the mean softmax of ``temperature · logits``. Radii are in units of σ/2.

    :param logits: m tensors ``(N, K)``, one for each noisy copy.
    :param labels: ``(N,)``.
    :param sigma: noise level in [0,1] pixels.
    """
    stacked = torch.stack(logits)
    mean = F.softmax(stacked, dim=2).mean(0)
    classification = F.nll_loss(mean.clamp_min(1e-20).log(), labels)
    soft = F.softmax(temperature * stacked, dim=2).mean(0)
    (first, second), top = soft.topk(2, dim=1).values.unbind(1), soft.argmax(1)
    inside = (p.clamp(_PROBABILITY_MARGIN, 1 - _PROBABILITY_MARGIN) for p in (first, second))
    high, low = (torch.special.ndtri(p) for p in inside)
    hinge = F.relu(margin - (high - low)) * (top == labels)
    return classification + weight * sigma / 2 * hinge.mean()


def distillation_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean squared L2 distance between the softmaxes of student and teacher on the same noisy copies.

    :param student: logits of each noisy copy.
    :param teacher: logits of the float network on the same copies, without gradient.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([((F.softmax(s, 1) - F.softmax(t, 1)) ** 2).sum(1).mean() for s, t in pairs]).mean()


def smoothed_attack(
    net: Network, pixels: Tensor, labels: Tensor, noise: Tensor, radius: float, steps: int, step_size: float = 2.0
) -> Tensor:
    """SmoothAdv's projected gradient ascent on the soft smoothed classifier (Salman et al., NeurIPS 2019).

    Maximises −log of the mean softmax probability of the label over the given noise, within an L2 ball.

    :param pixels: images in grey levels ``(N, C, H, W)``.
    :param noise: ``(m, N, C, H, W)`` in grey levels, the samples that the expectation is taken over.
    :param radius: of the ball, in grey levels (255 times the [0,1] radius).
    :param steps: gradient steps.
    :param step_size: length of a step times ``steps / radius``.
    :returns: the perturbation, same shape as `pixels`, L2 norm at most `radius`.
    """
    delta = torch.zeros_like(pixels)
    copies = noise.shape[0]
    for _ in range(steps if radius > 0 else 0):
        delta = delta.detach().requires_grad_(True)
        logits = net((pixels + delta + noise).flatten(0, 1))
        mean = F.softmax(logits, dim=1).reshape(copies, len(pixels), -1).mean(0)
        loss = F.nll_loss(mean.clamp_min(1e-20).log(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, delta)
        direction = gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, 1, 1, 1)
        moved = delta.detach() + step_size * radius / steps * direction
        delta = moved * (radius / moved.flatten(1).norm(dim=1).clamp_min(radius)).reshape(-1, 1, 1, 1)
    return delta.detach()
