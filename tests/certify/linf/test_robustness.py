"""Verdicts against enumeration; lines and files that were altered, cut or contradicted."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from arqsearch.certify.linf import robustness_file
from arqsearch.certify.linf.robustness import Verification, counted, covers
from arqsearch.certify.linf.robustness_check import check_file
from arqsearch.certify.linf.robustness_file import RobustnessWriter, merge, read_lines, replace_lines
from arqsearch.certify.linf.robustness_line import RobustnessLine, pack_image, unpack_image
from arqsearch.certify.linf.robustness_schema import Budget, schema, schema_text
from arqsearch.certify.linf.verdict import Limits, Verdict
from arqsearch.errors import ArqError
from tests.certify.linf.robust_world import Enumerator, Images, world_images, world_program

SCHEMA = Path(__file__).parents[3] / "docs" / "robustness.schema.json"
BUDGET = Budget(seconds=None, domains=None, milp=True, complete=True)
EPSILONS = (1, 2, 3, 4)
PROGRAM = world_program()


@pytest.fixture(scope="module")
def dataset() -> Images:
    return world_images(PROGRAM)


def decide(work: Verification, verifier: Enumerator) -> list[RobustnessLine]:
    """Everything that `verify-robustness` does, without files."""
    found = work.follow() + work.by_boxes(0)
    while questions := work.questions():
        for question in questions:
            image, label = work.dataset.images[question.position], int(work.dataset.labels[question.position])
            found += work.answer(question, verifier.verify(image, label, question.epsilon))
    return found


@pytest.fixture(scope="module")
def lines(dataset: Images) -> list[RobustnessLine]:
    return decide(Verification(PROGRAM, dataset, range(40), EPSILONS, BUDGET, {}), Enumerator(PROGRAM))


@pytest.fixture
def file(lines: list[RobustnessLine], tmp_path: Path) -> Path:
    path = tmp_path / "found.jsonl"
    replace_lines(path, sorted(lines, key=lambda line: line.key))
    return path


def check(path: Path, dataset: Images, sample: int | None = None) -> None:
    rank = {int(i): p for p, i in enumerate(dataset.ids)}
    verifier = Enumerator(PROGRAM)
    check_file(
        path, PROGRAM, dataset,
        lambda line, limits: verifier.verify(dataset.images[rank[line.image]], line.label, line.epsilon), sample,
    )  # fmt: skip


def test_every_verdict_is_that_of_enumeration(lines: list[RobustnessLine], dataset: Images) -> None:
    assert sorted(line.key for line in lines) == list(itertools.product(range(40), EPSILONS))
    truth = Enumerator(PROGRAM)
    for line in lines:
        expected = truth.verify(dataset.images[line.image], line.label, line.epsilon).status
        assert line.verdict == ("misclassified" if line.image % 8 == 0 else expected)
        assert not line.problems()
    kinds = {(line.verdict, line.method) for line in lines}
    assert {("robust", "boxes"), ("robust", "branch-and-bound"), ("non-robust", "attack")} <= kinds


def test_answers_decide_other_radii(lines: list[RobustnessLine], dataset: Images) -> None:
    verifier = Enumerator(PROGRAM)
    decide(Verification(PROGRAM, dataset, range(40), EPSILONS, BUDGET, {}), verifier)
    asked_alone = sum(line.method not in ("boxes", "run") for line in lines)
    assert len(verifier.asked) < asked_alone
    assert any(line.decided_at != line.epsilon for line in lines)
    more = Verification(PROGRAM, dataset, range(40), (1, 2, 5), BUDGET, {line.key: line for line in lines})
    broken = {line.image for line in lines if line.verdict == "non-robust"}
    assert broken <= {line.image for line in more.follow() if line.epsilon == 5 and line.verdict == "non-robust"}


def test_unknown_is_asked_again_only_with_more_work(dataset: Images) -> None:
    little = Budget(seconds=None, domains=30, milp=True, complete=True)
    work = Verification(PROGRAM, dataset, range(40), EPSILONS, little, {})
    decide(work, Enumerator(PROGRAM, Limits(None, 30)))
    left = [line for line in work.lines.values() if line.verdict == "unknown"]
    assert left
    assert all(line.limit == "30 domains" and line.budget == little for line in left)
    assert not Verification(PROGRAM, dataset, range(40), EPSILONS, little, dict(work.lines)).questions()
    again = Verification(PROGRAM, dataset, range(40), EPSILONS, BUDGET, dict(work.lines))
    assert {q.position for q in again.questions()} == {line.image for line in left}
    decide(again, Enumerator(PROGRAM))
    assert all(line.decided for line in again.lines.values())


@pytest.mark.parametrize(
    ("spent", "allowed", "idle"),
    [
        ({}, {}, True), ({"seconds": 5.0}, {}, False), ({}, {"seconds": 5.0}, True), ({"milp": False}, {}, False),
        ({"complete": False}, {}, False), ({}, {"complete": False}, True), ({"domains": 7}, {"domains": 8}, False),
    ],
)  # fmt: skip
def test_which_budget_covers_another(spent: dict[str, object], allowed: dict[str, object], idle: bool) -> None:
    assert covers(BUDGET.model_copy(update=spent), BUDGET.model_copy(update=allowed)) is idle


def test_a_counterexample_that_is_none_is_refused(dataset: Images) -> None:
    work = Verification(PROGRAM, dataset, range(40), (1,), BUDGET, {})
    work.by_boxes(0)
    question = work.questions()[0]
    same = Verdict("non-robust", "attack", dataset.images[question.position].copy())
    with pytest.raises(RuntimeError, match="has class"):
        work.answer(question, same)
    far = same.counterexample ^ 0x80 if same.counterexample is not None else None
    with pytest.raises(RuntimeError, match="grey levels away"):
        work.answer(question, dataclasses.replace(same, counterexample=far))


def test_counts_and_interval(lines: list[RobustnessLine]) -> None:
    rows = counted(lines, EPSILONS)
    assert [row["epsilon"] for row in rows] == list(EPSILONS)
    for row in rows:
        assert row["robust"] + row["non-robust"] + row["misclassified"] + row["open"] == row["images"] == 40
        assert row["low"] <= row["certified accuracy"] == row["robust"] / 40 <= row["high"]
    assert [row["robust"] for row in rows] == sorted((row["robust"] for row in rows), reverse=True)


# ---- lines and files -------------------------------------------------------------------------


def test_the_committed_schema_is_that_of_the_code(lines: list[RobustnessLine]) -> None:
    assert SCHEMA.read_text() == schema_text()
    assert set(json.loads(lines[0].to_json())) == set(schema()["properties"])


def test_lines_and_images_read_back(lines: list[RobustnessLine]) -> None:
    for line in lines:
        assert RobustnessLine.from_json(line.to_json()) == line
    image = np.random.default_rng(0).integers(0, 256, (5, 4, 3)).astype(np.uint8)
    assert np.array_equal(unpack_image(pack_image(image, 2)), image)
    broken = pack_image(image, 2).model_copy(update={"shape": (5, 4, 2)})
    with pytest.raises(ArqError, match="does not hold"):
        unpack_image(broken)


@pytest.mark.parametrize("field", ["verdict", "epsilon", "label", "program", "seconds", "decided_at"])
def test_an_altered_line_is_refused(field: str, file: Path, lines: list[RobustnessLine]) -> None:
    raw = json.loads(lines[5].to_json())
    raw[field] = {"verdict": "robust", "program": "0" * 64, "seconds": 1234.5}.get(field, raw[field] + 1
                  if isinstance(raw[field], int) else "unknown")  # fmt: skip
    if raw == json.loads(lines[5].to_json()):
        raw[field] = "unknown"
    with pytest.raises(ArqError, match="was altered"):
        RobustnessLine.from_json(json.dumps(raw, sort_keys=True, separators=(",", ":")))


def test_check_accepts_the_file_and_refuses_forged_lines(file: Path, dataset: Images) -> None:
    check(file, dataset)
    found = read_lines(file)
    verdicts = {line.key: line.verdict for line in found}
    broken = next(  # Nothing smaller is broken, so that only running something tells that a forged line is.
        line for line in found
        if line.verdict == "non-robust" and verdicts.get((line.image, line.epsilon - 1)) == "robust"
    )  # fmt: skip
    broken = dataclasses.replace(broken, decided_at=broken.epsilon)
    robust = next(line for line in found if line.verdict == "robust" and line.epsilon == 1)
    assert broken.counterexample is not None
    forged = {
        "robust in the file, now non-robust": dataclasses.replace(
            broken, verdict="robust", counterexample=None, method="branch-and-bound"
        ),
        "boxes do not prove it": dataclasses.replace(
            broken, verdict="robust", counterexample=None, method="boxes"
        ),
        "grey levels away|has class": dataclasses.replace(
            broken, counterexample=pack_image(255 - unpack_image(broken.counterexample), 0)
        ),
        "by the program": dataclasses.replace(robust, predicted=(robust.label + 1) % 3, verdict="misclassified"),
        "in the data set": dataclasses.replace(robust, label=7, predicted=7),
        "about program": dataclasses.replace(robust, program="f" * 64),
        "about data": dataclasses.replace(robust, data="other"),
        "does not follow": dataclasses.replace(robust, decided_at=0),
    }  # fmt: skip
    for message, line in forged.items():
        replace_lines(file, [line if other.key == line.key else other for other in found])
        with pytest.raises(ArqError, match=message):
            check(file, dataset)


def test_a_robust_line_above_a_broken_one_is_a_contradiction(file: Path, dataset: Images) -> None:
    found = read_lines(file)
    broken = next(line for line in found if line.verdict == "non-robust" and line.epsilon == 3)
    above = dataclasses.replace(broken, epsilon=4, decided_at=4, verdict="robust", counterexample=None)
    replace_lines(file, [above if line.key == above.key else line for line in found])
    with pytest.raises(ArqError, match="but robust at ε = 4"):
        check(file, dataset, sample=0)


def test_a_cut_line_is_dropped_and_a_foreign_file_kept(file: Path, lines: list[RobustnessLine]) -> None:
    whole = file.read_bytes()
    for cut in (1, 40, len(whole.splitlines()[-1])):
        file.write_bytes(whole[:-cut])
        with pytest.raises(ArqError, match="ends within a line"):
            read_lines(file)
        with RobustnessWriter(file) as writer:
            assert len(writer.lines) == len(lines) - 1
    file.write_bytes(b"not ours\nhalf")
    with pytest.raises(ArqError, match="not a robustness line"):
        RobustnessWriter(file)
    assert file.read_bytes() == b"not ours\nhalf"


def test_one_writer_at_a_time(file: Path) -> None:
    with RobustnessWriter(file), pytest.raises(ArqError, match="another process"):
        RobustnessWriter(file)


def test_shards_join_to_the_whole(file: Path, lines: list[RobustnessLine], tmp_path: Path) -> None:
    parts = []
    for shard in range(3):
        parts.append(tmp_path / f"part{shard}.jsonl")
        replace_lines(parts[-1], [line for line in lines if line.image % 3 == shard])
    merged = merge(parts, tmp_path / "all.jsonl")
    assert (tmp_path / "all.jsonl").read_bytes() == file.read_bytes()
    assert len(merged) == len(lines)
    other = dataclasses.replace(lines[0], program="another")
    replace_lines(parts[0], [other])
    with pytest.raises(ArqError, match="another program"):
        merge(parts, tmp_path / "all.jsonl")


def test_a_decided_line_wins_and_contradictions_are_refused(file: Path, lines: list[RobustnessLine]) -> None:
    robust = next(line for line in lines if line.verdict == "robust")
    open_ = dataclasses.replace(robust, verdict="unknown", limit="1 s", budget=BUDGET, decided_at=robust.epsilon)
    replace_lines(file, [open_, robust, open_])
    assert read_lines(file) == [robust]
    replace_lines(file, [robust, dataclasses.replace(robust, verdict="misclassified")])
    with pytest.raises(ArqError, match="in one line and"):
        read_lines(file)
    assert robustness_file.is_robustness_file(file)
