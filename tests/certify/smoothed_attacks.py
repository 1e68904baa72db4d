"""Attacks on a smoothed classifier through the fake-quantized network, ending in integer images inside a ball."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from arqsearch.quantize.smoothing_losses import Network, integer_noise, smoothed_attack

Pixels = NDArray[np.uint8]


def project(delta: Tensor, radii: Tensor) -> Tensor:
    """Shorten perturbations ``(N, ...)`` to at most their radius in L2."""
    norms = delta.flatten(1).norm(dim=1)
    factors: Tensor = (radii / norms.clamp_min(1e-12)).clamp(max=1.0)
    return delta * factors.reshape(-1, 1, 1, 1)


def pgd(net: Network, pixels: Tensor, labels: Tensor, noise: Tensor, radii: Tensor, steps: int) -> Tensor:
    """Projected gradient ascent on the mean margin loss over the noise, with fresh halves of the noise and momentum.

    :param pixels: grey levels ``(N, C, H, W)``.
    :param labels: the classes to leave.
    :param noise: ``(m, N, C, H, W)`` in grey levels.
    :param radii: of the balls, in grey levels ``(N,)``.
    :returns: perturbations within the balls.
    """
    delta, velocity = torch.zeros_like(pixels), torch.zeros_like(pixels)
    half = max(1, noise.shape[0] // 2)
    for step in range(steps):
        delta = delta.detach().requires_grad_(True)
        part = noise.roll(step * half, 0)[:half]
        logits = net((pixels + delta + part).flatten(0, 1))
        own = labels.repeat(half)
        true = logits.gather(1, own[:, None])[:, 0]
        other = logits.scatter(1, own[:, None], -torch.inf).amax(1)
        (gradient,) = torch.autograd.grad(torch.tanh(other - true).sum(), delta)
        velocity = 0.7 * velocity + gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, 1, 1, 1)
        size = (2.0 * radii / steps).reshape(-1, 1, 1, 1)
        delta = project(delta.detach() + size * velocity, radii)
    return delta.detach()


def soft_ascent(net: Network, pixels: Tensor, labels: Tensor, noise: Tensor, radii: Tensor, steps: int) -> Tensor:
    """SmoothAdv's attack (`smoothed_attack`), image by image as its radius is one number."""
    parts = [
        smoothed_attack(net, pixels[i : i + 1], labels[i : i + 1], noise[:, i : i + 1], float(radius), steps)
        for i, radius in enumerate(radii)
    ]
    return torch.cat(parts)


def random_directions(net: Network, pixels: Tensor, labels: Tensor, noise: Tensor, radii: Tensor, steps: int) -> Tensor:
    """No attack at all: the baseline that attacks must beat."""
    drawn = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(steps))
    return project(drawn * 1e6, radii)


ATTACKS = {"pgd": pgd, "smoothadv": soft_ascent}


def to_integer_ball(images: Pixels, delta: Tensor, limits: NDArray[np.int64]) -> Pixels:
    """Round perturbed images to the pixel grid so that ‖x' − x‖² ≤ limit holds in integers.

    :param images: uint8 ``(N, H, W, C)``.
    :param delta: ``(N, C, H, W)`` in grey levels.
    :param limits: squared distances in grey levels, ``(N,)``.
    :returns: uint8 ``(N, H, W, C)``.
    """
    base, moves = images.astype(np.int64), delta.permute(0, 2, 3, 1).double().numpy()
    result = base.copy()
    for index, (image, move, limit) in enumerate(zip(base, moves, limits, strict=True)):
        for factor in np.linspace(1.0, 0.0, 101):
            candidate = np.clip(image + np.rint(factor * move).astype(np.int64), 0, 255)
            if ((candidate - image) ** 2).sum() <= limit:
                result[index] = candidate
                break
    assert (((result - base) ** 2).sum((1, 2, 3)) <= limits).all()
    return result.astype(np.uint8)


def attack(
    name: str, net: Network, images: Pixels, classes: NDArray[np.int64], sigma: float, limits: NDArray[np.int64],
    *, copies: int, steps: int, seed: int,
) -> Pixels:  # fmt: skip
    """Attack images within their balls of squared integer radius `limits`; see `ATTACKS`."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    noise = integer_noise((copies, *pixels.shape), sigma, torch.Generator().manual_seed(seed))
    radii = torch.from_numpy(np.sqrt(limits)).float()
    method = {**ATTACKS, "random": random_directions}[name]
    delta = method(net, pixels, torch.from_numpy(classes), noise, radii, steps)
    return to_integer_ball(images, delta, limits)


def soft_share(net: Network, images: Pixels, classes: NDArray[np.int64], noise: Tensor) -> NDArray[np.float64]:
    """Mean softmax probability of the classes over the noise."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        soft = F.softmax(net((pixels + noise).flatten(0, 1)), 1).reshape(len(noise), len(images), -1).mean(0)
    shares: NDArray[np.float64] = soft.double().numpy()[np.arange(len(classes)), classes]
    return shares
