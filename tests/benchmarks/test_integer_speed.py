"""`arqsearch bench integer-speed`: order and ratios on made-up times, exactness checks, and the command itself."""

from __future__ import annotations

import csv
import gc
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from arqsearch.benchmarks import contenders, environment, integer_speed, networks, results
from arqsearch.benchmarks.cli import app
from arqsearch.benchmarks.contenders import Contender, IntegerNetwork, TorchBest, TorchEager
from arqsearch.benchmarks.networks import CONFIGURATIONS, Network, NetworkSpec
from arqsearch.benchmarks.runtimes import OnnxFiles, OnnxRuntime, OpenVino
from arqsearch.benchmarks.timing import MIN_ROUNDS, interleave, paired_ratio, rate, rotated
from arqsearch.errors import ArqError
from arqsearch.integer.backend_torch import TorchBackend
from arqsearch.integer.program import IntegerProgram

TINY = NetworkSpec("resnet20", "Tiny", "cnn_residual", 8, 6, 4)
KEYS = {key for key, *_ in integer_speed.RATIOS}
FACTS = {
    "hardware": "2x-test", "cpu": "Test CPU", "isa": "auto", "engine": "torch",
    "versions": {"arqsearch": "0.1.0", "torch": "2"},
}  # fmt: skip


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(TINY, TINY.batch)


def silent(*_: object) -> None:
    """No progress."""


class OneLogitOff(IntegerNetwork):
    """An integer network whose engine makes one mistake in the whole batch."""

    def run(self) -> np.ndarray:
        logits = super().run().copy()
        logits[1, 2] += 1
        return logits


class Missing(TorchEager):
    name = "openvino_int8"

    def available(self) -> str | None:
        return "not on this machine"


class Refusing(TorchEager):
    name = "onnxruntime_int8"

    def prepare(self, network: Network) -> None:
        raise RuntimeError("unsupported operator\nand a long story")


def team(*members: Callable[[], Contender]) -> Callable[[str], integer_speed.Lineup]:
    """A stand-in for `integer_speed.lineup`."""

    def lineup(isa: str) -> integer_speed.Lineup:
        def make(files: OnnxFiles) -> Sequence[Contender]:
            return [member() for member in members]

        return make

    return lineup


# ---- order and ratios ------------------------------------------------------------------------


def test_every_round_has_everyone_and_another_one_first() -> None:
    names = ["a", "b", "c", "d"]
    orders = [rotated(names, turn) for turn in range(4)]
    assert [order[0] for order in orders] == names
    assert all(sorted(order) == names for order in orders)
    assert rotated(names, 5) == ["b", "c", "d", "a"] and rotated([], 3) == []


def test_interleaved_calls_are_timed_one_by_one_in_rotated_order() -> None:
    now, seen = [0.0], []
    costs = {"fast": 1.0, "slow": 4.0}

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            assert not gc.isenabled()
            seen.append(name)
            now[0] += costs[name]

        return run

    told: list[int] = []
    table = interleave({name: call(name) for name in costs}, 3, on_round=told.append, clock=lambda: now[0])
    assert seen == ["fast", "slow", "slow", "fast", "fast", "slow"]
    assert table == {"fast": [1.0] * 3, "slow": [4.0] * 3} and told == [1, 2, 3] and gc.isenabled()


def test_no_round_begins_late_but_a_few_are_always_run() -> None:
    now = [0.0]

    def second() -> None:
        now[0] += 1.0

    assert len(interleave({"a": second}, 50, seconds=0.5, clock=lambda: now[0])["a"]) == MIN_ROUNDS
    assert len(interleave({"a": second}, 50, seconds=4.5, clock=lambda: now[0])["a"]) == 5


def test_ratios_are_medians_of_the_ratios_within_rounds() -> None:
    """The machine was slow in the first two rounds for one of the two each: pairing tells, medians alone do not."""
    table = {"ours": [1.0, 2.0, 1.0, 1.0, 3.0], "theirs": [3.0, 3.0, 2.0, 4.0, 9.0], "absent": []}
    ratio = paired_ratio(table, "ours", "theirs")
    assert ratio == median([3.0, 1.5, 2.0, 4.0, 3.0]) == 3.0
    assert paired_ratio(table, "theirs", "ours") == pytest.approx(1 / 3)
    assert paired_ratio(table, "ours", "absent") is None and paired_ratio(table, "unknown", "ours") is None
    speed = rate(table["ours"], 12)
    assert (speed.median, speed.low, speed.high) == (12.0, 4.0, 12.0)


def test_the_summary_takes_its_ratios_from_the_right_pairs() -> None:
    names = [*(f"arqsearch_{name}" for name in CONFIGURATIONS), "torch_eager", "torch_best", "onnxruntime_int8"]
    table = {name: [float(2**place)] * 3 for place, name in enumerate(names)}
    found = integer_speed.Measurement(TINY, 8, table=table, mismatches={"arqsearch_w4a4": 2, "arqsearch_w8a8": 3})
    told = integer_speed.summary([found], FACTS)
    assert told["resnet20_w4a4_vs_torch_eager"] == 8.0  # 2^4 against 2^1
    assert told["resnet20_w4a4_vs_torch_best"] == 16.0
    assert told["resnet20_w8a8_vs_onnxruntime_int8"] == 64.0
    assert told["resnet20_w4a4_vs_openvino_int8"] is None and told["mobilenetv2_w4a4_vs_openvino_int8"] is None
    assert told["mismatches"] == 5 and told["images_per_second"]["resnet20"]["torch_best"] == 0.2


# ---- networks and contenders -----------------------------------------------------------------


def test_pixels_are_noisy_images_that_the_proofs_cover(network: Network) -> None:
    assert network.pixels.dtype == np.int16 and network.pixels.shape == (6, 8, 8, 3)
    assert network.pixels.min() < 0 and network.pixels.max() > 255
    assert np.array_equal(network.pixels, Network(TINY, 6).pixels)
    limit = network.table.hi
    assert -limit <= network.pixels.min() and network.pixels.max() <= 255 + limit


def test_batch_norm_has_the_statistics_of_the_images(network: Network) -> None:
    seen: list[torch.Tensor] = []
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append(o)) for m in network.model.modules()
             if isinstance(m, nn.BatchNorm2d)]  # fmt: skip
    with torch.no_grad():
        network.model(network.normalized())
    for hook in hooks:
        hook.remove()
    assert len(seen) == 5
    for values in seen:
        assert abs(float(values.mean())) < 0.02 and 0.9 < float(values.std()) < 1.1
    assert all(module.momentum == 0.1 for module in network.model.modules() if isinstance(module, nn.BatchNorm2d))


def test_configurations_keep_the_ends_at_eight_bits(network: Network) -> None:
    for configuration in CONFIGURATIONS:
        bits = [tuple(pair) for _, pair in network.bitwidths(configuration)]
        assert bits[0] == bits[-1] == (8, 8)
        if configuration == "w2a4":
            assert set(bits[1:-1]) == {(2, 4)}
    assert len({pair for _, pair in network.bitwidths("mixed")}) >= 4
    assert network.bitwidths("mixed") == Network(TINY, 2).bitwidths("mixed")


def test_every_network_is_known_by_name() -> None:
    assert [spec.name for spec in networks.select([], quick=True)] == ["resnet20", "mobilenetv2"]
    assert [spec.resolution for spec in networks.select([], quick=False)] == [32, 32, 224, 224]
    assert [spec.name for spec in networks.select(["mobilenetv2", "mobilenetv2"], quick=True)] == ["mobilenetv2"]
    with pytest.raises(ArqError, match="Did you mean 'resnet20'"):
        networks.select(["resnet-20"], quick=False)


@pytest.mark.parametrize(
    "kind", ["torch_best", "onnxruntime_fp32", "onnxruntime_int8", "openvino_fp32", "openvino_int8"]
)
def test_peers_compute_the_same_network(network: Network, kind: str) -> None:
    """int8 is near, fp32 equal up to rounding: nobody is timed on another network."""
    if kind.startswith("openvino"):
        pytest.importorskip("openvino")
    eager = TorchEager()
    eager.prepare(network)
    expected = eager.run()
    files = OnnxFiles(network)
    package, _, precision = kind.partition("_")
    makers: dict[str, Callable[[], Contender]] = {
        "torch": TorchBest,
        "onnxruntime": lambda: OnnxRuntime(precision, files),
        "openvino": lambda: OpenVino(precision, files),
    }
    peer = makers[package]()
    assert peer.available() is None and peer.name == kind
    peer.prepare(network)
    distance = np.linalg.norm(peer.run() - expected) / np.linalg.norm(expected)
    files.close()
    assert distance < (0.2 if precision == "int8" else 1e-4)
    assert precision != "int8" or distance > 1e-4, "not quantized"


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_ours_runs_the_lowered_program_from_pixels(network: Network, configuration: str) -> None:
    ours = IntegerNetwork(configuration)
    ours.prepare(network)
    assert ours.program is not None
    assert (ours.program.input.lo, ours.program.input.hi) == (-network.table.hi, 255 + network.table.hi)
    assert ours.program.metadata["bitwidths"] == {n: list(b) for n, b in network.bitwidths(configuration)}
    assert np.array_equal(ours.run(), TorchBackend(ours.program).run(network.pixels).numpy())


def test_the_native_engine_runs_on_one_thread_at_the_chosen_instruction_set(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    class Backend:
        def __init__(self, program: IntegerProgram, isa: str, threads: int) -> None:
            asked.append((isa, threads))
            self.isa, self.reference = "avx512", TorchBackend(program)

        def run(self, pixels: np.ndarray) -> torch.Tensor:
            return self.reference.run(pixels)

    monkeypatch.setattr(contenders.engine, "native_available", lambda: True)
    monkeypatch.setattr(contenders.engine, "NativeBackend", Backend)
    ours = IntegerNetwork("w4a4", "auto")
    ours.prepare(network)
    assert asked == [("auto", 1)] and ours.isa == "avx512" and ours.run().shape == (6, 10)
    assert ours.note == "native engine, 15-bit multipliers" and contenders.engine_name() == "native"


def test_an_instruction_set_that_the_engine_lacks_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders.engine, "native_available", lambda: True)
    monkeypatch.setattr(contenders.engine, "native_isas", lambda: ("portable", "avx2"))
    contenders.require_isa("auto")
    contenders.require_isa("avx2")
    with pytest.raises(ArqError, match=r"do not run --isa avx512\. Did you mean 'avx2'"):
        contenders.require_isa("avx512")
    monkeypatch.setattr(contenders.engine, "native_available", lambda: False)
    contenders.require_isa("avx512")


# ---- a whole measurement ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> integer_speed.Measurement:
    make = team(TorchEager, TorchBest, Missing, Refusing, lambda: IntegerNetwork("w4a4"), lambda: OneLogitOff("w8a8"))
    return integer_speed.measure(TINY, make("auto"), 3, silent)


def test_wrong_logits_are_counted_for_whoever_is_wrong(measured: integer_speed.Measurement) -> None:
    assert measured.mismatches == {"arqsearch_w4a4": 0, "arqsearch_w8a8": 1}
    assert integer_speed.differing(np.zeros((2, 3)), np.ones((2, 4))) == 8
    assert set(measured.errors) == {"torch_best"} and measured.errors["torch_best"] < 1e-4


def test_absent_peers_give_null_and_a_reason(measured: integer_speed.Measurement) -> None:
    told = integer_speed.summary([measured], FACTS)
    assert told["resnet20_w4a4_vs_openvino_int8"] is None and told["resnet20_w8a8_vs_onnxruntime_int8"] is None
    assert told["absent"] == {
        "openvino_int8": "not on this machine", "onnxruntime_int8": "RuntimeError: unsupported operator",
    }  # fmt: skip
    assert told["resnet20_w4a4_vs_torch_eager"] > 0 and told["mismatches"] == 1
    assert json.loads(json.dumps(told)) == told and set(told) >= KEYS


def test_a_fault_of_ours_is_no_gap_in_the_table() -> None:
    class Broken(IntegerNetwork):
        def prepare(self, network: Network) -> None:
            raise RuntimeError("kernel fault")

    with pytest.raises(RuntimeError, match="kernel fault"):
        integer_speed.measure(TINY, team(lambda: Broken("w4a4"))("auto"), 1, silent)


def test_rows_become_a_file_and_a_table(measured: integer_speed.Measurement, tmp_path: Path) -> None:
    listed = integer_speed.rows([measured], FACTS)
    path = integer_speed.csv_path(tmp_path / "results", FACTS)
    assert path.name == "integer-speed-2x-test.csv"
    assert integer_speed.csv_path(tmp_path, {**FACTS, "isa": "avx2"}).name == "integer-speed-2x-test-only-avx2.csv"
    assert integer_speed.csv_path(tmp_path / "own.csv", FACTS) == tmp_path / "own.csv"
    integer_speed.write_rows(listed, path)
    with path.open(newline="") as file:
        read = {row["contender"]: row for row in csv.DictReader(file)}
    assert list(read) == ["torch_eager", "torch_best", "arqsearch_w4a4", "arqsearch_w8a8"]
    ours, best = read["arqsearch_w4a4"], read["torch_best"]
    assert (best["ratio_to_torch_best"], best["batch"], best["rounds"]) == ("1.0", "6", "3")
    assert (ours["mismatches"], best["mismatches"], read["arqsearch_w8a8"]["mismatches"]) == ("0", "", "1")
    assert float(ours["images_per_second_min"]) <= float(ours["images_per_second"])
    assert float(ours["images_per_second"]) <= float(ours["images_per_second_max"])
    page = "<!-- results:integer-speed:rates -->\n<!-- /results -->\n<!-- results:integer-speed:milliseconds -->\n"
    text = results.rendered(f"{page}<!-- /results -->\n", tmp_path, "page")
    assert "Logits of ours that differ from the reference: 1." in text and "Test CPU" in text
    speed, ratio = float(ours["images_per_second"]), float(ours["ratio_to_torch_best"])
    assert f"| **arqsearch W4A4** | {speed:,.0f} ({ratio:.2f}×) |" in text
    assert "| PyTorch fp32, at its best |" in text and "(1.00×)" in text
    milliseconds = re.search(r"\| \*\*arqsearch W4A4\*\* \| ([\d.]+) ms, \d+ GMAC/s \|", text)
    assert milliseconds is not None and float(milliseconds[1]) == pytest.approx(1000 / speed, rel=0.02, abs=6e-4)
    assert "- `torch_eager`: fp32; instruction set not limited; batch norm not folded" in text


def test_an_empty_measurement_writes_no_file(tmp_path: Path) -> None:
    with pytest.raises(ArqError, match="Nothing was measured"):
        integer_speed.write_rows([], tmp_path / "empty.csv")


# ---- environment -----------------------------------------------------------------------------


def test_the_process_starts_again_once_with_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda *given: calls.append(given))
    for name in (*environment.wanted("avx2"), environment.MARK):
        monkeypatch.delenv(name, raising=False)
    environment.relaunch("avx2")
    ((program, arguments, variables),) = calls
    assert (program, arguments) == (sys.executable, [sys.executable, *sys.orig_argv[1:]])
    assert environment.wanted("avx2").items() <= variables.items()
    assert variables["OMP_NUM_THREADS"] == "1" and variables["MALLOC_MMAP_THRESHOLD_"] == "4294967296"
    assert variables["DNNL_MAX_CPU_ISA"] == variables["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    monkeypatch.setattr(os, "environ", variables)
    environment.relaunch("avx2")
    assert len(calls) == 1


def test_only_avx2_limits_the_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.wanted("auto") == environment.wanted("portable") == environment.FIXED
    assert (environment.peers_isa("avx2"), environment.peers_isa("portable")) == ("avx2", "not limited")
    assert OnnxRuntime.isa == "cannot be limited"
    with pytest.raises(ArqError, match="Did you mean 'avx512'"):
        environment.wanted("avx-512")


def test_the_machine_is_named() -> None:
    text = "model name\t: Some CPU\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: Some CPU\n"
    assert environment.processor(text) == "Some CPU (family 26, model 2)"
    assert environment.processor("")
    assert {"arqsearch", "torch", "numpy", "onnxruntime"} <= set(environment.versions())


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call the command in this process on the tiny network with few contenders."""
    small = {"resnet20": TINY, "mobilenetv2": replace(TINY, name="mobilenetv2")}
    monkeypatch.setattr(networks, "NETWORKS", small)
    monkeypatch.setattr(environment, "relaunch", lambda isa: environment.wanted(isa))
    monkeypatch.setattr(integer_speed, "lineup", team(TorchEager, TorchBest, lambda: IntegerNetwork("w4a4")))

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["integer-speed", *map(str, arguments)])

    return call


def test_the_last_line_is_one_json_object(quick: Callable[..., Any], tmp_path: Path) -> None:
    done = quick("--quick", "--rounds", 3, "--output", tmp_path / "speed.csv")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert set(told) >= KEYS
    for key in KEYS:
        assert told[key] is None or isinstance(told[key], float)
    assert told["resnet20_w4a4_vs_torch_best"] > 0 and told["mobilenetv2_w4a4_vs_openvino_int8"] is None
    assert (told["mismatches"], told["mismatches_checked"], told["isa"]) == (0, 2, "auto")
    assert {"hardware", "cpu", "versions", "engine"} <= set(told) and told["rounds"]["resnet20"] == 3
    assert "arqsearch_w4a4" in done.stdout and f"Wrote {tmp_path / 'speed.csv'}" in done.stdout
    assert len((tmp_path / "speed.csv").read_text().splitlines()) == 7


def test_a_wrong_logit_fails_the_command(quick: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_speed, "lineup", team(lambda: OneLogitOff("w4a4")))
    done = quick("--network", "resnet20", "--rounds", 1)
    assert done.exit_code == 1 and "1 logits differ" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["mismatches"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--network", "resnet21"), "Did you mean 'resnet20'"),
        (("--isa", "sse"), "No instruction set 'sse'"),
        (("--multiplier", "16"), "No multiplier '16'"),
    ],
)
def test_mistakes_are_named(quick: Callable[..., Any], arguments: tuple[str, str], message: str) -> None:
    done = quick(*arguments)
    assert isinstance(done.exception, ArqError) and message in str(done.exception)


def test_help_lists_the_options() -> None:
    listed = CliRunner().invoke(app, ["--help"])
    assert listed.exit_code == 0 and "integer-speed" in listed.output
    shown = CliRunner().invoke(app, ["integer-speed", "-h"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    for option in ("--quick", "--network", "--isa", "--rounds", "--output", "--multiplier"):
        assert option in shown.output
    for name in (*networks.NETWORKS, *environment.ISAS):
        assert name in " ".join(shown.output.split())
