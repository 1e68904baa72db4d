"""The report as its readers get it: complete, self-contained, honest about estimates and about what is missing."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from arqsearch.errors import ArqError
from arqsearch.report import ReportContent, write_report
from tests.report import synthetic

SECTIONS = ["result", "bitwidths", "cost", "radius", "search", "guarantee", "provenance"]
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects sections, ids, resources and text, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
                if tag == "section":
                    self.sections.append(str(value))
            if name in ("href", "src", "xlink:href"):
                self.links.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        where = self.sections[-1] if self.sections else "head"
        self.words[where] = self.words.get(where, "") + data


def plain(**changes: object) -> ReportContent:
    """The made-up run without its pictures, which take most of the time."""
    none = pd.DataFrame()
    return synthetic.content(**{"bitwidths": none, "curves": none, "history": none, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert write_report(folder, synthetic.content()) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_page_has_every_section_and_closes_every_tag(page: Page) -> None:
    assert page.sections == [*SECTIONS, "notes"]
    assert page.open == []


def test_page_is_self_contained(run: Path, page: Page) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    assert page.links
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\((?!#)", text)


def test_ids_are_unique_and_every_inner_link_has_a_target(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_pictures_are_inline_in_both_widths(page: Page) -> None:
    assert page.tags.count("svg") == 6
    assert page.tags.count("figure") == 3


def test_estimate_is_labelled_wherever_its_figures_stand(run: Path, page: Page) -> None:
    assert "estimate, not certified" in page.words["result"]
    assert "FP32: estimate, not certified" in page.words["radius"]
    markdown = (run / "report.md").read_text(encoding="utf-8")
    assert "FP32 estimate, not certified" in markdown


def test_hashes_stand_under_provenance_only(page: Page) -> None:
    assert "3f0c" * 16 in page.words["provenance"]
    assert "9b1e" * 16 in page.words["provenance"]
    assert "3f0c" not in page.words["head"]
    assert "CIFAR-10 (JPEG copy)" in page.words["head"]


def test_markdown_pictures_exist_and_tables_are_rectangular(run: Path) -> None:
    text = (run / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 3
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_csv_files_hold_the_frames(run: Path) -> None:
    with (run / "report" / "comparison.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["kind"] for row in rows] == ["estimate", "certified", "certified", "certified"]
    read = pd.read_csv(run / "report" / "history.csv")
    pd.testing.assert_frame_equal(read, synthetic.history())


def test_same_content_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    again = write_report(tmp_path, synthetic.content()).read_text(encoding="utf-8")
    assert again.replace(str(tmp_path), str(run)) == (run / "report.html").read_text(encoding="utf-8")
    for name in ("bitwidths.png", "curves.png", "history.png"):
        assert (tmp_path / "report" / name).read_bytes() == (run / "report" / name).read_bytes()


EMPTY = {
    "bitwidths": ("bitwidths", "search"),
    "curves": ("radius", "certify"),
    "history": ("search", "search"),
}


@pytest.mark.parametrize("frame", EMPTY)
def test_a_missing_part_is_named_with_the_command_that_makes_it(frame: str, tmp_path: Path) -> None:
    section, command = EMPTY[frame]
    path = write_report(tmp_path, synthetic.content(**{frame: pd.DataFrame()}))
    page = Page(path.read_text(encoding="utf-8"))
    assert page.sections == [*SECTIONS, "notes"]
    assert f"arqsearch {command} {tmp_path}" in page.words[section]
    assert f"arqsearch {command} {tmp_path}" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not (tmp_path / "report" / f"{frame}.csv").exists()


def test_empty_report_asks_for_everything(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, ReportContent(title="Nothing yet")).read_text(encoding="utf-8"))
    assert page.sections == SECTIONS
    assert all("Make it with:" in page.words[section] for section in SECTIONS)
    assert "svg" not in page.tags


def test_a_rewritten_report_leaves_no_stale_pictures(tmp_path: Path) -> None:
    write_report(tmp_path, plain(curves=synthetic.curves()))
    assert (tmp_path / "report" / "curves.png").exists()
    write_report(tmp_path, plain())
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["comparison.csv", "terms.csv"]


def test_text_is_escaped(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script> & more"
    path = write_report(tmp_path, plain(title=nasty, notes=[nasty], provenance={nasty: nasty}))
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert nasty in page.words["notes"]


def test_a_layer_name_cannot_break_out_of_the_picture(tmp_path: Path) -> None:
    frame = synthetic.bitwidths()
    frame.loc[1, "layer"] = "block<b>&"
    page = Page(write_report(tmp_path, plain(bitwidths=frame)).read_text(encoding="utf-8"))
    assert "block<b>&" in page.words["bitwidths"]


@pytest.mark.parametrize(("layers", "evaluations"), [(1, 1), (120, 1500)])
def test_sizes_from_one_to_many(layers: int, evaluations: int, tmp_path: Path) -> None:
    base = synthetic.bitwidths()
    frame = pd.concat([base.iloc[:1]] * layers, ignore_index=True)
    frame["layer"] = [f"stage.{index}.conv" for index in range(layers)]
    report = plain(bitwidths=frame, history=synthetic.history(evaluations))
    path = write_report(tmp_path, report)
    assert path.stat().st_size < 4_000_000
    assert f"stage.{layers - 1}.conv" in Page(path.read_text(encoding="utf-8")).words["bitwidths"]


def test_wrong_column_and_kind_are_refused_with_the_fix() -> None:
    with pytest.raises(ArqError, match=r"'curves' frame has no column 'radius'.*'radii'"):
        synthetic.content(curves=synthetic.curves().rename(columns={"radius": "radii"}))
    frame = synthetic.comparison()
    frame.loc[0, "kind"] = "estimated"
    with pytest.raises(ArqError, match=r"kind 'estimated'.*'estimate'"):
        synthetic.content(comparison=frame)
    with pytest.raises(ArqError, match=r"no command 'verfy'.*'verify'"):
        synthetic.content(commands={"verfy": "x"})
