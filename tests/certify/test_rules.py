"""What every rule promises: the same bytes however it was run, lines that check themselves, no lie that passes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arqsearch.certify.certificate import read_lines
from arqsearch.certify.line import CertificateLine
from arqsearch.certify.line_schema import LineFields
from arqsearch.certify.rules import RULES, make_rule
from arqsearch.certify.shards import Shard, merge
from arqsearch.certify.smoothing import SmoothingSettings
from arqsearch.certify.summary import holds_at, summarize
from arqsearch.certify.verify import settings_of, verify_file
from arqsearch.errors import ArqError
from tests.certify.rule_cases import CASES, Case, Images

DATA = Images.make()


def test_every_rule_has_a_case() -> None:
    assert {case.settings.rule for case in CASES.values()} == set(RULES)
    assert all(rule.name == name for name, rule in RULES.items())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
class TestRule:
    """The conformance tests."""

    @pytest.fixture
    def whole(self, case: Case, tmp_path: Path) -> Path:
        """A finished file."""
        path = tmp_path / "whole.jsonl"
        case.certify(DATA, path)
        return path

    def test_lines_are_consistent_and_read_back(self, case: Case, whole: Path) -> None:
        lines = read_lines(whole)
        assert len(lines) == len(DATA.images) and any(line.certified for line in lines)
        expected = make_rule(case.settings, case.open_base(DATA, whole.parent)).stated(case.settings)
        for line in lines:
            assert line.rule == case.settings.rule and line.problems() == []
            assert CertificateLine.from_json(line.to_json()) == line
            assert LineFields.model_validate_json(line.to_json()).format == 2
            assert expected.items() <= line.settings.items()
            assert line.samples <= line.n

    @pytest.mark.parametrize("batch_size", [9, 1000])
    def test_batches_do_not_matter(self, case: Case, whole: Path, batch_size: int, tmp_path: Path) -> None:
        path = tmp_path / "again" / "whole.jsonl"
        case.certify(DATA, path, batch_size=batch_size)
        assert path.read_bytes() == whole.read_bytes()

    @pytest.mark.parametrize("kept", [0, 100, 700, 1500, -2])
    def test_a_cut_file_is_finished_to_the_same_bytes(self, case: Case, whole: Path, kept: int, tmp_path: Path) -> None:
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole.read_bytes()[:kept])
        case.certify(DATA, path)
        assert path.read_bytes() == whole.read_bytes()

    def test_shards_merge_to_the_same_bytes(self, case: Case, whole: Path, tmp_path: Path) -> None:
        parts = [Shard(number, 3) for number in (3, 1, 2)]
        paths = [part.path(tmp_path / "x.jsonl") for part in parts]
        for part, path in zip(parts, paths, strict=True):
            case.certify(DATA, path, positions=part.of(range(len(DATA.images))))
        done = merge(paths, tmp_path / "x.jsonl")
        assert done.path.read_bytes() == whole.read_bytes()
        assert (done.missing, done.missing_shards) == ((), ())

    def test_other_settings_are_not_mixed(self, case: Case, whole: Path) -> None:
        before = whole.read_bytes()
        changes: list[dict[str, Any]] = [{"alpha": 0.01}]
        if not case.base:
            changes += [{"sigma": 0.2}, {"seed": 1}]
        if case.settings.rule == "sequential":
            changes += [{"radii": (0.0, 0.2)}, {"cap": 999}]
        else:
            changes += [{"rule": "sequential", "radii": (0.1,)}] if not case.base else [{"shared": 100}]
        for change in changes:
            with pytest.raises(ArqError, match="was begun with"):
                case.certify(DATA, whole, **change)
            assert whole.read_bytes() == before

    def test_summary_counts_what_the_lines_say(self, case: Case, whole: Path) -> None:
        lines = read_lines(whole)
        radii = case.settings.radii or (0.0, 0.05)
        found = summarize(lines, radii)
        assert found.rule == case.settings.rule and found.images == len(lines)
        for radius in radii:
            assert found.accuracy[radius].count == sum(holds_at(line, radius) for line in lines)
        assert found.acr_is_lower_bound == (case.settings.rule != "fixed")
        estimated = sum(line.estimated for line in lines)
        assert found.expected_wrong == pytest.approx(0.001 * estimated)
        assert (set(found.undecided) == set(radii)) == (case.settings.rule == "sequential")

    def test_verify_recomputes_every_line(self, case: Case, whole: Path) -> None:
        base = case.open_base(DATA, whole.parent, keep=False)
        found = verify_file(whole, case.classifier(), DATA, "hash", base=base, classes=3, batch_size=50)
        assert found.recomputed == tuple(DATA.ids.tolist())
        for line in read_lines(whole):
            kept = settings_of(line)
            assert (kept.rule, kept.alpha, kept.seed) == (line.rule, line.alpha, line.seed)

    def test_no_changed_field_passes(self, case: Case, whole: Path) -> None:
        """Every leaf of a line is changed, with a digest that fits; by its counts or by recomputation it is refused."""
        texts = whole.read_text().splitlines()
        base = case.open_base(DATA, whole.parent, keep=False)
        index = next(i for i, line in enumerate(read_lines(whole)) if line.certified)
        tried = 0
        for name, text in altered(texts[index]):
            whole.write_text("\n".join([*texts[:index], text, *texts[index + 1 :]]) + "\n")
            with pytest.raises(ArqError):
                verify_file(whole, case.classifier(), DATA, "hash", base=base, classes=3)
                pytest.fail(f"{name} was changed and not noticed: {text}")
            tried += 1
        assert tried > 25

    def test_a_network_that_answers_otherwise_is_noticed(self, case: Case, whole: Path) -> None:
        base = case.open_base(DATA, whole.parent, keep=False)
        liar = case.classifier()
        liar.level += 1
        with pytest.raises(ArqError, match="recomputed"):
            verify_file(whole, liar, DATA, "hash", base=base, classes=3)


def altered(text: str) -> Iterator[tuple[str, str]]:
    """A line with one leaf changed at a time and a digest that fits."""
    fields = json.loads(text)
    fields.pop("digest")

    def walk(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, (*path, key))
        elif isinstance(value, list):
            yield path, value[:-1]
            for position, inner in enumerate(value):
                yield from walk(inner, (*path, position))
        elif isinstance(value, bool):
            yield path, not value
        elif isinstance(value, int):
            yield from ((path, value + 1), (path, max(0, value - 1)) if value else (path, value + 2))
        elif isinstance(value, float):
            yield from ((path, value + 0.000001), (path, value * 0.5))
        elif value is None:
            yield path, 1
        else:
            choices = ("fixed", "sequential", "incremental", "certified", "refuted", "undecided", "selected", "label")
            yield from (
                (path, other)
                for other in ([c for c in choices if c != value] if value in choices else [value[::-1] + "x"])
            )

    for path, changed in walk(fields, ()):
        copy = json.loads(json.dumps(fields))
        place = copy
        for key in path[:-1]:
            place = place[key]
        if place[path[-1]] == changed:
            continue
        place[path[-1]] = changed
        canonical = json.dumps(copy, sort_keys=True, separators=(",", ":"))
        copy["digest"] = hashlib.sha256(canonical.encode()).hexdigest()
        yield ".".join(map(str, path)), json.dumps(copy, sort_keys=True, separators=(",", ":"))


def test_unknown_rules_and_missing_bases_are_refused() -> None:
    with pytest.raises(ArqError, match="Did you mean 'sequential'"):
        SmoothingSettings(sigma=0.1, rule="sequentail")
    with pytest.raises(ArqError, match="name their file"):
        make_rule(SmoothingSettings(sigma=0.1, rule="incremental"))
