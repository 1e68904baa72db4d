"""The record in SQLite: what every database owes it, keys, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from arqsearch.errors import ArqError
from arqsearch.search.record import Record, canonical_hash
from tests.search.record_conformance import RecordConformance


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'deep' / 'er' / 'record.sqlite'}"


class TestSQLiteRecord(RecordConformance):
    """A file that is made with its folders."""


def test_canonical_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_hash({"a": 1, "b": [2, 3]}) == canonical_hash({"b": [2, 3], "a": 1})
    assert canonical_hash({"a": 1}) != canonical_hash({"a": 2})


def test_urls_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a database, only text that is long enough to be looked at")
    bad = [tmp_path / "file", tmp_path / "file" / "below", tmp_path]
    for url in ("runs/record.sqlite", "nosuch://host/db", *(f"sqlite:///{path}" for path in bad)):
        with pytest.raises(ArqError, match=r"(?s)cannot be opened .*sqlite:///file"):
            Record(url)
    with pytest.raises(ArqError, match=r"nosuch://me:\*\*\*@host/db") as caught:
        Record("nosuch://me:hunter2@host/db")
    assert "hunter2" not in str(caught.value)
