"""What a database owes the record and its claims; a test class inherits from `RecordConformance` and gives a `url`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.search import record as module
from arqsearch.search.claims import Claims
from arqsearch.search.record import PARTIAL, Entry, Record, RecordKey

KEY = RecordKey("w" * 64, "s" * 64)
BITS = BitWidths.from_mapping({"a": (2, 3), "b": (8, 8)})
ENTRY = Entry("p" * 64, {"votes": [1, 2, 3], "robust": {"1": [0, 1]}}, 1.5)
CANDIDATES = [BITS.replace({"a": (weight, 2)}) for weight in range(2, 9)]


def write_together(url: str, barrier: Any, number: int) -> None:
    """Open the same new database at the same moment and write the same keys."""
    barrier.wait()
    record = Record(url)
    for bits in CANDIDATES[:4]:
        record.put(KEY, bits, replace(ENTRY, seconds=float(number)))


def compute_claimed(url: str, barrier: Any, log: str) -> None:
    """Compute, as an evaluator does, what is neither recorded nor claimed; note what was computed."""
    barrier.wait()
    record = Record(url)
    claims = Claims(record)
    while left := [bits for bits in CANDIDATES if record.get(KEY, bits) is None]:
        for bits in left:
            if claims.acquire(KEY, bits):
                if record.get(KEY, bits) is None:
                    with Path(log).open("a") as file:
                        file.write(bits.to_json() + "\n")
                    time.sleep(0.05)
                    record.put(KEY, bits, ENTRY)
                claims.release(KEY, bits)
        time.sleep(0.01)


def claim_and_stay(url: str, ready: Any) -> None:
    Claims(Record(url)).acquire(KEY, BITS)
    ready.set()
    time.sleep(120)


def in_processes(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in two processes that start together."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    first, *rest = arguments
    processes = [context.Process(target=function, args=(first, barrier, *each)) for each in zip(*rest, strict=True)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def elsewhere(claims: Claims) -> Claims:
    """The same claims as if they were made on another machine."""
    claims.owner = "other-host/1 " + claims.owner.split(" ", 1)[1]
    return claims


class RecordConformance:
    """Inherit, and give a fixture `url` of an empty database."""

    def test_what_is_put_is_got_also_by_another_instance(self, url: str) -> None:
        record = Record(url)
        assert record.get(KEY, BITS) is None and record.count() == 0
        record.put(KEY, BITS, ENTRY)
        assert record.get(KEY, BITS) == ENTRY
        assert Record(url).get(KEY, BITS) == ENTRY

    def test_the_first_row_of_a_key_stays(self, url: str) -> None:
        record = Record(url)
        record.put(KEY, BITS, ENTRY)
        record.put(KEY, BITS, Entry("other", {"votes": []}, 0.0))
        assert record.count() == 1 and record.get(KEY, BITS) == ENTRY

    def test_the_table_itself_refuses_a_second_row(self, url: str) -> None:
        record = Record(url)
        record.put(KEY, BITS, ENTRY)
        columns = "weights_hash, bitwidths_hash, settings_hash, arithmetic_version, stage"
        rest = "bitwidths, program_hash, counts, seconds, created"
        copy = sa.text(f"INSERT INTO evaluations ({columns}, {rest}) SELECT {columns}, {rest} FROM evaluations")
        with pytest.raises(sa.exc.IntegrityError), record.engine.begin() as connection:
            connection.execute(copy)

    @pytest.mark.parametrize("change", [{"weights_hash": "x" * 64}, {"settings_hash": "x" * 64}, {"stage": "finetune"}])
    def test_whatever_the_evaluation_depends_on_gives_another_row(self, url: str, change: dict[str, str]) -> None:
        record, other = Record(url), replace(KEY, **change)
        record.put(KEY, BITS, ENTRY)
        assert record.get(other, BITS) is None
        record.put(other, BITS, replace(ENTRY, seconds=9.0))
        assert record.count() == 2 and record.count(KEY) == record.count(other) == 1
        assert record.get(KEY, BITS) == ENTRY and record.get(other, BITS) == replace(ENTRY, seconds=9.0)

    def test_other_bits_and_another_order_of_layers_are_other_rows(self, url: str) -> None:
        record = Record(url)
        record.put(KEY, BITS, ENTRY)
        assert record.get(KEY, BITS.replace({"a": (3, 2)})) is None
        assert record.get(KEY, BitWidths.from_mapping(reversed(BITS.layers))) is None

    def test_another_arithmetic_is_another_row(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        record = Record(url)
        record.put(KEY, BITS, ENTRY)
        monkeypatch.setattr(module, "ARITHMETIC_VERSION", module.ARITHMETIC_VERSION + 1)
        assert record.get(KEY, BITS) is None
        record.put(KEY, BITS, ENTRY)
        assert record.count() == 2

    def test_of_evaluations_that_were_stopped_early_the_longest_is_got(self, url: str) -> None:
        record = Record(url)
        assert record.get_partial(KEY, BITS) is None
        for images in (20, 100, 40):
            entry = Entry("p" * 64, {"votes": [1] * images}, 0.1)
            record.put(replace(KEY, stage=f"{PARTIAL}{images}"), BITS, entry)
        found = record.get_partial(KEY, BITS)
        assert found is not None and len(found.counts["votes"]) == 100
        assert record.get(KEY, BITS) is None, "none of them is a full evaluation"
        assert record.get_partial(KEY, CANDIDATES[0]) is None

    def test_processes_write_the_same_keys_at_once(self, url: str) -> None:
        in_processes(write_together, url, (0, 1))
        record = Record(url)
        assert record.count() == 4
        assert all(record.get(KEY, bits) is not None for bits in CANDIDATES[:4])

    def test_processes_that_claim_compute_nothing_twice(self, url: str, tmp_path: Path) -> None:
        log = str(tmp_path / "log")
        in_processes(compute_claimed, url, (log, log))
        assert sorted(Path(log).read_text().split()) == sorted("".join(bits.to_json().split()) for bits in CANDIDATES)
        assert Record(url).count(KEY) == len(CANDIDATES)

    def test_a_claim_is_held_until_it_is_released(self, url: str) -> None:
        record = Record(url)
        one, other = Claims(record), Claims(record)
        assert one.acquire(KEY, BITS)
        assert not other.acquire(KEY, BITS) and other.acquire(KEY, CANDIDATES[0])
        other.release(KEY, BITS)
        assert not other.acquire(KEY, BITS), "only its owner can release it"
        one.release_all()
        assert other.acquire(KEY, BITS)
        other.release_all()

    def test_the_claim_of_a_killed_process_is_taken_over_at_once(self, url: str) -> None:
        context = multiprocessing.get_context("spawn")
        ready = context.Event()
        process = context.Process(target=claim_and_stay, args=(url, ready))
        process.start()
        assert ready.wait(120)
        claims = Claims(Record(url))
        assert not claims.acquire(KEY, BITS)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        # The process is not waited for: it stays in the table, dead.
        while not (taken := claims.acquire(KEY, BITS)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert taken
        process.join()
        claims.release_all()

    def test_a_claim_from_elsewhere_goes_stale_without_a_heartbeat(self, url: str) -> None:
        record = Record(url)
        lost = elsewhere(Claims(record, beat=1000.0))
        assert lost.acquire(KEY, BITS)
        takers = [Claims(record, lease=0.3) for _ in range(2)]
        assert not any(taker.acquire(KEY, BITS) for taker in takers)
        time.sleep(0.4)
        assert [taker.acquire(KEY, BITS) for taker in takers] == [True, False], "one of them"
        lost.release_all()
        assert not Claims(record).acquire(KEY, BITS), "what was taken over is not the old owner's to release"
        takers[0].release_all()

    def test_a_heartbeat_keeps_a_claim_from_elsewhere(self, url: str) -> None:
        record = Record(url)
        alive = elsewhere(Claims(record, beat=0.05))
        assert alive.acquire(KEY, BITS)
        taker = Claims(record, lease=1.5)
        deadline = time.monotonic() + 2.5
        while time.monotonic() < deadline:
            assert not taker.acquire(KEY, BITS)
            time.sleep(0.1)
        alive.release_all()
        assert taker.acquire(KEY, BITS)
        taker.release_all()
