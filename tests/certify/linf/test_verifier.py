"""`CompleteVerifier`: the truth of enumeration, or the limit that stopped it."""

from __future__ import annotations

import numpy as np
import pytest

from arqsearch.certify.linf.verdict import Limits
from arqsearch.certify.linf.verifier import CompleteVerifier
from arqsearch.errors import ArqError
from arqsearch.integer.program import IntegerProgram, TensorSpec
from tests.certify.linf.small_worlds import instances, robust, world
from tests.integer.interpreter import interpret


def check(seed: int, epsilon: int) -> None:
    """With and without integer programming."""
    for program, image, label in instances(seed, epsilon):
        truth = "robust" if robust(program, image, label, epsilon) else "non-robust"
        for milp in (True, False):
            verdict = CompleteVerifier(program, Limits(None, None, milp)).verify(image, label, epsilon)
            assert verdict.status == truth and verdict.limit is None
            if truth == "non-robust":
                found = verdict.counterexample
                assert found is not None and found.dtype == np.uint8
                assert int(np.abs(found.astype(int) - image.astype(int)).max()) <= epsilon
                logits = interpret(program, found[None])[0]
                assert logits.index(max(logits)) != label


@pytest.mark.parametrize("seed", range(7))
def test_the_verdict_is_that_of_enumeration(seed: int) -> None:
    check(seed, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(7, 70))
def test_the_verdict_is_that_of_enumeration_on_more_networks(seed: int) -> None:
    check(seed, 1)
    check(seed, 2)


@pytest.mark.parametrize("seed", range(7))
def test_a_larger_radius_never_makes_an_image_robust(seed: int) -> None:
    for program, image, label in instances(seed, 2):
        verifier = CompleteVerifier(program, Limits(None))
        answers = [verifier.verify(image, label, epsilon).status for epsilon in range(5)]
        assert answers[0] == "robust"
        first = answers.index("non-robust") if "non-robust" in answers else len(answers)
        assert answers == ["robust"] * first + ["non-robust"] * (len(answers) - first)


def test_a_misclassified_image_is_said_to_be() -> None:
    program, image, label = next(found for seed in range(14) for found in instances(seed, 2))
    verdict = CompleteVerifier(program).verify(image, (label + 1) % program.num_classes, 2)
    assert (verdict.status, verdict.method) == ("misclassified", "run")


def test_a_limit_is_named() -> None:
    # One that linear bounds leave open, so that something is left to be cut off.
    for seed in range(28):
        for program, image, label in instances(seed, 2):
            verdict = CompleteVerifier(program, Limits(None, None, False)).verify(image, label, 2)
            if verdict.method == "branch-and-bound" and verdict.status == "robust" and verdict.domains > 5:
                cut = CompleteVerifier(program, Limits(None, 4, False)).verify(image, label, 2)
                assert (cut.status, cut.limit) == ("unknown", "4 domains")
                assert cut.domains <= 4
                late = CompleteVerifier(program, Limits(0.0)).verify(image, label, 2)
                assert (late.status, late.limit) == ("unknown", "0 s")
                return
    raise AssertionError("no instance needs branch and bound")


def test_bad_questions_are_refused() -> None:
    program = world(0)
    verifier = CompleteVerifier(program)
    image = np.zeros(program.input.shape, dtype=np.uint8)
    with pytest.raises(ArqError, match="takes uint8"):
        verifier.verify(image[:, :1], 0, 1)
    with pytest.raises(ArqError, match="is no class"):
        verifier.verify(image, program.num_classes, 1)
    with pytest.raises(ArqError, match="whole number"):
        verifier.verify(image, 0, -1)
    narrow = IntegerProgram(
        program.ops, (TensorSpec(program.input.shape, 0, 127), *program.tensors[1:]), program.output
    )
    with pytest.raises(ArqError, match="grey levels"):
        CompleteVerifier(narrow)
