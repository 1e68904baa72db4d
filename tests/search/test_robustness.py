"""`verify-robustness` as a user sees it: a program on digits, killed and resumed, checked, refused, merged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from arqsearch.certify.linf.robustness_file import read_lines
from arqsearch.certify.linf.verdict import Limits, Verdict
from arqsearch.cli import app
from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer
from arqsearch.search import robustness
from arqsearch.search.delivery import verify
from arqsearch.search.outside import Behind
from arqsearch.search.robustness import RobustnessOptions, parse_epsilons, verify_robustness
from tests.search.conftest import silent

OPTIONS = RobustnessOptions((2, 20, 40), images=30, data="digits")


def digits_program() -> IntegerProgram:
    """Templates: the mean digit of each class, as far as eight bits and a pass through four bits keep it."""
    from arqsearch import data

    train = data.load("digits", "train")
    means = np.stack([train.images[train.labels == c].reshape(-1, 64).mean(0) for c in range(10)])
    weight = np.round((means - means.mean(0)) / 2).clip(-127, 127).astype(np.int8)
    bias = np.round(-(means**2).sum(1) / 4 / 4).astype(np.int32)
    operations = (
        O.Flatten((0,), 1),
        O.Requantize((1,), 2, np.array([1]), np.array([2]), "half_up", 0, 63),
        O.Linear((2,), 3, weight, bias),
    )
    return IntegerProgram(operations, infer(operations, TensorSpec((8, 8, 1), 0, 255)), 3)


class Attacker:
    """A stand-in for complete verification: takes the worst corner; where that holds, it is exact for one layer."""

    def __init__(self, program: IntegerProgram, limits: Limits) -> None:
        self.program, self.limits = program, limits

    def verify(self, image: np.ndarray, label: int, epsilon: int) -> Verdict:
        time.sleep(float(os.environ.get("ATTACKER_SLEEPS", "0")))
        weight = self.program.ops[-1].weight.astype(np.int64)  # type: ignore[attr-defined]
        for other in range(10):
            sign = np.sign(weight[other] - weight[label]).reshape(image.shape)
            corner = np.clip(image.astype(np.int64) + epsilon * sign, 0, 255).astype(np.uint8)
            if int(self.program.run(corner[None]).argmax()) != label:
                return Verdict("non-robust", "attack", corner, 1)
        return Verdict("unknown", "attack", None, 10, "10 domains")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(robustness, "complete_verifier", Attacker)
    robustness._verifier.cache_clear()
    path = tmp_path / "digits.safetensors"
    digits_program().save(path)
    yield path
    robustness._verifier.cache_clear()


def claims(path: Path) -> list[tuple[object, ...]]:
    """What a file says, without what differs from run to run."""
    return [(line.image, line.epsilon, line.verdict, line.counterexample) for line in read_lines(path)]


def test_verdicts_are_written_checked_and_kept(program: Path) -> None:
    updates: list[tuple[str, int, int, str]] = []
    outcome = verify_robustness(str(program), OPTIONS, lambda *update: updates.append(update))
    path = Path(outcome["file"])
    rows = {row["epsilon"]: row for row in outcome["verdicts"]}
    assert rows[2]["robust"] > rows[40]["robust"] > 0
    assert rows[40]["non-robust"] > 0
    assert rows[2]["misclassified"] == rows[40]["misclassified"]
    assert {update[0] for update in updates} == {"boxes digits", "verify digits"}
    assert [line.key for line in read_lines(path)] == sorted(line.key for line in read_lines(path))
    before = path.read_bytes()
    verify_robustness(str(program), OPTIONS, silent)
    assert path.read_bytes() == before
    checked = verify(str(path), 0, Behind(program, "digits"))
    assert checked["verified"] and checked["checks"][0]["items"] == 90


def test_a_killed_run_goes_on(program: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    verify_robustness(str(program), RobustnessOptions((30, 40), images=40, data="digits", output=whole), silent)
    cut = tmp_path / "cut.jsonl"
    script = (
        "import sys, dataclasses; from pathlib import Path; from arqsearch.search import robustness as r; "
        "from tests.search.test_robustness import Attacker; r.complete_verifier = Attacker; "
        "o = r.RobustnessOptions((30, 40), images=40, data='digits', output=Path(sys.argv[2])); "
        "r.verify_robustness(sys.argv[1], o, lambda *a: None)"
    )
    environment = os.environ | {"ATTACKER_SLEEPS": "0.2", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", script, str(program), str(cut)], env=environment)
    deadline = time.monotonic() + 120
    while (not cut.is_file() or b'"attack"' not in cut.read_bytes()) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with cut.open("ab") as file:
        file.write(b'{"half of a line')
    count = cut.read_bytes().count(b"\n")
    assert 0 < count < whole.read_bytes().count(b"\n")
    verify_robustness(str(program), RobustnessOptions((30, 40), images=40, data="digits", output=cut), silent)
    assert claims(cut) == claims(whole)


def test_shards_join_by_the_command(program: Path, tmp_path: Path) -> None:
    whole = Path(verify_robustness(str(program), OPTIONS, silent)["file"])
    parts = []
    for number in (1, 2):
        options = RobustnessOptions((2, 20, 40), images=30, data="digits", shard=f"{number}/2")
        parts.append(str(verify_robustness(str(program), options, silent)["file"]))
    joined = tmp_path / "joined.jsonl"
    result = CliRunner().invoke(app, ["merge", *parts, "--output", str(joined), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images"] == 30
    assert claims(joined) == claims(whole)


def test_the_command_prints_json_and_boxes_alone_leave_the_rest_open(program: Path) -> None:
    command = ["verify-robustness", str(program), "--eps", "40", "--data", "digits", "--images", "20", "--json"]
    result = CliRunner().invoke(app, [*command, "--boxes-only"])
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)["verdicts"][0]
    assert row["open"] > 0 and row["non-robust"] == 0
    row = json.loads(CliRunner().invoke(app, command).stdout)["verdicts"][0]
    assert row["non-robust"] > 0


def test_a_tampered_or_foreign_file_is_refused(program: Path) -> None:
    path = Path(verify_robustness(str(program), OPTIONS, silent)["file"])
    whole = path.read_text()
    path.write_text(whole.replace('"verdict":"non-robust"', '"verdict":"robust"', 1))
    with pytest.raises(ArqError, match="was altered"):
        verify(str(path), 0, Behind(program, "digits"))
    path.write_text(whole)
    other = digits_program()
    shifted = O.Linear((2,), 3, other.ops[-1].weight, other.ops[-1].bias + 1)  # type: ignore[attr-defined]
    IntegerProgram((*other.ops[:-1], shifted), infer((*other.ops[:-1], shifted), other.input), 3).save(program)
    with pytest.raises(ArqError, match="about program"):
        verify(str(path), 0, Behind(program, "digits"))
    with pytest.raises(ArqError, match="was begun with program"):
        verify_robustness(str(program), OPTIONS, silent)
    with pytest.raises(ArqError, match="--program and --data"):
        verify(str(path), 0, Behind())


@pytest.mark.parametrize(
    ("text", "message"),
    [("8/255", "8 grey levels"), ("0.03", "whole grey levels"), ("", "1..255"), ("0", "1..255"), ("300", "1..255")],
)
def test_bad_radii_are_explained(text: str, message: str) -> None:
    with pytest.raises(ArqError, match=message):
        parse_epsilons(text)
    assert parse_epsilons("4, 1,2 1") == (1, 2, 4)


def test_bad_options_are_explained(program: Path) -> None:
    for options, message in (
        (RobustnessOptions((1,)), "Which data set"),
        (RobustnessOptions((1,), data="digits", images=0), "--images 0"),
        (RobustnessOptions((1,), data="digits", shard="3/2"), "no shard"),
    ):
        with pytest.raises(ArqError, match=message):
            verify_robustness(str(program), options, silent)
