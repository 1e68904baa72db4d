"""Data sets: identities, splits, digits, IDX files, names, and the real files."""

from __future__ import annotations

import gzip
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arqsearch import data
from arqsearch.data import Dataset
from arqsearch.errors import ArqError

Finder = Callable[[str], Path]


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, prefix: str = "t10k", packed: bool = True) -> None:
    for what, array in (("images", images), ("labels", labels)):
        content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        name = f"{prefix}-{what}-idx{array.ndim}-ubyte" + (".gz" if packed else "")
        (folder / name).write_bytes(gzip.compress(content) if packed else content)


def small(n: int = 10) -> Dataset:
    images = np.arange(n * 12, dtype=np.uint8).reshape(n, 2, 2, 3)
    return Dataset(images, np.arange(n) % 3, 3, "small")


# ---- the data set itself -----------------------------------------------------------------------


def test_identity_is_the_stated_hash_of_shape_pixels_and_labels() -> None:
    dataset = small(4)
    content = struct.pack("<4q", 4, 2, 2, 3) + bytes(range(48)) + struct.pack("<4q", 0, 1, 2, 0)
    assert dataset.identity == hashlib.sha256(content).hexdigest()
    pixels = dataset.images.copy()
    pixels[3, 1, 1, 2] ^= 1
    assert Dataset(pixels, dataset.labels, 3, "small").identity != dataset.identity
    labels = np.array([0, 1, 2, 1])
    assert Dataset(dataset.images, labels, 3, "small").identity != dataset.identity


def test_identity_does_not_depend_on_memory_layout() -> None:
    dataset = small(4)
    turned = np.asfortranarray(dataset.images)
    assert Dataset(turned, dataset.labels.astype(np.int32), 3, "other name").identity == dataset.identity


def test_subsets_keep_the_original_ids() -> None:
    part = small().subset([7, 2, 5]).subset(slice(1, None))
    assert part.ids.tolist() == [2, 5]
    np.testing.assert_array_equal(part.images, small().images[[2, 5]])
    assert part.labels.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, np.int64), "expected uint8"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int64), r"\(N, H, W, C\)"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int64), "2 images but labels"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 3]), r"label 3 in row 1 is outside 0\.\.2"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([-1, -1]), "validation split"),
    ],
)
def test_malformed_data_sets_are_refused(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(ArqError, match=message):
        Dataset(images, labels, 3, "broken")


def test_holdout_is_fixed_and_disjoint() -> None:
    train, holdout = data.split_holdout(small(), 4)
    assert len(train) == 6
    assert sorted([*train.ids, *holdout.ids]) == list(range(10))
    # RandomState(0).permutation(10) begins so, in every NumPy.
    assert holdout.ids.tolist() == [2, 8, 4, 9]
    assert data.split_holdout(small(), 4, seed=1)[1].ids.tolist() != holdout.ids.tolist()


@pytest.mark.parametrize("size", [0, 10, 11])
def test_an_impossible_holdout_is_refused(size: int) -> None:
    with pytest.raises(ArqError, match="between 1 and 9"):
        data.split_holdout(small(), size)


# ---- digits ------------------------------------------------------------------------------------


def test_digits_split_is_fixed_and_in_proportion() -> None:
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert train.images.shape == (1297, 8, 8, 1)
    assert test.images.shape == (500, 8, 8, 1)
    counts = np.bincount(train.labels), np.bincount(test.labels)
    assert np.ptp(counts[1] / (counts[0] + counts[1])) < 0.01
    assert train.identity.startswith("a2b4a579839e")
    assert test.identity.startswith("d164336743ff")


def test_digits_are_disjoint_and_rescaled_by_rounding() -> None:
    from sklearn.datasets import load_digits

    original = load_digits().images
    loaded = np.concatenate([data.load("digits", split).images for split in ("train", "test")])[..., 0]
    expected = np.floor(original * 255 / 16 + 0.5).astype(np.uint8)
    assert sorted(image.tobytes() for image in loaded) == sorted(image.tobytes() for image in expected)


# ---- IDX ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_plain_and_packed(tmp_path: Path, packed: bool) -> None:
    images = np.arange(2 * 5 * 4, dtype=np.uint8).reshape(2, 5, 4)
    write_idx(tmp_path, images, np.array([9, 0], np.uint8), packed=packed)
    dataset = data.load("mnist", "test", path=str(tmp_path))
    np.testing.assert_array_equal(dataset.images, images[..., None])
    assert (dataset.labels.tolist(), dataset.num_classes, dataset.name) == ([9, 0], 10, "mnist")


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    write_idx(tmp_path, np.zeros((1, 2, 2), np.uint8), np.zeros(1, np.uint8))
    with pytest.raises(ArqError, match=r"train-images-idx3-ubyte\.gz"):
        data.load("fashion-mnist", "train", path=tmp_path)


def cut_plain(file: Path) -> None:
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))


def cut_packed(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def lengthen(file: Path) -> None:
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()) + b"x"))


def other_kind(file: Path) -> None:
    file.write_bytes(gzip.compress(b"\x89PNG" + bytes(40)))


def cut_header(file: Path) -> None:
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:7]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_plain, "truncated: 23 bytes.*= 24 bytes"),
        (cut_packed, "truncated or not gzip"),
        (lengthen, "bytes left over"),
        (other_kind, "89504e47"),
        (cut_header, "its header alone has 16"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_idx(tmp_path, np.zeros((2, 2, 2), np.uint8), np.zeros(2, np.uint8))
    damage(tmp_path / "t10k-images-idx3-ubyte.gz")
    with pytest.raises(ArqError, match=message):
        data.load("mnist", "test", path=tmp_path)


def test_idx_images_and_labels_must_agree(tmp_path: Path) -> None:
    write_idx(tmp_path, np.zeros((2, 2, 2), np.uint8), np.zeros(3, np.uint8))
    with pytest.raises(ArqError, match=r"2 images.*3 labels"):
        data.load("mnist", "test", path=tmp_path)


# ---- names -------------------------------------------------------------------------------------


def test_unknown_names_and_splits() -> None:
    with pytest.raises(ArqError, match="Did you mean 'cifar10'"):
        data.load("cifar", "test")
    with pytest.raises(ArqError, match="Did you mean 'mnist'"):
        data.load("mnits", "test", path="/tmp")
    with pytest.raises(ArqError, match=r"needs data\.path"):
        data.load("folder", "test")
    with pytest.raises(ArqError, match="Did you mean 'test'"):
        data.load("digits", "tests")  # type: ignore[arg-type]
    with pytest.raises(ArqError, match="one size already"):
        data.load("digits", "test", image_size=16)


def test_a_data_set_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARQSEARCH_DATA", str(tmp_path))
    with pytest.raises(ArqError, match=r"data/cifar10.*ARQSEARCH_DATA.*train\.parquet"):
        data.load("cifar10", "test")
    with pytest.raises(ArqError, match="nowhere does not exist"):
        data.load("cifar10", "test", path=tmp_path / "nowhere")


# ---- the real files ----------------------------------------------------------------------------


def test_lossless_cifar10_images(shared_data: Finder) -> None:
    dataset = data.load("cifar10", "test", path=shared_data("data/cifar10/test_lossless_1000.parquet"))
    assert dataset.images.shape == (1000, 32, 32, 3)
    assert dataset.labels[:4].tolist() == [3, 8, 8, 0]
    assert dataset.identity == data.load(
        "cifar10", "test", path=shared_data("data/cifar10/test_lossless_1000.parquet")
    ).identity, "threads do not change the order"  # fmt: skip


def test_mnist_files(shared_data: Finder) -> None:
    dataset = data.load("mnist", "test", path=shared_data("data/mnist"))
    assert dataset.images.shape == (10000, 28, 28, 1)
    assert dataset.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert round(float(dataset.images.mean() / 255), 4) == 0.1325


def test_imagenet_sample(shared_data: Finder) -> None:
    dataset = data.load("imagenet", "test", path=shared_data("data/imagenet-sample"))
    assert dataset.images.shape == (500, 224, 224, 3)
    assert dataset.labels.tolist() == list(range(0, 1000, 2))
    assert dataset.num_classes == 1000


def test_fashion_mnist_of_the_debian_package() -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    dataset = data.load("fashion-mnist", "test", path=folder)
    assert dataset.images.shape == (10000, 28, 28, 1)
    assert dataset.labels[:4].tolist() == [9, 2, 1, 1]
