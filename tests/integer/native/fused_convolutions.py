"""Random convolutions with everything that a step can put around them, and their logits from the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np

from arqsearch.integer import ops as O
from tests.integer.interpreter import RULES, leaves
from tests.integer.native import assembler as A
from tests.integer.random_programs import weights

Image = np.ndarray[Any, Any]


class FusedConvolution:
    """A random convolution with everything around it: the blob, and the same from the interpreter's rules."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.height, self.width = self.integer(2, 7), self.integer(2, 7)
        self.channels = self.integer(1, 9) if self.maybe(0.5) else 4 * self.integer(1, 10)
        self.flat = self.maybe(0.15)
        kind = "dense" if self.flat else self.pick("dense", "dense", "dense", "depthwise", "grouped")
        self.groups = {"dense": 1, "depthwise": self.channels, "grouped": self.integer(1, 3)}[kind]
        if kind == "grouped":
            self.channels = self.groups * self.integer(1, 5)
        self.out_channels = self.channels if kind == "depthwise" else self.groups * self.integer(1, 40 // self.groups)
        kernel = (1, 1) if self.flat else (min(self.integer(1, 4), self.height), min(self.integer(1, 4), self.width))
        self.stride = (1, 1) if self.flat else (self.integer(1, 2), self.integer(1, 2))
        # No more padding than the kernel's overhang: the output is then no larger than the image.
        sides = [self.integer(0, size - 1) for size in kernel]
        self.padding = (sides[0] // 2, sides[0] - sides[0] // 2, sides[1] - sides[1] // 2, sides[1] // 2)
        in_per_group = self.channels * (self.height * self.width if self.flat else 1) // self.groups
        self.bits = self.pick(2, 2, 3, 4, 5, 6, 7, 8, 8, 16)
        self.weight = weights(self.rng, (self.out_channels, *kernel, in_per_group), self.bits)
        largest = 2**31 // (kernel[0] * kernel[1] * in_per_group * 4000)  # sums of any pixels fit int32
        self.weight = np.clip(self.weight.astype(np.int64), -largest, largest)
        self.bias = self.rng.integers(-5000, 5000, size=self.out_channels, endpoint=True)
        self.zero = self.pick(0, 0, -128, -255, self.integer(-255, 0))
        if self.pick(0, 1, 2) == 0 and not any(self.padding):
            self.zero = self.integer(-3000, 3000)
        self.storage = self.pick(A.U8, A.U8, A.U8, A.U8, A.I16, A.I32)

    def integer(self, lo: int, hi: int) -> int:
        return int(self.rng.integers(lo, hi, endpoint=True))

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def maybe(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def rescale(self, blob: A.Assembler, channels: int, bound: int, lo: int, hi: int) -> tuple[A.At, O.Requantize]:
        """Rescale values within ±bound to about lo..hi; sometimes with its 32-bit form, which is the same formula."""
        n = channels if self.maybe(0.6) else 1
        rounding = self.pick(*A.ROUNDINGS)
        fast = rounding != "half_even" and bound < 2**30 and self.maybe(0.6)
        precise = max(1, 2**30 // bound) if fast else 2**31 - 1
        multiplier = self.rng.integers(1, precise, size=n, endpoint=True)
        ratio = 2 * bound / (hi - lo) / self.rng.uniform(0.5, 3, size=n)
        shift = np.clip(np.round(np.log2(multiplier * ratio)), 1, 30 if fast else 62).astype(np.int64)
        lists = None
        if fast:
            half = [0 if rounding == "floor" else 2 ** (k - 1) for k in shift.tolist()]
            lists = [[-bound] * n, [bound] * n, multiplier.tolist(), half, shift.tolist()]
        at = blob.rescale(multiplier.tolist(), shift.tolist(), rounding, lo, hi, lists)
        return at, O.Requantize((0,), 1, multiplier, shift, rounding, lo, hi)

    def sum_class(self, usable: bool) -> tuple[int, int]:
        """A class that holds for any weights of these bits and any codes, and its depth."""
        top = 2 ** (self.bits - 1) * 255
        depth = 32767 // (2 * top)
        terms = self.weight[0].size
        allowed = [A.ANY]
        if usable and self.bits <= 8:
            allowed += [A.SUM_U8] * 2
            if depth >= 1:
                allowed += [A.SUM_PAIRS] * 3
            # Channels are padded to 4 and taps to 2, by zeros.
            if terms * top <= 32767:
                allowed += [A.SUM_INT16] * 3
        return self.pick(*allowed), max(depth, 1)

    def build(self) -> tuple[np.ndarray[Any, Any], Image, list[list[int]]]:
        """Blob, images and logits."""
        out_h, out_w = (
            (1, 1)
            if self.flat
            else [
                (size + before + after - kernel) // stride + 1
                for size, before, after, kernel, stride in zip(
                    (self.height, self.width), self.padding[::2], self.padding[1::2], self.weight.shape[1:3],
                    self.stride, strict=True,
                )
            ]
        )  # fmt: skip
        lo, hi = (self.zero, self.zero + 255) if self.storage == A.U8 else (-3000, 3000)
        planes = max(self.channels, self.out_channels)
        blob = A.Assembler((self.height, self.width, planes), (lo, hi))
        source = blob.tensor(
            self.storage, self.zero if self.storage == A.U8 else 0, self.height, self.width, self.channels
        )
        blob.step(A.SLICE, 0, source, 0, self.height, 1, 0, self.width, 1, 0, self.channels, 1)
        images = self.rng.integers(lo, hi, size=(4, self.height, self.width, planes), endpoint=True)
        images[0], images[1] = lo, hi
        values = [image[..., : self.channels].tolist() for image in images]
        fields: dict[str, Any] = {}
        codes, zero = self.storage == A.U8, self.zero if self.storage == A.U8 else 0
        if self.maybe(0.4):
            zero = self.pick(0, -8, -127)
            count = self.channels * self.height * self.width if self.flat and self.maybe(0.5) else self.channels
            at, op = self.rescale(blob, count, max(abs(lo), abs(hi)), zero, zero + self.pick(3, 15, 255))
            fields, codes = {"in_rescale": at, "in_zero": zero}, True
            values = [self.rescaled(value, op, count) for value in values]
        fields["sum_class"], fields["depth"] = self.sum_class(codes and (zero <= 0 or not any(self.padding)))
        conv = O.Conv2d((0,), 1, self.weight, self.bias, self.stride, self.padding, self.groups)
        values = [[[leaves(value)]] if self.flat else value for value in values]
        results = [RULES[O.Conv2d](conv, value) for value in values]
        storage, out_zero = A.I32, 0
        if self.maybe(0.7):
            bound = int(np.abs(self.weight.astype(np.int64)).reshape(self.out_channels, -1).sum(axis=1).max())
            bound = bound * max(abs(leaf) for value in values for leaf in leaves(value)) + 5000
            out_zero = self.pick(0, -127)
            at, op = self.rescale(blob, self.out_channels, bound, out_zero, out_zero + self.pick(15, 255))
            fields["rescale"], storage = at, A.U8
            results = [RULES[O.Requantize](op, value) for value in results]
        if self.maybe(0.5):
            kinds = (A.I16, A.I32, *((A.U8,) * 6 if self.storage == A.U8 else ()))
            kind = self.pick(*kinds)
            residual = blob.tensor(kind, lo if kind == A.U8 else 0, out_h, out_w, self.out_channels)
            blob.step(A.SLICE, 0, residual, 0, out_h, 1, 0, out_w, 1, 0, self.out_channels, 1)
            fields["residual"] = residual
            others = [image[:out_h, :out_w, : self.out_channels].tolist() for image in images]
            if self.maybe(0.5):
                at, op = self.rescale(blob, self.out_channels, max(abs(lo), abs(hi)), -100, 100)
                fields["residual_rescale"] = at
                others = [RULES[O.Requantize](op, value) for value in others]
            fields["clip"] = (out_zero, out_zero + 255) if storage == A.U8 else (-(10**6), 10**6)
            add = O.Add((0, 1), 2, *fields["clip"])
            results = [RULES[O.Add](add, a, b) for a, b in zip(results, others, strict=True)]
        added = blob.tensors[fields["residual"]] if "residual" in fields else None
        place = added[5] if added is not None and added[0] == storage and self.maybe(0.5) else None
        target = blob.tensor(storage, out_zero, out_h, out_w, self.out_channels, place)
        blob.conv(
            source, target, self.weight, self.bias.tolist(), bits=self.bits, stride=self.stride, padding=self.padding,
            groups=self.groups, flat=int(self.flat), **fields,
        )  # fmt: skip
        return blob.words(target), images.astype(np.int16), [leaves(value) for value in results]

    def rescaled(self, value: Any, op: O.Requantize, count: int) -> Any:
        """Rescale an image whose entries count as channels of it, or of the vector."""
        if count == self.channels or len(op.multiplier) == 1:
            return RULES[O.Requantize](op, value)
        return RULES[O.Requantize](op, leaves(value))
