"""What makes a search repeatable: the global random states and the numbers of threads, scoped."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the global states of `random`, `numpy.random` and torch's CPU generator back at the end."""
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Use `count` intra-op threads in torch, and the former number at the end.

    :param count: number of threads.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Use `count` threads in the linear algebra of numpy and scipy, whose sums may depend on that number.

    :param count: number of threads.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(limits=count, user_api="blas"):
        yield
