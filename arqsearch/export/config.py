"""Quantization config: bits, scales, signedness and rounding of every layer, from which the program can be rebuilt.

The config and the float weights beside it hold everything that lowering reads, so the same program hash
comes out on another machine. It is also the form for tools that quantize by themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arqsearch.errors import ArqError, nearest
from arqsearch.export.config_schema import (
    CONFIG_FILE,
    FORMAT_VERSION,
    BaseSection,
    CostSection,
    LayerSection,
    ModelSection,
    QuantizationConfig,
    SettingsSection,
    StreamSection,
    load_config,
    schema_text,
    validated,
)
from arqsearch.integer.lowering import lower
from arqsearch.integer.program import ARITHMETIC_VERSION, IntegerProgram
from arqsearch.quantize.bitwidths import MIN_BITS, BitWidths
from arqsearch.quantize.cost import total_cost
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.quantize.quantizers import StepTable

__all__ = ["QuantizationConfig", "apply_config", "load_config", "load_network", "schema_text", "write_config"]

BASE_FILE = "base.safetensors"


def write_config(
    net: QuantizedNet, program: IntegerProgram, folder: str | Path, *, model: Mapping[str, Any], sigma: float
) -> Path:
    """Write ``config.json`` and ``base.safetensors``, the network's float weights in the model's own keys.

    :param net: the network at the bit-widths and weights of `program`.
    :param program: what :func:`apply_config` must reproduce.
    :param folder: made when absent.
    :param model: ``name``, ``options`` (all of them, also those that follow from the images) and ``num_classes``;
        input shape and normalisation are read from `net`.
    :param sigma: noise level in the unit of [0,1] pixels, for the record.
    :returns: path of the config.
    :raises ArqError: when `program` is not the lowered `net`, or a key of `model` is wrong.
    """
    from arqsearch.models import save_weights

    noise_limit = -program.input.lo
    if program.input.hi != 255 + noise_limit or lower(net, noise_limit).hash != program.hash:
        raise ArqError(
            f"Program {program.hash[:12]} is not the lowered form of this network: its weights, scales or bits have "
            "changed since. Lower the network again and write that program's config."
        )
    described = _model_section(net, {"num_classes": program.num_classes, **model})
    target = Path(folder)
    save_weights(net.source, target / BASE_FILE)
    base = BaseSection(file=BASE_FILE, sha256=_file_hash(target / BASE_FILE))
    config = _describe(net, program.hash, noise_limit, sigma, described, base)
    partial = target / f"{CONFIG_FILE}.partial"
    partial.write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
    return partial.replace(target / CONFIG_FILE)


def load_network(config: QuantizationConfig, weights: str | Path) -> QuantizedNet:
    """Rebuild the quantized network of a config.

    :param weights: the file whose SHA-256 the config states.
    :returns: the network in quantized and evaluation mode, at the config's bits and scales.
    :raises ArqError: when the weights are others, or the config does not fit the network.
    """
    from arqsearch import models

    file = Path(weights).expanduser()
    if not file.is_file():
        raise ArqError(f"No base weights at {file}; name the file with --weights.")
    if _file_hash(file) != config.base.sha256:
        raise ArqError(
            f"{file} is not the base of this config: its SHA-256 is {_file_hash(file)}, the config states "
            f"{config.base.sha256}. Use the file that was exported with it."
        )
    section = config.model
    model = models.build(section.name, section.num_classes, **section.options)
    models.load_weights(model, file)
    settings = QuantizeSettings(**config.settings.model_dump())
    net = QuantizedNet(model.eval(), section.input_shape, section.mean, section.std, settings).eval()
    _same_names("layer", [v.name for v in config.layers], list(net.bitwidths.names))
    _same_names("stream", [v.name for v in config.streams], list(net.graph.streams))
    net.set_bitwidths(BitWidths.from_mapping(config.bitwidths))
    for entry in config.layers:
        layer = net.layer(entry.name)
        _set_step(layer.weight_steps, entry.weight_bits, entry.weight_scales, f"weights of {entry.name!r}")
        if entry.activation_scale is not None:
            _set_step(layer.activation, entry.activation_bits, [entry.activation_scale], f"input of {entry.name!r}")
    for stream in config.streams:
        _set_step(net.stream(stream.name), settings.residual_bits, [stream.scale], f"stream {stream.name!r}")
    net.quantized = True
    return net


def apply_config(
    config: str | Path, weights: str | Path | None = None, output: str | Path | None = None
) -> dict[str, Any]:
    """Rebuild the integer program of a config and check that it is the one that the config states.

    :param config: the JSON file, or its folder.
    :param weights: base weights; default: the file beside the config.
    :param output: where to write the integer program.
    :returns: ``program_hash``, ``matches`` (True) and ``output`` (None when nothing was written).
    :raises ArqError: when config or weights were altered, so that another program would come out.
    """
    stated = load_config(config)
    folder = Path(config) if Path(config).is_dir() else Path(config).parent
    net = load_network(stated, folder / stated.base.file if weights is None else weights)
    facts = {"sigma": stated.sigma, "model": stated.model.name}
    program = lower(net, stated.noise_limit, facts)
    if program.hash != stated.program_hash:
        raise ArqError(
            f"{config} was altered: its bits, scales and settings give program {program.hash}, it states "
            f"{stated.program_hash}. Export the config again."
        )
    # What the hash does not cover (costs, signs, kinds, summaries) must be that of the network, too.
    rebuilt = _describe(net, program.hash, stated.noise_limit, stated.sigma, stated.model, stated.base)
    difference = _difference(stated.model_dump(mode="json"), rebuilt.model_dump(mode="json"))
    if difference:
        raise ArqError(f"{config} was altered: {difference}. Export the config again.")
    if output is not None:
        program.save(output)
    return {"program_hash": program.hash, "matches": True, "output": None if output is None else str(output)}


def _describe(
    net: QuantizedNet, program_hash: str, noise_limit: int, sigma: float, model: ModelSection, base: BaseSection
) -> QuantizationConfig:
    """The config of a network at its current bits."""
    settings, bitwidths, infos = net.settings, net.bitwidths, net.layer_infos
    layers = []
    for info in infos:
        layer = net.layer(info.name)
        weight, activation = layer.bits
        pixels = settings.input_mode == "clip" and net.placements["input"] == ("layer", info.name)
        layers.append(
            LayerSection(
                name=info.name,
                kind="conv" if info.kind == "conv" else "linear",
                weight_bits=weight,
                activation_bits=activation,
                weight_scales=_floats(layer.weight_steps.step(weight)),
                activation_scale=None if pixels else _floats(layer.activation.step(activation))[0],
                activation_signed=layer.activation.signed,
                rounding="half_up" if pixels else layer.activation.rounding,
            )
        )
    bits = settings.residual_bits
    return QuantizationConfig(
        format_version=FORMAT_VERSION,
        arithmetic_version=ARITHMETIC_VERSION,
        program_hash=program_hash,
        noise_limit=noise_limit,
        sigma=sigma,
        model=model,
        base=base,
        settings=SettingsSection(
            input_mode=settings.input_mode,
            residual_bits=bits,
            multiplier=settings.multiplier,
            rounding=settings.rounding,
        ),
        bitwidths={name: (pair.weight, pair.activation) for name, pair in bitwidths},
        costs=CostSection(
            bops=total_cost("bops", infos, bitwidths), weight_bytes=total_cost("weight_bytes", infos, bitwidths)
        ),
        layers=layers,
        streams=[
            StreamSection(name=name, bits=bits, scale=_floats(table.step(bits))[0], signed=table.signed)
            for name, table in ((name, net.stream(name)) for name in net.graph.streams)
        ],
    )


def _model_section(net: QuantizedNet, model: Mapping[str, Any]) -> ModelSection:
    facts = {"input_shape": list(net.input_shape), "mean": _unit_values(net.mean), "std": _unit_values(net.std)}
    try:
        text = json.dumps({"options": {}, **model, **facts})
    except TypeError as error:
        raise ArqError(f"The model's options cannot be written as JSON ({error}); use plain values.") from error
    return validated(ModelSection, text, "model")


def _unit_values(levels: Any) -> list[float]:
    """Shortest decimals of [0,1] pixels whose float32 products with 255 are exactly `levels`."""
    found = []
    for level in levels.detach().cpu().flatten().numpy():
        middle = np.float32(level / 255.0)
        near = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))]
        values = [value for single in near for value in (float(str(single)), float(single))]
        exact = [value for value in values if np.float32(255) * np.float32(value) == level]
        if not exact:
            raise ArqError(
                f"The normalisation {level} grey levels is no [0,1] value times 255; build the network again."
            )
        found.append(min(exact, key=lambda value: len(repr(value))))
    return found


def _floats(steps: Tensor) -> list[float]:
    """Float32 steps as Python floats, which JSON writes and reads without loss."""
    return [float(value) for value in steps.detach().cpu().tolist()]


def _set_step(table: StepTable, bits: int, scales: list[float], where: str) -> None:
    row = table.steps[bits - MIN_BITS]
    if len(scales) != row.numel():
        raise ArqError(f"The {where} need {row.numel()} scale(s), the config has {len(scales)}. Export it again.")
    with torch.no_grad():
        row.copy_(torch.tensor(scales, dtype=torch.float32))


def _same_names(what: str, given: list[str], expected: list[str]) -> None:
    if given == expected:
        return
    foreign = [name for name in given if name not in expected]
    if foreign:
        raise ArqError(f"The network has no {what} {foreign[0]!r}. {nearest(foreign[0], set(expected) - set(given))}")
    raise ArqError(f"The config must list every {what} once, in execution order: {', '.join(expected)}.")


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(stated: Any, found: Any, where: str = "") -> str:
    """The first place where two JSON values differ, in words; empty when they are equal."""
    if isinstance(stated, dict) and isinstance(found, dict):
        pairs = [(f"{where}.{key}".lstrip("."), stated.get(key), found.get(key)) for key in {**stated, **found}]
    elif isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        pairs = [(f"{where}.{index}", a, b) for index, (a, b) in enumerate(zip(stated, found, strict=True))]
    else:
        return "" if stated == found else f"{where} is {stated!r}, the network has {found!r}"
    return next((text for name, a, b in pairs if (text := _difference(a, b, name))), "")
