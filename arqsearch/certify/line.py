"""`CertificateLine`: what is known about one image, as one self-contained line of JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from arqsearch.certify.binomial import certified_radius
from arqsearch.errors import ArqError, nearest

FORMAT = 1
FIXED = "fixed"


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
    :param n0: samples that select the class.
    :param n: fresh samples that estimate its probability.
    :param predicted: class selected by the n0 samples (``class`` in JSON).
    :param selection: votes by class in the select stage, classes without votes left out.
    :param estimate: votes by class in the estimate stage; empty when that was skipped.
    :param estimated: whether the estimate stage ran.
    :param certified: whether the class is certified (at radius 0 or more).
    :param radius: certified L2 radius in [0,1] pixels, rounded down to 10⁻⁶; 0 when not certified.
    :param rule: how counts become a radius; ``fixed``.
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

    @property
    def votes(self) -> int:
        """Votes for the selected class in the estimate stage."""
        return self.estimate.get(self.predicted, 0)

    @property
    def correct(self) -> bool:
        """Whether the selected class is the label; False without a label."""
        return self.label is not None and self.predicted == self.label

    @property
    def abstained(self) -> bool:
        """Whether the estimate stage ran and could not certify the selected class."""
        return self.estimated and not self.certified

    @property
    def settings(self) -> dict[str, Any]:
        """What all lines of a file share."""
        names = ("program", "data", "sigma", "d_tau", "alpha", "seed", "n0", "n", "rule")
        return {name: getattr(self, name) for name in names}

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of every other field."""
        return hashlib.sha256(_canonical(self._fields()).encode()).hexdigest()

    def _fields(self) -> dict[str, Any]:
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        fields["class"] = fields.pop("predicted")
        fields["counts"] = {
            stage: {str(name): votes for name, votes in fields.pop(field).items()}
            for stage, field in (("select", "selection"), ("estimate", "estimate"))
        }
        return {**fields, "format": FORMAT}

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
            fields = json.loads(text)
            version, digest = fields.pop("format"), fields.pop("digest")
            if version != FORMAT:
                raise ArqError(f"{where} has certificate format {version}; this version reads format {FORMAT}.")
            counts = fields.pop("counts")
            fields["predicted"] = fields.pop("class")
            fields["selection"], fields["estimate"] = (
                {int(name): int(votes) for name, votes in counts[stage].items()} for stage in ("select", "estimate")
            )
            line = cls(**fields)
            line._check_types()
            untouched = line.digest == digest and line.to_json() == text
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArqError(
                f"{where} is not a certificate line ({error}); delete that line and certify again."
            ) from error
        if not untouched:
            raise ArqError(f"{where} was altered: it does not match its digest. Delete that line and certify again.")
        return line

    def _check_types(self) -> None:
        for item in dataclasses.fields(self):
            value, kind = getattr(self, item.name), str(item.type)
            expected = {"str": str, "int": int, "float": float, "bool": bool, "int | None": int | None}.get(kind, dict)
            if not isinstance(value, expected) or (isinstance(value, bool) and kind != "bool"):
                raise TypeError(f"{item.name} is {value!r}, not {kind}")

    def problems(self) -> list[str]:
        """What the line's own counts contradict: recomputes class and radius without running the network."""
        if self.rule != FIXED:
            return [f"rule {self.rule!r} is unknown. {nearest(self.rule, [FIXED])}"]
        found = []
        if sum(self.selection.values()) != self.n0 or min(self.selection.values(), default=0) < 1:
            found.append(f"the selection counts do not add up to n0 = {self.n0}")
        elif self.predicted != first_maximum(self.selection):
            found.append(f"class {self.predicted} is not the first maximum of the selection counts")
        if sum(self.estimate.values()) != (self.n if self.estimated else 0):
            found.append(f"the estimate counts do not add up to {self.n if self.estimated else 0}")
        if not self.estimated and (self.label is None or self.correct):
            found.append("the estimate stage may be skipped for a misclassified image only")
        radius = certified_radius(self.votes, self.n, self.sigma, self.alpha, self.d_tau) if self.estimated else None
        if (self.certified, self.radius) != (radius is not None, float(radius or 0)):
            found.append(f"its counts give radius {radius}, the line says {self.radius}")
        return found


def first_maximum(counts: dict[int, int]) -> int:
    """The class with most votes, the smallest one among equals."""
    return min(counts, key=lambda name: (-counts[name], name))


def _canonical(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
