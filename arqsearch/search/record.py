"""The record: every evaluation ever made, keyed by what it depends on, as integer counts.

SQLite by default, any SQLAlchemy URL otherwise. An evaluation is a pure function of its key, so
nothing is computed twice and resuming a search is replaying it against the record.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError

from arqsearch.errors import ArqError
from arqsearch.integer.program import ARITHMETIC_VERSION
from arqsearch.quantize.bitwidths import BitWidths

_METADATA = sa.MetaData()
_EVALUATIONS = sa.Table(
    "evaluations",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("weights_hash", sa.String(64), nullable=False),
    sa.Column("bitwidths_hash", sa.String(64), nullable=False),
    sa.Column("settings_hash", sa.String(64), nullable=False),
    sa.Column("arithmetic_version", sa.Integer, nullable=False),
    sa.Column("stage", sa.String(32), nullable=False),
    sa.Column("bitwidths", sa.Text, nullable=False),
    sa.Column("program_hash", sa.String(64), nullable=False),
    sa.Column("counts", sa.Text, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.UniqueConstraint("weights_hash", "bitwidths_hash", "settings_hash", "arithmetic_version", "stage"),
)


def canonical_hash(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class RecordKey:
    """What an evaluation depends on.

    :param weights_hash: SHA-256 of the trained weights.
    :param settings_hash: SHA-256 of everything else: data, noise, quantization and scoring settings.
    :param stage: ``search`` today; later stages keep their own rows.
    """

    weights_hash: str
    settings_hash: str
    stage: str = "search"


@dataclass(frozen=True)
class Entry:
    """A recorded evaluation: its program, its integer counts and what it cost."""

    program_hash: str
    counts: dict[str, Any]
    seconds: float


class Record:
    """Table of evaluations behind a SQLAlchemy URL.

    :param url: for example ``sqlite:///runs/digits/record.sqlite`` or ``postgresql+psycopg://...``.
    :raises ArqError: when the database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            parsed = sa.make_url(url)
            if parsed.drivername.startswith("sqlite") and parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            self._engine = sa.create_engine(
                parsed, connect_args={"timeout": 60} if parsed.drivername.startswith("sqlite") else {}
            )
            self._create_table()
        except (ArgumentError, DatabaseError, ModuleNotFoundError, OSError) as error:
            raise ArqError(
                f"The record {url!r} cannot be opened ({error}); use sqlite:///file or a reachable PostgreSQL URL "
                "(extra: arqsearch[postgres])."
            ) from error

    def _create_table(self) -> None:
        try:
            _METADATA.create_all(self._engine)
        except DatabaseError:
            # Another process may have made the table between the look and the creation.
            if not sa.inspect(self._engine).has_table(_EVALUATIONS.name):
                raise

    def get(self, key: RecordKey, bitwidths: BitWidths) -> Entry | None:
        """The recorded evaluation, if there is one."""
        table = _EVALUATIONS.c
        query = sa.select(table.program_hash, table.counts, table.seconds).where(
            table.weights_hash == key.weights_hash,
            table.bitwidths_hash == canonical_hash(bitwidths.to_json()),
            table.settings_hash == key.settings_hash,
            table.arithmetic_version == ARITHMETIC_VERSION,
            table.stage == key.stage,
        )
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None else Entry(row.program_hash, json.loads(row.counts), row.seconds)

    def put(self, key: RecordKey, bitwidths: BitWidths, entry: Entry) -> None:
        """Add an evaluation; a row that another worker wrote meanwhile is left as it is."""
        values = {
            "weights_hash": key.weights_hash,
            "bitwidths_hash": canonical_hash(bitwidths.to_json()),
            "settings_hash": key.settings_hash,
            "arithmetic_version": ARITHMETIC_VERSION,
            "stage": key.stage,
            "bitwidths": bitwidths.to_json(),
            "program_hash": entry.program_hash,
            "counts": json.dumps(entry.counts, separators=(",", ":")),
            "seconds": entry.seconds,
            "created": time.time(),
        }
        try:
            with self._engine.begin() as connection:
                connection.execute(_EVALUATIONS.insert().values(**values))
        except IntegrityError:
            return

    def count(self, key: RecordKey | None = None) -> int:
        """Number of recorded evaluations, of one key or in all."""
        query = sa.select(sa.func.count()).select_from(_EVALUATIONS)
        if key is not None:
            table = _EVALUATIONS.c
            query = query.where(
                table.weights_hash == key.weights_hash,
                table.settings_hash == key.settings_hash,
                table.stage == key.stage,
            )
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())
