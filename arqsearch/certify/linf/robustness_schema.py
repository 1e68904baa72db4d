"""The JSON form of a robustness line: strict pydantic models, and the JSON Schema made from them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from arqsearch.certify.linf.verdict import Method, Status

KIND, FORMAT = "linf-robustness", 1

Count = Annotated[int, Field(ge=0)]
Hash = Annotated[str, Field(min_length=1)]
Epsilon = Annotated[int, Field(ge=0, le=255)]


class Part(BaseModel):
    """Base of all parts: frozen, no unknown keys, no conversions."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class CounterExample(Part):
    """An image of another class."""

    predicted: Count = Field(alias="class", description="its class by the program")
    shape: tuple[Count, Count, Count] = Field(description="height, width, channels")
    pixels: str = Field(description="base64 of zlib of its uint8 pixels in the order (H, W, C)")


class Budget(Part):
    """Work that was allowed for one image at one ε; null = no limit."""

    seconds: float | None = Field(description="wall clock")
    domains: Count | None = Field(description="domains bounded")
    milp: bool = Field(description="whether integer programming was allowed")
    complete: bool = Field(description="false: interval bounds only")


class LineFields(Part):
    """One line of a robustness file, docs/robustness.md."""

    kind: Literal["linf-robustness"]
    format: Literal[1] = Field(description="version of this format")
    version: str = Field(min_length=1, description="version of arqsearch that wrote the line")
    program: Hash = Field(description="hash of the integer program (SHA-256, hex)")
    data: Hash = Field(description="data identity (SHA-256, hex)")
    image: int = Field(ge=0, lt=2**32, description="id of the image in the data set")
    label: Count = Field(description="true class")
    epsilon: Epsilon = Field(description="largest change of a pixel, in grey levels")
    verdict: Status = Field(description="what is known of the box")
    method: Method = Field(description="what decided; for unknown, what was tried last")
    decided_at: Epsilon = Field(description="ε at which the method decided; the verdict here follows")
    predicted: Count = Field(alias="class", description="class of the unchanged image by the program")
    counterexample: CounterExample | None = Field(description="for non-robust, else null")
    domains: Count = Field(description="domains bounded")
    limit: str | None = Field(description="for unknown: the limit that was hit, else null")
    budget: Budget | None = Field(description="for unknown: the work that was allowed, else null")
    seconds: float = Field(ge=0, description="wall clock spent on it; never compared")
    digest: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 (hex) of the line without this field")


def schema() -> dict[str, Any]:
    """JSON Schema of one line."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **LineFields.model_json_schema()}


def schema_text() -> str:
    """The JSON Schema as it is committed in docs/robustness.schema.json."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
