"""Scikit-learn's handwritten digits: 1,797 images of 8×8, embedded in the package, so no network is needed."""

from __future__ import annotations

from typing import Literal

import numpy as np

from arqsearch.data.dataset import Dataset

TEST_IMAGES = 500


def load_digits(split: Literal["train", "test"]) -> Dataset:
    """Read one split: 500 test and 1,297 training images, every class in proportion.

    The values 0..16 of the original become grey levels round(v·255/16). The split is fixed by NumPy's
    frozen legacy generator; images come in mixed classes.
    """
    from sklearn import datasets as sklearn_datasets

    bunch = sklearn_datasets.load_digits()
    values = bunch.images.astype(np.int64)
    labels = bunch.target.astype(np.int64)
    images = ((values * 255 + 8) // 16).astype(np.uint8)[..., None]
    generator = np.random.RandomState(0)
    rank = np.empty(len(labels))
    for label in range(10):
        members = generator.permutation(np.flatnonzero(labels == label))
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.lexsort((labels, rank))
    chosen = order[:TEST_IMAGES] if split == "test" else order[TEST_IMAGES:]
    return Dataset(images[chosen], labels[chosen], 10, "digits")
