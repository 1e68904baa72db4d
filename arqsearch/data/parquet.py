"""Images in the Hugging Face parquet layout: a struct column {bytes, path} and an integer label column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from arqsearch.data.dataset import Dataset, check_labels
from arqsearch.data.decode import decode_images
from arqsearch.errors import ArqError

if TYPE_CHECKING:
    import pyarrow as pa

Split = Literal["train", "test"]

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMN = "label"
#: Folders below the given one in which the hub keeps shards.
SHARD_FOLDERS = (".", "data", "plain_text", "default")
#: File name stems that serve a split, the first that exists wins.
STEMS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation", "val")}


def load_parquet(
    path: Path,
    split: Split,
    name: str,
    *,
    num_classes: int | None = None,
    channels: int | None = None,
    image_size: int | None = None,
    prefer_validation: bool = False,
) -> Dataset:
    """Read one split.

    :param path: a folder with ``train.parquet``/``test.parquet`` or shards ``train-*.parquet``, or one file.
    :param name: of the data set.
    :param num_classes: None = from the schema's class names, otherwise the largest label of both splits + 1.
    :param channels: 1, 3, or None to find out.
    :param image_size: resize to this height and width.
    :param prefer_validation: the validation files serve as test split (ImageNet's test split has no labels).
    :raises ArqError: when files are missing, truncated or have other columns.
    """
    files = split_files(path, split, prefer_validation)
    tables = [_read(file) for file in files]
    images: list[bytes] = []
    labels: list[int] = []
    origins: list[str] = []
    for file, table in zip(files, tables, strict=True):
        column = image_column(table.column_names, table.schema, file)
        rows = table.column(column).to_pylist()
        for row, value in enumerate(rows):
            content = (value or {}).get("bytes")
            if content is None:
                raise ArqError(
                    f"{file}: row {row} of column {column!r} holds no image bytes; write the data set with embedded "
                    "images."
                )
            images.append(content)
            origins.append(f"Row {row} of {file}" + (f" ({value['path']})" if value.get("path") else ""))
        labels += _labels(table, file)
    if not images:
        raise ArqError(f"{', '.join(map(str, files))}: no rows.")
    label_array = np.array(labels, dtype=np.int64)
    classes = num_classes or _class_count(path, split, tables[0].schema, label_array, prefer_validation)
    check_labels(label_array, classes, str(files[0]))
    pixels = decode_images(images, origins.__getitem__, channels=channels, image_size=image_size)
    return Dataset(pixels, label_array, classes, name)


def split_files(path: Path, split: Split, prefer_validation: bool = False) -> list[Path]:
    """Files of a split, in order.

    A single file serves as training set only when its name begins with ``train``, and never as both.

    :raises ArqError: saying what was looked for.
    """
    if path.is_file():
        of_file: Split = "train" if path.name.startswith("train") else "test"
        if of_file != split:
            raise ArqError(
                f"{path} serves as the {of_file} split, but the {split} split was asked for. Point data.path at a "
                "folder with train.parquet and test.parquet."
            )
        return [path]
    stems = STEMS[split]
    if prefer_validation and split == "test":
        stems = ("validation", "val", "test")
    for stem in stems:
        for folder in SHARD_FOLDERS:
            whole = path / folder / f"{stem}.parquet"
            shards = [whole] if whole.is_file() else sorted((path / folder).glob(f"{stem}-*.parquet"))
            if shards:
                return shards
    looked = ", ".join(f"{stem}.parquet or {stem}-*.parquet" for stem in stems)
    present = sorted(p.name for folder in SHARD_FOLDERS for p in (path / folder).glob("*.parquet"))
    raise ArqError(
        f"No {split} split in {path}: looked for {looked} (there and in {', '.join(SHARD_FOLDERS[1:])}); found "
        f"{', '.join(dict.fromkeys(present)) or 'no parquet file'}. Correct data.path or add the file."
    )


def has_parquet(path: Path) -> bool:
    """Whether a folder looks like this layout."""
    return any(True for folder in SHARD_FOLDERS for _ in (path / folder).glob("*.parquet"))


def _read(file: Path, columns: list[str] | None = None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file).read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ArqError(
            f"{file} cannot be read as parquet ({str(error).splitlines()[0]}); it is truncated or another kind of "
            "file. Fetch it again."
        ) from error


def image_column(names: list[str], schema: Any, where: Path | str) -> str:
    """The image column of a table.

    :param schema: the Arrow schema.
    :raises ArqError: listing the columns there are and those expected.
    """
    import pyarrow as pa

    found = [name for name in IMAGE_COLUMNS if name in names]
    if found and LABEL_COLUMN in names:
        kind = schema.field(found[0]).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return found[0]
    columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
    raise ArqError(
        f"{where} has the columns {columns}; expected {' or '.join(repr(n) for n in IMAGE_COLUMNS)} as a struct "
        f"{{bytes, path}} and {LABEL_COLUMN!r} as an integer. Rename or convert the columns."
    )


def _labels(table: pa.Table, file: Path) -> list[int]:
    import pyarrow as pa

    column = table.column(LABEL_COLUMN)
    if not pa.types.is_integer(column.type) or column.null_count:
        problem = f"{column.null_count} empty cells" if column.null_count else f"type {column.type}"
        raise ArqError(f"{file}: column {LABEL_COLUMN!r} has {problem}; expected integers 0..number of classes − 1.")
    return list(column.to_pylist())


def _class_count(path: Path, split: Split, schema: Any, labels: np.ndarray, prefer_validation: bool) -> int:
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return len(features[LABEL_COLUMN]["names"])
    except (KeyError, TypeError, ValueError):
        largest = int(labels.max())
    if path.is_dir():
        other: Split = "test" if split == "train" else "train"
        try:
            files = split_files(path, other, prefer_validation)
        except ArqError:
            files = []  # Only one split is there: its labels say all there is to know.
        for file in files:
            largest = max(largest, *_labels(_read(file, [LABEL_COLUMN]), file))
    return largest + 1
