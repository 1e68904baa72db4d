"""One training loop for base networks, candidates and shared weights; deterministic and resumable.

Every step draws its batch, augmentation, noise and assignments from generators seeded by (seed, step),
so a run that was killed continues from its checkpoint to the same weights, on the same machine.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.network import QuantizedNet
from arqsearch.quantize.objectives import objective_loss
from arqsearch.quantize.quantizers import LogAdam
from arqsearch.recipe import Train

#: Assignments to train in a step, given the step's generator.
ChooseBitWidths: TypeAlias = Callable[[int, np.random.Generator], Sequence[BitWidths]]
#: Called with (steps done, steps in all, running loss).
OnStep: TypeAlias = Callable[[int, int, float], None]

#: Largest relative change of a step size in one update.
STEP_LR = 0.003
WARMUP = 0.03


def train(
    net: QuantizedNet,
    images: np.ndarray,
    labels: np.ndarray,
    settings: Train,
    sigma: float,
    seed: int = 0,
    choose: ChooseBitWidths | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_step: OnStep | None = None,
) -> None:
    """Train a network in place; leaves it in eval mode.

    In float mode (``net.quantized`` False) the base network is trained; otherwise the fake-quantized
    one, at its current bit-widths or at those that `choose` returns for each step.

    :param images: uint8 ``(N, H, W, C)``.
    :param labels: ``(N,)``.
    :param sigma: noise level in the unit of [0,1] pixels.
    :param seed: with `settings` it fixes every random choice.
    :param checkpoint: file that makes the run resumable; removed by the caller when done.
    :raises ArqError: when the loss is no longer finite, or the checkpoint is of another run.
    """
    steps_per_epoch = max(1, len(images) // settings.batch_size)
    total = round(settings.epochs * steps_per_epoch)
    optimizers = _optimizers(net, settings)
    done = _resume(net, optimizers, checkpoint, total)
    saved, average = time.monotonic(), 0.0
    net.train()
    for step in range(done, total):
        progress = step / total
        if progress >= settings.freeze_batch_norm:
            net.freeze_batch_norm()
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = group["peak"] * schedule(progress)
        loss = _step(net, optimizers, images, labels, settings, sigma, seed, step, steps_per_epoch, progress, choose)
        if not math.isfinite(loss):
            raise ArqError(
                f"The loss is not finite at step {step} of {total}; lower the learning rate ({settings.lr})."
            )
        average = loss if step == done else 0.98 * average + 0.02 * loss
        if on_step is not None:
            on_step(step + 1, total, average)
        if checkpoint is not None and time.monotonic() - saved > checkpoint_seconds:
            _save(net, optimizers, checkpoint, step + 1, total)
            saved = time.monotonic()
    net.eval()


def schedule(progress: float) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to 0."""
    if progress < WARMUP:
        return (progress + 1e-3) / (WARMUP + 1e-3)
    return 0.5 * (1.0 + math.cos(math.pi * (progress - WARMUP) / (1.0 - WARMUP)))


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 ``(N, H, W, C)`` to float ``(N, C, H, W)`` grey levels, channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()


def augment(pixels: Tensor, mode: str, generator: torch.Generator) -> Tensor:
    """Random shifts (zero grey level padding) and horizontal flips of a batch ``(N, C, H, W)``."""
    if mode == "none":
        return pixels
    count, _, height, width = pixels.shape
    reach = max(1, height // 8)
    padded = F.pad(pixels, (reach,) * 4)
    rows = torch.randint(0, 2 * reach + 1, (count,), generator=generator)
    columns = torch.randint(0, 2 * reach + 1, (count,), generator=generator)
    row = (rows[:, None] + torch.arange(height))[:, None, :, None]
    column = (columns[:, None] + torch.arange(width))[:, None, None, :]
    batch = torch.arange(count)[:, None, None, None]
    channel = torch.arange(pixels.shape[1])[None, :, None, None]
    shifted = padded[batch, channel, row, column]
    if mode == "crop-flip":
        flip = torch.rand(count, generator=generator) < 0.5
        shifted = torch.where(flip[:, None, None, None], shifted.flip(3), shifted)
    return shifted.contiguous(memory_format=torch.channels_last)


def _step(
    net: QuantizedNet, optimizers: list[torch.optim.Optimizer], images: np.ndarray, labels: np.ndarray, settings: Train,
    sigma: float, seed: int, step: int, steps_per_epoch: int, progress: float, choose: ChooseBitWidths | None,
) -> float:  # fmt: skip
    epoch, position = divmod(step, steps_per_epoch)
    order = np.random.default_rng((seed, epoch, 1)).permutation(len(images))
    batch = order[position * settings.batch_size : (position + 1) * settings.batch_size]
    generator = torch.Generator().manual_seed((seed << 32) + step)
    pixels = augment(to_pixels(images[batch]), settings.augment, generator)
    targets = torch.from_numpy(labels[batch])
    device = next(net.parameters()).device
    pixels, targets = pixels.to(device), targets.to(device)
    chosen = choose(step, np.random.default_rng((seed, step, 2))) if choose is not None else [net.bitwidths]
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for bitwidths in chosen:
        net.set_bitwidths(bitwidths)
        loss = objective_loss(net, pixels, targets, settings.objective, sigma, progress, generator) / len(chosen)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    torch.nn.utils.clip_grad_norm_([p for group in optimizers[0].param_groups for p in group["params"]], 5.0)
    for optimizer in optimizers:
        optimizer.step()
    return total


def _optimizers(net: QuantizedNet, settings: Train) -> list[torch.optim.Optimizer]:
    steps = net.quantizer_parameters()
    known = {id(p) for p in steps}
    weights = [p for p in net.parameters() if id(p) not in known and p.ndim > 1]
    others = [p for p in net.parameters() if id(p) not in known and p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": settings.weight_decay, "peak": settings.lr},
        {"params": others, "weight_decay": 0.0, "peak": settings.lr},
    ]
    main: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        main = torch.optim.AdamW(groups, lr=settings.lr)
    else:
        main = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True)
    return [main, LogAdam([{"params": steps, "peak": STEP_LR}], STEP_LR)] if net.quantized else [main]


def _save(net: QuantizedNet, optimizers: list[torch.optim.Optimizer], path: Path, step: int, total: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"net": net.state_dict(), "optimizers": states, "step": step, "total": total}, partial)
    os.replace(partial, path)


def _resume(net: QuantizedNet, optimizers: list[torch.optim.Optimizer], path: Path | None, total: int) -> int:
    if path is None or not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    if state["total"] != total:
        raise ArqError(
            f"{path} belongs to a training of {state['total']} steps, this one has {total}; delete it to start over."
        )
    net.load_state_dict(state["net"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])
