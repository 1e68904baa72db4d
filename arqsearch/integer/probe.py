"""A convolution kernel is believed only after it gave the right integers once for its shape.

Libraries may choose Winograd, FFT or reduced precision by shape and batch. The probe runs the very
call on codes at the edge of float's exact range and compares two images of it with integer arithmetic.
A shape that fails is computed by unfold and matrix product instead.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_Shape = tuple[int, ...]


def checked_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int], padding: tuple[int, int], groups: int
) -> Tensor:
    """``F.conv2d`` on integer-valued floats, or its unfold form where the probe found the kernel inexact.

    :param x: ``(N, C, H, W)``, integers in float32 or float64.
    :param weight: ``(O, C/groups, KH, KW)`` of the same dtype.
    :param bias: ``(O,)``.
    """
    # Everything a library may choose its kernel by: layout is made equal, the rest is part of the key.
    x = x.contiguous(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    if _probe(tuple(x.shape), tuple(weight.shape), stride, padding, groups, x.dtype, str(x.device), threads):
        return F.conv2d(x, weight, bias, stride, padding, 1, groups)
    return _unfold_conv2d(x, weight, bias, stride, padding, groups)


@lru_cache(maxsize=4096)
def _probe(
    x_shape: _Shape,
    w_shape: _Shape,
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: int,
    dtype: torch.dtype,
    device: str,
    threads: int,
) -> bool:
    """Whether ``F.conv2d`` gives exact integers for this shape on this machine."""
    terms = int(np.prod(w_shape[1:]))
    limit = 2**24 if dtype == torch.float32 else 2**40
    # The largest equal magnitudes whose sums stay exactly representable: odd, so low bits are in play.
    magnitude = min(max(int((limit / terms) ** 0.5) - 1, 1) | 1, 2**15 - 1)
    if magnitude * magnitude * terms > limit:
        magnitude = max(magnitude - 2, 1)
    generator = np.random.default_rng(20260101)
    x = generator.integers(0, magnitude, size=x_shape, endpoint=True)
    x[-1] = magnitude
    w = generator.integers(-magnitude, magnitude, size=w_shape, endpoint=True)
    w[0] = magnitude
    b = generator.integers(-3, 3, size=w_shape[0], endpoint=True)
    inputs = torch.from_numpy(x).to(device, dtype).contiguous(memory_format=torch.channels_last)
    weights = torch.from_numpy(w).to(device, dtype).contiguous(memory_format=torch.channels_last)
    got = F.conv2d(inputs, weights, torch.from_numpy(b).to(device, dtype), stride, padding, 1, groups)
    picked = sorted({0, x_shape[0] - 1})
    expected = _integer_conv2d(x[picked], w, b, stride, padding, groups)
    return bool(np.array_equal(got[picked].cpu().to(torch.int64).numpy(), expected))


def _integer_conv2d(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: tuple[int, int], padding: tuple[int, int], groups: int
) -> np.ndarray:
    """Reference convolution in int64, one kernel position at a time."""
    n, _, height, width = x.shape
    out, per_group, kh, kw = w.shape
    padded = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2)).astype(np.int64)
    rows = (height + 2 * padding[0] - kh) // stride[0] + 1
    columns = (width + 2 * padding[1] - kw) // stride[1] + 1
    result = np.zeros((n, groups, out // groups, rows, columns), dtype=np.int64)
    grouped = w.reshape(groups, out // groups, per_group, kh, kw)
    for i in range(kh):
        for j in range(kw):
            window = padded[:, :, i : i + stride[0] * rows : stride[0], j : j + stride[1] * columns : stride[1]]
            window = window.reshape(n, groups, per_group, rows, columns)
            result += np.einsum("goc,ngcyx->ngoyx", grouped[..., i, j], window)
    return np.asarray(result.reshape(n, out, rows, columns) + b[:, None, None])


def _unfold_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int], padding: tuple[int, int], groups: int
) -> Tensor:
    """Convolution as unfold and matrix product in float64: a plain sum for any library."""
    n, out = x.shape[0], weight.shape[0]
    columns = F.unfold(x.double(), (weight.shape[2], weight.shape[3]), padding=padding, stride=stride)
    columns = columns.reshape(n, groups, -1, columns.shape[-1])
    matrix = weight.double().reshape(groups, out // groups, -1)
    rows = (x.shape[2] + 2 * padding[0] - weight.shape[2]) // stride[0] + 1
    result = torch.einsum("gok,ngkp->ngop", matrix, columns).reshape(n, out, rows, -1)
    return (result + bias.double()[:, None, None]).to(x.dtype)
