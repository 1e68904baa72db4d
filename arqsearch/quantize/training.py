"""One training loop for base networks, candidates and shared weights; deterministic and resumable.

Every step draws its batch, augmentation, noise and assignments from generators seeded by (seed, step),
so a run that was killed continues from its checkpoint to the same weights, on the same machine.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.monitor import BoundsMonitor
from arqsearch.quantize.network import QuantizedNet
from arqsearch.quantize.objectives import needs_teacher, objective_loss
from arqsearch.quantize.quantizers import LogAdam
from arqsearch.quantize.ranks import Ranks
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
    teacher: nn.Module | None = None,
    monitor: BoundsMonitor | None = None,
) -> None:
    """Train a network in place; leaves it in eval mode, on the device it came from.

    In float mode (``net.quantized`` False) the base network is trained; otherwise the fake-quantized
    one, at its current bit-widths or at those that `choose` returns for each step. Started by
    ``torchrun``, every process calls this and takes its share of each batch.

    :param images: uint8 ``(N, H, W, C)``.
    :param labels: ``(N,)``.
    :param sigma: noise level in the unit of [0,1] pixels.
    :param seed: with `settings` it fixes every random choice.
    :param checkpoint: file that makes the run resumable; removed by the caller when done.
    :param teacher: float network that distillation follows.
    :param monitor: estimates box bounds on held-out images as training goes on.
    :raises ArqError: when the loss is no longer finite, the checkpoint is of another run, the device is
        missing, or distillation has no teacher.
    """
    ranks, home = Ranks.current(), next(net.parameters()).device
    if needs_teacher(settings.objective) and teacher is None:
        raise ArqError("The objective distils, but there is no teacher; name its float weights in teacher=...")
    device = training_device(settings)
    net.to(device)
    if teacher is not None:
        teacher.to(device).eval()
    steps_per_epoch = max(1, len(images) // settings.batch_size)
    total = round(settings.epochs * steps_per_epoch)
    optimizers = _optimizers(net, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
    done, average = _resume(net, optimizers, scaler, checkpoint, total)
    ranks.copy_first(net)
    if monitor is not None and ranks.first:
        monitor.resume(done)
    loop = _Step(
        net, optimizers, scaler, images, labels, settings, sigma, seed, steps_per_epoch, choose, teacher, ranks
    )
    saved, frozen = time.monotonic(), False
    net.train()
    for step in range(done, total):
        progress = step / total
        if progress >= settings.freeze_batch_norm:
            if not frozen:
                ranks.average_statistics(net)
            net.freeze_batch_norm()
            frozen = True
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = group["peak"] * schedule(progress)
        loss = loop.run(step, progress)
        if not math.isfinite(loss):
            raise ArqError(
                f"The loss is not finite at step {step} of {total}; lower the learning rate ({settings.lr})."
            )
        average = loss if average is None else 0.98 * average + 0.02 * loss
        if monitor is not None and ranks.first and monitor.due(step + 1, total, steps_per_epoch):
            monitor.record(net, step + 1, (step + 1) / steps_per_epoch, average)
        if on_step is not None and ranks.first:
            on_step(step + 1, total, average)
        if checkpoint is not None and _time_to_save(ranks, device, saved, checkpoint_seconds):
            ranks.average_statistics(net)
            if ranks.first:
                _save(net, optimizers, scaler, checkpoint, step + 1, total, average)
            saved = time.monotonic()
    ranks.average_statistics(net)
    net.eval().to(home)


def training_device(settings: Train) -> torch.device:
    """The device that the settings ask for.

    :raises ArqError: when there is no such device, or it cannot train in the asked precision.
    """
    gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not gpu:
        raise ArqError("device = cuda, but torch finds no GPU here; use device=auto or device=cpu.")
    device = torch.device("cuda" if gpu and settings.device != "cpu" else "cpu")
    if settings.precision == "float16" and device.type == "cpu":
        raise ArqError("precision = float16 needs a GPU; on a CPU use float32 (fastest there) or bfloat16.")
    return device


def _time_to_save(ranks: Ranks, device: torch.device, saved: float, seconds: float) -> bool:
    """Whether a checkpoint is due by the clock of rank 0, so that all processes agree."""
    due = time.monotonic() - saved > seconds
    if ranks.size == 1:
        return due
    flag = torch.tensor(float(due), device=device)
    torch.distributed.broadcast(flag, 0)
    return bool(flag.item())


def schedule(progress: float) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to 0."""
    if progress < WARMUP:
        return (progress + 1e-3) / (WARMUP + 1e-3)
    return 0.5 * (1.0 + math.cos(math.pi * (progress - WARMUP) / (1.0 - WARMUP)))


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 ``(N, H, W, C)`` to float ``(N, C, H, W)`` grey levels, channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()


def augment(pixels: Tensor, mode: str, generator: torch.Generator, shift: int | None = None) -> Tensor:
    """Random shifts (zero grey level padding) and horizontal flips of a batch ``(N, C, H, W)``.

    :param mode: none, crop, flip or crop-flip.
    :param shift: largest shift in pixels; None = 1/8 of the height.
    """
    if mode == "none":
        return pixels
    count, _, height, width = pixels.shape
    if mode == "flip":
        turned = torch.rand(count, generator=generator, device=pixels.device) < 0.5
        return torch.where(turned[:, None, None, None], pixels.flip(3), pixels)
    reach = shift or max(1, height // 8)
    padded = F.pad(pixels, (reach,) * 4)
    device = pixels.device
    rows = torch.randint(0, 2 * reach + 1, (count,), generator=generator, device=device)
    columns = torch.randint(0, 2 * reach + 1, (count,), generator=generator, device=device)
    row = (rows[:, None] + torch.arange(height, device=device))[:, None, :, None]
    column = (columns[:, None] + torch.arange(width, device=device))[:, None, None, :]
    batch = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(pixels.shape[1], device=device)[None, :, None, None]
    shifted = padded[batch, channel, row, column]
    if mode == "crop-flip":
        flip = torch.rand(count, generator=generator, device=device) < 0.5
        shifted = torch.where(flip[:, None, None, None], shifted.flip(3), shifted)
    return shifted.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class _Step:
    """What every step of one training shares."""

    net: QuantizedNet
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    images: np.ndarray
    labels: np.ndarray
    settings: Train
    sigma: float
    seed: int
    steps_per_epoch: int
    choose: ChooseBitWidths | None
    teacher: nn.Module | None
    ranks: Ranks

    def run(self, step: int, progress: float) -> float:
        """One update; returns the loss of this process's share."""
        net, settings = self.net, self.settings
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.images))
        picked = torch.from_numpy(order[position * settings.batch_size : (position + 1) * settings.batch_size])
        batch = self.ranks.share(picked).numpy()
        device = next(net.parameters()).device
        generator = torch.Generator(device).manual_seed((self.seed << 32) + step + (self.ranks.rank << 56))
        pixels = augment(to_pixels(self.images[batch]).to(device), settings.augment, generator, settings.shift)
        targets = torch.from_numpy(self.labels[batch]).to(device)
        chosen = [net.bitwidths]
        if self.choose is not None:
            chosen = list(self.choose(step, np.random.default_rng((self.seed, step, 2))))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total = 0.0
        half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(settings.precision)
        for bitwidths in chosen:
            net.set_bitwidths(bitwidths)
            with torch.autocast(device.type, dtype=half, enabled=half is not None):
                loss = objective_loss(
                    net, pixels, targets, settings.objective, self.sigma, progress, generator, self.teacher
                )
            loss = loss / len(chosen)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.ranks.average_gradients(net)
        torch.nn.utils.clip_grad_norm_([p for group in self.optimizers[0].param_groups for p in group["params"]], 5.0)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
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


def _save(
    net: QuantizedNet, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, path: Path, step: int,
    total: int, average: float,
) -> None:  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    states = [optimizer.state_dict() for optimizer in optimizers]
    state = {
        "net": net.state_dict(), "optimizers": states, "scaler": scaler.state_dict(), "step": step, "total": total,
        "average": average,
    }  # fmt: skip
    torch.save(state, partial)
    os.replace(partial, path)


def _resume(
    net: QuantizedNet, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, path: Path | None,
    total: int,
) -> tuple[int, float | None]:  # fmt: skip
    """Steps done and running loss of a checkpoint; (0, None) without one."""
    if path is None or not path.is_file():
        return 0, None
    state = torch.load(path, weights_only=True, map_location=next(net.parameters()).device)
    if state["total"] != total:
        raise ArqError(
            f"{path} belongs to a training of {state['total']} steps, this one has {total}; delete it to start over."
        )
    net.load_state_dict(state["net"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    scaler.load_state_dict(state["scaler"])
    return int(state["step"]), state.get("average")
