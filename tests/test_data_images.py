"""Encoded images: parquet, class folders, the hub; and what a user reads when a file is wrong."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from arqsearch import data
from arqsearch.errors import ArqError


def encoded(value: int, size: tuple[int, int] = (4, 6), mode: str = "RGB") -> bytes:
    """A PNG of one colour; `size` is height, width."""
    buffer = io.BytesIO()
    shape = size if mode == "L" else (*size, 3)
    Image.fromarray(np.full(shape, value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    file: Path, labels: list[Any], images: list[bytes | None] | None = None, *, column: str = "img",
    label: str = "label", names: list[str] | None = None,
) -> None:  # fmt: skip
    images = images if images is not None else [encoded(i) for i in range(len(labels))]
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(images)]
    table = pa.table({column: pa.array(rows, struct_type), label: labels})
    if names:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def write_images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (4, 6)) -> None:
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i:03}.png").write_bytes(encoded(10 * number + i, size))


# ---- parquet -----------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["img", "image"])
def test_one_parquet_file_for_each_split(tmp_path: Path, column: str) -> None:
    write_parquet(tmp_path / "train.parquet", [1, 2, 0], column=column)
    write_parquet(tmp_path / "test.parquet", [9], [encoded(200)], column=column)
    train, test = (data.load("cifar10", split, path=str(tmp_path)) for split in ("train", "test"))
    assert train.images.shape == (3, 4, 6, 3)
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert (train.labels.tolist(), train.num_classes) == ([1, 2, 0], 10)
    assert test.images.min() == test.images.max() == 200


def test_shards_are_read_in_order_also_below_data(tmp_path: Path) -> None:
    for shard in (1, 0):
        write_parquet(tmp_path / "data" / f"train-0000{shard}-of-00002.parquet", [shard], [encoded(50 + shard)])
    dataset = data.load(str(tmp_path), "train")
    assert dataset.images[:, 0, 0, 0].tolist() == [50, 51]
    assert (dataset.num_classes, dataset.name) == (2, tmp_path.name)


def test_imagenet_prefers_validation_whose_images_have_labels(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [-1])
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", [998])
    assert data.load("imagenet", "test", path=tmp_path).labels.tolist() == [998]
    with pytest.raises(ArqError, match="published without labels"):
        data.load("imagenet", "test", path=tmp_path / "test-00000-of-00001.parquet")


def test_class_count_comes_from_the_schema_or_both_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a" / "train.parquet", [0, 1])
    write_parquet(tmp_path / "a" / "test.parquet", [4])
    assert data.load("folder", "train", path=tmp_path / "a").num_classes == 5
    write_parquet(tmp_path / "b" / "train.parquet", [0, 1], names=list("abcdefg"))
    assert data.load("folder", "train", path=tmp_path / "b").num_classes == 7


def test_grey_images_have_one_channel_unless_some_are_coloured(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1], [encoded(7, mode="L"), encoded(8, mode="L")])
    write_parquet(tmp_path / "test.parquet", [0, 1], [encoded(7, mode="L"), encoded(8)])
    assert data.load(str(tmp_path), "train").images.shape == (2, 4, 6, 1)
    mixed = data.load(str(tmp_path), "test").images
    assert mixed.shape == (2, 4, 6, 3)
    assert mixed[0].min() == mixed[0].max() == 7


def test_a_single_file_never_serves_as_both_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "extra.parquet", [0])
    write_parquet(tmp_path / "train-part.parquet", [0])
    assert len(data.load("cifar10", "test", path=tmp_path / "extra.parquet")) == 1
    assert len(data.load("cifar10", "train", path=tmp_path / "train-part.parquet")) == 1
    with pytest.raises(ArqError, match="serves as the test split"):
        data.load("cifar10", "train", path=tmp_path / "extra.parquet")
    with pytest.raises(ArqError, match="serves as the train split"):
        data.load("cifar10", "test", path=tmp_path / "train-part.parquet")


def test_a_missing_split_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0])
    with pytest.raises(ArqError, match=r"looked for test\.parquet or test-\*\.parquet.*found train\.parquet"):
        data.load("cifar10", "test", path=tmp_path)


def test_other_columns_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "test.parquet"
    write_parquet(file, [0], column="picture", label="fine_label")
    with pytest.raises(ArqError, match=r"picture: struct.*fine_label: int64; expected 'img' or 'image'.*'label'"):
        data.load("cifar10", "test", path=tmp_path)
    pq.write_table(pa.table({"img": [b"raw"], "label": [0]}), file)
    with pytest.raises(ArqError, match=r"img: binary.*expected.*struct"):
        data.load("cifar10", "test", path=tmp_path)


@pytest.mark.parametrize(
    ("labels", "images", "message"),
    [
        ([0, 10], None, r"label 10 in row 1 is outside 0\.\.9"),
        ([0, None], None, "1 empty cells"),
        (["cat", "dog"], None, "has type string"),
        ([0, 1], [encoded(1), None], "row 1 of column 'img' holds no image bytes"),
        ([0, 1], [encoded(1), encoded(1)[:40]], r"Row 1 of .*\(1\.png\) cannot be decoded"),
        ([0, 1], [encoded(1), b"text"], "cannot be decoded"),
        ([0, 1], [encoded(1), encoded(1, (4, 7))], r"different sizes: .*6x4.*7x4.*image_size"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, labels: list[Any], images: list[Any] | None, message: str) -> None:
    write_parquet(tmp_path / "test.parquet", labels, images)
    with pytest.raises(ArqError, match=message):
        data.load("cifar10", "test", path=tmp_path)


@pytest.mark.parametrize("keep", [0, 30, -30])
def test_truncated_parquet(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "test.parquet"
    write_parquet(file, [0, 1])
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArqError, match="truncated or another kind of file"):
        data.load("cifar10", "test", path=tmp_path)


def test_images_are_brought_to_one_size_without_distortion(tmp_path: Path) -> None:
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255  # The centre square is white.
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    write_parquet(tmp_path / "test.parquet", [0, 1], [buffer.getvalue(), encoded(9, (8, 8))])
    images = data.load("cifar10", "test", path=tmp_path, image_size=4).images
    assert images.shape == (2, 4, 4, 3)
    assert images[0].min() == 255
    assert images[1].max() == images[1].min() == 9


# ---- folders -----------------------------------------------------------------------------------


def test_image_folder_with_levels(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"cat": 2, "dog": 1, "emu": 1})
    write_images(tmp_path / "val", {"dog": 2})
    train, test = (data.load("folder", split, path=tmp_path) for split in ("train", "test"))
    assert train.labels.tolist() == [0, 1, 2, 0]
    assert train.images[:, 0, 0, 0].tolist() == [0, 10, 20, 1]
    assert (test.labels.tolist(), test.num_classes) == ([1, 1], 3)


def test_image_folder_without_levels_is_split_without_overlap(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    write_images(root, {"2": 7, "10": 5})
    train, test = (data.load(str(root), split) for split in ("train", "test"))
    assert test.images[:, 0, 0, 0].tolist() == [4, 14]
    assert test.labels.tolist() == [0, 1], "classes that are numbers are in numeric order"
    assert len(train) == 10
    assert not set(train.images[:, 0, 0, 0].tolist()) & {4, 14}


def test_a_folder_of_one_split_does_not_serve_as_the_other(tmp_path: Path) -> None:
    write_images(tmp_path / "test", {"a": 1, "b": 1})
    assert len(data.load("folder", "test", path=tmp_path / "test")) == 2
    for path in (tmp_path, tmp_path / "test"):
        with pytest.raises(ArqError, match="test images only"):
            data.load("folder", "train", path=path)


def test_cifar10_as_image_folder_needs_its_ten_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "ten" / "test", {f"class{i}": 1 for i in range(10)})
    assert data.load("cifar10", "test", path=tmp_path / "ten").labels.tolist() == list(range(10))
    write_images(tmp_path / "two" / "test", {"a": 1, "b": 1})
    with pytest.raises(ArqError, match=r"2 class folders, cifar10 has 10 classes.*data\.name: folder"):
        data.load("cifar10", "test", path=tmp_path / "two")


def test_folders_without_images_or_classes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArqError, match="is no data set"):
        data.load("folder", "test", path=tmp_path / "empty")
    (tmp_path / "classes" / "a").mkdir(parents=True)
    with pytest.raises(ArqError, match=r"No test images.*\.png"):
        data.load("folder", "test", path=tmp_path / "classes")
    (tmp_path / "levels" / "test").mkdir(parents=True)
    with pytest.raises(ArqError, match="no class folders"):
        data.load("folder", "test", path=tmp_path / "levels")


def test_the_data_root_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARQSEARCH_DATA", str(tmp_path))
    write_parquet(tmp_path / "data" / "cifar10" / "test.parquet", [3])
    assert data.load("cifar10", "test").labels.tolist() == [3]


# ---- hub ---------------------------------------------------------------------------------------


class FakeTable:
    """What `datasets.Dataset` offers of what is used."""

    def __init__(self, rows: list[dict[str, Any]], names: list[str] | None) -> None:
        self.rows = rows
        self.column_names = list(rows[0])
        self.features = {"label": types.SimpleNamespace(**({"names": names} if names else {}))}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        return [row[column] for row in self.rows]

    def cast_column(self, column: str, feature: Any) -> FakeTable:
        assert feature == ("Image", False)
        return self


def install_fake_hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, FakeTable]) -> None:
    module: Any = types.ModuleType("datasets")
    module.get_dataset_split_names = lambda name: list(splits)
    module.load_dataset = lambda name, split: splits[split]
    module.Image = lambda decode: ("Image", decode)
    monkeypatch.setitem(sys.modules, "datasets", module)


def hub_rows(labels: list[int], column: str = "image") -> list[dict[str, Any]]:
    return [{column: {"bytes": encoded(i), "path": None}, "label": label} for i, label in enumerate(labels)]


def test_hub_skips_a_test_split_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"test": FakeTable(hub_rows([-1, -1]), None), "validation": FakeTable(hub_rows([1, 0]), list("abcd"))}
    install_fake_hub(monkeypatch, splits)
    dataset = data.load("hf:owner/name", "test")
    assert (dataset.labels.tolist(), dataset.num_classes, dataset.name) == ([1, 0], 4, "owner/name")
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 1]
    with pytest.raises(ArqError, match="has the splits test, validation; none of train"):
        data.load("hf:owner/name", "train")


def test_hub_class_count_without_names_covers_both_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_hub(monkeypatch, {"train": FakeTable(hub_rows([0, 6]), None), "test": FakeTable(hub_rows([1]), None)})
    assert data.load("hf:owner/name", "test").num_classes == 7


@pytest.mark.parametrize("label", ["cat", None])
def test_hub_labels_must_be_integers(monkeypatch: pytest.MonkeyPatch, label: Any) -> None:
    install_fake_hub(monkeypatch, {"train": FakeTable(hub_rows([0, label]), None)})
    with pytest.raises(ArqError, match=r"owner/name \(train\) has the label .*expected integers"):
        data.load("hf:owner/name", "train")


def test_hub_with_other_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_hub(monkeypatch, {"train": FakeTable(hub_rows([0], "pixels"), None)})
    with pytest.raises(ArqError, match="columns pixels, label; expected img or image and label"):
        data.load("hf:owner/name", "train")


def test_hub_without_package_or_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ArqError, match=r"pip install 'arqsearch\[hub\]'"):
        data.load("hf:owner/name", "train")

    def unreachable(name: str) -> list[str]:
        raise ConnectionError("no route")

    install_fake_hub(monkeypatch, {})
    monkeypatch.setattr(sys.modules["datasets"], "get_dataset_split_names", unreachable)
    with pytest.raises(ArqError, match=r"cannot be fetched.*no route.*network"):
        data.load("hf:owner/name", "train")
