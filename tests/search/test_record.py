"""The record: what an evaluation depends on is its key, a key has one row, and several processes may write."""

from __future__ import annotations

import multiprocessing
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.search import record as module
from arqsearch.search.record import Entry, Record, RecordKey, canonical_hash

KEY = RecordKey("w" * 64, "s" * 64)
BITS = BitWidths.from_mapping({"a": (2, 3), "b": (8, 8)})
ENTRY = Entry("p" * 64, {"votes": [1, 2, 3], "robust": {"1": [0, 1]}}, 1.5)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'deep' / 'er' / 'record.sqlite'}"


def test_what_is_put_is_got_also_by_another_instance(url: str) -> None:
    record = Record(url)
    assert record.get(KEY, BITS) is None and record.count() == 0
    record.put(KEY, BITS, ENTRY)
    assert record.get(KEY, BITS) == ENTRY
    assert Record(url).get(KEY, BITS) == ENTRY


def test_the_first_row_of_a_key_stays(url: str) -> None:
    record = Record(url)
    record.put(KEY, BITS, ENTRY)
    record.put(KEY, BITS, Entry("other", {"votes": []}, 0.0))
    assert record.count() == 1 and record.get(KEY, BITS) == ENTRY


@pytest.mark.parametrize(
    "other",
    [replace(KEY, weights_hash="x" * 64), replace(KEY, settings_hash="x" * 64), replace(KEY, stage="finetune")],
)
def test_whatever_the_evaluation_depends_on_gives_another_row(url: str, other: RecordKey) -> None:
    record = Record(url)
    record.put(KEY, BITS, ENTRY)
    assert record.get(other, BITS) is None
    record.put(other, BITS, replace(ENTRY, seconds=9.0))
    assert record.count() == 2 and record.count(KEY) == record.count(other) == 1
    assert record.get(KEY, BITS) == ENTRY and record.get(other, BITS) == replace(ENTRY, seconds=9.0)


def test_other_bits_and_another_order_of_layers_are_other_rows(url: str) -> None:
    record = Record(url)
    record.put(KEY, BITS, ENTRY)
    assert record.get(KEY, BITS.replace({"a": (3, 2)})) is None
    assert record.get(KEY, BitWidths.from_mapping(reversed(BITS.layers))) is None


def test_another_arithmetic_is_another_row(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(url)
    record.put(KEY, BITS, ENTRY)
    monkeypatch.setattr(module, "ARITHMETIC_VERSION", module.ARITHMETIC_VERSION + 1)
    assert record.get(KEY, BITS) is None
    record.put(KEY, BITS, ENTRY)
    assert record.count() == 2


def test_canonical_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_hash({"a": 1, "b": [2, 3]}) == canonical_hash({"b": [2, 3], "a": 1})
    assert canonical_hash({"a": 1}) != canonical_hash({"a": 2})


def write_together(url: str, barrier: Any, number: int) -> None:
    """Open the same new file at the same moment and write the same keys."""
    barrier.wait()
    record = Record(url)
    for weight in (2, 3, 4, 5):
        record.put(KEY, BITS.replace({"a": (weight, 2)}), replace(ENTRY, seconds=float(number)))


def test_processes_write_the_same_keys_at_once(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=write_together, args=(url, barrier, number)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    record = Record(url)
    assert record.count() == 4
    assert all(record.get(KEY, BITS.replace({"a": (weight, 2)})) is not None for weight in (2, 3, 4, 5))


def test_the_table_itself_refuses_a_second_row(url: str) -> None:
    Record(url).put(KEY, BITS, ENTRY)
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        columns = "weights_hash, bitwidths_hash, settings_hash, arithmetic_version, stage"
        rest = "bitwidths, program_hash, counts, seconds, created"
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(f"INSERT INTO evaluations ({columns}, {rest}) SELECT {columns}, {rest} FROM evaluations")


def test_urls_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a database, only text that is long enough to be looked at")
    bad = [tmp_path / "file", tmp_path / "file" / "below", tmp_path]
    for url in ("runs/record.sqlite", "nosuch://host/db", *(f"sqlite:///{path}" for path in bad)):
        with pytest.raises(ArqError, match=r"(?s)cannot be opened .*sqlite:///file"):
            Record(url)
