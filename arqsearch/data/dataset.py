"""`Dataset`: labelled uint8 images in memory, with the identity that certificates name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from arqsearch.errors import ArqError

Images: TypeAlias = NDArray[np.uint8]
Integers: TypeAlias = NDArray[np.int64]


def _no_ids() -> Integers:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size.

    :param images: uint8 ``(N, H, W, C)``, grey levels 0..255.
    :param labels: int64 ``(N,)``, each in 0..num_classes−1.
    :param num_classes: number of classes of the task, whether or not all occur here.
    :param name: the data set's name, for reports and certificates.
    :param ids: int64 ``(N,)``, position of each image in the split as loaded; left out = 0..N−1.
    :raises ArqError: when shapes, types or label range are not as stated.
    """

    images: Images
    labels: Integers
    num_classes: int
    name: str
    ids: Integers = field(default_factory=_no_ids)

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ArqError(
                f"Images of {self.name} are {self.images.dtype} of shape {self.images.shape}; "
                "expected uint8 of shape (N, H, W, C)."
            )
        if self.labels.shape != (len(self.images),):
            raise ArqError(f"{self.name} has {len(self.images)} images but labels of shape {self.labels.shape}.")
        object.__setattr__(self, "labels", self.labels.astype(np.int64, copy=False))
        if not len(self.ids):
            object.__setattr__(self, "ids", np.arange(len(self.images), dtype=np.int64))
        if self.ids.shape != self.labels.shape:
            raise ArqError(f"{self.name} has {len(self.images)} images but ids of shape {self.ids.shape}.")
        check_labels(self.labels, self.num_classes, self.name)

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of shape (4 × ``<i8``), decoded pixels and labels (``<i8``); JPEG decoders differ."""
        digest = hashlib.sha256(np.array(self.images.shape, dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def subset(self, indices: Sequence[int] | NDArray[Any] | slice) -> Dataset:
        """The images at these positions, in this order, with their original ids.

        :param indices: positions in this data set, or a slice.
        """
        chosen = indices if isinstance(indices, slice) else np.asarray(indices, dtype=np.int64)
        return Dataset(self.images[chosen], self.labels[chosen], self.num_classes, self.name, self.ids[chosen])


def check_labels(labels: Integers, num_classes: int, where: str) -> None:
    """Refuse labels outside 0..num_classes−1.

    :param where: data set or file, for the message.
    :raises ArqError: naming the first bad label and its row.
    """
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if not len(bad):
        return
    row, value = int(bad[0]), int(labels[bad[0]])
    hint = (
        "Label -1 marks a split that was published without labels; use the validation split instead."
        if value == -1
        else "Check the label column and the name of the data set."
    )
    raise ArqError(
        f"{where}: label {value} in row {row} is outside 0..{num_classes - 1} ({len(bad)} such rows). {hint}"
    )


def split_holdout(dataset: Dataset, size: int, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Set a fixed random part aside, to score candidates on.

    Both parts are in random order, so any first n images of one are a sample of it. The permutation is
    that of NumPy's frozen legacy generator: the same for every NumPy version.

    :param dataset: a training set.
    :param size: number of images set aside (CIFAR-10: 5,000).
    :param seed: of the permutation.
    :returns: ``(train, holdout)``, disjoint, together everything.
    :raises ArqError: when nothing would be left of one of them.
    """
    if not 0 < size < len(dataset):
        raise ArqError(
            f"A held-out part of {size} images cannot be taken from {dataset.name} with {len(dataset)} training "
            f"images; choose data.holdout between 1 and {len(dataset) - 1}."
        )
    order = np.random.RandomState(seed).permutation(len(dataset))
    return dataset.subset(order[size:]), dataset.subset(order[:size])
