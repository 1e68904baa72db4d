"""`CertificateLine`: what is known about one image, as one self-contained line of JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pydantic import ValidationError

from arqsearch import __version__
from arqsearch.certify.line_schema import FORMAT, Incremental, LineFields, Sequential, TwoClass
from arqsearch.errors import ArqError

FIXED, SEQUENTIAL, INCREMENTAL = "fixed", "sequential", "incremental"


@dataclass(frozen=True)
class CertificateLine:
    """One image's certificate; docs/certificate-format.md states the fields and the guarantee.

    :param program: hash of the classifier, for an integer program its :attr:`IntegerProgram.hash`.
    :param data: identity of the data set.
    :param image: id of the image in the data set.
    :param label: true class, None when unknown.
    :param sigma: noise level in [0,1] pixels.
    :param d_tau: upper bound on d·τ, the distance of the drawn noise from the ideal.
    :param alpha: failure probability of this line.
    :param seed: key of the noise generator.
    :param n0: samples that select the class; 0 when the label itself is tested.
    :param n: samples of the estimate stage: all (``fixed``), the cap (``sequential``), the shared ones
        (``incremental``).
    :param predicted: class that the line is about (``class`` in JSON).
    :param selection: votes by class in the select stage, classes without votes left out.
    :param estimate: votes by class in the estimate stage; empty when that was skipped.
    :param estimated: whether the estimate stage ran.
    :param certified: whether the class is certified (at radius 0 or more).
    :param radius: certified L2 radius in [0,1] pixels, rounded down to 10⁻⁶; 0 when not certified.
    :param rule: how counts become a radius: ``fixed``, ``sequential`` or ``incremental``.
    :param version: version of this software that wrote the line.
    :param two_class: the two-class radius beside the standard one, where asked for.
    :param sequential: looks and decisions of the sequential rule.
    :param incremental: base network and discordant pairs of the incremental rule.
    """

    program: str
    data: str
    image: int
    label: int | None
    sigma: float
    d_tau: float
    alpha: float
    seed: int
    n0: int
    n: int
    predicted: int
    selection: dict[int, int]
    estimate: dict[int, int]
    estimated: bool
    certified: bool
    radius: float
    rule: str = FIXED
    version: str = __version__
    two_class: TwoClass | None = None
    sequential: Sequential | None = None
    incremental: Incremental | None = None

    @property
    def s(self) -> float:
        """Noise level in grey levels."""
        return float(255 * Fraction(str(float(self.sigma))))

    @property
    def votes(self) -> int:
        """Votes for the class in the estimate stage."""
        return self.estimate.get(self.predicted, 0)

    @property
    def samples(self) -> int:
        """Samples that the estimate stage took."""
        return sum(self.estimate.values())

    @property
    def correct(self) -> bool:
        """Whether the class is the label; False without a label."""
        return self.label is not None and self.predicted == self.label

    @property
    def abstained(self) -> bool:
        """Whether the estimate stage ran and could not certify the class."""
        return self.estimated and not self.certified

    def undecided(self, radius: float) -> bool:
        """Whether this radius was asked for and the cap came before a decision; False for a wrong class."""
        return self.sequential is not None and self.correct and radius in self.sequential.undecided

    @property
    def settings(self) -> dict[str, Any]:
        """What all lines of a file share."""
        names = ("program", "data", "sigma", "d_tau", "alpha", "seed", "n0", "n", "rule", "version")
        shared = {name: getattr(self, name) for name in names}
        if self.two_class is not None:
            shared["two_class"] = self.two_class.classes
        if self.sequential is not None:
            shared |= {"target": self.sequential.target, "radii": self.sequential.radii}
        if self.incremental is not None:
            found = self.incremental
            shared |= {"base": found.base, "base_n": found.base_n, "split": found.split}
        return shared

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of every other field."""
        return hashlib.sha256(_canonical(self._fields()).encode()).hexdigest()

    def _fields(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__} | {"s": self.s, "format": FORMAT}
        fields["class"] = fields.pop("predicted")
        fields["counts"] = {
            stage: {str(name): votes for name, votes in fields.pop(field).items()}
            for stage, field in (("select", "selection"), ("estimate", "estimate"))
        }
        for name in ("two_class", "sequential", "incremental"):
            part = fields.pop(name)
            if part is not None:
                fields[name] = part.model_dump(mode="json")
        return fields

    def to_json(self) -> str:
        """One line of JSON without the line break: sorted keys, no spaces, shortest floats, with the digest."""
        return _canonical({**self._fields(), "digest": self.digest})

    @classmethod
    def from_json(cls, text: str, where: str = "the certificate") -> CertificateLine:
        """Read a line and check its form and digest (not its truth: that is `verify_file`).

        :param where: file and line, for errors.
        :raises ArqError: when the line is damaged, altered or of another format.
        """
        try:
            version = json.loads(text)["format"]
            if version != FORMAT:
                raise ArqError(
                    f"{where} has certificate format {version}; this version reads format {FORMAT}. Move the file away "
                    "and run `arqsearch certify` again: the same seed draws the same noise."
                )
            found = LineFields.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise _damaged(where, problem) from error
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(where, str(error)) from error
        fields = {name: getattr(found, name) for name in cls.__dataclass_fields__ if hasattr(found, name)}
        line = cls(
            **fields,
            selection={int(name): votes for name, votes in found.counts.select.items()},
            estimate={int(name): votes for name, votes in found.counts.estimate.items()},
        )
        if line.digest != found.digest or line.to_json() != text:
            raise ArqError(f"{where} was altered: it does not match its digest. Delete that line and certify again.")
        return line

    def problems(self) -> list[str]:
        """What the line's own counts contradict: recomputes class and radius without running the network."""
        from arqsearch.certify.rules import problems  # The rules make lines.

        return problems(self)


def first_maximum(counts: dict[int, int]) -> int:
    """The class with most votes, the smallest one among equals."""
    return min(counts, key=lambda name: (-counts[name], name))


def _damaged(where: str, problem: str) -> ArqError:
    return ArqError(f"{where} is not a certificate line ({problem}); delete that line and certify again.")


def _canonical(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
