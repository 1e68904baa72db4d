"""The integer programming encoding admits exactly the program's own runs."""

from __future__ import annotations

import numpy as np
import pytest

from arqsearch.certify.linf.domain import Domain
from arqsearch.certify.linf.linear import LinearBounds
from arqsearch.certify.linf.milp import MilpSolver
from arqsearch.certify.linf.milp_encoding import RULES, Encoder
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer
from tests.certify.linf.small_worlds import instances, robust, world
from tests.integer.interpreter import interpret


def test_every_operation_has_a_rule() -> None:
    assert set(RULES) == set(O.OPS)


def check_oracle(seed: int, epsilon: int) -> None:
    """With and without bounds proven before, the answer is that of enumeration."""
    for program, image, label in instances(seed, epsilon):
        domain = Domain.around(image[None], np.array([label]), epsilon)
        truth = "robust" if robust(program, image, label, epsilon) else "non-robust"
        for bound in (None, LinearBounds(program).bound(domain)):
            result = MilpSolver(program).solve(domain, bound)
            assert result.answer == truth
            if result.image is not None:
                assert ((result.image >= domain.lo[0]) & (result.image <= domain.hi[0])).all()
                assert int(program.run(result.image[None])[0].argmax()) != label


@pytest.mark.parametrize("seed", range(7))
def test_the_answer_is_that_of_enumeration(seed: int) -> None:
    check_oracle(seed, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(7, 70))
def test_the_answer_is_that_of_enumeration_on_more_networks(seed: int) -> None:
    check_oracle(seed, 1)
    check_oracle(seed, 2)


@pytest.mark.parametrize("seed", range(7))
def test_a_fixed_image_leaves_the_logits_of_the_program(seed: int) -> None:
    """A box of one image: every column is gone, the constants are the run."""
    program = world(seed)
    image = np.random.default_rng(seed).integers(0, 256, (1, *program.input.shape)).astype(np.uint8)
    domain = Domain.around(image, np.array([0]), 0)
    solver = MilpSolver(program)
    ranges = solver._ranges(domain, None)
    assert ranges is not None
    encoder = Encoder(program, ranges, True)
    assert encoder.exact and encoder.model.low == []
    assert encoder.source(program.output).constant.tolist() == interpret(program, image)[0]


@pytest.mark.parametrize("rounding", O.ROUNDINGS)
def test_ties_and_phases_of_a_staircase(rounding: O.Rounding) -> None:
    """One pixel through one requantization: each code is asked for by a logit that is positive there alone."""
    for code in range(-3, 5):
        # z_0 = 0; z_1 = 1 - 100 |y - code| through two clipped differences.
        ops: list[O.Op] = [
            O.Flatten((0,), 1),
            O.Linear((1,), 2, np.array([[1]], dtype=np.int32), np.array([-20], dtype=np.int32)),
            O.Requantize((2,), 3, np.array([1]), np.array([2]), rounding, -3, 4),
            O.Linear((3,), 4, np.array([[1], [-1]], dtype=np.int32), np.array([-code, code], dtype=np.int32)),
            O.Requantize((4,), 5, np.array([2]), np.array([1]), "floor", 0, 20),
            O.Linear((5,), 6, np.array([[0, 0], [-9, -9]], dtype=np.int32), np.array([0, 1], dtype=np.int32)),
        ]
        program = IntegerProgram(tuple(ops), infer(ops, TensorSpec((1, 1, 1), 0, 255)), 6, {})
        runs = np.arange(0, 46)[:, None, None, None]
        hit = [row[1] > row[0] for row in interpret(program, runs)]
        for start, stop in ((0, 45), (7, 12), (30, 45), (21, 22)):
            image = np.array([[[[start]]]], dtype=np.uint8)
            domain = Domain.around(image, np.array([0]), 0)
            domain = Domain(domain.lo, domain.hi + (stop - start), domain.labels)
            truth = "non-robust" if any(hit[start : stop + 1]) else "robust"
            assert MilpSolver(program).solve(domain).answer == truth, (code, start, stop)


def test_no_time_is_no_answer() -> None:
    program, image, label = next(found for seed in range(14) for found in instances(seed, 2))
    domain = Domain.around(image[None], np.array([label]), 2)
    result = MilpSolver(program).solve(domain, seconds=0.0)
    assert result.answer == "unknown" and result.stopped
