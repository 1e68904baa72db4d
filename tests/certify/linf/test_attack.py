"""Attacks find counter-examples, report none that is not one, and are repeatable."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from arqsearch.certify.linf.attack import Attack, Budget
from arqsearch.certify.linf.attack_surrogate import RULES, Surrogate
from arqsearch.certify.linf.domain import Domain
from arqsearch.integer import ops as O
from tests.certify.linf.small_worlds import instances, robust, world
from tests.integer.interpreter import interpret


def test_every_operation_has_a_rule() -> None:
    assert set(RULES) == set(O.OPS)


@pytest.mark.parametrize("seed", range(14))
def test_the_surrogate_follows_the_program(seed: int) -> None:
    """Sums this short are exact: its logits are the program's, but for the last rounding."""
    program = world(seed)
    image = np.random.default_rng(seed).integers(0, 256, (50, *program.input.shape)).astype(np.uint8)
    surrogate = Surrogate(program)
    ours = surrogate.clipped(surrogate.logits(torch.from_numpy(image).float()), torch.zeros(50, 1))
    exact = torch.tensor(interpret(program, image), dtype=torch.float32)
    assert float((ours - exact).abs().max()) <= (1.0 if surrogate.clip else 0.0)


def test_counter_examples_are_real_and_most_are_found() -> None:
    found, there = 0, 0
    for seed in range(7):
        for program, image, label in instances(seed, 2):
            domain = Domain.around(image[None], np.array([label]), 2)
            targets = torch.arange(program.num_classes)[None] != label
            attack, budget = Attack(program), Budget(10, 4, 20)
            hit, images = attack.run(domain, targets, budget)
            again = attack.run(domain, targets, budget)
            assert torch.equal(hit, again[0]) and torch.equal(images, again[1])
            assert ((images >= domain.lo) & (images <= domain.hi)).all()
            if bool(hit[0]):
                logits = interpret(program, images.numpy())[0]
                assert logits.index(max(logits)) != label
                found += 1
            there += not robust(program, image, label, 2)
    assert found <= there
    assert found >= 0.8 * there > 0


def test_a_deadline_stops_the_search() -> None:
    program, image, label = next(found for seed in range(14) for found in instances(seed, 2) if robust(*found, 2))
    domain = Domain.around(image[None], np.array([label]), 2)
    start = time.monotonic()
    hit, _ = Attack(program).run(
        domain, torch.arange(program.num_classes)[None] != label, Budget(10, 2, 10**9), deadline=start + 0.2
    )
    assert not bool(hit[0])
    assert time.monotonic() - start < 30
