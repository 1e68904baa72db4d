"""A config and its base rebuild the program hash for hash; anything altered is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from arqsearch.errors import ArqError
from arqsearch.export.config import apply_config, load_config, load_network, schema_text, write_config
from arqsearch.integer.lowering import lower
from arqsearch.integer.program import IntegerProgram
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from tests.quantize.nets import NETS, Plain, Residual, build

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "quantization-config.schema.json"
SETTINGS: tuple[dict[str, Any], ...] = (
    {"input_mode": "wide"},
    {"input_mode": "clip", "rounding": "half_even"},
    {"input_mode": "wide", "multiplier": "15", "residual_bits": 5},
    {"input_mode": "wide", "multiplier": "pow2"},
    {"input_mode": "clip", "multiplier": "pow2", "rounding": "floor"},
)
MIXED = [(8, 8), (2, 3), (4, 4), (3, 7), (5, 2), (8, 8)]


def quantized(kind: type[nn.Module], settings: dict[str, Any]) -> QuantizedNet:
    """A network with mixed bits and steps as after training: no simple numbers."""
    torch.manual_seed(3)
    net = QuantizedNet(build(kind), (2, 8, 8), (0.4914, 0.1307), (0.247, 1 / 3), QuantizeSettings(**settings)).eval()
    net.calibrate([torch.randint(-40, 296, (32, 2, 8, 8)).float()])
    with torch.no_grad():
        for parameter in net.quantizer_parameters():
            parameter.mul_(1 + 0.05 * torch.rand_like(parameter))
    names = net.bitwidths.names
    net.set_bitwidths(BitWidths.from_mapping(list(zip(names, MIXED[: len(names)], strict=True))))
    return net


def write(kind: type[nn.Module], settings: dict[str, Any], folder: Path) -> tuple[Path, IntegerProgram]:
    net = quantized(kind, settings)
    program = lower(net, noise_limit=40)
    model = {"name": f"tests.quantize.nets:{kind.__name__}", "options": {}, "num_classes": 5}
    return write_config(net, program, folder, model=model, sigma=0.05), program


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, IntegerProgram]:
    return write(Residual, {}, tmp_path)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_round_trip_reproduces_the_hash(kind: type[nn.Module], settings: dict[str, Any], tmp_path: Path) -> None:
    path, program = write(kind, settings, tmp_path / "export")
    outcome = apply_config(path, output=tmp_path / "again.safetensors")
    assert outcome == {
        "program_hash": program.hash,
        "matches": True,
        "output": str(tmp_path / "again.safetensors"),
    }
    rebuilt = IntegerProgram.load(tmp_path / "again.safetensors")
    assert rebuilt.hash == program.hash
    pixels = torch.randint(-40, 296, (4, 8, 8, 2), dtype=torch.int16)
    assert torch.equal(rebuilt.run(pixels), program.run(pixels))


def test_config_says_what_the_network_is(written: tuple[Path, IntegerProgram]) -> None:
    path, program = written
    config, net = load_config(path), quantized(Residual, {})
    assert (config.program_hash, config.noise_limit, config.sigma) == (program.hash, 40, 0.05)
    assert config.model.mean == [0.4914, 0.1307] and config.model.input_shape == (2, 8, 8)
    assert [v.name for v in config.layers] == list(net.bitwidths.names)
    assert list(config.bitwidths.values()) == MIXED[: len(config.layers)]
    stem, last = config.layers[0], config.layers[-1]
    assert stem.weight_scales == net.layer("stem").weight_steps.step(8).tolist() and len(stem.weight_scales) == 4
    assert len(last.weight_scales) == 1 and last.kind == "linear"
    assert stem.activation_signed and not last.activation_signed
    assert [v.name for v in config.streams] == list(net.graph.streams) != []
    assert config.costs.bops == sum(
        info.macs * bits.weight * bits.activation
        for info, (_, bits) in zip(net.layer_infos, net.bitwidths, strict=True)
    )


def test_pixels_read_in_clip_mode_have_no_scale(tmp_path: Path) -> None:
    path, _ = write(Plain, {"input_mode": "clip", "rounding": "half_even"}, tmp_path)
    first, *others = load_config(path).layers
    assert first.activation_scale is None and first.rounding == "half_up"
    assert all(v.activation_scale is not None and v.rounding == "half_even" for v in others)


def test_rebuilt_network_computes_the_same(written: tuple[Path, IntegerProgram]) -> None:
    net = load_network(load_config(written[0]), written[0].parent / "base.safetensors")
    pixels = torch.randint(0, 256, (8, 2, 8, 8)).float()
    with torch.no_grad():
        assert torch.equal(net(pixels), quantized(Residual, {})(pixels))


def test_folder_and_other_place_of_the_weights(written: tuple[Path, IntegerProgram], tmp_path: Path) -> None:
    path, program = written
    assert apply_config(path.parent)["program_hash"] == program.hash
    (path.parent / "base.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ArqError, match="--weights"):
        apply_config(path)
    assert apply_config(path, tmp_path / "elsewhere.safetensors")["output"] is None


def test_writing_is_deterministic(tmp_path: Path) -> None:
    first, second = (write(Plain, {}, tmp_path / name)[0] for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_program_of_other_weights_is_not_written(tmp_path: Path) -> None:
    net = quantized(Plain, {})
    program = lower(net, noise_limit=40)
    net.set_bitwidths(BitWidths.uniform(net.bitwidths.names, 8, 8))
    with pytest.raises(ArqError, match="not the lowered form"):
        write_config(net, program, tmp_path, model={"name": "x", "num_classes": 5}, sigma=0.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "x", "option": {}}, "Did you mean 'options'"),
        ({"options": {}}, "name: Field required"),
        ({"name": "x", "options": {"f": object()}}, "cannot be written as JSON"),
    ],
)
def test_wrong_model_facts_are_refused(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    net = quantized(Plain, {})
    with pytest.raises(ArqError, match=message):
        write_config(net, lower(net), tmp_path, model=model, sigma=0.0)


def _set(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        target: Any = data
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value(target[keys[-1]]) if callable(value) else value

    return change


def _swap_layers(data: dict[str, Any]) -> None:
    data["layers"][:2] = data["layers"][1::-1]
    data["bitwidths"] = {v["name"]: [v["weight_bits"], v["activation_bits"]] for v in data["layers"]}


def _other_bits(data: dict[str, Any]) -> None:
    data["layers"][1]["weight_bits"] = data["bitwidths"]["conv1"][0] = 6


def _rename(data: dict[str, Any]) -> None:
    data["layers"][1]["name"] = "conv9"
    data["bitwidths"] = {("conv9" if k == "conv1" else k): v for k, v in data["bitwidths"].items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("layers", 1, "weight_scales", 0, value=lambda v: v * 1.5), "was altered: its bits, scales"),
        (_set("layers", 2, "activation_scale", value=lambda v: v * 1.01), "was altered: its bits, scales"),
        (_set("streams", 0, "scale", value=lambda v: v * 0.9), "was altered: its bits, scales"),
        (_set("model", "std", 0, value=0.25), "was altered: its bits, scales"),
        (_set("settings", "multiplier", value="15"), "was altered: its bits, scales"),
        (_set("noise_limit", value=41), "was altered: its bits, scales"),
        (_set("program_hash", value="0" * 64), "was altered: its bits, scales"),
        (_other_bits, "was altered: its bits, scales"),
        (_set("layers", 1, "activation_scale", value=None), "was altered"),
        (_set("layers", 1, "activation_signed", value=True), "layers.1.activation_signed is True"),
        (_set("streams", 0, "bits", value=7), "streams.0.bits is 7, the network has 8"),
        (_set("costs", "bops", value=1), "costs.bops is 1"),
        (_set("bitwidths", "stem", value=[2, 2]), "must agree"),
        (_set("layers", 0, "weight_scales", value=[0.1]), "need 4 scale"),
        (_swap_layers, "in execution order"),
        (_rename, "Did you mean 'conv1'"),
        (_set("base", "sha256", value="0" * 64), "is not the base of this config"),
        (_set("base", "file", value="../base.safetensors"), "base.file"),
        (_set("model", "name", value="tests.quantize.nets:Plain"), "does not fit Plain"),
    ],
)
def test_altered_config_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, written: tuple[Path, IntegerProgram], tmp_path: Path
) -> None:
    data = json.loads(written[0].read_text())
    change(data)
    written[0].write_text(json.dumps(data))
    with pytest.raises(ArqError, match=message):
        apply_config(written[0], output=tmp_path / "never.safetensors")
    assert not (tmp_path / "never.safetensors").exists()


def test_other_weights_are_refused(written: tuple[Path, IntegerProgram], tmp_path: Path) -> None:
    from arqsearch.models import save_weights

    save_weights(build(Residual, seed=1), tmp_path / "other.safetensors")
    with pytest.raises(ArqError, match="is not the base of this config"):
        apply_config(written[0], tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format_version", value=2), "format_version 2, this version of arqsearch knows 1"),
        (_set("arithmetic_version", value=99), "arithmetic_version 99"),
        (_set("sigmas", value=1), "sigmas: unknown key. Did you mean 'sigma'"),
        (_set("layers", 2, "weight_bit", value=4), "layers.2.weight_bit: unknown key. Did you mean 'weight_bits'"),
        (_set("settings", "rounding", value="up"), "settings.rounding: .*'half_up'.*given: 'up'"),
        (_set("layers", 0, "weight_bits", value=9), "layers.0.weight_bits"),
        (_set("layers", 0, "weight_bits", value="8"), "layers.0.weight_bits: .*integer"),
        (_set("layers", 0, "weight_scales", 0, value=-0.5), "layers.0.weight_scales.0"),
        (_set("sigma", value=float("nan")), "sigma"),
        (lambda data: data.pop("streams"), "streams: Field required"),
        (lambda data: data.pop("format_version"), "not a quantization config"),
    ],
)
def test_reading_names_what_is_wrong(
    change: Callable[[dict[str, Any]], None], message: str, written: tuple[Path, IntegerProgram]
) -> None:
    data = json.loads(written[0].read_text())
    change(data)
    written[0].write_text(json.dumps(data))
    with pytest.raises(ArqError, match=message):
        load_config(written[0])


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ArqError, match="No quantization config"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArqError, match="not JSON"):
        load_config(tmp_path)


def test_committed_schema_is_that_of_the_code() -> None:
    command = "python -c \"from arqsearch.export.config import schema_text; print(schema_text(), end='')\""
    assert json.loads(SCHEMA.read_text()) == json.loads(schema_text()), f"write it again: {command} > {SCHEMA}"
