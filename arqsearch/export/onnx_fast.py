"""Fast ONNX: the program as onnxruntime's quantized operators, equal on every logit.

Tensors are bytes with a zero point wherever their range fits. Convolutions run as ``QLinearConv``, whose float rescale
is used where it is proven to give the program's integers (:mod:`arqsearch.export.onnx_rescale`); requantization of
bytes and residual sums are ``DequantizeLinear``, ``Add``, ``QuantizeLinear`` on proven numbers, which onnxruntime
merges into one operator. What cannot be proven runs as in strict ONNX: sums by ``ConvInteger``, requantization in
float32 or float64 where that is proven, else in int64. So every graph is exact; only its speed depends on the program.

- A branch of a residual sum seldom fits a byte. It is cut at 0 into two bytes, each the output of a ``QLinearConv``
  that saturates at the cut; both are added to the shortcut, one after the other.
- On x86 without VNNI onnxruntime adds pairs of byte products in 16 bits. Where a pair of weights could leave them,
  the layer's weights are uint8 with zero point 128, which every processor adds exactly; with ``vnni`` they stay int8.
- Weights are stored in 2, 4 or 8 bits; onnxruntime widens them once, when it loads the model.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from arqsearch.errors import ArqError
from arqsearch.export import onnx_strict as strict
from arqsearch.export.onnx_bytes import ByteGraph
from arqsearch.export.onnx_fast_rules import RULES, widen
from arqsearch.export.onnx_graph import GraphBuilder
from arqsearch.export.onnx_rescale import TOP
from arqsearch.export.runtime import (
    FORM_KEYS,
    HASH_KEY,
    INPUT,
    OUTPUT,
    RANGE_KEY,
    Model,
    load_model,
    open_session,
    read_metadata,
    require,
)
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import prove

FORM = "onnx-fast"
#: Metadata: how many requantizations run in which form, session options that must be set, logits of known images.
PLAN_KEY, OPTIONS_KEY, PROBE_KEY = FORM_KEYS[FORM], "arqsearch_session_options", "arqsearch_probe"
#: Makes onnxruntime turn int8 weights into uint8 on processors without VNNI.
PRECISION_OPTION = {"session.x64quantprecision": "1"}
PROBE_IMAGES = 4


def export_fast(program: IntegerProgram, path: str | Path, *, vnni: bool = False) -> dict[str, int]:
    """Write the program as an ONNX model of quantized operators.

    Input, output and metadata are those of the strict form; the metadata also holds the plan (the returned counts),
    session options that must be set, and a digest of the logits of a few images, which :func:`run_fast` repeats.

    :param path: where to write; folders are made.
    :param vnni: keep the 8-bit weights of 8-bit activations as int8. Faster, but on x86 processors without VNNI
        exact only with the session option that the metadata names and :func:`run_fast` sets there.
    :returns: how many requantizations run in which form: ``conv`` within a QLinearConv, ``codes`` between bytes,
        ``float32``, ``float64`` and ``int64`` as separate operators.
    :raises ArqError: when the range proof fails or the package onnx is missing.
    """
    graph = ByteGraph(require("onnx"), program, vnni, widen)
    prove(program)
    for op in program.ops:
        if type(op) in RULES:
            RULES[type(op)](graph, op)
    graph.node("Identity", graph.values[program.output], output=OUTPUT)
    plan = dict(sorted(graph.plan.items()))
    facts = {
        PLAN_KEY: json.dumps(plan),
        OPTIONS_KEY: json.dumps(PRECISION_OPTION if graph.may_saturate else {}),
        PROBE_KEY: _digest(program.run(probe_pixels(program.input)).numpy()),
    }
    strict.write_integers(graph, program, path, facts, opset=graph.opset)
    return plan


def run_fast(
    path: str | Path, pixels: Any, *, batch: int = 64, threads: int = 1, program: IntegerProgram | None = None
) -> np.ndarray:
    """Run an exported model with onnxruntime on the CPU, with the session options that it needs.

    Once for each session, a few known images are run and their logits compared with those of the program.

    :param pixels: integers ``(N, H, W, C)`` within the proven pixel range.
    :param batch: images per call, which bounds memory.
    :param threads: threads within an operator; the logits do not depend on it.
    :param program: refuse a model of another program.
    :returns: logits, int32 ``(N, K)``.
    :raises ArqError: when the file is missing or not such a model, the pixels do not fit it, or this processor or
        version of onnxruntime computes other integers.
    """
    model = load_fast(path, threads=threads)
    if program is not None and model.facts[HASH_KEY] != program.hash:
        raise ArqError(
            f"{path} states program {model.facts[HASH_KEY][:12]}, this is {program.hash[:12]}; export it again."
        )
    images = model.integer_pixels(pixels)
    return model.run(images, batch, np.int32)


def load_fast(path: str | Path, *, threads: int = 1) -> Model:
    """Open a model with the session options that it needs here, and check it once on known images.

    :raises ArqError: as :func:`run_fast`.
    """
    model = load_model(path, FORM, threads=threads)
    entries = json.loads(model.facts[OPTIONS_KEY])
    if entries and saturates():
        model = load_model(path, FORM, threads=threads, entries=entries)
    if model.session not in _PROBED:
        lo, hi = json.loads(model.facts[RANGE_KEY])
        logits = model.run(probe_pixels(TensorSpec(model.shape, lo, hi)), PROBE_IMAGES, np.int32)
        if _digest(logits) != model.facts[PROBE_KEY]:
            raise ArqError(
                f"{path}: onnxruntime {require('onnxruntime').__version__} computes other logits on this processor "
                "than the program has for known images. Export it again, or use the strict form, `--format onnx`."
            )
        _PROBED.add(model.session)
    return model


@lru_cache(maxsize=1)
def saturates() -> bool:
    """Whether onnxruntime adds pairs of uint8 by int8 products in 16 bits on this processor, as AVX2 alone does."""
    channels, side, top = 64, 3, 127
    graph = GraphBuilder(require("onnx"))
    one, zeros = graph.constant(1.0, "FLOAT"), {kind: graph.constant(0, kind) for kind in ("UINT8", "INT8")}
    weight = graph.constant(np.full((channels, channels, side, side), top), "INT8")
    total = channels * side * side * TOP * top
    scale = graph.constant(np.full(channels, 200 / total), "FLOAT")
    pixels = graph.cast(INPUT, "UINT8")
    graph.node("QLinearConv", pixels, one, zeros["UINT8"], weight, scale, zeros["INT8"], one, zeros["UINT8"],
               output=OUTPUT)  # fmt: skip
    model = graph.model("probe", ("INT16", (channels, side, side)), ("UINT8", (channels, 1, 1)), {})
    images = np.full((1, channels, side, side), TOP, np.int16)
    (result,) = open_session(model.SerializeToString()).run([OUTPUT], {INPUT: images})
    return bool((result != 200).any())


def check_fast(path: str | Path, program: IntegerProgram, pixels: Any, *, batch: int = 64, threads: int = 1) -> int:
    """Compare every logit of the model with the program's.

    :param pixels: integers ``(N, H, W, C)`` within the proven pixel range.
    :returns: how many logits were compared.
    :raises ArqError: naming how many differ, or when the model cannot be run or states another program.
    """
    logits = run_fast(path, pixels, batch=batch, threads=threads, program=program)
    expected = program.run(pixels).numpy()
    wrong = int((logits != expected).sum()) if logits.shape == expected.shape else expected.size
    if wrong:
        raise ArqError(f"{path}: {wrong} of {expected.size} logits differ from those of {program.hash[:12]}.")
    return int(expected.size)


def fast_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of an exported model."""
    return read_metadata(path, FORM)


def probe_pixels(spec: TensorSpec) -> np.ndarray:
    """Fixed images for a self-check, int16: half of them scattered over the range, half scattered over its two ends.

    :param spec: of the input.
    """
    places = np.arange(PROBE_IMAGES * int(np.prod(spec.shape)), dtype=np.uint64)
    # The golden ratio's multiplicative hash; its middle bits are well mixed.
    mixed = ((places * np.uint64(2654435761)) >> np.uint64(8)).astype(np.int64) & 0xFFFF
    values = spec.lo + mixed * (spec.hi - spec.lo) // 0xFFFF
    ends = np.where(mixed & 256, spec.hi, spec.lo)
    return np.where(places % 2 == 0, values, ends).reshape(PROBE_IMAGES, *spec.shape).astype(np.int16)


def _digest(logits: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(logits, dtype="<i4").tobytes()).hexdigest()


#: Sessions that gave the known logits.
_PROBED: WeakSet[Any] = WeakSet()
