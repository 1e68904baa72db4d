"""The record: every evaluation ever made, keyed by what it depends on, as integer counts.

SQLite by default, any SQLAlchemy URL otherwise. An evaluation is a pure function of its key, so
nothing is computed twice and resuming a search is replaying it against the record.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError

from arqsearch.errors import ArqError
from arqsearch.integer.program import ARITHMETIC_VERSION
from arqsearch.quantize.bitwidths import BitWidths

METADATA = sa.MetaData()
_EVALUATIONS = sa.Table(
    "evaluations",
    METADATA,
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
#: Stage of an evaluation that was stopped early, followed by its number of images.
PARTIAL = "search@"


def canonical_hash(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class RecordKey:
    """What an evaluation depends on.

    :param weights_hash: SHA-256 of the trained weights.
    :param settings_hash: SHA-256 of everything else: data, noise, quantization and scoring settings.
    :param stage: ``search``, or :data:`PARTIAL` and the number of images of one that was stopped early.
    """

    weights_hash: str
    settings_hash: str
    stage: str = "search"

    @property
    def hashes(self) -> tuple[str, str]:
        """Both hashes, for a key of another stage."""
        return self.weights_hash, self.settings_hash


@dataclass(frozen=True)
class Entry:
    """A recorded evaluation: its program, its integer counts and what it cost."""

    program_hash: str
    counts: dict[str, Any]
    seconds: float


def row_key(key: RecordKey, bitwidths: BitWidths) -> dict[str, str | int]:
    """Columns, with their values, that name one evaluation."""
    return {
        "weights_hash": key.weights_hash,
        "bitwidths_hash": canonical_hash(bitwidths.to_json()),
        "settings_hash": key.settings_hash,
        "arithmetic_version": ARITHMETIC_VERSION,
        "stage": key.stage,
    }


def without_password(url: str) -> str:
    """A URL that may be shown."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


def create_tables(engine: sa.Engine) -> None:
    """Create the tables that are missing.

    :raises DatabaseError: when the database refuses.
    """
    try:
        METADATA.create_all(engine)
    except DatabaseError:
        # Another process may have made a table between the look and the creation.
        METADATA.create_all(engine)


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
            self.engine = sa.create_engine(
                # A server may close idle connections between two evaluations.
                parsed, connect_args={"timeout": 60} if parsed.drivername.startswith("sqlite") else {},
                pool_pre_ping=True,
            )  # fmt: skip
            create_tables(self.engine)
        except (ArgumentError, DatabaseError, ModuleNotFoundError, OSError) as error:
            raise ArqError(
                f"The record {without_password(url)!r} cannot be opened ({error}); use sqlite:///file or a reachable "
                "PostgreSQL URL (extra: arqsearch[postgres])."
            ) from error

    def get(self, key: RecordKey, bitwidths: BitWidths) -> Entry | None:
        """The recorded evaluation, if there is one."""
        table = _EVALUATIONS.c
        query = sa.select(table.program_hash, table.counts, table.seconds).where(
            *(table[name] == value for name, value in row_key(key, bitwidths).items())
        )
        with self.engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None else Entry(row.program_hash, json.loads(row.counts), row.seconds)

    def get_partial(self, key: RecordKey, bitwidths: BitWidths) -> Entry | None:
        """The evaluation that was stopped after the most images, if there is one."""
        table = _EVALUATIONS.c
        same = {name: value for name, value in row_key(key, bitwidths).items() if name != "stage"}
        query = sa.select(table.stage, table.program_hash, table.counts, table.seconds).where(
            *(table[name] == value for name, value in same.items()), table.stage.startswith(PARTIAL, autoescape=True)
        )
        with self.engine.connect() as connection:
            rows = connection.execute(query).all()
        if not rows:
            return None
        row = max(rows, key=lambda row: int(row.stage.removeprefix(PARTIAL)))
        return Entry(row.program_hash, json.loads(row.counts), row.seconds)

    def put(self, key: RecordKey, bitwidths: BitWidths, entry: Entry) -> None:
        """Add an evaluation; a row that another worker wrote meanwhile is left as it is."""
        values = {
            **row_key(key, bitwidths),
            "bitwidths": bitwidths.to_json(),
            "program_hash": entry.program_hash,
            "counts": json.dumps(entry.counts, separators=(",", ":")),
            "seconds": entry.seconds,
            "created": time.time(),
        }
        try:
            with self.engine.begin() as connection:
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
        with self.engine.connect() as connection:
            return int(connection.execute(query).scalar_one())
