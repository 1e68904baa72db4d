"""Images per second of the integer engine and its peers: one process, one thread, interleaved rounds.

Behind ``arqsearch bench integer-speed``. Every contender runs the same batch of the same network once in each round;
before that, the logits of the integer programs are compared with the reference backend, one by one.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np
import torch

from arqsearch.benchmarks import environment
from arqsearch.benchmarks.contenders import Contender, IntegerNetwork, TorchBest, TorchEager, engine_name
from arqsearch.benchmarks.networks import CONFIGURATIONS, Network, NetworkSpec
from arqsearch.benchmarks.results import FOLDER, this_machine
from arqsearch.benchmarks.runtimes import OnnxFiles, OnnxRuntime, OpenVino
from arqsearch.benchmarks.timing import Table, interleave, paired_ratio, rate
from arqsearch.errors import ArqError
from arqsearch.integer.backend_torch import TorchBackend
from arqsearch.quantize.network import Multiplier

#: Told ``(task, done, total, note)``.
OnProgress: TypeAlias = Callable[[str, int, int, str], None]
#: Makes everyone who is timed on one network.
Lineup: TypeAlias = Callable[[OnnxFiles], Sequence[Contender]]

RECIPE = "integer-speed"
#: Float network whose logits the peers are compared with, and the one that rates are compared with.
REFERENCE, BASELINE = "torch_eager", "torch_best"
OURS = "arqsearch_"
#: Images whose logits are compared with the reference backend, by resolution.
CHECKED_IMAGES = {32: 32, 224: 4}
ROUNDS, QUICK_ROUNDS = 15, 7
#: With ``--quick``, no round of a network begins after this many seconds of rounds.
QUICK_SECONDS = 6.0
#: Ratios in the summary: key, network, ours, theirs.
RATIOS = (
    ("resnet20_w4a4_vs_torch_eager", "resnet20", "arqsearch_w4a4", "torch_eager"),
    ("resnet20_w4a4_vs_torch_best", "resnet20", "arqsearch_w4a4", "torch_best"),
    ("resnet20_w4a4_vs_openvino_int8", "resnet20", "arqsearch_w4a4", "openvino_int8"),
    ("resnet20_w8a8_vs_onnxruntime_int8", "resnet20", "arqsearch_w8a8", "onnxruntime_int8"),
    ("mobilenetv2_w4a4_vs_openvino_int8", "mobilenetv2", "arqsearch_w4a4", "openvino_int8"),
)


@dataclass
class Measurement:
    """What one network gave.

    :param spec: the network.
    :param batch: images in one call.
    :param macs: multiply-accumulates for one image.
    :param contenders: those that ran, in their order.
    :param table: seconds of each call.
    :param mismatches: logits that differ from the reference backend, by contender: ours only.
    :param errors: relative error of the logits against the float network, by contender: peers only.
    :param absent: why a contender did not run.
    :param seconds: wall time of preparing, checking and timing.
    """

    spec: NetworkSpec
    batch: int
    macs: int = 0
    contenders: list[Contender] = field(default_factory=list)
    table: Table = field(default_factory=dict)
    mismatches: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def lineup(isa: str) -> Lineup:
    """Everyone: our configurations, PyTorch twice, onnxruntime and OpenVINO in fp32 and int8.

    :param isa: instruction set, of ours and of the peers that can be limited.
    """

    def make(files: OnnxFiles) -> list[Contender]:
        return [
            TorchEager(isa), TorchBest(isa), OnnxRuntime("fp32", files), OnnxRuntime("int8", files),
            OpenVino("fp32", files, isa), OpenVino("int8", files, isa),
            *(IntegerNetwork(configuration, isa) for configuration in CONFIGURATIONS),
        ]  # fmt: skip

    return make


def measure(
    spec: NetworkSpec,
    make: Lineup,
    rounds: int,
    on_progress: OnProgress,
    *,
    batch: int | None = None,
    seconds: float = float("inf"),
    multiplier: Multiplier = "15",
) -> Measurement:
    """Prepare every contender on one network, check ours, and time all in interleaved rounds.

    :param spec: the network.
    :param make: makes the contenders.
    :param rounds: rounds of timing.
    :param batch: images in one call; default: the network's own.
    :param seconds: no further round begins after this time.
    :param multiplier: requantization multipliers of the integer programs.
    """
    torch.set_num_threads(1)
    begin = time.perf_counter()
    images = batch or spec.batch
    task = f"{spec.name}: prepare"
    on_progress(task, 0, 1, "network")
    network = Network(spec, images, multiplier)
    found, files = Measurement(spec, images), OnnxFiles(network)
    outputs: dict[str, np.ndarray] = {}
    try:
        everyone = make(files)
        for index, contender in enumerate(everyone):
            on_progress(task, index, len(everyone), contender.name)
            logits = _prepared(contender, network, found)
            if logits is not None:
                outputs[contender.name] = logits
                found.contenders.append(contender)
        on_progress(task, len(everyone), len(everyone), "")
        found.macs = network.macs
        _compare(found, network, outputs)
        calls = {contender.name: contender.run for contender in found.contenders}
        found.table = interleave(
            calls, rounds, seconds, lambda done: on_progress(f"{spec.name}: rounds", done, rounds, "")
        )
    finally:
        files.close()
    found.seconds = time.perf_counter() - begin
    return found


def _prepared(contender: Contender, network: Network, found: Measurement) -> np.ndarray | None:
    """Logits of the first call, which also warms up; None, with the reason noted, where a peer cannot run."""
    reason = contender.available()
    if reason is None:
        try:
            contender.prepare(network)
            return contender.run()
        except Exception as error:
            # A runtime of others that refuses this network is a gap in the table; a fault of ours is a fault.
            if contender.name.startswith(OURS):
                raise
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    found.absent[contender.name] = reason
    return None


def _compare(found: Measurement, network: Network, outputs: Mapping[str, np.ndarray]) -> None:
    """Fill in the mismatches of ours, and the peers' distance from the float network."""
    count = min(CHECKED_IMAGES.get(found.spec.resolution, 4), found.batch)
    floats = outputs.get(REFERENCE)
    for contender in found.contenders:
        if contender.program is not None:
            expected = TorchBackend(contender.program).run(network.pixels[:count]).numpy()
            found.mismatches[contender.name] = differing(outputs[contender.name][:count], expected)
        elif floats is not None and contender.name != REFERENCE:
            distance = np.linalg.norm(outputs[contender.name] - floats) / np.linalg.norm(floats)
            found.errors[contender.name] = float(distance)


def differing(logits: np.ndarray, expected: np.ndarray) -> int:
    """How many logits differ; all of them where the shapes do."""
    if logits.shape != expected.shape:
        return int(expected.size)
    return int(np.count_nonzero(logits != expected))


# ---- what is told ----------------------------------------------------------------------------


def machine(isa: str) -> dict[str, Any]:
    """Facts that every row and the summary carry."""
    return {
        "hardware": this_machine(),
        "cpu": environment.processor(),
        "isa": isa,
        "engine": engine_name(),
        "versions": environment.versions(),
    }


def summary(measured: Iterable[Measurement], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of the last line: ratios, mismatches, machine; null where a contender or network is absent.

    :param measured: all networks.
    :param facts: as :func:`machine`.
    """
    found = {item.spec.name: item for item in measured}
    ratios = {
        key: paired_ratio(found[network].table, ours, theirs) if network in found else None
        for key, network, ours, theirs in RATIOS
    }
    return {
        **{key: None if value is None else round(value, 3) for key, value in ratios.items()},
        "mismatches": sum(sum(item.mismatches.values()) for item in found.values()),
        "mismatches_checked": sum(len(item.mismatches) for item in found.values()),
        **facts,
        "absent": {name: reason for item in found.values() for name, reason in item.absent.items()},
        "images_per_second": {
            name: {c: round(rate(item.table[c], item.batch).median, 1) for c in item.table}
            for name, item in found.items()
        },
        "rounds": {name: max(map(len, item.table.values()), default=0) for name, item in found.items()},
        "seconds": {name: round(item.seconds, 1) for name, item in found.items()},
    }


def rows(measured: Iterable[Measurement], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each network and contender.

    :param measured: all networks.
    :param facts: as :func:`machine`.
    """
    versions = " ".join(f"{name}={version}" for name, version in facts["versions"].items())
    listed = []
    for item in measured:
        for contender in item.contenders:
            times = item.table[contender.name]
            speed, ratio = rate(times, item.batch), paired_ratio(item.table, contender.name, BASELINE)
            listed.append(
                {
                    "recipe": RECIPE, "version": facts["versions"]["arqsearch"], "hardware": facts["hardware"],
                    "cpu": facts["cpu"], "network": item.spec.title, "resolution": item.spec.resolution,
                    "batch": item.batch, "mmacs": round(item.macs / 1e6, 2), "contender": contender.name,
                    "bits": contender.bits, "images_per_second": round(speed.median, 2),
                    "images_per_second_min": round(speed.low, 2), "images_per_second_max": round(speed.high, 2),
                    "ratio_to_torch_best": "" if ratio is None else round(ratio, 3), "rounds": len(times),
                    "mismatches": item.mismatches.get(contender.name, ""),
                    "relative_error": _short(item.errors.get(contender.name)), "limit": facts["isa"],
                    "isa": contender.isa, "note": contender.note, "versions": versions,
                }
            )  # fmt: skip
    return listed


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def table_lines(item: Measurement) -> list[list[str]]:
    """Rows of text for people: contender, images per second, spread, times torch best, milliseconds an image."""
    lines = []
    for contender in item.contenders:
        times = item.table[contender.name]
        speed, ratio = rate(times, item.batch), paired_ratio(item.table, contender.name, BASELINE)
        lines.append(
            [
                contender.name, f"{speed.median:,.1f}", f"{speed.low:,.1f}–{speed.high:,.1f}",
                "–" if ratio is None else f"{ratio:.2f}", f"{1000 * median(times) / item.batch:.3f}",
                f"{speed.median * item.macs / 1e9:.1f}", contender.isa, contender.note,
            ]
        )  # fmt: skip
    return lines


def csv_path(output: Path, facts: Mapping[str, Any]) -> Path:
    """Where the rows go: the file itself, or in a folder ``integer-speed-<hardware>[-<isa>].csv``."""
    if output.suffix == ".csv":
        return output
    limit = "" if facts["isa"] == "auto" else f"-only-{facts['isa']}"
    return output / f"{RECIPE}-{facts['hardware']}{limit}.csv"


def write_rows(listed: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a CSV file; its folder is made."""
    if not listed:
        raise ArqError(f"Nothing was measured, so {FOLDER}/ gets no file; choose another --network.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(listed[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(listed)
