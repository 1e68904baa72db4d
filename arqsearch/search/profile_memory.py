"""Activation bytes of a network before it is trained: the native engine's plan, from the structure alone.

The engine holds every tensor as narrow as its range: codes of 2..8 bits take one byte each, sums and accumulators two
or four. So the plan follows from the layers and the stated ranges, and is the same for all bits. The figure is that of
`compile_program`, or above it where one program needs less: its weights may prove a range narrower, and in `clip` mode
the mean pixel may have code 0 at few input bits, so that the first layer needs no padded copy of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from arqsearch.integer import ops as O
from arqsearch.integer.lowering import lower
from arqsearch.integer.native.blob import PlacedStep
from arqsearch.integer.native.fuse import fuse
from arqsearch.integer.native.plan import _memory
from arqsearch.integer.native.storage import choose_storage
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import OpRange, RangeProof, op_range
from arqsearch.quantize.bitwidths import MAX_BITS, BitWidths
from arqsearch.quantize.cost import LayerInfo
from arqsearch.quantize.network import QuantizedNet
from arqsearch.quantize.quantizers import StepTable

#: Step of every activation while the structure is lowered: so small that no ReLU6 narrows the codes.
FINE_STEP = 2.0**-10


def planned(net: QuantizedNet, layers: Sequence[LayerInfo]) -> tuple[LayerInfo, ...]:
    """The layers with the bytes of activations that are alive while each of them runs.

    :param net: the network, trained or not; it is left as it was.
    :param layers: its layers, in execution order.
    """
    with _plain(net):
        program = lower(net)
    alive = bytes_alive(program)
    return tuple(replace(layer, activation_bytes=alive[layer.name]) for layer in layers)


def bytes_alive(program: IntegerProgram) -> dict[str, int]:
    """Most bytes of activations alive from one layer up to the next one, by layer, for the ranges that ops state.

    :param program: as lowering makes them; steps before the first layer count to that layer.
    """
    tensors = choose_storage(program, _stated(program))
    steps = fuse(program, tensors)
    blocks, _ = _memory([PlacedStep(step, (), None, 0) for step in steps], tensors, program.output)
    names = program.metadata["tensor_names"]
    layers = [names[str(step.op.output)] if isinstance(step.op, O.Conv2d | O.Linear) else None for step in steps]
    current = next(layer for layer in layers if layer is not None)
    found: dict[str, int] = {}
    for index, layer in enumerate(layers):
        current = layer or current
        alive = sum(block.size for block in blocks if block.first <= index <= block.last)
        found[current] = max(found.get(current, 0), alive)
    return found


def _stated(program: IntegerProgram) -> RangeProof:
    """Ranges that hold for any weights: clips as stated, accumulators of 32 bits."""
    specs, ranges = [program.input], []
    for op, tensor in zip(program.ops, program.tensors[1:], strict=True):
        if isinstance(op, O.Conv2d | O.Linear):
            lo, hi = O.INT32_MIN, O.INT32_MAX
        elif isinstance(op, O.Requantize | O.Add | O.InputQuantize):
            lo, hi = op.lo, op.hi
        else:
            found = op_range(op, *(specs[source] for source in op.inputs))
            lo, hi = found.lo, found.hi
        specs.append(TensorSpec(tensor.shape, lo, hi))
        ranges.append(OpRange(lo, hi, lo, hi))
    return RangeProof(program.hash, tuple(ranges))


@contextmanager
def _plain(net: QuantizedNet) -> Iterator[None]:
    """8 bits, and steps with which any network can be lowered; what was there is put back."""
    tables = [module for module in net.modules() if isinstance(module, StepTable)]
    bitwidths = net.bitwidths
    kept = [table.steps.detach().clone() for table in tables]
    weights = {id(layer.weight_steps) for layer in map(net.layer, net.bitwidths.names)}
    net.set_bitwidths(BitWidths.uniform(bitwidths.names, MAX_BITS, MAX_BITS))
    with torch.no_grad():
        for table in tables:
            table.steps.fill_(1.0 if id(table) in weights else FINE_STEP)
    try:
        yield
    finally:
        net.set_bitwidths(bitwidths)
        with torch.no_grad():
            for table, steps in zip(tables, kept, strict=True):
                table.steps.copy_(steps)
