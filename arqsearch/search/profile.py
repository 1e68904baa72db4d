"""`arqsearch profile`: measure every layer of a network at every pair of bits on the native engine.

A layer is timed as a program of its own: the codes of its input are quantized from an image of the same shape, then
come the layer and its requantization, as in the real program. The time of the input quantizer alone is taken off. All
programs of a layer are timed in turn, round after round, so that whatever else the machine does meets all of them; the
median over the rounds counts. What is no layer is the difference of whole networks to the sums of their layers. Then
random configurations are predicted and measured: the table states how far off it is.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from arqsearch import __version__
from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.lowering import lower
from arqsearch.integer.native import engine
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import INT16_MAX, INT16_MIN, infer
from arqsearch.quantize.bitwidths import BitWidths, LayerBits
from arqsearch.quantize.network import QuantizedNet
from arqsearch.search.executor import OnProgress
from arqsearch.search.profile_table import LatencyTable, hardware_name, network_identity

#: Rounds of timing, and of whole networks, of which there are few.
ROUNDS, CHECK_ROUNDS = 7, 15
#: A call lasts about this long, so that the clock and the call itself do not count.
CALL_SECONDS = 1e-3
MAX_IMAGES = 256
#: Random configurations whose predicted latency is compared with a measured one.
CHECKED = 10
#: Uniform configurations at which what is no layer is measured.
REST_BITS = (2, 4, 8)

Key = TypeVar("Key", bound=Hashable)


def measure(
    net: QuantizedNet, choices: Sequence[int], ends: Sequence[int], threads: int, on_progress: OnProgress,
    *, rounds: int = ROUNDS, seed: int = 0,
) -> LatencyTable:  # fmt: skip
    """Measure a network.

    :param net: calibrated; its bits are changed.
    :param choices: bits of the search.
    :param ends: further bits, of fixed layers.
    :param threads: a batch of images is shared out among so many; times are for each image of the batch. With one
        thread the processor's time counts, which other processes do not add to.
    :param rounds: of timing.
    :param seed: of the images and the checked configurations.
    :raises ArqError: when the native engine is not built, or `threads` is below 1.
    """
    if engine.native_problem():
        raise ArqError(f"Latency is that of the native engine, which cannot run: {engine.native_problem()}.")
    if threads < 1:
        raise ArqError(f"threads = {threads}; choose at least 1.")
    bits = sorted({*choices, *ends})
    pairs = [LayerBits(w, a) for w, a in product(bits, repeat=2)]
    names, source = net.bitwidths.names, np.random.default_rng(seed)
    programs: dict[LayerBits, IntegerProgram] = {}
    for index, pair in enumerate(pairs):
        net.set_bitwidths(BitWidths.uniform(names, *pair))
        programs[pair] = lower(net)
        on_progress("lower the network at every pair of bits", index + 1, len(pairs), "")
    layers: dict[str, dict[LayerBits, int]] = {}
    for index, name in enumerate(names):
        calls: dict[LayerBits | int, Call] = {}
        for pair, program in programs.items():
            whole, quantizer = layer_program(program, name)
            calls[pair] = Call.of(whole, threads, source)
            if pair.activation not in calls:  # The quantizer does not know the weights.
                calls[pair.activation] = Call.of(quantizer, threads, source)
        spent = interleaved(calls, rounds, threads)
        layers[name] = {pair: max(0, round(spent[pair] - spent[pair.activation])) for pair in pairs}
        on_progress("measure layers", index + 1, len(names), name)
    table = LatencyTable(network_identity(net), hardware_name(), layers, 0)
    return _checked(net, table, bits, threads, source, on_progress, rounds, seed)


def _checked(
    net: QuantizedNet, table: LatencyTable, bits: Sequence[int], threads: int, source: np.random.Generator,
    on_progress: OnProgress, rounds: int, seed: int,
) -> LatencyTable:  # fmt: skip
    """The table with the time of what is no layer, and with predictions checked on random configurations."""
    names, generator = net.bitwidths.names, random.Random(seed)
    uniform = [BitWidths.uniform(names, b, b) for b in REST_BITS if b in bits] or [
        BitWidths.uniform(names, bits[-1], bits[-1])
    ]
    mixed = [
        BitWidths.from_mapping([(name, (generator.choice(bits), generator.choice(bits))) for name in names])
        for _ in range(CHECKED)
    ]
    calls = {}
    for index, bitwidths in enumerate([*uniform, *mixed]):
        net.set_bitwidths(bitwidths)
        calls[index] = Call.of(lower(net), threads, source)
        on_progress("compile whole networks", index + 1, len(uniform) + len(mixed), "")
    spent = interleaved(calls, CHECK_ROUNDS, threads)
    monotone = {name: table.monotone(name) for name in names}
    sums = [sum(monotone[name][pair] for name, pair in bitwidths) for bitwidths in (*uniform, *mixed)]
    rest = max(0, round(median(spent[index] - sums[index] for index in range(len(uniform)))))
    checks = [
        {"bitwidths": {name: list(pair) for name, pair in bitwidths}, "predicted_ns": sums[index] + rest,
         "measured_ns": round(spent[index]), "relative_error": (sums[index] + rest) / spent[index] - 1}
        for index, bitwidths in enumerate(mixed, len(uniform))
    ]  # fmt: skip
    facts = {
        "version": __version__, "isa": engine.native_isas()[-1], "threads": threads, "rounds": rounds,
        "bits": list(bits), "clock": "processor time" if threads == 1 else "wall time", "checks": checks,
    }  # fmt: skip
    return replace(table, rest=rest, facts=facts)


def summary(table: LatencyTable) -> dict[str, Any]:
    """What the command prints of a table: sizes, spread between bits, errors of the checked predictions."""
    checks = table.facts["checks"]
    errors = [abs(check["relative_error"]) for check in checks]
    widest = LayerBits(*(max(table.facts["bits"]),) * 2)
    smallest = LayerBits(*(min(table.facts["bits"]),) * 2)
    totals = {
        pair: (table.rest + sum(table.monotone(name)[pair] for name in table.layers)) / 1000
        for pair in (smallest, widest)
    }
    return {
        "hardware": table.hardware, "threads": table.facts["threads"], "layers": len(table.layers),
        "smallest bits, us": round(totals[smallest], 2), "largest bits, us": round(totals[widest], 2),
        "no layer, us": round(table.rest / 1000, 2), "checked configurations": len(checks),
        "relative error, median": round(median(errors), 4), "relative error, largest": round(max(errors), 4),
    }  # fmt: skip


# ---- programs of one layer ---------------------------------------------------------------------


def layer_program(program: IntegerProgram, name: str) -> tuple[IntegerProgram, IntegerProgram]:
    """The part of a program that runs one layer, and the quantizer that stands for what comes before it.

    :param program: as lowering makes them.
    :param name: layer.
    :returns: two programs that read an image of the shape of the layer's input.
    """
    named = program.metadata["tensor_names"]
    chain: list[O.Op] = [
        op for op in program.ops if isinstance(op, O.Conv2d | O.Linear) and named[str(op.output)] == name
    ]
    # A stream is requantized to the layer's bits on reading, and the layer's sums on writing.
    before = program.producer(chain[0].inputs[0])
    if isinstance(before, O.Requantize) and named[str(before.output)] == f"{name}.input":
        chain.insert(0, before)
    readers = [op for op in program.ops if chain[-1].output in op.inputs]
    if len(readers) == 1 and isinstance(readers[0], O.Requantize):
        chain.append(readers[0])
    entry = program.tensors[chain[0].inputs[0]]
    shape = entry.shape if len(entry.shape) == 3 else (1, 1, *entry.shape)
    lo, hi = max(entry.lo, INT16_MIN), min(entry.hi, INT16_MAX)
    ops: list[O.Op] = [
        O.InputQuantize(
            inputs=(0,), output=1, multiplier=np.ones(shape[-1], np.int64), offset=np.zeros(shape[-1], np.int64),
            shift=0, rounding="half_up", pre_lo=lo, pre_hi=hi, lo=lo, hi=hi,
        )
    ]  # fmt: skip
    if len(entry.shape) == 1:
        ops.append(O.Flatten(inputs=(1,), output=2))
    image, quantizer = TensorSpec(shape, lo, hi), list(ops)
    for op in chain:
        ops.append(replace(op, inputs=(len(ops),), output=len(ops) + 1))
    return _ending(ops, image), _ending(quantizer, image)


def _ending(ops: Sequence[O.Op], image: TensorSpec) -> IntegerProgram:
    """A program with these ops: of a result that is an image, one position stands for the logits."""
    found = list(ops)
    if len(infer(found, image)[-1].shape) == 3:
        one = (0, 1, 1)
        channels = (0, infer(found, image)[-1].shape[-1], 1)
        found.append(O.Slice(inputs=(len(found),), output=len(found) + 1, rows=one, columns=one, channels=channels))
        found.append(O.Flatten(inputs=(len(found),), output=len(found) + 1))
    return IntegerProgram(tuple(found), infer(found, image), len(found), {})


# ---- timing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A compiled program with images to run it on.

    :param run: runs it once on all images.
    :param images: how many these are.
    """

    run: Callable[[], object]
    images: int

    @classmethod
    def of(cls, program: IntegerProgram, threads: int, source: np.random.Generator) -> Call:
        """Compile a program, and choose as many images as make a call long enough to be timed.

        :param threads: that share the images.
        :param source: of the pixels.
        """
        backend = engine.NativeBackend(program, threads=threads)
        pixels = source.integers(max(0, program.input.lo), min(255, program.input.hi) + 1, (1, *program.input.shape))
        run = _runner(backend, pixels.astype(np.int16), threads)
        run()
        clock = _clock(threads)
        begin = clock()
        run()
        once = max(clock() - begin, 1e-7)
        images = threads * min(MAX_IMAGES, max(1, round(CALL_SECONDS / once)))
        run = _runner(backend, np.repeat(pixels.astype(np.int16), images, axis=0), threads)
        run()
        return cls(run, images)


def _clock(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def _runner(backend: engine.NativeBackend, pixels: NDArray[np.int16], threads: int) -> Callable[[], object]:
    if threads > 1:
        return lambda: backend.run(pixels)
    logits = np.empty((len(pixels), backend.program.num_classes), dtype=np.int32)
    # Without the checks of Python around it, which a deployed network does not have either.
    return lambda: engine._native.run(backend._handle, pixels, logits)  # type: ignore[attr-defined]


def interleaved(calls: Mapping[Key, Call], rounds: int, threads: int) -> dict[Key, float]:
    """Median nanoseconds for one image of each call, all of them timed once in every round.

    :param calls: what to time.
    :param rounds: how often.
    :param threads: with one, the processor's time is taken.
    """
    clock = _clock(threads)
    names = list(calls)
    spent: dict[Key, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            start = turn * len(names) // rounds  # Another one begins each round.
            for name in [*names[start:], *names[:start]]:
                begin = clock()
                calls[name].run()
                spent[name].append(clock() - begin)
    finally:
        if collecting:
            gc.enable()
    return {name: 1e9 * median(values) / calls[name].images for name, values in spent.items()}
