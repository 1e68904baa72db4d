"""Numbers as printed: certified figures rounded down, verdicts that follow from the rows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arqsearch.report import tables
from arqsearch.report.content import role
from tests.report import synthetic


@given(correct=st.integers(0, 1000), images=st.sampled_from([100, 500, 1000]))
def test_a_share_of_images_is_never_overstated_and_exact_where_it_fits(correct: int, images: int) -> None:
    correct = min(correct, images)
    printed = float(tables.percent(correct / images).removesuffix(" %"))
    exact = 100 * correct / images
    assert printed <= exact + 1e-9
    assert exact - printed < 0.1
    if 1000 * correct % images == 0:
        assert abs(printed - exact) < 1e-9


def test_radius_is_rounded_down_and_the_interval_outwards() -> None:
    table = tables.comparison_table(synthetic.content())
    acr = next(row for row in table.rows if row[0].text == "ACR")
    assert acr[2] == tables.Cell("0.412", "0.360–0.470")
    frame = synthetic.comparison()
    frame["acr_low"], frame["acr_high"] = 0.36051, 0.47011
    acr = next(row for row in tables.comparison_table(synthetic.content(comparison=frame)).rows if row[0].text == "ACR")
    assert acr[2].small == "0.360–0.471"


def test_radii_are_in_numeric_order_and_absent_values_are_dashes() -> None:
    frame = synthetic.comparison().rename(columns={"certified@0.75": "certified@10"})
    table = tables.comparison_table(synthetic.content(comparison=frame))
    labels = [row[0].text for row in table.rows]
    assert labels.index("Certified at r = 0.5") < labels.index("Certified at r = 10")
    bounds = next(row for row in table.rows if row[0].text == "Certified at ε = 1")
    assert bounds[1].text == tables.DASH
    assert table.header[table.emphasis or 0].text == "found (ddpg)"


def test_cost_against_float() -> None:
    rows = {row[0].text: row for row in tables.cost_table(synthetic.content()).rows}
    assert rows["BOPs"][1].text == "41.52 G"
    assert rows["Fewer by"][4].text == "62.0 ×"
    assert rows["Weights"][4] == tables.Cell("141 kB", "13.1 % of FP32")


def test_verdict_says_when_intervals_overlap_and_when_not() -> None:
    sentences = tables.verdict(synthetic.content()).sentences
    assert [s.split(" on ")[0] for s in sentences] == [
        "Found (ddpg) is ahead of uniform",
        "Found (ddpg) is ahead of random",
    ]
    assert all("intervals overlap throughout" in sentence for sentence in sentences)
    frame = synthetic.comparison()
    frame.loc[3, [c for c in frame.columns if c.endswith("_low")]] = 0.99
    apart = tables.verdict(synthetic.content(comparison=frame)).sentences
    assert not any("overlap" in sentence for sentence in apart)


def test_verdict_admits_defeat() -> None:
    frame = synthetic.comparison()
    frame.loc[3, "certified@0.5"] = 0.1
    frame.loc[3, "certified@0.25"] = frame.loc[1, "certified@0.25"]
    sentence = tables.verdict(synthetic.content(comparison=frame)).sentences[0]
    assert "level with uniform on accuracy at r = 0.25" in sentence
    assert "behind uniform on accuracy at r = 0.5" in sentence


def test_an_estimate_is_never_compared_with_a_certificate() -> None:
    frame = synthetic.comparison()
    frame.loc[3, "kind"] = "estimate"
    verdict = tables.verdict(synthetic.content(comparison=frame))
    assert verdict.sentences == []
    assert any(remark == "estimate, not certified" for _, _, remark in verdict.tiles)


def test_search_table_reports_the_best_candidate_of_each_policy() -> None:
    history = synthetic.history()
    table = tables.search_table(synthetic.content(history=history))
    agent = history[history["policy"] == "ddpg"]
    best = agent.loc[agent["reward"].idxmax()]
    assert [cell.text for cell in table.rows[0]][:4] == ["ddpg", "60", f"{best['reward']:.4f}", str(best["evaluation"])]
    assert [cell.text for cell in table.header][4:] == ["smoothed_radius", "ibp@1"]


def test_roles() -> None:
    names = ["FP32", "fp32 (float)", "float", "uniform W4A4", "random", "found (ddpg)", "MaskablePPO", "floating"]
    assert [role(name) for name in names] == ["float", "float", "float", "uniform", "random", "found", "found", "found"]


def test_markdown_cells_cannot_break_the_table() -> None:
    table = tables.Table([tables.Cell("a"), tables.Cell("b")], [[tables.Cell("x|y"), tables.Cell("1\n2")]])
    assert table.markdown().splitlines()[2] == "| x\\|y | 1 2 |"
