"""Nothing that is still needed is ever written over; the arena is about as small as it can be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arqsearch.integer.native import compile_program
from arqsearch.integer.native.arena import Block, peak, place
from tests.integer.native.blob_interpreter import ADD, CONV, COPY, RESCALE, Blob
from tests.integer.native.examples import lowered
from tests.integer.native.random_graphs import random_graph
from tests.integer.random_programs import random_program

BLOCKS = st.lists(
    st.builds(
        lambda size, first, length: Block(size, first, first + length),
        st.integers(0, 5000),
        st.integers(0, 12),
        st.integers(0, 6),
    ),
    max_size=24,
)


@settings(max_examples=200, deadline=None)
@given(BLOCKS)
def test_blocks_that_live_together_lie_apart(blocks: list[Block]) -> None:
    offsets, size = place(blocks)
    assert len(offsets) == len(blocks)
    for step in range(20):
        alive = [i for i, block in enumerate(blocks) if block.first <= step <= block.last and block.size]
        spans = sorted((offsets[i], offsets[i] + blocks[i].size) for i in alive)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
        assert all(stop <= size for _, stop in spans)
    assert all(offset % 64 == 0 for offset in offsets)
    assert peak(blocks) <= peak(blocks, aligned=True) <= size <= sum(-(-block.size // 64) * 64 for block in blocks)


def test_blocks_in_turn_share_one_place() -> None:
    offsets, size = place([Block(100, 0, 1), Block(60, 2, 3), Block(128, 4, 9)])
    assert (offsets, size) == ((0, 0, 0), 128)


def test_a_small_block_fills_a_hole() -> None:
    """The middle block dies; what comes next fits there instead of growing the arena."""
    blocks = [Block(640, 0, 9), Block(128, 0, 2), Block(320, 0, 9), Block(64, 3, 9)]
    assert place(blocks)[1] == 640 + 128 + 320


class Replay:
    """Which tensor every byte of the arena holds, from what the steps read and write."""

    def __init__(self, blob: Blob) -> None:
        self.blob = blob
        self.owner = np.full(blob.arena_bytes, -1)
        self.written = {step.writes for step in blob.steps}

    def run(self) -> None:
        for number, step in enumerate(self.blob.steps):
            start, stop = step.scratch
            self.owner[start:stop] = -2
            for tensor in step.reads:
                self.check(tensor, f"step {number}")
            self.check_apart(number)
            start, stop = self.blob.tensors[step.writes].span
            assert not (self.owner[start:stop] == -2).any(), "scratch memory and result lie apart"
            self.owner[self.owner == step.writes] = -1
            self.owner[start:stop] = step.writes
            self.owner[self.owner == -2] = -1
        self.check(self.blob.output, "output")

    def check(self, tensor: int, where: str) -> None:
        """The whole tensor is there, untouched since it was written; a view shows the tensor it is a view of."""
        if tensor == 0:
            return
        entry = self.blob.tensors[tensor]
        start, stop = entry.span
        holders = set(self.owner[start:stop].tolist())
        assert len(holders) == 1, f"{where} reads tensor {tensor}, parts of which were written over by {holders}"
        holder = holders.pop()
        if tensor in self.written:
            assert holder == tensor, f"{where} reads tensor {tensor}, finds {holder}"
        else:
            source = self.blob.tensors[holder]
            assert holder >= 0 and source.span == entry.span, f"{where} reads view {tensor}, finds {holder}"
            assert (source.storage, source.zero) == (entry.storage, entry.zero)

    def check_apart(self, number: int) -> None:
        """A result lies apart from what its step reads, or exactly on it where the step goes element by element."""
        step = self.blob.steps[number]
        target = self.blob.tensors[step.writes]
        for position, tensor in enumerate(step.reads):
            if tensor == 0:
                continue
            (start, stop), (first, last) = self.blob.tensors[tensor].span, target.span
            if stop <= first or last <= start:
                continue
            assert (start, stop) == (first, last)
            assert step.kind in (RESCALE, ADD, COPY) or (step.kind == CONV and position == 1)


@pytest.mark.parametrize("seed", range(150))
def test_replay(seed: int) -> None:
    for program in (random_program(seed), random_graph(seed)):
        Replay(Blob(compile_program(program).words)).run()


def test_replay_notices_an_arena_that_is_too_tight() -> None:
    """Moving every tensor to the beginning of the arena cannot go unnoticed."""
    noticed = 0
    for seed in range(10):
        blob = Blob(compile_program(random_program(seed)).words)
        blob.tensors = [type(t)(t.storage, t.zero, t.shape, 0) for t in blob.tensors]
        try:
            Replay(blob).run()
        except AssertionError:
            noticed += 1
    assert noticed == 10


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_networks_use_little_more_than_they_must(name: str) -> None:
    program, _ = lowered(name, (4, 4), multiplier="15")
    native = compile_program(program)
    blob = Blob(native.words)
    Replay(blob).run()
    bound = 0  # of one step alone: operands, result (unless in place) and scratch
    for step in blob.steps:
        spans = {blob.tensors[tensor].span for tensor in (*step.reads, step.writes) if tensor} | {step.scratch}
        bound = max(bound, sum(stop - start for start, stop in spans))
    assert native.peak_activation_bytes <= bound <= native.arena_bytes <= 1.1 * bound


def test_the_peak_of_a_residual_network() -> None:
    """The largest images of ResNet-20 are 32x32x16 codes: the stream and the layer's input; sums go over the stream."""
    program, _ = lowered("resnet20", (4, 4), multiplier="15")
    assert compile_program(program).peak_activation_bytes == 2 * 32 * 32 * 16
