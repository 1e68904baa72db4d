"""Small sets of images whose every member can be run, and what the bounds owe them."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from arqsearch.certify.linf.domain import Bound, Domain
from arqsearch.integer.backend_torch import RULES
from arqsearch.integer.program import IntegerProgram

CPU = torch.device("cpu")


def tensors_of(program: IntegerProgram, images: np.ndarray) -> dict[int, np.ndarray]:
    """Every tensor of every image by the execution rules, int64 ``(N, *shape)``."""
    values = {0: torch.from_numpy(images.astype(np.int16)).permute(0, 3, 1, 2)}
    for op in program.ops:
        kernel = RULES[type(op)](op, program, CPU)
        values[op.output] = kernel(*(values[i].clone() for i in op.inputs))
    return {
        t: (v.permute(0, 2, 3, 1) if v.ndim == 4 else v).to(torch.int64).contiguous().numpy() for t, v in values.items()
    }


def corner_box(program: IntegerProgram, seed: int, free: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A box ``(H, W, C)`` around a random image with `free` free pixels of up to `width` further values."""
    rng = np.random.default_rng(seed)
    shape, lo, hi = program.input.shape, program.input.lo, program.input.hi
    low = rng.integers(max(lo, -300), min(hi, 400) - width, size=shape, endpoint=True)
    high = low.copy()
    for place in rng.choice(low.size, size=min(free, low.size), replace=False):
        high.reshape(-1)[place] += int(rng.integers(1, width, endpoint=True))
    return low.astype(np.int16), high.astype(np.int16)


def every_image(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """All integer images of a box, ``(M, H, W, C)``."""
    axes = [range(int(a), int(b) + 1) for a, b in zip(low.ravel(), high.ravel(), strict=True)]
    return np.array(list(itertools.product(*axes)), dtype=np.int16).reshape(-1, *low.shape)


def domain_of(low: np.ndarray, high: np.ndarray, label: int, copies: int = 1) -> Domain:
    """One box as a batch."""
    low, high = (torch.from_numpy(x)[None].repeat(copies, 1, 1, 1) for x in (low, high))
    return Domain(low, high, torch.full((copies,), label, dtype=torch.int64))


def check_sound(bound: Bound, label: int, values: dict[int, np.ndarray], program: IntegerProgram) -> None:
    """A bound of one domain against all of its images; `values` hold those inside it only."""
    logits = values[program.output]
    if bound.empty[0]:
        assert len(logits) == 0, "called empty, yet it holds images"
        return
    if len(logits) == 0:
        return
    true = (logits[:, [label]] - logits).min(0)
    assert (bound.margins[0].numpy() <= true).all(), (bound.margins[0].numpy(), true)
    for tensor, (low, high) in bound.tensors.items():
        assert (low[0].numpy() <= values[tensor].min(0)).all(), f"tensor {tensor}: lower bound"
        assert (high[0].numpy() >= values[tensor].max(0)).all(), f"tensor {tensor}: upper bound"


def random_limits(values: dict[int, np.ndarray], tensors: list[int], seed: int) -> dict[int, tuple[int, int, int]]:
    """For some tensors, a random element and limits lo..hi that cut its true values."""
    rng = np.random.default_rng(seed)
    limits = {}
    for tensor in tensors:
        flat = values[tensor].reshape(len(values[tensor]), -1)
        moving = np.flatnonzero(flat.min(0) < flat.max(0))
        if len(moving) == 0 or rng.random() < 0.3:
            continue
        place = int(rng.choice(moving))
        low, high = int(flat[:, place].min()), int(flat[:, place].max())
        cut = int(rng.integers(low, high))
        limits[tensor] = (place, low, cut) if rng.random() < 0.5 else (place, cut + 1, high)
    return limits
