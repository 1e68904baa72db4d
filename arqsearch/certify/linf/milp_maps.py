"""Operations on flat tensors as matrices and indices, for the integer programming encoding."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from arqsearch.integer import ops as O

Int64: TypeAlias = NDArray[np.int64]


def moved(op: O.Op, shape: tuple[int, ...]) -> tuple[Int64, Int64]:
    """For each element written: index of the element that is copied, or −1, and the constant written then."""
    index = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    if isinstance(op, O.Flatten):
        found = index.reshape(-1)
    elif isinstance(op, O.Slice):
        found = index[slice(*op.rows), slice(*op.columns), slice(*op.channels)]
    elif isinstance(op, O.PadChannels):
        edges = [(0, 0)] * (len(shape) - 1) + [(op.before, op.after)]
        found = np.pad(index, edges, constant_values=-1)
    elif isinstance(op, O.Pad2d):
        top, bottom, left, right = op.padding
        found = np.pad(index, [(top, bottom), (left, right), (0, 0)], constant_values=-1)
        return found, np.broadcast_to(op.values.astype(np.int64), found.shape).copy()
    else:
        raise TypeError(f"{type(op).__name__} does not move elements")
    return found, np.zeros_like(found)


def windows(op: O.MaxPool2d | O.SumPool2d, shape: tuple[int, ...]) -> list[list[int]]:
    """Indices of the elements in each window, in the order in which windows are written."""
    height, width, channels = shape
    rows, columns, _ = O.output_shape(op, shape)
    top, _, left, _ = op.padding
    found = []
    for r in range(rows):
        ys = [y for y in range(r * op.stride[0] - top, r * op.stride[0] - top + op.kernel[0]) if 0 <= y < height]
        for c in range(columns):
            start = c * op.stride[1] - left
            xs = [x for x in range(start, start + op.kernel[1]) if 0 <= x < width]
            found += [[(y * width + x) * channels + k for y in ys for x in xs] for k in range(channels)]
    return found


def linear_map(op: O.Conv2d | O.Linear | O.SumPool2d, shape: tuple[int, ...]) -> tuple[Any, Int64]:
    """Matrix (CSR, whole numbers) and bias of an affine operation on flat tensors."""
    if isinstance(op, O.Linear):
        return sparse.csr_array(op.weight.astype(float)), op.bias.astype(np.int64)
    if isinstance(op, O.SumPool2d):
        members = windows(op, shape)
        rows = np.repeat(np.arange(len(members)), [len(window) for window in members])
        columns = np.concatenate([np.array(window, dtype=np.int64) for window in members])
        size = len(members), int(np.prod(shape))
        return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=size), np.zeros(size[0], np.int64)
    return _convolution(op, shape)


def _convolution(op: O.Conv2d, shape: tuple[int, ...]) -> tuple[Any, Int64]:
    height, width, channels = shape
    rows, columns, out = O.output_shape(op, shape)
    per_group, group_out = op.weight.shape[3], out // op.groups
    r, c, o, k = (x.reshape(-1) for x in np.meshgrid(
        np.arange(rows), np.arange(columns), np.arange(out), np.arange(per_group), indexing="ij"
    ))  # fmt: skip
    target = (r * columns + c) * out + o
    parts = []
    for i in range(op.weight.shape[1]):
        for j in range(op.weight.shape[2]):
            y, x = r * op.stride[0] + i - op.padding[0], c * op.stride[1] + j - op.padding[2]
            value = op.weight[o, i, j, k].astype(float)
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (value != 0)
            from_channel = (o // group_out) * per_group + k
            parts.append((value[inside], target[inside], ((y * width + x) * channels + from_channel)[inside]))
    values, places, sources = (np.concatenate([part[n] for part in parts]) for n in range(3))
    size = rows * columns * out, height * width * channels
    bias = np.tile(op.bias.astype(np.int64), rows * columns)
    return sparse.csr_array((values, (places, sources)), shape=size), bias
