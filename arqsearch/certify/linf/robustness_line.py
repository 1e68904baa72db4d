"""`RobustnessLine`: what is known about one image at one ε, as one self-contained line of JSON."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from arqsearch import __version__
from arqsearch.certify.linf.robustness_schema import FORMAT, KIND, Budget, CounterExample, LineFields
from arqsearch.certify.linf.verdict import Method, Status
from arqsearch.errors import ArqError

#: Fields that differ from machine to machine or version to version and state nothing about the program.
NOT_COMPARED = ("seconds", "version", "domains")


@dataclass(frozen=True)
class RobustnessLine:
    """One verdict; docs/robustness.md states the fields and the guarantee.

    :param program: :attr:`IntegerProgram.hash`.
    :param data: identity of the data set.
    :param image: id of the image in the data set.
    :param label: true class.
    :param epsilon: largest change of a pixel, in grey levels.
    :param verdict: see :data:`arqsearch.certify.linf.verdict.Status`.
    :param method: what decided, or was tried last.
    :param decided_at: ε at which it was decided: robust there, so here as well; or a counter-example found there.
    :param predicted: class of the unchanged image (``class`` in JSON).
    :param counterexample: for "non-robust".
    :param domains: domains bounded.
    :param limit: for "unknown": the limit that was hit.
    :param budget: for "unknown": the work that was allowed.
    :param seconds: wall clock spent; not compared.
    :param version: version of this software that wrote the line.
    """

    program: str
    data: str
    image: int
    label: int
    epsilon: int
    verdict: Status
    method: Method
    decided_at: int
    predicted: int
    counterexample: CounterExample | None = None
    domains: int = 0
    limit: str | None = None
    budget: Budget | None = None
    seconds: float = 0.0
    version: str = __version__

    @property
    def key(self) -> tuple[int, int]:
        """Image and ε."""
        return self.image, self.epsilon

    @property
    def decided(self) -> bool:
        """Whether anything but "unknown" is known."""
        return self.verdict != "unknown"

    def same_claim(self, other: RobustnessLine) -> bool:
        """Whether two lines say the same of the program, whatever it took to find out."""
        ours, theirs = (dataclasses.asdict(line) for line in (self, other))
        return all(ours[name] == theirs[name] for name in ours if name not in NOT_COMPARED)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of every other field."""
        return hashlib.sha256(_canonical(self._fields()).encode()).hexdigest()

    def _fields(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__} | {"kind": KIND, "format": FORMAT}
        fields["class"] = fields.pop("predicted")
        for name in ("counterexample", "budget"):
            part = fields[name]
            fields[name] = None if part is None else part.model_dump(mode="json", by_alias=True)
        return fields

    def to_json(self) -> str:
        """One line of JSON without the line break: sorted keys, no spaces, shortest floats, with the digest."""
        return _canonical({**self._fields(), "digest": self.digest})

    @classmethod
    def from_json(cls, text: str, where: str = "the robustness file") -> RobustnessLine:
        """Read a line and check its form, its digest and that its fields agree (not its truth: that is `verify`).

        :param where: file and line, for errors.
        :raises ArqError: when the line is damaged, altered or of another format.
        """
        try:
            raw = json.loads(text)
            if raw["kind"] != KIND or raw["format"] != FORMAT:
                raise ArqError(
                    f"{where} is of kind {raw['kind']!r}, format {raw['format']}; this version reads {KIND!r}, format "
                    f"{FORMAT}. Move the file away and run `arqsearch verify-robustness` again."
                )
            found = LineFields.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            raise _damaged(where, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(where, str(error)) from error
        line = cls(**{name: getattr(found, name) for name in cls.__dataclass_fields__})
        if line.digest != found.digest or line.to_json() != text:
            raise ArqError(f"{where} was altered: it does not match its digest. Delete that line and run again.")
        return line

    def problems(self) -> list[str]:
        """What the line's own fields contradict."""
        found = []
        if (self.verdict == "misclassified") != (self.predicted != self.label):
            found.append(f"verdict {self.verdict} with class {self.predicted} and label {self.label}")
        if (self.verdict == "non-robust") != (self.counterexample is not None):
            found.append(f"verdict {self.verdict} {'without' if self.counterexample is None else 'with'} an image")
        if (self.verdict == "unknown") != (self.limit is not None and self.budget is not None):
            found.append(f"verdict {self.verdict} with limit {self.limit}")
        implied = {"robust": self.decided_at >= self.epsilon, "unknown": self.decided_at == self.epsilon}
        if not implied.get(self.verdict, True):
            found.append(f"verdict {self.verdict} at ε = {self.epsilon} does not follow from ε = {self.decided_at}")
        if self.counterexample is not None and self.counterexample.predicted == self.label:
            found.append("its counter-example has the class of the label")
        return found


def pack_image(image: NDArray[np.uint8], predicted: int) -> CounterExample:
    """A counter-example ``(H, W, C)`` and its class as a line holds them."""
    pixels = base64.b64encode(zlib.compress(np.ascontiguousarray(image).tobytes(), 9)).decode()
    height, width, channels = (int(size) for size in image.shape)
    return CounterExample(**{"class": int(predicted)}, shape=(height, width, channels), pixels=pixels)


def unpack_image(found: CounterExample, where: str = "the counter-example") -> NDArray[np.uint8]:
    """The pixels of a counter-example, uint8 ``(H, W, C)``.

    :raises ArqError: when they are damaged.
    """
    size = int(np.prod(found.shape))
    try:
        packed = base64.b64decode(found.pixels, validate=True)
        decoder = zlib.decompressobj()
        pixels = decoder.decompress(packed, size + 1)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ArqError(f"{where} is damaged ({error}); delete that line and run again.") from error
    if len(pixels) != size or not decoder.eof:
        raise ArqError(f"{where} does not hold {found.shape} pixels; delete that line and run again.")
    return np.frombuffer(pixels, dtype=np.uint8).reshape(found.shape).copy()


def _damaged(where: str, problem: str) -> ArqError:
    return ArqError(f"{where} is not a robustness line ({problem}); delete that line and run again.")


def _canonical(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
