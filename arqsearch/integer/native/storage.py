"""How each tensor of a program lies in the arena: bytes of an element, zero point, and which flat tensors are views."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram
from arqsearch.integer.ranges import INT16_MAX, INT16_MIN, RangeProof

#: Of the runtime (arq_validate.c): elements of one tensor; kernels, strides and paddings.
MAX_ELEMENTS, MAX_WINDOW = 1 << 28, 65535


class Kind(IntEnum):
    """ARQ_STORE_*."""

    U8 = 0
    I16 = 1
    I32 = 2


@dataclass(frozen=True)
class Storage:
    """value = stored + zero, `zero` being 0 unless the kind is U8."""

    kind: Kind
    zero: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of one element."""
        return 1 << self.kind


@dataclass(frozen=True)
class Tensor:
    """A tensor of a program as the runtime sees it.

    :param shape: (height, width, channels); a vector is (1, 1, count).
    :param lo: smallest value that can occur.
    :param hi: largest value that can occur.
    :param root: the tensor whose memory this one is; itself unless it is a flat view.
    """

    shape: tuple[int, int, int]
    lo: int
    hi: int
    storage: Storage
    root: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        height, width, channels = self.shape
        return height * width * channels

    @property
    def bytes(self) -> int:
        """Bytes in memory."""
        return self.elements * self.storage.bytes

    @property
    def value_range(self) -> tuple[int, int]:
        """What memory of this storage can hold, as far as it says more than `lo` and `hi`: 256 codes of U8."""
        return (self.storage.zero, self.storage.zero + 255) if self.storage.kind == Kind.U8 else (self.lo, self.hi)


def narrow_storage(lo: int, hi: int) -> Storage | None:
    """U8 with the zero point for values lo..hi, or None where they do not fit.

    The code of value 0 must exist, as padding holds it.
    """
    zero = min(lo, 0)
    return Storage(Kind.U8, zero) if max(hi, 0) - zero <= 255 else None


def choose_storage(program: IntegerProgram, proof: RangeProof) -> dict[int, Tensor]:
    """Storage of every tensor. The image is int16, the logits int32, anything else as narrow as its proven range.

    A flattened tensor is a view of its source, unless that is the image, or the flat tensor holds the logits and its
    source has other readers.

    :raises ArqError: when a tensor is larger than the runtime can address.
    """
    wide, views = {program.output}, {}
    for op in reversed(program.ops):
        if isinstance(op, O.Flatten) and op.inputs[0] != 0:
            if op.output not in wide:
                views[op.output] = op.inputs[0]
            elif program.readers[op.inputs[0]] == 1:
                views[op.output] = op.inputs[0]
                wide.add(op.inputs[0])
    quantized = {op.inputs[0] for op in program.ops if isinstance(op, O.InputQuantize)}
    tensors = {0: Tensor(_shape(program.input.shape), program.input.lo, program.input.hi, Storage(Kind.I16), 0)}
    for op, found in zip(program.ops, proof.ranges, strict=True):
        shape = _shape(program.tensors[op.output].shape)
        if op.output in views:
            source = tensors[views[op.output]]
            tensors[op.output] = Tensor(shape, source.lo, source.hi, source.storage, source.root)
            continue
        lo, hi, storage = found.lo, found.hi, Storage(Kind.I32)
        if op.output in quantized:
            storage = _int16(op.output, lo, hi)
        elif op.output not in wide:
            storage = _narrowest(lo, hi)
        tensors[op.output] = Tensor(shape, lo, hi, storage, op.output)
    for index, tensor in tensors.items():
        if tensor.elements > MAX_ELEMENTS:
            raise ArqError(
                f"Tensor {index} has {tensor.elements} elements; the native engine takes up to {MAX_ELEMENTS}. "
                "Use smaller images."
            )
    return tensors


def _shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    height, width, channels = shape if len(shape) == 3 else (1, 1, *shape)
    return height, width, channels


def _narrowest(lo: int, hi: int) -> Storage:
    narrow = narrow_storage(lo, hi)
    if narrow is not None:
        return narrow
    return Storage(Kind.I16 if lo >= INT16_MIN and hi <= INT16_MAX else Kind.I32)


def _int16(index: int, lo: int, hi: int) -> Storage:
    if lo < INT16_MIN or hi > INT16_MAX:
        raise ArqError(
            f"Tensor {index} spans {lo}..{hi} and is read by InputQuantize; the native engine quantizes int16 pixels. "
            "Use Requantize there."
        )
    return Storage(Kind.I16)
