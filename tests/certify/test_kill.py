"""Certification that is killed with SIGKILL again and again ends with the same bytes, and loses no finished image."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest

from tests.certify import kill_worker

KILLS = 6


@pytest.mark.parametrize("rule", ["fixed", "sequential"])
def test_kills_lose_nothing_and_count_nothing_twice(rule: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.certify.kill_worker"])
    whole, killed, record = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl", tmp_path / "record"
    kill_worker.certify(whole, tmp_path / "asked", rule, 0.0)
    asked = sum(map(int, (tmp_path / "asked").read_text().split()))
    source, finished = random.Random(rule), b""
    for _ in range(KILLS):
        process = context.Process(target=kill_worker.certify, args=(killed, record, rule, 0.01))
        process.start()
        size = len(finished)
        while process.is_alive() and (not killed.exists() or killed.stat().st_size <= size):
            time.sleep(0.002)  # Until one more image is on the disk.
        time.sleep(source.random() * 0.06)
        process.kill()
        process.join()
        text = killed.read_bytes()
        assert text.startswith(finished), "what was finished stays as it was"
        finished = text[: text.rfind(b"\n") + 1]
        assert finished.count(b"\n") >= 1 and whole.read_bytes().startswith(finished)
    assert 6 <= finished.count(b"\n") < 12, "it was killed half-way"
    (tmp_path / "last").touch()
    kill_worker.certify(killed, tmp_path / "last", rule, 0.0)
    assert killed.read_bytes() == whole.read_bytes()
    # The last start took samples of the images that were missing, and of no other.
    done = finished.count(b"\n")
    rest = whole.read_bytes().splitlines()[done:]
    from arqsearch.certify.line import CertificateLine

    missing = sum(line.n0 + line.samples for line in map(CertificateLine.from_json, map(bytes.decode, rest)))
    assert sum(map(int, (tmp_path / "last").read_text().split())) == missing < asked
