"""Data sets by name from the Hugging Face hub, through the optional package `datasets`."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from arqsearch.data.dataset import Dataset
from arqsearch.data.decode import decode_images
from arqsearch.data.parquet import IMAGE_COLUMNS, LABEL_COLUMN
from arqsearch.errors import ArqError

_SPLITS = {"train": ("train",), "test": ("test", "validation", "val")}


def load_hub(name: str, split: Literal["train", "test"], *, image_size: int | None = None) -> Dataset:
    """Fetch one split; the hub's cache keeps it for the next time.

    :param name: ``owner/name``.
    :param split: for ``test`` the first of test, validation, val that has labels.
    :param image_size: resize to this height and width.
    :raises ArqError: when `datasets` is missing, the hub cannot be reached, or the columns are others.
    """
    try:
        import datasets
    except ImportError as error:
        raise ArqError(
            f"Data set {name!r} comes from the hub and needs the package `datasets`: pip install 'arqsearch[hub]'. "
            "Without a network, download its parquet files and set data.path."
        ) from error
    try:
        available = list(datasets.get_dataset_split_names(name))
        tables = {
            s: datasets.load_dataset(name, split=s) for names in _SPLITS.values() for s in names if s in available
        }
    except (OSError, ValueError, RuntimeError) as error:
        raise ArqError(
            f"Data set {name!r} cannot be fetched from the hub ({type(error).__name__}: {error}). Check the name and "
            "the network, or download its parquet files and set data.path."
        ) from error
    labels = {s: _labels(table, f"{name} ({s})") for s, table in tables.items()}
    usable = [s for s in _SPLITS[split] if s in labels and len(labels[s]) and labels[s].max() >= 0]
    if not usable:
        raise ArqError(
            f"Data set {name!r} has the splits {', '.join(available)}; none of {', '.join(_SPLITS[split])} has labels."
        )
    table = tables[usable[0]]
    column = next(c for c in IMAGE_COLUMNS if c in table.column_names)
    sources = [row[column]["bytes"] for row in table.cast_column(column, datasets.Image(decode=False))]
    if None in sources:
        raise ArqError(f"{name} ({usable[0]}): image {sources.index(None)} is empty; this data set cannot be used.")
    pixels = decode_images(sources, lambda i: f"Image {i} of {name}", image_size=image_size)
    class_names = getattr(table.features[LABEL_COLUMN], "names", None)
    classes = len(class_names) if class_names else 1 + max(int(array.max()) for array in labels.values() if len(array))
    return Dataset(pixels, labels[usable[0]], classes, name)


def _labels(table: Any, where: str) -> NDArray[np.int64]:
    if LABEL_COLUMN not in table.column_names or not any(c in table.column_names for c in IMAGE_COLUMNS):
        raise ArqError(
            f"{where} has the columns {', '.join(table.column_names)}; expected {' or '.join(IMAGE_COLUMNS)} and "
            f"{LABEL_COLUMN}."
        )
    values = list(table[LABEL_COLUMN])
    odd = [value for value in values if not isinstance(value, int)]
    if odd:
        raise ArqError(f"{where} has the label {odd[0]!r}; expected integers 0..number of classes − 1.")
    return np.array(values, dtype=np.int64)
