"""The record in PostgreSQL: what every database owes it, on a private server without a network."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import sqlalchemy as sa

from arqsearch.errors import ArqError
from arqsearch.search.record import Record
from tests.search.record_conformance import RecordConformance

pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'arqsearch[postgres]'")
#: The user that runs the server where the tests run as root, which a server refuses to run as.
UNPRIVILEGED = "postgres"


def programs() -> Path:
    """The folder of `initdb` and `pg_ctl`, as PATH or Debian's package has it."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if (place / "initdb").is_file() and (place / "pg_ctl").is_file():
            return place
    pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of an administrative database, with a place for the name: a server in a folder of its own."""
    bin_folder, prefix = programs(), []
    # Not pytest's folder, which other users may not enter; and short, for the name of a socket.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if os.getuid() == 0:
        try:
            owner = pwd.getpwnam(UNPRIVILEGED)
        except KeyError:
            pytest.skip(f"a server does not run as root, and there is no user {UNPRIVILEGED!r}")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        prefix = ["runuser", "-u", UNPRIVILEGED, "--"]
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    control = [*prefix, str(bin_folder / "pg_ctl"), "-D", str(folder / "data"), "-w", "-s"]

    def run(command: list[str]) -> None:
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, timeout=120)

    try:
        run([*prefix, str(bin_folder / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "postgres", "-N"])
        run([*control, "-l", str(folder / "log"), "-o", options, "start"])
        yield f"postgresql+psycopg://postgres@/{{}}?host={folder}"
        run([*control, "-m", "immediate", "stop"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_NUMBERS = count()


@pytest.fixture
def url(server: str) -> str:
    """A new database."""
    name = f"record{next(_NUMBERS)}"
    engine = sa.create_engine(server.format("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.format(name)


class TestPostgresRecord(RecordConformance):
    """A real server."""


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArqError, match=r"(?s)cannot be opened .*reachable PostgreSQL URL"):
        Record(f"postgresql+psycopg://postgres@/record?host={tmp_path}")
