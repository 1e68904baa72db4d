"""The JSON form of a certificate line: strict pydantic models, and the JSON Schema made from them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 2

Count = Annotated[int, Field(ge=0)]
Samples = Annotated[int, Field(ge=1)]
Radius = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(gt=0, lt=0.5)]
Hash = Annotated[str, Field(min_length=1)]
Votes = dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]*)$")], Samples]
Target = Literal["selected", "label"]


class Part(BaseModel):
    """Base of all parts: frozen, no unknown keys, no conversions."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class TwoClass(Part):
    """A second, larger radius from the runner-up's votes; never mixed with `radius`."""

    alpha: Probability = Field(description="failure probability of this figure by itself")
    classes: int = Field(ge=2, description="number of classes of the program")
    radius: Radius | None = Field(description="L2 radius in [0,1] pixels, rounded down; null when it abstains")


class Sequential(Part):
    """What the sequential rule saw and decided."""

    target: Target = Field(description="whose probability is tested: the class that n0 samples selected, or the label")
    radii: tuple[Radius, ...] = Field(min_length=1, description="asked L2 radii in [0,1] pixels, ascending")
    looks: tuple[tuple[Samples, Count], ...] = Field(description="samples and votes for the class at each look")
    decisions: tuple[Literal["certified", "refuted", "undecided"], ...] = Field(
        description="one for each radius; empty when nothing was estimated"
    )

    @property
    def undecided(self) -> tuple[float, ...]:
        """Asked radii that the cap left open."""
        pairs = zip(self.radii, self.decisions, strict=bool(self.decisions))
        return tuple(radius for radius, decision in pairs if decision == "undecided")


class AlphaSplit(Part):
    """How alpha is divided by the union bound."""

    base: Probability = Field(description="for the lower bound on the base network's probability")
    lost: Probability = Field(description="for the upper bound on lost pairs")
    gained: float = Field(ge=0, lt=0.5, description="for the lower bound on gained pairs; 0 = not used")


class Incremental(Part):
    """What the incremental rule counted; A is `class`, which the base network's n0 samples selected."""

    base: Hash = Field(description="hash of the base program")
    base_votes: Count = Field(description="votes of the base program for A among its n estimate samples")
    base_n: Samples = Field(description="estimate samples of the base program")
    shared_votes: Count = Field(description="votes of the base program for A among the shared samples")
    lost: Count = Field(description="shared samples on which the base program answers A and this one does not")
    gained: Count = Field(description="shared samples on which this program answers A and the base program does not")
    split: AlphaSplit


class Counts(Part):
    """Votes by class, classes without votes left out."""

    select: Votes = Field(description="stage 1")
    estimate: Votes = Field(description="stage 2")


class LineFields(Part):
    """One line of a certificate file, docs/certificate-format.md."""

    format: Literal[2] = Field(description="version of this format")
    program: Hash = Field(description="hash of the integer program (SHA-256, hex); float:... for an estimate")
    data: Hash = Field(description="data identity (SHA-256, hex)")
    image: int = Field(ge=0, lt=2**32, description="id of the image in the data set")
    label: Count | None = Field(description="true class; null when certified without labels")
    sigma: float = Field(gt=0, description="noise level in [0,1] pixels")
    s: float = Field(gt=0, description="255·sigma, the noise level in grey levels")
    d_tau: float = Field(ge=0, lt=0.5, description="upper bound on the distance of the noise from the ideal")
    alpha: Probability = Field(description="failure probability of this line")
    seed: int = Field(ge=0, lt=2**64, description="key of the noise generator")
    rule: Literal["fixed", "sequential", "incremental"]
    version: str = Field(min_length=1, description="version of arqsearch that wrote the line")
    n0: Count = Field(description="samples that select the class; 0 when the label is tested")
    n: Samples = Field(description="estimate samples: all of them (fixed), the cap (sequential), shared (incremental)")
    counts: Counts
    predicted: Count = Field(alias="class", description="class that the line is about")
    estimated: bool = Field(description="whether the estimate stage ran")
    certified: bool = Field(description="whether the class is certified at radius 0 or more")
    radius: Radius = Field(description="certified L2 radius in [0,1] pixels, rounded down; 0 when not certified")
    digest: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 (hex) of the line without this field")
    two_class: TwoClass | None = Field(None, description="rule fixed, where asked for")
    sequential: Sequential | None = Field(None, description="rule sequential")
    incremental: Incremental | None = Field(None, description="rule incremental")


def schema() -> dict[str, Any]:
    """JSON Schema of one line."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **LineFields.model_json_schema()}


def schema_text() -> str:
    """The JSON Schema as it is committed in docs/certificate.schema.json."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
