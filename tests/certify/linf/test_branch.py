"""Branch and bound ends, and ends with the truth, whatever bounds it and in whatever batches."""

from __future__ import annotations

import numpy as np
import pytest

from arqsearch.certify.linf.boxes import IntervalBounds
from arqsearch.certify.linf.branch import BranchAndBound
from arqsearch.certify.linf.domain import Domain
from arqsearch.certify.linf.linear import LinearBounds
from arqsearch.certify.linf.milp import MilpSolver
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer
from tests.certify.linf.small_worlds import instances, robust

QUICK = [(seed, 2) for seed in range(7)]
SLOW = [(seed, epsilon) for seed in range(7, 70) for epsilon in (1, 2)]


def check_completeness(seed: int, epsilon: int) -> None:
    """Both bounders give the answer of enumeration; so does a leaf method in place of splitting pixels."""
    for program, image, label in instances(seed, epsilon):
        domain = Domain.around(image[None], np.array([label]), epsilon)
        truth = "robust" if robust(program, image, label, epsilon) else "non-robust"
        solver = MilpSolver(program)

        def leaf(part, bound, solver=solver):  # type: ignore[no-untyped-def]
            found = solver.solve(part, bound)
            return found.answer, found.image

        for bounder in (IntervalBounds(program), LinearBounds(program)):
            for batch, method in ((1, None), (5, None), (5, leaf)):
                result = BranchAndBound(program, bounder, batch).run(domain, leaf=method)
                assert result.answer == truth, (bounder.name, batch)
                if result.image is not None:
                    assert ((result.image >= domain.lo[0]) & (result.image <= domain.hi[0])).all()
                    assert int(program.run(result.image[None])[0].argmax()) != label


@pytest.mark.parametrize(("seed", "epsilon"), QUICK)
def test_the_answer_is_that_of_enumeration(seed: int, epsilon: int) -> None:
    check_completeness(seed, epsilon)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "epsilon"), SLOW)
def test_the_answer_is_that_of_enumeration_on_more_networks(seed: int, epsilon: int) -> None:
    check_completeness(seed, epsilon)


def two_pixels(bias: int = 0) -> IntegerProgram:
    """Class 0 as long as ``x0 - x1 >= bias``, from codes whose boxes cannot see that x0 is in both logits."""
    weight = np.array([[2, -1], [1, 0]], dtype=np.int32)
    ops = (O.Flatten((0,), 1), O.Linear((1,), 2, weight, np.array([0, bias], dtype=np.int32)), O.Requantize(
        (2,), 3, np.array([1]), np.array([1]), "floor", -512, 511
    ))  # fmt: skip
    return IntegerProgram(ops, infer(ops, TensorSpec((1, 2, 1), 0, 255)), 3, {})


def test_a_box_of_two_neighbours_is_split_and_the_search_ends() -> None:
    """A real midpoint k + 1/2 would round back to [k, k+1] for ever."""
    program = two_pixels()
    domain = Domain.around(np.array([[[100], [100]]], dtype=np.uint8)[None], np.array([0]), 1)
    domain = Domain(domain.lo, domain.hi - 1, domain.labels)
    assert (domain.hi - domain.lo == 1).all()
    result = BranchAndBound(program, IntervalBounds(program), batch=1).run(domain)
    points = program.run(np.array([[[a, b]] for a in (99, 100) for b in (99, 100)], dtype=np.int16)[..., None])
    assert result.answer == ("robust" if bool((points.long().argmax(1) == 0).all()) else "non-robust")
    assert 1 < result.domains <= 7


def test_a_limit_is_reported_and_never_passed() -> None:
    program, image, label = next(found for seed in range(14) for found in instances(seed, 2) if robust(*found, 2))
    domain = Domain.around(image[None], np.array([label]), 2)
    method = BranchAndBound(program, IntervalBounds(program))
    whole = method.run(domain)
    assert whole.answer == "robust" and whole.domains > 2
    cut = method.run(domain, domains=2)
    assert (cut.answer, cut.limit) == ("unknown", "domains")
    assert cut.domains <= 2 and cut.worst is not None and cut.worst < 0
    late = method.run(domain, deadline=0.0)
    assert (late.answer, late.limit) == ("unknown", "time")
