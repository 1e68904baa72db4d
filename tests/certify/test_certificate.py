"""Certificate files: resumable byte for byte, tamper-evident, recomputed by verify, merged from shards."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from arqsearch.certify.certificate import CertificateWriter, certify_dataset, read_lines
from arqsearch.certify.line import CertificateLine
from arqsearch.certify.line_schema import AlphaSplit, Incremental, Sequential, TwoClass, schema, schema_text
from arqsearch.certify.shards import merge
from arqsearch.certify.smoothing import SmoothingSettings
from arqsearch.certify.verify import verify_file
from arqsearch.errors import ArqError


@dataclass(frozen=True)
class Images:
    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    identity: str = "0" * 64


class Counting:
    """Class 1 where the first pixel is at least 128; counts the images it has seen."""

    def __init__(self, threshold: int = 128) -> None:
        self.threshold, self.seen = threshold, 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return (pixels[:, 0, 0, 0] >= self.threshold).to(torch.int64)


SCHEMA = Path(__file__).parents[2] / "docs" / "certificate.schema.json"
SETTINGS = SmoothingSettings(sigma=0.1, n0=20, n=200, seed=5, batch_size=64)


@pytest.fixture
def dataset() -> Images:
    generator = np.random.default_rng(0)
    images = generator.integers(80, 180, (9, 2, 2, 1)).astype(np.uint8)
    labels = (images[:, 0, 0, 0] >= 128).astype(np.int64)
    labels[2] = 1 - labels[2]
    return Images(images, labels, np.array([40, 3, 17, 8, 99, 2, 5, 60, 1]))


@pytest.fixture
def whole(dataset: Images, tmp_path: Path) -> Path:
    path = tmp_path / "whole.jsonl"
    certify_dataset(Counting(), dataset, "hash", SETTINGS, path)
    return path


def test_file_has_one_line_for_each_image_in_order(dataset, whole):
    lines = read_lines(whole)
    assert [line.image for line in lines] == dataset.ids.tolist()
    assert [line.label for line in lines] == dataset.labels.tolist()
    assert all(not line.problems() for line in lines)
    assert [line.estimated for line in lines].count(False) >= 1
    names = (
        "alpha certified class counts d_tau data digest estimated format image label n n0 program radius rule s version"
    )
    for text in whole.read_text().splitlines():
        fields = json.loads(text)
        assert set(fields) == {*names.split(" "), "seed", "sigma"}
        assert list(fields) == sorted(fields)


def test_the_format_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "certificate-format.md").read_text()
    line = CertificateLine("p", "d", 0, 1, 0.1, 0.0, 0.001, 0, 1, 1, 1, {1: 1}, {}, False, False, 0.0)
    for name in [*json.loads(line.to_json()), "two_class", "sequential", "incremental"]:
        assert f"`{name}`" in text, name
    for part in (TwoClass, Sequential, Incremental, AlphaSplit):
        for name in part.model_fields:
            assert f"`{name}`" in text, f"{part.__name__}.{name}"


def test_the_committed_schema_is_that_of_the_code():
    command = "python -c \"from arqsearch.certify.line_schema import schema_text; print(schema_text(), end='')\""
    assert SCHEMA.read_text() == schema_text(), f"write it again: {command} > {SCHEMA}"
    fields = schema()["properties"]
    line = CertificateLine("p", "d", 0, 1, 0.1, 0.0, 0.001, 0, 1, 1, 1, {1: 1}, {}, False, False, 0.0)
    assert {*json.loads(line.to_json()), "two_class", "sequential", "incremental"} == set(fields)
    assert all("type" in value or "anyOf" in value or "$ref" in value or "const" in value for value in fields.values())


@pytest.mark.parametrize("kept", [0, 1, 150, 500, 900, 1700, -1])
def test_resume_after_a_cut_gives_the_same_bytes(dataset, whole, kept, tmp_path):
    complete = whole.read_bytes()
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(complete[:kept])
    done = complete[:kept].count(b"\n")
    classify = Counting()
    calls = []
    lines = certify_dataset(
        classify, dataset, "hash", SETTINGS, cut, on_image=lambda *seen: calls.append((*seen[:2], seen[2].image))
    )
    assert cut.read_bytes() == complete
    assert lines == read_lines(whole)
    assert classify.seen == sum(20 + 200 * line.estimated for line in lines[done:])
    assert calls == [(index + 1, 9, image) for index, image in enumerate(dataset.ids.tolist())]


def test_a_cut_file_is_not_read_as_a_result(whole):
    whole.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(ArqError, match="ends within a line"):
        read_lines(whole)


def test_other_program_data_or_settings_are_refused(dataset, whole):
    before = whole.read_bytes()
    changes = [
        ("program", {"program_hash": "other"}),
        ("data", {"dataset": replace(dataset, identity="1" * 64)}),
        ("label", {"dataset": replace(dataset, labels=1 - dataset.labels)}),
        ("image 40", {"dataset": replace(dataset, ids=dataset.ids + 1000)}),
        ("label", {"labelled": False}),
        *(
            (name, {"settings": replace(SETTINGS, **{name: value})})
            for name, value in [("sigma", 0.2), ("n0", 21), ("n", 201), ("alpha", 0.01), ("seed", 6)]
        ),
        ("skip_misclassified", {"settings": replace(SETTINGS, skip_misclassified=False)}),
    ]
    for message, change in changes:
        arguments = {"dataset": dataset, "program_hash": "hash", "settings": SETTINGS, **change}
        with pytest.raises(ArqError, match=message):
            certify_dataset(Counting(), path=whole, **arguments)
        assert whole.read_bytes() == before


def test_more_images_extend_a_file_and_batches_do_not_matter(dataset, whole, tmp_path):
    path = tmp_path / "grown.jsonl"
    certify_dataset(Counting(), dataset, "hash", SETTINGS, path, positions=[4, 1])
    lines = certify_dataset(Counting(), dataset, "hash", replace(SETTINGS, batch_size=7), path, positions=range(9))
    assert path.read_bytes() == whole.read_bytes()
    fewer = certify_dataset(Counting(), dataset, "hash", SETTINGS, path, positions=[0, 1])
    assert fewer == lines[:2] and path.read_bytes() == whole.read_bytes()


def test_shards_merge_to_the_whole(dataset, whole, tmp_path):
    shards = [tmp_path / f"shard{index}.jsonl" for index in range(3)]
    for index, shard in enumerate(shards):
        certify_dataset(Counting(), dataset, "hash", SETTINGS, shard, positions=range(2 - index, 9, 3))
    merged = merge(shards, tmp_path / "merged.jsonl", dataset)
    assert merged.path.read_bytes() == whole.read_bytes() and merged.missing == ()
    assert merge([merged.path, *shards], merged.path, dataset).path.read_bytes() == whole.read_bytes()
    certify_dataset(Counting(150), dataset, "hash", SETTINGS, tmp_path / "other.jsonl")
    with pytest.raises(ArqError, match="two different lines"):
        merge([whole, tmp_path / "other.jsonl"], tmp_path / "x.jsonl", dataset)
    certify_dataset(Counting(), dataset, "hash", replace(SETTINGS, seed=6), tmp_path / "seed.jsonl")
    with pytest.raises(ArqError, match="other settings"):
        merge([whole, tmp_path / "seed.jsonl"], tmp_path / "x.jsonl", dataset)
    assert not (tmp_path / "x.jsonl").exists()


def test_a_file_of_the_former_format_is_refused_with_the_remedy(whole):
    fields = json.loads(whole.read_text().splitlines()[0])
    former = {name: value for name, value in fields.items() if name not in ("s", "version")} | {"format": 1}
    whole.write_text(json.dumps(former, sort_keys=True, separators=(",", ":")) + "\n")
    for read in (read_lines, CertificateWriter):
        with pytest.raises(ArqError, match=r"format 1; this version reads format 2\. .*`arqsearch certify` again"):
            read(whole)


def test_a_file_of_another_version_is_read_but_not_continued(dataset, whole):
    older = [replace(line, version="0.0.9") for line in read_lines(whole)]
    whole.write_text("".join(line.to_json() + "\n" for line in older))
    assert certify_dataset(Counting(), dataset, "hash", SETTINGS, whole) == older
    assert verify_file(whole, Counting(), dataset, "hash").lines == 9
    whole.write_text("".join(line.to_json() + "\n" for line in older[:-1]))
    with pytest.raises(ArqError, match=r"begun by version 0\.0\.9"):
        certify_dataset(Counting(), dataset, "hash", SETTINGS, whole)


def test_two_writers_are_refused(tmp_path):
    with CertificateWriter(tmp_path / "a.jsonl"), pytest.raises(ArqError, match="another process"):
        CertificateWriter(tmp_path / "a.jsonl")
    with CertificateWriter(tmp_path / "a.jsonl") as writer:
        assert writer.lines == []


@pytest.mark.parametrize(
    "change", [{"radius": 0.9}, {"class": 7}, {"image": 41}, {"n": 100}, {"sigma": 0.2}, {"format": 1}, {"extra": 1}]
)
def test_altered_lines_are_refused(whole, change):
    lines = whole.read_text().splitlines()
    fields = {**json.loads(lines[0]), **change}
    lines[0] = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    whole.write_text("\n".join(lines) + "\n")
    with pytest.raises(ArqError, match="line 1"):
        read_lines(whole)


@pytest.mark.parametrize("junk", ["", "{}", "[]", "null", "not json", '{"format":1,"digest":""}'])
def test_damaged_lines_are_refused(whole, junk):
    whole.write_text(whole.read_text() + junk + "\n")
    with pytest.raises(ArqError, match="line 10"):
        read_lines(whole)
    with pytest.raises(ArqError, match="line 10"):
        CertificateWriter(whole)


def test_values_of_a_wrong_type_are_refused(whole):
    line = read_lines(whole)[0]
    for change in ({"sigma": "0.1"}, {"n": True}, {"radius": 0}, {"label": "1"}, {"certified": 1}):
        with pytest.raises(ArqError, match=r"not a certificate line|was altered"):
            CertificateLine.from_json(replace(line, **change).to_json())


def test_verify_recomputes_the_file(dataset, whole):
    result = verify_file(whole, Counting(), dataset, "hash")
    assert result.lines == 9 and result.recomputed == tuple(dataset.ids.tolist())
    classify = Counting()
    assert len(verify_file(whole, classify, dataset, "hash", sample=2, batch_size=9).recomputed) == 2
    assert 0 < classify.seen <= 2 * 220
    assert verify_file(whole, Counting(), dataset, "hash", sample=0).recomputed == ()


def forge(path: Path, **changes: object) -> None:
    """Rewrite the first certified line with a matching digest."""
    lines = read_lines(path)
    index = next(i for i, line in enumerate(lines) if line.certified)
    lines[index] = replace(lines[index], **changes)
    path.write_text("".join(line.to_json() + "\n" for line in lines))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radius": 0.9}, "give radius"),
        ({"certified": False}, "radius"),
        ({"predicted": 4}, "first maximum"),
        ({"estimate": {0: 250}}, "do not add up"),
        ({"selection": {0: 19}}, "do not add up to n0"),
        ({"d_tau": 0.0}, "d_tau"),
        ({"label": 3}, "label 3"),
        ({"image": 12345}, "no such image"),
        ({"rule": "fxed"}, "rule: Input should be 'fixed'"),
        ({"rule": "sequential"}, "the part 'sequential' is missing"),
        ({"program": "other"}, "program other"),
        ({"estimated": False, "estimate": {}, "certified": False, "radius": 0.0}, "skipped"),
    ],
)
def test_verify_refuses_forged_lines_without_running_the_network(dataset, whole, changes, message):
    forge(whole, **changes)
    with pytest.raises(ArqError, match=message):
        verify_file(whole, Counting(), dataset, "hash", sample=0)


def test_verify_refuses_consistent_lies_and_lists_them(dataset, whole):
    with pytest.raises(ArqError, match="selection is") as caught:
        verify_file(whole, Counting(129), dataset, "hash")
    assert str(caught.value).count("image ") >= 3
    whole.write_text(whole.read_text() * 2)
    with pytest.raises(ArqError, match="a line already"):
        verify_file(whole, Counting(), dataset, "hash", sample=0)
    whole.write_text("")
    with pytest.raises(ArqError, match="no certificate"):
        verify_file(whole, Counting(), dataset, "hash")


def test_impossible_positions_and_ids_are_refused(dataset, tmp_path):
    with pytest.raises(ArqError, match="Positions"):
        certify_dataset(Counting(), dataset, "hash", SETTINGS, tmp_path / "a", positions=[9])
    with pytest.raises(ArqError, match="same id"):
        certify_dataset(Counting(), replace(dataset, ids=dataset.ids * 0), "hash", SETTINGS, tmp_path / "a")
