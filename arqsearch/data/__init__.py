"""Data sets by name or path, always as uint8 pixels."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arqsearch.data.dataset import Dataset, split_holdout
from arqsearch.data.digits import load_digits
from arqsearch.data.folder import load_folder
from arqsearch.data.hub import load_hub
from arqsearch.data.idx import has_idx, load_idx
from arqsearch.data.parquet import has_parquet, load_parquet
from arqsearch.errors import ArqError, nearest

__all__ = ["Dataset", "available", "data_root", "load", "split_holdout"]

Split = Literal["train", "test"]


@dataclass(frozen=True)
class _Known:
    """What a name stands for: class count, channels, default folders below the data root or absolute."""

    num_classes: int
    channels: int
    places: tuple[str, ...]
    get: str
    prefer_validation: bool = False


_KNOWN = {
    "mnist": _Known(10, 1, ("mnist",), "put the four IDX files there"),
    "fashion-mnist": _Known(
        10,
        1,
        ("fashion-mnist", "/usr/share/datasets/fashion-mnist"),
        "on Debian: apt-get install dataset-fashion-mnist",
    ),
    "cifar10": _Known(10, 3, ("cifar10",), "put train.parquet and test.parquet (columns img, label) there"),
    "imagenet": _Known(
        1000, 3, ("imagenet", "imagenet-sample"), "put its parquet shards there", prefer_validation=True
    ),
}
_ALIASES = {"fashion_mnist": "fashion-mnist", "cifar-10": "cifar10"}


def available() -> list[str]:
    """Names that :func:`load` knows; besides them ``folder`` with a path, a path, and ``hf:owner/name``."""
    return sorted(["digits", *_KNOWN])


def data_root() -> Path:
    """Folder with ``data/``: $ARQSEARCH_DATA, by default ``../shared`` beside the checkout."""
    given = os.environ.get("ARQSEARCH_DATA")
    if given:
        return Path(given).expanduser()
    return Path(__file__).resolve().parents[2].parent / "shared"


def load(name_or_path: str, split: Split, *, path: str | Path | None = None, image_size: int | None = None) -> Dataset:
    """Load one split of a data set.

    The layout (IDX files, parquet, class folders) is found from what lies at the path.

    :param name_or_path: a name of :func:`available`, ``folder``, a path, or ``hf:owner/name`` for the hub.
    :param split: ``train`` or ``test``.
    :param path: folder or file; None = where the data root or the system keeps data sets of that name.
    :param image_size: scale the shorter side to this and cut the centre square (encoded images only).
    :raises ArqError: saying what was looked for and how to mend it.
    """
    if split not in ("train", "test"):
        raise ArqError(f"There is no split {split!r}. {nearest(str(split), ['train', 'test'])}")
    if name_or_path.startswith("hf:"):
        return load_hub(name_or_path.removeprefix("hf:"), split, image_size=image_size)
    name = _ALIASES.get(name_or_path, name_or_path)
    if name == "digits":
        _no_resize(name, image_size)
        return load_digits(split)
    known = _KNOWN.get(name)
    if known is not None:
        place = Path(path).expanduser() if path is not None else _find(name, known)
        return _load_path(place, split, name, known, image_size)
    if name != "folder" and path is None and Path(name).expanduser().exists():
        path = name
    if path is None:
        problem = "data.name folder needs data.path." if name == "folder" else f"No data set {name_or_path!r}."
        raise ArqError(
            f"{problem} {nearest(name_or_path, available())} Other choices: folder with data.path, an existing path, "
            "or hf:owner/name."
        )
    place = Path(path).expanduser()
    if name not in ("folder", str(path)):
        raise ArqError(f"No data set {name!r}. {nearest(name, [*available(), 'folder'])}")
    return _load_path(place, split, place.resolve().name, None, image_size)


def _find(name: str, known: _Known) -> Path:
    places = [data_root() / "data" / place for place in known.places]  # An absolute place replaces the root.
    for place in places:
        if place.exists():
            return place
    raise ArqError(
        f"Data set {name!r} was not found: looked in {', '.join(map(str, places))}. Set data.path or ARQSEARCH_DATA, "
        f"or {known.get}."
    )


def _load_path(place: Path, split: Split, name: str, known: _Known | None, image_size: int | None) -> Dataset:
    if not place.exists():
        raise ArqError(f"{place} does not exist; correct data.path ({name}).")
    if place.is_dir() and has_idx(place):
        _no_resize(name, image_size)
        return load_idx(place, split, name, known.num_classes if known else 10)
    num_classes, channels = (known.num_classes, known.channels) if known else (None, None)
    validation = known.prefer_validation if known else False
    if (place.is_file() and place.suffix == ".parquet") or (place.is_dir() and has_parquet(place)):
        reader: Callable[..., Dataset] = load_parquet
    elif place.is_dir() and any(entry.is_dir() for entry in place.iterdir()):
        reader = load_folder
    else:
        raise ArqError(
            f"{place} is no data set: expected a .parquet file, or a folder with train.parquet and test.parquet, IDX "
            "files (train-images-idx3-ubyte[.gz], ...) or one subfolder of images for each class."
        )
    return reader(
        place,
        split,
        name,
        num_classes=num_classes,
        channels=channels,
        image_size=image_size,
        prefer_validation=validation,
    )


def _no_resize(name: str, image_size: int | None) -> None:
    if image_size is not None:
        raise ArqError(f"{name} has images of one size already; leave data.image_size out.")
