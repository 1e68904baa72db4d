"""MNIST and Fashion-MNIST in the IDX format (http://yann.lecun.com/exdb/mnist), plain or gzipped."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from arqsearch.data.dataset import Dataset
from arqsearch.errors import ArqError

_PREFIX = {"train": "train", "test": "t10k"}


def load_idx(path: Path, split: Literal["train", "test"], name: str, num_classes: int = 10) -> Dataset:
    """Read one split.

    :param path: folder with ``train-images-idx3-ubyte[.gz]``, ``t10k-labels-idx1-ubyte[.gz]``, ...
    :param name: of the data set.
    :raises ArqError: when a file is missing, truncated or not IDX.
    """
    images_file, labels_file = idx_file(path, split, "images", 3), idx_file(path, split, "labels", 1)
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise ArqError(
            f"{images_file} holds {len(images)} images but {labels_file} {len(labels)} labels; they are not of one "
            "data set."
        )
    return Dataset(images[..., None], labels.astype(np.int64), num_classes, name)


def idx_file(path: Path, split: Literal["train", "test"], what: str, axes: int) -> Path:
    """The file with a split's images or labels.

    :raises ArqError: naming the folder and every file name looked for.
    """
    names = [f"{_PREFIX[split]}-{what}{sep}idx{axes}-ubyte{end}" for sep in ("-", ".") for end in ("", ".gz")]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ArqError(f"No {split} {what} in {path}: looked for {', '.join(names)}. Correct data.path or add the file.")


def has_idx(path: Path) -> bool:
    """Whether a folder looks like this layout."""
    return any(path.glob("*-ubyte")) or any(path.glob("*-ubyte.gz"))


def read_idx(file: Path, axes: int) -> NDArray[np.uint8]:
    """Read an array of unsigned bytes.

    :param axes: how many dimensions the file must have.
    :raises ArqError: when the file is truncated, has bytes left over, or holds something else.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ArqError(f"{file} is truncated or not gzip ({error}); fetch it again.") from error
    header = 4 + 4 * axes
    if content[:4] != bytes((0, 0, 8, axes)):
        raise ArqError(
            f"{file} is not an IDX file of unsigned bytes with {axes} axes: it begins with "
            f"{content[:4].hex() or 'nothing'}, expected 000008{axes:02x}. Fetch it again."
        )
    if len(content) < header:
        raise ArqError(f"{file} is truncated: {len(content)} bytes, its header alone has {header}. Fetch it again.")
    shape = struct.unpack(f">{axes}I", content[4:header])
    expected = header + math.prod(shape)
    if len(content) != expected:
        problem = "is truncated" if len(content) < expected else "has bytes left over"
        raise ArqError(
            f"{file} {problem}: {len(content)} bytes, its header announces shape {shape} = {expected} bytes. Fetch it "
            "again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()
