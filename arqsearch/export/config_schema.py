"""The strict schema of a quantization config, its JSON Schema and its reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arqsearch.errors import ArqError, nearest
from arqsearch.integer.ops import Rounding
from arqsearch.integer.program import ARITHMETIC_VERSION
from arqsearch.quantize.bitwidths import MAX_BITS, MIN_BITS
from arqsearch.quantize.network import InputMode, Multiplier

#: Raised whenever a key changes its name or meaning.
FORMAT_VERSION: Final = 1
CONFIG_FILE = "config.json"

Bits = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]
Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Section = TypeVar("_Section", bound="Section")


class Section(BaseModel):
    """Base of every part: unknown keys are refused, nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(Section):
    """The network that was quantized."""

    name: str = Field(description="registered name, or package.module:function")
    options: dict[str, Any] = Field(description="all keyword arguments of the builder")
    num_classes: Annotated[int, Field(gt=0)]
    input_shape: tuple[int, int, int] = Field(description="of an image: channels, height, width")
    mean: list[Finite] = Field(description="per channel, of [0,1] pixels")
    std: list[Scale] = Field(description="per channel, of [0,1] pixels")


class BaseSection(Section):
    """The float weights."""

    file: str = Field(pattern=r"^[^/\\]+$", description="file name, in the folder of the config")
    sha256: Sha256 = Field(description="of the whole file")


class SettingsSection(Section):
    """What is fixed for the whole network."""

    input_mode: InputMode = Field(description="wide covers noise; clip clips pixels to 0..255")
    residual_bits: Bits = Field(description="bits of streams")
    multiplier: Multiplier = Field(description="requantization multipliers: 31 or 15 bits, or powers of two")
    rounding: Rounding = Field(description="requantization rounding")


class LayerSection(Section):
    """One conv or linear layer and the quantizer of its input."""

    name: str = Field(description="module path in the network")
    kind: Literal["conv", "linear"]
    weight_bits: Bits = Field(description="codes -(2^(b-1)-1) .. 2^(b-1)-1")
    activation_bits: Bits = Field(description="of the layer's input; codes 0..2^b-1, or as weights when signed")
    weight_scales: list[Scale] = Field(
        min_length=1,
        description="of weights with batch norm folded in: one for each output channel; one for the last layer",
    )
    activation_scale: Scale | None = Field(description="null where pixels are read in clip mode")
    activation_signed: bool
    rounding: Rounding = Field(description="of the layer's input")


class StreamSection(Section):
    """A residual sum, or a tensor with several consumers; named after the traced node that computes it."""

    name: str
    bits: Bits
    scale: Scale
    signed: bool


class CostSection(Section):
    """Costs for one image."""

    bops: Count = Field(description="sum of MACs * weight bits * activation bits")
    weight_bytes: Count = Field(description="packed weights, biases, multipliers and shifts")


class QuantizationConfig(Section):
    """The quantization of one network."""

    format_version: Literal[1]
    arithmetic_version: Annotated[int, Field(gt=0)]
    program_hash: Sha256 = Field(description="of the integer program that this config stands for")
    noise_limit: Count = Field(description="largest absolute noise in grey levels that the range proofs cover")
    sigma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        description="noise level in the unit of [0,1] pixels"
    )
    model: ModelSection
    base: BaseSection
    settings: SettingsSection
    bitwidths: dict[str, tuple[Bits, Bits]] = Field(description="summary: layer to weight and activation bits")
    costs: CostSection
    layers: list[LayerSection] = Field(min_length=1, description="in execution order")
    streams: list[StreamSection]

    @model_validator(mode="after")
    def _summary_agrees(self) -> Self:
        if list(self.bitwidths.items()) != [(v.name, (v.weight_bits, v.activation_bits)) for v in self.layers]:
            raise ValueError("'bitwidths' and 'layers' name other layers or bits; they must agree")
        return self


def schema_text() -> str:
    """The JSON Schema of a config, as committed in ``docs/quantization-config.schema.json``."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **QuantizationConfig.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


def load_config(path: str | Path) -> QuantizationConfig:
    """Read and check a config.

    :param path: the JSON file, or its folder.
    :raises ArqError: when it is missing, of another version, or has unknown keys or wrong values (all are listed).
    """
    file = Path(path)
    file = file / CONFIG_FILE if file.is_dir() else file
    if not file.is_file():
        raise ArqError(f"No quantization config at {file}; `arqsearch export --format config` writes one.")
    try:
        text = file.read_text()
        data = json.loads(text)
    except ValueError as error:
        raise ArqError(f"{file} is not JSON ({error}); export the config again.") from error
    if not isinstance(data, dict) or "format_version" not in data:
        raise ArqError(f"{file} is not a quantization config: it has no key 'format_version'.")
    for key, known in (("format_version", FORMAT_VERSION), ("arithmetic_version", ARITHMETIC_VERSION)):
        if key in data and data[key] != known:
            raise ArqError(
                f"{file} has {key} {data[key]!r}, this version of arqsearch knows {known}; "
                "use the version that wrote it, or export again with this one."
            )
    return validated(QuantizationConfig, text, str(file))


def validated(kind: type[_Section], text: str, where: str) -> _Section:
    """Read JSON text strictly.

    :param kind: the schema.
    :param where: named in errors.
    :raises ArqError: listing every wrong key and value.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = [_explain(kind, e["loc"], e["type"], e["msg"], e["input"]) for e in error.errors()]
        raise ArqError(f"{where}:\n  " + "\n  ".join(problems)) from error


def _explain(root: type[BaseModel], location: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    key = ".".join(map(str, location))
    if kind == "extra_forbidden":
        section = root
        for part in location[:-1]:
            if isinstance(part, str):
                annotation = section.model_fields[part].annotation
                options = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
                section = next(a for a in options if issubclass(a, BaseModel))
        return f"{key}: unknown key. {nearest(str(location[-1]), section.model_fields)}"
    if kind in {"missing", "value_error"}:
        return f"{key}: {message}".lstrip(": ")
    return f"{key}: {message} (given: {value!r})"
