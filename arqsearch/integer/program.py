"""`IntegerProgram`: the one thing that is searched for, certified, exported and run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arqsearch.errors import ArqError, nearest
from arqsearch.integer import ops as O
from arqsearch.integer.ops import Op

if TYPE_CHECKING:
    import torch

    from arqsearch.integer.execution import Backend

#: Raised whenever the meaning of any operation changes; part of every program hash and record key.
ARITHMETIC_VERSION = 1
_HEADER = "arqsearch.program"


@dataclass(frozen=True)
class TensorSpec:
    """Shape (no batch axis; ``(H, W, C)`` or ``(C,)``) and the stated range of one integer tensor."""

    shape: tuple[int, ...]
    lo: int
    hi: int


@dataclass(frozen=True, eq=False)
class IntegerProgram:
    """A list of integer operations over integer tensors; tensor 0 is the input, pixels as int16.

    The class of an image is the first maximum of the output tensor (the logits, raw int32 accumulators).

    :param ops: in execution order; each writes one tensor.
    :param tensors: a shape and a range for each tensor index; ``tensors[0]`` is the input.
    :param output: index of the logits.
    :param metadata: names, scales and provenance for people; not part of the hash.
    """

    ops: tuple[Op, ...]
    tensors: tuple[TensorSpec, ...]
    output: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def input(self) -> TensorSpec:
        """The input tensor: shape ``(H, W, C)`` and the range of pixel values that the proofs cover."""
        return self.tensors[0]

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.tensors[self.output].shape[0]

    @cached_property
    def readers(self) -> Counter[int]:
        """How many operations (and the output) read each tensor."""
        return Counter([source for op in self.ops for source in op.inputs] + [self.output])

    def producer(self, tensor: int) -> Op | None:
        """The operation that writes a tensor; None for the input."""
        return next((op for op in self.ops if op.output == tensor), None)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the arithmetic version, the canonical structure and every integer tensor."""
        structure, arrays = self._structure()
        digest = hashlib.sha256(f"arqsearch-arithmetic-{ARITHMETIC_VERSION}\n".encode())
        digest.update(json.dumps(structure, sort_keys=True, separators=(",", ":")).encode())
        for name in sorted(arrays):
            values = np.ascontiguousarray(arrays[name], dtype="<i8")
            digest.update(f"\n{name}{list(values.shape)}\n".encode())
            digest.update(values.tobytes())
        return digest.hexdigest()

    def run(self, pixels: Any, *, device: str = "cpu", backend: str = "auto") -> torch.Tensor:
        """Run the program exactly; every backend gives the same integers.

        :param pixels: integer tensor or array ``(N, H, W, C)`` within the input range.
        :param device: torch device.
        :param backend: see :meth:`backend`.
        :returns: logits, int32 ``(N, classes)``.
        :raises ArqError: when shape or range do not fit.
        """
        return self.backend(device=device, backend=backend).run(pixels)

    def backend(self, *, device: str = "cpu", backend: str = "auto") -> Backend:
        """What runs this program, compiled at the first call and kept.

        :param device: torch device.
        :param backend: "native" (C, on the CPU), "torch", or "auto": what ``$ARQSEARCH_BACKEND`` names, else native
            where it is built, else torch with one warning.
        :raises ArqError: for an unknown backend, one that cannot run, and when the range proof fails.
        """
        from arqsearch.integer.execution import backend_of

        return backend_of(self, device, backend, self.__dict__.setdefault("_backends", {}))

    def _structure(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Split into JSON-able integers and arrays, without names and floats."""
        arrays: dict[str, np.ndarray] = {}
        listed = []
        for index, op in enumerate(self.ops):
            entry: dict[str, Any] = {"op": type(op).__name__}
            for item in dataclasses.fields(op):
                value = getattr(op, item.name)
                if isinstance(value, np.ndarray):
                    arrays[f"{index:04d}.{item.name}"] = value
                else:
                    entry[item.name] = list(value) if isinstance(value, tuple) else value
            listed.append(entry)
        structure = {
            "ops": listed,
            "tensors": [[list(spec.shape), spec.lo, spec.hi] for spec in self.tensors],
            "output": self.output,
        }
        return structure, arrays

    def save(self, path: str | Path) -> None:
        """Write one safetensors file whose header holds the structure, the metadata and the hash."""
        from safetensors.numpy import save_file

        structure, arrays = self._structure()
        header = {
            "structure": structure,
            "metadata": self.metadata,
            "hash": self.hash,
            "arithmetic_version": ARITHMETIC_VERSION,
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: np.ascontiguousarray(values) for name, values in arrays.items()},
            str(path),
            metadata={_HEADER: json.dumps(header, sort_keys=True)},
        )

    @classmethod
    def load(cls, path: str | Path) -> IntegerProgram:
        """Read a file written by :meth:`save` and check its hash.

        :raises ArqError: when the file is missing, not a program, of another arithmetic, or altered.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ArqError(f"No integer program at {path}; `arqsearch run` or `arqsearch search` writes one.")
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            version, stated = header["arithmetic_version"], header["hash"]
            if version == ARITHMETIC_VERSION:
                program = cls._from_structure(header["structure"], arrays, dict(header["metadata"]))
                actual = program.hash
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise ArqError(f"{path} is not an integer program ({error}); lower the network again.") from error
        if version != ARITHMETIC_VERSION:
            raise ArqError(
                f"{path} was written for arithmetic version {version}, this is {ARITHMETIC_VERSION}; lower the network "
                "again with this version."
            )
        if actual != stated:
            raise ArqError(f"{path} was altered: its content hashes to {actual}, the file says {stated}.")
        return program

    @classmethod
    def _from_structure(
        cls, structure: dict[str, Any], arrays: dict[str, np.ndarray], metadata: dict[str, Any]
    ) -> IntegerProgram:
        kinds = {kind.__name__: kind for kind in O.OPS}
        listed: list[Op] = []
        for index, entry in enumerate(structure["ops"]):
            fields = dict(entry)
            name = fields.pop("op")
            if name not in kinds:
                raise ArqError(f"Operation {name!r} is unknown to this version. {nearest(name, kinds)}")
            for item in dataclasses.fields(kinds[name]):
                key = f"{index:04d}.{item.name}"
                if key in arrays:
                    fields[item.name] = arrays[key]
                elif isinstance(fields.get(item.name), list):
                    fields[item.name] = tuple(fields[item.name])
            listed.append(kinds[name](**fields))
        tensors = tuple(TensorSpec(tuple(shape), lo, hi) for shape, lo, hi in structure["tensors"])
        return cls(tuple(listed), tensors, structure["output"], metadata)
