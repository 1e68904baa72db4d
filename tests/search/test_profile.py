"""Memory plans equal the compiled program's; layer programs are the layers; tables are monotone, and of one network."""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from arqsearch import models
from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.lowering import lower
from arqsearch.integer.native import compile_program
from arqsearch.integer.native.engine import native_available
from arqsearch.quantize.bitwidths import BitWidths, LayerBits
from arqsearch.quantize.cost import total_cost
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.search import profile, profile_table
from arqsearch.search.profile_memory import planned
from arqsearch.search.profile_table import LatencyTable, OtherMachineWarning, network_identity
from tests.quantize.nets import NETS, build
from tests.search.conftest import silent

needs_engine = pytest.mark.skipif(not native_available(), reason="the native engine is not built")


def network(name: str, **settings: object) -> QuantizedNet:
    """A network with random weights, not calibrated, and its normalisation."""
    kinds = {kind.__name__: kind for kind in NETS}
    torch.manual_seed(0)
    model, shape = (build(kinds[name]), (2, 8, 8)) if name in kinds else (models.build(name, 10), (3, 32, 32))
    for _ in range(3 if shape[0] == 3 else 0):  # So that batch norms fit and values neither vanish nor grow.
        model.train()(torch.randn(4, *shape))
    mean, std = (0.4, 0.55, 0.5)[: shape[0]], (0.25, 0.3, 0.25)[: shape[0]]
    return QuantizedNet(model.eval(), shape, mean, std, QuantizeSettings(**settings)).eval()  # type: ignore[arg-type]


def calibrate(net: QuantizedNet) -> None:
    pixels = torch.randint(0, 256, (4, *net.input_shape), generator=torch.Generator().manual_seed(1))
    net.calibrate([pixels.float()])


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ("Bottleneck", "Plain", "resnet20", "mobilenet_v2", "cnn_small")),
        ("Residual", {"multiplier": "pow2"}),
        ("Residual", {"residual_bits": 4}),
    ],
)
def test_planned_bytes_are_the_compiled_programs_for_any_bits(name: str, settings: dict[str, object]) -> None:
    net = network(name, **settings)
    layers = planned(net, net.layer_infos)
    calibrate(net)
    generator = random.Random(0)
    for _ in range(1 if name == "mobilenet_v2" else 3):
        bits = {name: (generator.randint(2, 8), generator.randint(2, 8)) for name in net.bitwidths.names}
        net.set_bitwidths(BitWidths.from_mapping(bits))
        stated = total_cost("peak_activation_bytes", layers, net.bitwidths)
        assert stated == compile_program(lower(net, noise_limit=30)).peak_activation_bytes


@pytest.mark.parametrize("name", ["Residual", "Plain"])
def test_clip_mode_is_planned_for_the_input_bits_that_need_most(name: str) -> None:
    net = network(name, input_mode="clip")
    stated = max(layer.activation_bytes or 0 for layer in planned(net, net.layer_infos))
    calibrate(net)
    needed = set()
    for bits in range(2, 9):
        net.set_bitwidths(BitWidths.uniform(net.bitwidths.names, bits, bits))
        needed.add(compile_program(lower(net, noise_limit=30)).peak_activation_bytes)
    assert max(needed) == stated


def test_planning_leaves_the_network_as_it_was() -> None:
    net = network("Residual")
    calibrate(net)
    net.set_bitwidths(BitWidths.uniform(net.bitwidths.names, 3, 5))
    before, program = {k: v.clone() for k, v in net.state_dict().items()}, lower(net).hash
    planned(net, net.layer_infos)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert lower(net).hash == program


# ---- programs of one layer ---------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("name", ["Residual", "Bottleneck", "Plain", "cnn_small"])
def test_layer_programs_compute_what_the_layer_computes(name: str) -> None:
    net = network(name)
    calibrate(net)
    net.set_bitwidths(BitWidths.uniform(net.bitwidths.names, 4, 5))
    program = lower(net)
    named = program.metadata["tensor_names"]
    for layer in net.bitwidths.names:
        whole, quantizer = profile.layer_program(program, layer)
        own = next(op for op in program.ops if named[str(op.output)] == layer and isinstance(op, O.Conv2d | O.Linear))
        kept = next(op for op in whole.ops if isinstance(op, type(own)))
        assert isinstance(kept, O.Conv2d | O.Linear) and np.array_equal(kept.weight, own.weight)
        assert whole.input.shape[-1] == whole.ops[0].multiplier.size  # type: ignore[union-attr]
        assert not any(isinstance(op, O.Conv2d | O.Linear) for op in quantizer.ops)
        # One more kind of op beside the layer: its requantizations.
        count = sum(isinstance(op, O.Requantize) for op in whole.ops)
        assert (
            count
            == sum(
                isinstance(op, O.Requantize) and (named[str(op.output)] == f"{layer}.input" or own.output in op.inputs)
                for op in program.ops
            )
            or len([op for op in program.ops if own.output in op.inputs]) > 1
        )
        pixels = np.random.default_rng(0).integers(whole.input.lo, whole.input.hi + 1, (3, *whole.input.shape))
        ours = whole.run(pixels.astype(np.int16), backend="native")
        assert torch.equal(ours, whole.run(pixels.astype(np.int16), backend="torch"))


# ---- tables ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    net = network("Residual")
    calibrate(net)
    return profile.measure(net, (2, 4, 8), (8,), 1, silent, rounds=3)


@needs_engine
def test_a_measured_table_holds_every_layer_and_pair(table: LatencyTable) -> None:
    net = network("Residual")
    assert tuple(table.layers) == net.bitwidths.names
    assert all(set(row) == {LayerBits(w, a) for w, a in product((2, 4, 8), repeat=2)} for row in table.layers.values())
    assert all(ns >= 0 for row in table.layers.values() for ns in row.values()) and table.rest >= 0
    checks = table.facts["checks"]
    assert len(checks) == profile.CHECKED
    layers = table.applied(net.layer_infos, network_identity(net))
    for check in checks:
        bits = BitWidths.from_mapping(check["bitwidths"])
        assert check["predicted_ns"] == total_cost("latency", layers, bits)
        assert check["relative_error"] == pytest.approx(check["predicted_ns"] / check["measured_ns"] - 1, abs=1e-3)
    assert profile.summary(table)["checked configurations"] == profile.CHECKED


@needs_engine
def test_more_threads_share_a_batch() -> None:
    net = network("Plain")
    calibrate(net)
    found = profile.measure(net, (8,), (), 2, silent, rounds=1)
    assert found.facts["threads"] == 2 and found.facts["clock"] == "wall time"
    with pytest.raises(ArqError, match="threads = 0"):
        profile.measure(net, (8,), (), 0, silent)


def made_up(net: QuantizedNet, seed: int) -> LatencyTable:
    generator = random.Random(seed)
    pairs = [LayerBits(w, a) for w, a in product((2, 3, 5, 8), repeat=2)]
    rows = {name: {pair: generator.randrange(1, 1000) for pair in pairs} for name in net.bitwidths.names}
    return LatencyTable(network_identity(net), profile_table.hardware_name(), rows, 77, {"bits": [2, 3, 5, 8]})


@pytest.mark.parametrize("seed", range(3))
def test_latencies_are_made_monotone_by_the_least_of_wider_bits(seed: int) -> None:
    net = network("Residual")
    table = made_up(net, seed)
    for name, row in table.layers.items():
        found = table.monotone(name)
        for (w, a), ns in found.items():
            assert ns == min(row[w2, a2] for w2, a2 in row if w2 >= w and a2 >= a)  # type: ignore[index]
            assert all(found[b] >= ns for b in found if b.weight >= w and b.activation >= a)


def test_a_table_is_saved_and_read(tmp_path: Path) -> None:
    net = network("Residual")
    table = made_up(net, 0)
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    layers = LatencyTable.load(tmp_path / "table.json").applied(net.layer_infos, network_identity(net))
    eight = BitWidths.uniform(net.bitwidths.names, 8, 8)
    assert total_cost("latency", layers, eight) == 77 + sum(row[LayerBits(8, 8)] for row in table.layers.values())


def test_a_table_of_another_network_is_refused() -> None:
    table = made_up(network("Residual"), 0)
    for other in (network("Residual", residual_bits=4), network("Plain")):
        with pytest.raises(ArqError, match="is about another network"):
            table.applied(other.layer_infos, network_identity(other))


def test_other_weights_are_the_same_network() -> None:
    net = network("Residual")
    before = network_identity(net)
    calibrate(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.25)
    net.set_bitwidths(BitWidths.uniform(net.bitwidths.names, 3, 3))
    assert network_identity(net) == before


def test_a_table_of_another_machine_warns() -> None:
    net = network("Residual")
    table = made_up(net, 0)
    with pytest.warns(OtherMachineWarning, match="was measured on an abacus"):
        replace(table, hardware="an abacus").applied(net.layer_infos, network_identity(net))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.applied(net.layer_infos, network_identity(net))


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArqError, match="arqsearch profile RECIPE --output"):
        LatencyTable.load(tmp_path / "absent.json")
    for text in ("no json", "[]", json.dumps({"format": "arqsearch-latency-0"})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ArqError, match="is no latency table"):
            LatencyTable.load(tmp_path / "bad.json")
