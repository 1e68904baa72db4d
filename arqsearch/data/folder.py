"""A folder of images with one subfolder for each class, with or without train/ and test/ above them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from arqsearch.data.dataset import Dataset
from arqsearch.data.decode import decode_images
from arqsearch.errors import ArqError

Split = Literal["train", "test"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
#: Folder names that serve a split.
LEVELS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "validation"),
}
#: Without levels, every fifth image of a class is a test image.
TEST_EVERY = 5


def load_folder(
    path: Path,
    split: Split,
    name: str,
    *,
    num_classes: int | None = None,
    channels: int | None = None,
    image_size: int | None = None,
    prefer_validation: bool = False,
) -> Dataset:
    """Read one split; classes are numbered in the order of their names (as numbers, if all are numbers).

    Without ``train/`` and ``test/`` levels every fifth image of each class is a test image. Images are
    ordered by turns, the first of every class, then the second, so that the first n are of all classes.

    :param path: the folder.
    :param name: of the data set.
    :param num_classes: how many class folders there must be; None = as many as there are.
    :param channels: 1, 3, or None to find out.
    :param image_size: resize to this height and width.
    :param prefer_validation: val/ serves as the test split when both it and test/ are there.
    :raises ArqError: when the folder has no classes or images, or another number of classes.
    """
    root, whole = _split_root(path, split, prefer_validation)
    roots = {root, *(path / level for levels in LEVELS.values() for level in levels if (path / level).is_dir())}
    classes = _sorted_names({entry.name for level in roots for entry in _subfolders(level)})
    if not classes:
        raise ArqError(f"{root} has no class folders; expected one subfolder with images for each class.")
    if num_classes is not None and len(classes) != num_classes:
        raise ArqError(
            f"{root} has {len(classes)} class folders, {name} has {num_classes} classes, so labels would not agree. "
            "Use data.name: folder for another set of classes."
        )
    turns: list[tuple[int, int, Path]] = []
    for label, class_name in enumerate(classes):
        files = sorted(f for f in (root / class_name).rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        if not whole:
            files = [f for i, f in enumerate(files) if (i % TEST_EVERY == TEST_EVERY - 1) == (split == "test")]
        turns += [(turn, label, file) for turn, file in enumerate(files)]
    if not turns:
        raise ArqError(f"No {split} images under {root}; files ending in {', '.join(sorted(SUFFIXES))} are read.")
    turns.sort(key=lambda item: item[:2])
    files = [file for _, _, file in turns]
    pixels = decode_images(files, lambda i: str(files[i]), channels=channels, image_size=image_size)
    return Dataset(pixels, np.array([label for _, label, _ in turns], dtype=np.int64), len(classes), name)


def _split_root(path: Path, split: Split, prefer_validation: bool) -> tuple[Path, bool]:
    """The folder above the classes, and whether all of its images belong to the split."""
    names = LEVELS[split]
    if prefer_validation and split == "test":
        names = ("val", "validation", "test", "testing")
    for level in names:
        if (path / level).is_dir():
            return path / level, True
    other: Split = "test" if split == "train" else "train"
    if path.name in names:
        return path, True
    if path.name in LEVELS[other] or any((path / level).is_dir() for level in LEVELS[other]):
        raise ArqError(
            f"{path} holds the {other} images only; looked for a folder named {' or '.join(names)} in it for the "
            f"{split} split. Point data.path at the folder above both."
        )
    return path, False


def _subfolders(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _sorted_names(names: set[str]) -> list[str]:
    return sorted(names, key=int) if all(n.isascii() and n.isdigit() for n in names) else sorted(names)
