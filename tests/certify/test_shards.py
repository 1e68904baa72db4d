"""Shards: every image once, and the joining says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arqsearch.certify.meter import Meter, duration
from arqsearch.certify.shards import Shard, absent_shards, merge, regular_series
from arqsearch.errors import ArqError
from tests.certify.rule_cases import CASES, Images

CASE = CASES["fixed"]


@given(st.integers(0, 60), st.integers(1, 9))
def test_shards_share_the_images_out(images: int, count: int) -> None:
    parts = [Shard(number, count).of(range(images)) for number in range(1, count + 1)]
    assert sorted(position for part in parts for position in part) == list(range(images))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shards_are_read_and_named() -> None:
    shard = Shard.parse("2/4")
    assert shard == Shard(2, 4) and shard.path("a/found.jsonl") == Path("a/found.shard-2-of-4.jsonl")
    for wrong in ("0/4", "5/4", "1", "1/0", "a/b", "-1/3"):
        with pytest.raises(ArqError, match="write i/n"):
            Shard.parse(wrong)
    assert absent_shards(["x.shard-2-of-4.jsonl", "x.shard-4-of-4.jsonl", "other.jsonl"]) == (1, 3)
    assert absent_shards(["x.jsonl"]) == ()


def test_series_of_positions() -> None:
    assert list(regular_series([4, 6, 10])) == [0, 2, 4, 6, 8, 10]
    assert list(regular_series([1, 2])) == [0, 1, 2]
    assert list(regular_series([20])) == [20]


def test_missing_images_are_named(tmp_path: Path) -> None:
    data = Images.make(9)
    first, second = Shard(1, 2).path(tmp_path / "x.jsonl"), Shard(2, 2).path(tmp_path / "x.jsonl")
    CASE.certify(data, first, positions=[0, 2, 4, 8])
    CASE.certify(data, second, positions=[1, 3, 5])
    done = merge([first, second], tmp_path / "x.jsonl", data)
    assert len(done.lines) == 7 and done.missing_shards == ()
    assert done.missing == tuple(data.ids[[6, 7]].tolist())
    half = merge([second], tmp_path / "y.jsonl", data, expected=data.ids.tolist())
    assert half.missing == tuple(data.ids[[0, 2, 4, 6, 7, 8]].tolist()) and half.missing_shards == (1,)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ArqError, match="hold no certificate"):
        merge([tmp_path / "empty.jsonl"], tmp_path / "z.jsonl")
    assert not (tmp_path / "z.jsonl").exists()


def test_the_meter_states_rates_and_the_time_left() -> None:
    now = 0.0
    meter = Meter(lambda: now)
    assert meter.note(5) == ""
    meter.took(3000)
    now = 2.0
    assert meter.note(5) == "1,500 samples/s"
    meter.finished()
    assert meter.note(5) == "1,500 samples/s, 30.0 images/min, 10 s left"
    assert meter.note(0) == "1,500 samples/s, 30.0 images/min"
    assert [duration(s) for s in (45, 600, 7200)] == ["45 s", "10 min", "2.0 h"]
