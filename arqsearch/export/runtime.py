"""What the ONNX exports share around their graphs: metadata, sessions of onnxruntime, batches."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from arqsearch.errors import ArqError

#: Names of the graphs' one input and one output.
INPUT, OUTPUT = "pixels", "logits"
#: Keys of a model's metadata.
HASH_KEY, VERSION_KEY, RANGE_KEY = "arqsearch_program_hash", "arqsearch_arithmetic_version", "arqsearch_pixel_range"
#: A model holds the key of its own form and none of the others.
FORM_KEYS = {"onnx": "arqsearch_strict", "onnx-fast": "arqsearch_fast", "qdq": "arqsearch_note"}


@dataclass(frozen=True)
class Model:
    """An exported model, loaded.

    :param path: its file.
    :param session: onnxruntime's session on the CPU.
    :param facts: the model's metadata.
    """

    path: Path
    session: Any
    facts: dict[str, str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image, ``(H, W, C)``."""
        return tuple(self.session.get_inputs()[0].shape[1:])

    @property
    def input_type(self) -> np.dtype[Any]:
        """Type of the pixels."""
        name = self.session.get_inputs()[0].type.removeprefix("tensor(").removesuffix(")")
        return np.dtype("float32" if name == "float" else name)

    def integer_pixels(self, pixels: Any) -> np.ndarray:
        """Pixels as an array, once shape, type and proven range are checked.

        :raises ArqError: when they do not fit.
        """
        images, (lo, hi) = np.asarray(pixels), json.loads(self.facts[RANGE_KEY])
        if images.dtype.kind not in "iu" or images.shape[1:] != self.shape:
            raise ArqError(
                f"{self.path} takes integer pixels of shape (N, {', '.join(map(str, self.shape))}); "
                f"got {images.dtype} {images.shape}. Pass the uint8 or int16 image as NHWC."
            )
        if images.size and (images.min() < lo or images.max() > hi):
            raise ArqError(
                f"Pixels span {images.min()}..{images.max()}, the proofs cover {lo}..{hi}; export for this noise."
            )
        return images

    def run(self, images: np.ndarray, batch: int, dtype: DTypeLike) -> np.ndarray:
        """Logits ``(N, K)`` of checked images.

        :param batch: images per call, which bounds memory.
        :param dtype: of the logits, for when there is no image.
        """
        kind = self.input_type
        parts = [
            self.session.run([OUTPUT], {INPUT: images[start : start + batch].astype(kind)})[0]
            for start in range(0, len(images), batch)
        ]
        return np.concatenate(parts) if parts else np.empty((0, *self.session.get_outputs()[0].shape[1:]), dtype)


def load_model(
    path: str | Path, form: str, *, threads: int = 1, optimize: bool = True, entries: Mapping[str, str] | None = None
) -> Model:
    """Open an exported model with onnxruntime on the CPU; a session is kept until the file changes.

    :param form: the ``--format`` that must have written it, a key of :data:`FORM_KEYS`.
    :param threads: threads within an operator.
    :param optimize: whether onnxruntime may rewrite the graph.
    :param entries: further session options, by name.
    :raises ArqError: when the file is missing, damaged or of another form.
    """
    _check_file(path, form)
    modified, options = Path(path).stat().st_mtime_ns, tuple(sorted((entries or {}).items()))
    session = _session(str(path), modified, threads, optimize, options)
    facts = dict(session.get_modelmeta().custom_metadata_map)
    if FORM_KEYS[form] not in facts:
        raise ArqError(f"{path} was not written by `arqsearch export --format {form}`; export the program again.")
    return Model(Path(path), session, facts)


def read_metadata(path: str | Path, form: str) -> dict[str, str]:
    """The metadata of a model: program hash, arithmetic version, pixel range and more.

    :raises ArqError: when the file is missing.
    """
    _check_file(path, form)
    model = require("onnx").load(str(path), load_external_data=False)
    return {entry.key: entry.value for entry in model.metadata_props}


def require(package: str) -> Any:
    """Import a package that only the ONNX exports need.

    :raises ArqError: when it is absent.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ArqError(f"ONNX models need the package {package}; run `pip install {package}`.") from error


def _check_file(path: str | Path, form: str) -> None:
    if not Path(path).is_file():
        raise ArqError(f"No ONNX model at {path}; `arqsearch export --format {form}` writes one.")


@lru_cache(maxsize=8)
def _session(path: str, modified: int, threads: int, optimize: bool, entries: tuple[tuple[str, str], ...]) -> Any:
    """A session on a file; `modified` makes a rewritten file a new one."""
    try:
        return open_session(path, threads, optimize, entries)
    except ArqError:
        raise
    except Exception as error:
        version = require("onnxruntime").__version__
        raise ArqError(f"onnxruntime {version} cannot load {path}: {error}. Export the program again.") from error


def open_session(
    model: str | bytes, threads: int = 1, optimize: bool = True, entries: tuple[tuple[str, str], ...] = ()
) -> Any:
    """An inference session of onnxruntime on the CPU.

    :param model: file or content.
    """
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for name, value in entries:
        options.add_session_config_entry(name, value)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
