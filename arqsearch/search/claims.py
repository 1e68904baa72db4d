"""Claims: who computes which evaluation, so that no two processes, on any machines, compute the same one at once.

A claim is a row beside the record's. Its owner raises a counter (a heartbeat) while it works; whoever waits for it and
sees the counter stand still for :data:`LEASE_SECONDS` of its own clock takes the claim over. No two clocks are
compared. The claim of a dead process of the same machine is taken over at once.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, IntegrityError

from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.search.record import METADATA, Record, RecordKey, create_tables, row_key

#: Seconds without a heartbeat after which a claim is stale, and between two heartbeats.
LEASE_SECONDS, BEAT_SECONDS = 60.0, 10.0
#: Seconds between two looks at somebody else's claim.
LOOK_SECONDS = 0.2

_CLAIMS = sa.Table(
    "claims",
    METADATA,
    sa.Column("weights_hash", sa.String(64), primary_key=True),
    sa.Column("bitwidths_hash", sa.String(64), primary_key=True),
    sa.Column("settings_hash", sa.String(64), primary_key=True),
    sa.Column("arithmetic_version", sa.Integer, primary_key=True),
    sa.Column("stage", sa.String(32), primary_key=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("beat", sa.Integer, nullable=False),
)


class Claims:
    """The claims of one caller.

    :param record: whose evaluations are claimed.
    :param lease: seconds without a heartbeat after which somebody else's claim is stale.
    :param beat: seconds between two heartbeats of our own.
    """

    def __init__(self, record: Record, lease: float = LEASE_SECONDS, beat: float = BEAT_SECONDS) -> None:
        self._engine = record.engine
        create_tables(self._engine)
        self._lease, self._beat = lease, beat
        self.owner = f"{_process()} {uuid.uuid4().hex}"
        self._held: set[tuple[RecordKey, BitWidths]] = set()
        self._stop: threading.Event | None = None
        self._seen: dict[tuple[RecordKey, BitWidths], tuple[str, int, float]] = {}

    def acquire(self, key: RecordKey, bitwidths: BitWidths) -> bool:
        """Claim an evaluation; False while somebody else holds it. Look into the record again after True."""
        values = row_key(key, bitwidths)
        try:
            with self._engine.begin() as connection:
                connection.execute(_CLAIMS.insert().values(**values, owner=self.owner, beat=0))
        except IntegrityError:
            if not self._take_over(key, bitwidths):
                return False
        self._seen.pop((key, bitwidths), None)
        self._held.add((key, bitwidths))
        if self._stop is None:
            self._stop = threading.Event()
            threading.Thread(target=self._keep_alive, args=(self._stop,), daemon=True).start()
        return True

    def release(self, key: RecordKey, bitwidths: BitWidths) -> None:
        """Give up a claim of ours, usually because the evaluation is in the record."""
        ours = _CLAIMS.delete().where(*_same(key, bitwidths), _CLAIMS.c.owner == self.owner)
        with self._engine.begin() as connection:
            connection.execute(ours)
        self._held.discard((key, bitwidths))
        if not self._held and self._stop is not None:
            self._stop.set()
            self._stop = None

    def release_all(self) -> None:
        """Give up whatever is still held."""
        for key, bitwidths in list(self._held):
            self.release(key, bitwidths)

    def _take_over(self, key: RecordKey, bitwidths: BitWidths) -> bool:
        """Take a claim whose owner is dead; one of several takers succeeds."""
        query = sa.select(_CLAIMS.c.owner, _CLAIMS.c.beat).where(*_same(key, bitwidths))
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        if row is None:  # Released just now; the next try gets it.
            return False
        now = time.monotonic()
        owner, beat, since = self._seen.get((key, bitwidths), ("", -1, now))
        if (owner, beat) != (row.owner, row.beat):
            self._seen[key, bitwidths] = (row.owner, row.beat, now)
            since = now
        if now - since < self._lease and not _died_here(row.owner):
            return False
        change = (
            _CLAIMS.update()
            .where(*_same(key, bitwidths), _CLAIMS.c.owner == row.owner, _CLAIMS.c.beat == row.beat)
            .values(owner=self.owner, beat=0)
        )
        with self._engine.begin() as connection:
            return bool(connection.execute(change).rowcount)

    def _keep_alive(self, stop: threading.Event) -> None:
        change = _CLAIMS.update().where(_CLAIMS.c.owner == self.owner).values(beat=_CLAIMS.c.beat + 1)
        while not stop.wait(self._beat):
            try:
                with self._engine.begin() as connection:
                    connection.execute(change)
            except DatabaseError:
                # The next beat may come through; without any, another caller computes the same once more, no worse.
                continue


def _same(key: RecordKey, bitwidths: BitWidths) -> Sequence[sa.ColumnElement[bool]]:
    return [_CLAIMS.c[name] == value for name, value in row_key(key, bitwidths).items()]


def _process() -> str:
    """``place number start``: a process, and the set of processes that its number belongs to."""
    return f"{_place()} {os.getpid()} {_start_of(os.getpid())}"


def _place() -> str:
    """Machine and, where there are containers, the namespace of process numbers."""
    try:
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        namespace = "-"
    return f"{socket.gethostname()[:60]}/{namespace}"


def _start_of(pid: int) -> str:
    """When a process started, as /proc tells it, so that a number that is used again is noticed."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, ValueError):
        return "-"
    return "dead" if state in "ZX" else rest[18]


def _died_here(owner: str) -> bool:
    """Whether the owner is a process of this machine that exists no more."""
    place, pid, start, _ = owner.split()
    if place != _place():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return start != _start_of(int(pid))
