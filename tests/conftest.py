"""Fixtures for every test: fixed seeds, one thread, and the data sets that lie outside the repository."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# The same examples on every machine and no failure for a slow one: a red test is a wrong program.
settings.register_profile("arqsearch", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("arqsearch")


def data_root() -> Path:
    """The folder with ``data/`` and ``weights/``: $ARQSEARCH_DATA, relative to the repository's root."""
    return (ROOT / os.environ.get("ARQSEARCH_DATA", "../shared")).resolve()


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Call it with a path such as ``"data/mnist"``; skips the test, with the reason, when that is absent."""

    def find(relative: str) -> Path:
        path = data_root() / relative
        if not path.exists():
            pytest.skip(f"{relative} is not under {data_root()}; set ARQSEARCH_DATA to the folder that holds it")
        return path

    return find


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> None:
    random.seed(0)
    np.random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
