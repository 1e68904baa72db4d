"""Places in the arena: what is alive at the same time never shares a byte, and the arena is as small as we can find.

Memory is divided among blocks, each alive over an interval of steps. Blocks are placed one by one, in a few greedy
orders, each at the lowest offset where it meets no block that is alive together with it; the smallest result is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

ALIGNMENT = 64


@dataclass(frozen=True)
class Block:
    """Memory that is needed from step `first` to step `last`, both included."""

    size: int
    first: int
    last: int

    def meets(self, other: Block) -> bool:
        """Whether both are alive at one step."""
        return self.first <= other.last and other.first <= self.last


def align(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def place(blocks: Sequence[Block]) -> tuple[tuple[int, ...], int]:
    """Offsets (multiples of 64) of the blocks, and the bytes of the arena."""
    results = [_greedy(blocks, sorted(range(len(blocks)), key=order(blocks))) for order in _ORDERS]
    return min(results, key=lambda result: result[1])


def peak(blocks: Sequence[Block], *, aligned: bool = False) -> int:
    """Largest number of bytes alive at one step: no arena is smaller (if `aligned`, with blocks that begin at 64s)."""
    sizes = [align(block.size) if aligned else block.size for block in blocks]
    return max(
        (
            sum(size for size, block in zip(sizes, blocks, strict=True) if block.first <= step <= block.last)
            for step in {block.first for block in blocks}
        ),
        default=0,
    )


def _by_size(blocks: Sequence[Block]) -> Callable[[int], tuple[int, ...]]:
    return lambda index: (-blocks[index].size, blocks[index].first, index)


def _by_breadth(blocks: Sequence[Block]) -> Callable[[int], tuple[int, ...]]:
    """The blocks of the fullest steps first."""
    pressure = {
        step: sum(align(block.size) for block in blocks if block.first <= step <= block.last)
        for step in {block.first for block in blocks}
    }
    fullest = [max(n for step, n in pressure.items() if block.first <= step <= block.last) for block in blocks]
    return lambda index: (-fullest[index], -blocks[index].size, blocks[index].first, index)


def _by_area(blocks: Sequence[Block]) -> Callable[[int], tuple[int, ...]]:
    """Large and long-lived blocks first."""
    areas = [block.size * (block.last - block.first + 1) for block in blocks]
    return lambda index: (-areas[index], blocks[index].first, index)


_ORDERS = (_by_size, _by_breadth, _by_area)


def _greedy(blocks: Sequence[Block], order: Sequence[int]) -> tuple[tuple[int, ...], int]:
    offsets = [0] * len(blocks)
    placed: list[int] = []
    for index in order:
        block = blocks[index]
        taken = sorted(
            (offsets[other], offsets[other] + align(blocks[other].size))
            for other in placed
            if block.meets(blocks[other])
        )
        offset = 0
        for start, stop in taken:
            if offset + block.size <= start:
                break
            offset = max(offset, stop)
        offsets[index] = offset
        placed.append(index)
    end = max((offset + align(block.size) for offset, block in zip(offsets, blocks, strict=True)), default=0)
    return tuple(offsets), end
