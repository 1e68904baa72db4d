"""`BaseNetwork`: the certified network that the incremental rule starts from, with what it answered sample by sample.

Answers ("is it class A?") of the first samples are kept beside the certificates in ``<file>.answers``, JSON lines, so
that a second near network costs no run of the base. A line that is cut, altered or about other samples is passed over
and computed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arqsearch.certify.certificate import read_lines
from arqsearch.certify.incremental import check_independent
from arqsearch.certify.job import ImageJob
from arqsearch.certify.line import FIXED, CertificateLine
from arqsearch.certify.noise import ESTIMATE
from arqsearch.certify.smoothing import Classifier, SmoothingSettings
from arqsearch.errors import ArqError

#: Key of a program's metadata: [seed, stage] of every noise stream that entered its selection or training.
PROVENANCE = "noise_provenance"


class BaseNetwork:
    """Certificates of the base network by the ``fixed`` rule, and its answers.

    :param path: its certificate file.
    :param near: metadata of the program to certify, which says what noise that program has seen.
    :param classify: runs the base program; None where the answers are kept already.
    :param program: hash of what `classify` runs.
    :param keep: read and write the kept answers; False always runs the base program.
    :raises ArqError: when the lines do not hold or are of another rule or program, or the noise is not independent.
    """

    def __init__(
        self,
        path: str | Path,
        near: Mapping[str, Any],
        classify: Classifier | None = None,
        program: str | None = None,
        *,
        keep: bool = True,
    ) -> None:
        self.path = Path(path)
        lines = read_lines(path)
        if not lines:
            raise ArqError(f"{path} holds no certificate; certify the base network first.")
        first = lines[0]
        for line in lines:
            if line.rule != FIXED or line.settings != first.settings:
                raise ArqError(
                    f"{path}: image {line.image} is not by the rule 'fixed' with the settings of the first; certify "
                    "the base network with --rule fixed."
                )
            if found := line.problems():
                raise ArqError(f"{path}: image {line.image}: {found[0]}; certify the base network again.")
        if program is not None and program != first.program:
            raise ArqError(f"{path} is about program {first.program}, the base program given is {program}.")
        check_independent(provenance(near), first.seed, ESTIMATE)
        self.program, self.n0, self.n, self.sigma, self.seed = (
            first.program, first.n0, first.n, first.sigma, first.seed
        )  # fmt: skip
        self.data = first.data
        self._lines = {line.image: line for line in lines}
        self._classify = classify
        self._keep = keep
        self._kept = _read_answers(self.answers_path) if keep else {}

    @property
    def answers_path(self) -> Path:
        """Where the answers are kept."""
        return self.path.with_name(f"{self.path.name}.answers")

    def check(self, settings: SmoothingSettings, data: str) -> None:
        """Refuse settings under which the two networks would not see the same noise on the same images.

        :raises ArqError: naming what differs.
        """
        pairs = {"sigma": (self.sigma, float(settings.sigma)), "seed": (self.seed, settings.seed),
                 "data": (self.data, data)}  # fmt: skip
        differing = [f"{name} {was!r}, now {now!r}" for name, (was, now) in pairs.items() if was != now]
        if differing:
            raise ArqError(f"{self.path} was made with {'; '.join(differing)}. Use the base network's settings.")
        if settings.shared > self.n:
            raise ArqError(
                f"The base network took {self.n} samples, {settings.shared} cannot be shared; choose fewer (--shared)."
            )

    def line(self, image_id: int) -> CertificateLine:
        """The base network's line of an image.

        :raises ArqError: when it has none.
        """
        if image_id not in self._lines:
            raise ArqError(f"{self.path} has no line of image {image_id}; certify it for the base network first.")
        return self._lines[image_id]

    def answers(self, line: CertificateLine, job: ImageJob, samples: int) -> NDArray[np.bool_]:
        """Whether the base program answers the line's class on each of the first estimate samples, ``(samples,)``.

        :param job: the image; its settings state the noise.
        :raises ArqError: when the answers are not kept and there is no base program to run, or they contradict the
            line's votes.
        """
        key = (line.image, line.predicted, line.seed, line.sigma, line.program)
        found = self._kept.get(key)
        if found is None or len(found) < samples:
            if self._classify is None:
                raise ArqError(
                    f"{self.answers_path} does not hold {samples} answers for image {line.image}; give the base "
                    "network's program (--base-program FILE), and they are computed."
                )
            found = replace(job, classify=self._classify).classes(ESTIMATE, samples) == line.predicted
            if self._keep:
                _append(self.answers_path, key, found)
                self._kept[key] = found
        found = found[:samples]
        hits = int(found.sum())
        if not 0 <= line.votes - hits <= line.n - samples:
            raise ArqError(
                f"Image {line.image}: {hits} answers of the base network on {samples} samples contradict its "
                f"{line.votes} votes of {line.n}; delete {self.answers_path.name}, or certify the base network again."
            )
        return found


def provenance(metadata: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    """Noise streams, (seed, stage), that entered the selection or training of a program; None when it does not say.

    :raises ArqError: when the metadata are damaged.
    """
    stated = metadata.get(PROVENANCE)
    if stated is None:
        return None
    try:
        return [(int(seed), int(stage)) for seed, stage in stated]
    except (TypeError, ValueError) as error:
        raise ArqError(f"The program's {PROVENANCE} {stated!r} is no list of [seed, stage]; lower it again.") from error


_Key = tuple[int, int, int, float, str]


def _fields(key: _Key, answers: NDArray[np.bool_]) -> dict[str, Any]:
    image, predicted, seed, sigma, program = key
    return {
        "image": image, "class": predicted, "seed": seed, "sigma": sigma, "program": program, "samples": len(answers),
        "answers": np.packbits(answers).tobytes().hex(),
    }  # fmt: skip


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _append(path: Path, key: _Key, answers: NDArray[np.bool_]) -> None:
    fields = _fields(key, answers)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")  # What a kill cut short stays a line of its own.
        file.write(json.dumps({**fields, "digest": _digest(fields)}, sort_keys=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read_answers(path: Path) -> dict[_Key, NDArray[np.bool_]]:
    found: dict[_Key, NDArray[np.bool_]] = {}
    lines: Sequence[bytes] = path.read_bytes().split(b"\n") if path.is_file() else []
    for text in lines:
        try:
            fields = json.loads(text)
            if fields.pop("digest") != _digest(fields):
                continue
            key = (fields["image"], fields["class"], fields["seed"], fields["sigma"], fields["program"])
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(fields["answers"]), np.uint8), count=fields["samples"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if len(bits) > len(found.get(key, ())):
            found[key] = bits.astype(np.bool_)
    return found
