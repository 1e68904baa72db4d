"""`arqsearch bench policies`: runs, resuming, the report in a real browser, and what the verdict says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from arqsearch.benchmarks import policies as comparison
from arqsearch.benchmarks.policies_table import policies_table, write_table
from arqsearch.benchmarks.policies_targets import Opened, TabularTarget, open_target
from arqsearch.benchmarks.policies_verdict import verdict
from arqsearch.benchmarks.tabular import task
from arqsearch.cli import app
from arqsearch.envs.analytic import AnalyticEvaluator
from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import BitWidths

POLICIES = ("random", "uniform", "greedy")
TASKS = ("bops-0.9-both", "bops-0.7-radius")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium, which draws the page (Debian package chromium)")


def silent(task: str, done: int, total: int, note: str) -> None:
    """Progress that nobody asked for."""


def small(output: Path, **changes: object) -> comparison.Settings:
    fields: dict[str, object] = {
        "target": "tabular", "policies": POLICIES, "seeds": 3, "evaluations": 14, "output": output, "workers": 1,
        "tasks": TASKS,
    }  # fmt: skip
    return comparison.Settings(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[comparison.Settings, dict[str, object]]:
    """A small finished comparison."""
    settings = small(tmp_path_factory.mktemp("comparison"))
    return settings, comparison.compare(settings, silent)


# ---- runs ------------------------------------------------------------------------------------


def test_every_run_is_a_file_and_equals_the_search_itself(done: tuple[comparison.Settings, dict[str, object]]) -> None:
    from arqsearch.policies import create

    settings, outcome = done
    paths = sorted((settings.output / "runs").rglob("*.json"))
    assert len(paths) == len(POLICIES) * len(TASKS) * settings.seeds
    for path in paths:
        run = json.loads(path.read_text())
        known = task(run["task"])
        found = create(run["policy"]).search(known.problem(), settings.evaluations, run["seed"])
        assert run["rewards"] == [round(evaluation.reward, 9) for evaluation in found.history]
        assert run["best_reward"] == found.best.reward
        assert len(run["seconds"]) == len(run["rewards"]) <= settings.evaluations
        assert run["seconds"] == sorted(run["seconds"])
        assert BitWidths.from_json(json.dumps(run["bitwidths"])) == found.best.bitwidths
        bops = [point[0] for point in run["front"]]
        assert bops == sorted(bops) and bops[-1] <= dict(known.budget.limits)["bops"]
    assert outcome["policies"] == list(POLICIES) and outcome["seeds"] == 3
    assert outcome["best"] in POLICIES
    assert Path(str(outcome["report"])).is_file()


def test_a_comparison_goes_on_where_it_stopped(
    done: tuple[comparison.Settings, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, outcome = done
    gone = comparison.run_path(settings.output, TASKS[1], "random", 2)
    before = json.loads(gone.read_text())
    gone.unlink()
    made: list[tuple[object, ...]] = []
    original = comparison.run_one

    def spy(*args: object) -> object:
        made.append(args[1:4])
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(comparison, "run_one", spy)
    again = comparison.compare(settings, silent)
    assert made == [(TASKS[1], "random", 2)]
    after = json.loads(gone.read_text())
    assert {k: v for k, v in after.items() if k != "seconds"} == {k: v for k, v in before.items() if k != "seconds"}
    assert again["best"] == outcome["best"] and again["verdict"] == outcome["verdict"]


def test_runs_of_other_settings_are_refused(done: tuple[comparison.Settings, dict[str, object]]) -> None:
    settings, _ = done
    with pytest.raises(ArqError, match="made with other settings"):
        comparison.compare(small(settings.output, evaluations=15), silent)


def test_a_stopwatch_charges_what_evaluations_cost() -> None:
    evaluator = AnalyticEvaluator()
    opened = Opened(None, lambda bitwidths: 2.5)  # type: ignore[arg-type]
    watch = comparison.Stopwatch(evaluator, opened)
    bits = BitWidths.uniform([layer.name for layer in watch.layers], 4, 4)
    found = watch.evaluate_many([bits, bits])
    assert found == [evaluator.evaluate(bits)] * 2
    assert 5.0 <= watch.seconds < 6.0


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ArqError, match="greedy"):
        small(tmp_path, policies=("gredy",))
    with pytest.raises(ArqError, match="each once"):
        small(tmp_path, policies=("random", "random"))
    with pytest.raises(ArqError, match="--seeds is 0"):
        small(tmp_path, seeds=0)
    with pytest.raises(ArqError, match="positive"):
        small(tmp_path, seconds=-1.0)
    with pytest.raises(ArqError, match="bops"):
        TabularTarget(("bobs-0.9-both",))
    with pytest.raises(ArqError, match="leave 'digits' out"):
        comparison.settings("digits", None, None, None, tmp_path, 1, None, None, True)
    with pytest.raises(ArqError, match="a recipe is one task"):
        comparison.settings("digits", None, None, None, tmp_path, 1, None, "bytes-both", False)
    every = comparison.settings("tabular", "all", None, None, tmp_path, 1, None, None, False)
    assert set(POLICIES) < set(every.policies) and every.seeds == 5 and every.evaluations == 100


def test_a_recipe_is_one_task_with_its_run_folder_in_the_output(tmp_path: Path) -> None:
    target = open_target("digits", (), tmp_path)
    assert target.tasks == ("digits",)
    assert target.recipe.run_dir == tmp_path / "run"  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_recipe_is_compared_from_end_to_end(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: tiny\nsigma: 0.25\nworkers: 1\ndata: {name: digits, holdout: 60}\n"
        "model: {name: cnn_tiny, options: {batch_norm: false}}\n"
        "train: {epochs: 1, objective: {smoothing: gaussian}}\n"
        "evaluate: {training: {epochs: 0.5, objective: {smoothing: gaussian}}, smoothed: {images: 30, samples: 8}}\n"
        "search: {budget: {bops: '2%'}, first_last: null, bits: [2, 4, 8]}\n"
    )
    settings = small(
        tmp_path / "out", target=str(recipe), policies=("random", "greedy"), seeds=2, evaluations=6, tasks=()
    )
    outcome = comparison.compare(settings, silent)
    run = json.loads(comparison.run_path(settings.output, "tiny", "greedy", 1).read_text())
    assert min(b - a for a, b in zip([0.0, *run["seconds"]], run["seconds"], strict=False)) >= 0
    assert run["seconds"][-1] > 0.001
    assert Path(str(outcome["report"])).is_file()
    assert comparison.compare(settings, silent)["verdict"] == outcome["verdict"]


# ---- the report ------------------------------------------------------------------------------


def test_the_report_is_whole_and_needs_no_network(done: tuple[comparison.Settings, dict[str, object]]) -> None:
    settings, outcome = done
    page = (settings.output / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 5_000_000
    assert not re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(?!data:)', page)
    for anchor in ("ranking", "improvement", "tests", "curves", "profiles", "fronts", "bitwidths", "tasks", "notes"):
        assert f'<section id="{anchor}">' in page
    markdown = (settings.output / "report.md").read_text(encoding="utf-8")
    for sentence in outcome["verdict"]:  # type: ignore[attr-defined]
        assert sentence in markdown
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", markdown):
        assert (settings.output / picture).stat().st_size > 5_000
    report = json.loads((settings.output / "report" / "comparison.json").read_text(encoding="utf-8"))
    runs = pd.read_csv(settings.output / "report" / "runs.csv")
    assert len(runs) == len(report["runs"]) == 18
    assert runs["score"].max() <= 1.0


def test_the_report_is_the_same_for_the_same_runs(done: tuple[comparison.Settings, dict[str, object]]) -> None:
    settings, _ = done
    before = (settings.output / "report.html").read_bytes()
    comparison.compare(settings, silent)
    assert (settings.output / "report.html").read_bytes() == before


def test_the_table_for_the_docs(done: tuple[comparison.Settings, dict[str, object]], tmp_path: Path) -> None:
    import csv

    settings, outcome = done
    path = write_table(settings, tmp_path)
    assert path.name.startswith("policies-tabular-")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    assert rows[0]["policy"] == outcome["best"]
    text = policies_table(rows)
    for policy in POLICIES:
        assert f"| {policy} |" in text
    assert "6 runs of each policy (2 tasks × 3 seeds), 14 evaluations each" in text


def browse(page: Path, folder: Path, *options: str) -> tuple[str, str]:
    """The page's DOM after its scripts, and what the browser logged."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--enable-logging=stderr",
        "--virtual-time-budget=10000", *options, "--dump-dom", page.absolute().as_uri(),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return run.stdout, run.stderr


@needs_chromium
def test_the_page_draws_and_sorts_in_a_browser_without_errors(
    done: tuple[comparison.Settings, dict[str, object]], tmp_path: Path
) -> None:
    settings, _ = done
    page = (settings.output / "report.html").read_text(encoding="utf-8")
    probe = """<script>
      const table = document.querySelector("#ranking table.sortable");
      const read = (column) => [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.key));
      const button = table.tHead.rows[0].cells[1].querySelector("button");
      button.click(); const down = read(1); button.click(); const up = read(1);
      document.documentElement.dataset.probe = JSON.stringify({
        down, up, names: [...table.tBodies[0].rows].map((row) => row.cells[0].textContent),
        plots: document.querySelectorAll(".js-plotly-plot svg.main-svg").length,
        wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      });
    </script></body>"""
    (tmp_path / "probed.html").write_text(page.replace("</body>", probe), encoding="utf-8")
    dom, log = browse(tmp_path / "probed.html", tmp_path / "profile")
    assert "CONSOLE" not in log, [line for line in log.splitlines() if "CONSOLE" in line]
    assert 'data-ready="yes"' in dom
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found is not None
    state = json.loads(found[1].replace("&quot;", '"'))
    assert state["down"] == sorted(state["down"], reverse=True)
    assert state["up"] == sorted(state["up"])
    assert set(state["names"]) == set(POLICIES)
    assert state["plots"] >= 6
    assert state["wide"] <= 0  # Nothing but tables scrolls sideways.


@needs_chromium
def test_the_page_fits_a_phone_and_prints(done: tuple[comparison.Settings, dict[str, object]], tmp_path: Path) -> None:
    settings, _ = done
    shutil.copy(settings.output / "report.html", tmp_path / "report.html")
    # A frame is as narrow as it is told to be; a headless window is not.
    (tmp_path / "phone.html").write_text(
        '<body style="margin:0"><iframe src="report.html" style="width:390px;height:4000px;border:0"></iframe><script>'
        'onload = () => setTimeout(() => { const d = document.querySelector("iframe").contentDocument;'
        " document.documentElement.dataset.wide = d.documentElement.scrollWidth;"
        ' document.documentElement.dataset.plot = d.querySelector(".js-plotly-plot .main-svg").clientWidth; }, 1500);'
        "</script></body>"
    )
    dom, log = browse(tmp_path / "phone.html", tmp_path / "profile", "--allow-file-access-from-files")
    assert "CONSOLE" not in log
    wide, plot = re.search(r'data-wide="(\d+)"', dom), re.search(r'data-plot="(\d+)"', dom)
    assert wide is not None and int(wide[1]) <= 390
    assert plot is not None and int(plot[1]) <= 390
    pdf = tmp_path / "report.pdf"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--virtual-time-budget=10000", f"--print-to-pdf={pdf}", (tmp_path / "report.html").as_uri()]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=240, check=True)
    assert pdf.read_bytes().startswith(b"%PDF") and pdf.stat().st_size > 50_000


# ---- verdict ---------------------------------------------------------------------------------


def frames(significant: bool) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    ranking = pd.DataFrame(
        {"policy": ["ilp", "random"], "iqm": [0.9, 0.5], "low": [0.88, 0.4], "high": [0.92, 0.6]}
    )  # fmt: skip
    tests = pd.DataFrame([{"a": "random", "b": "ilp", "p_holm": 0.001, "significant": significant}])
    improvement = pd.DataFrame([{"x": "ilp", "y": "random", "probability": 0.8, "low": 0.6, "high": 0.95}])
    return ranking, tests, improvement


def test_the_verdict_says_what_is_not_significant() -> None:
    sure = " ".join(verdict(*frames(True), seeds=50, tasks=2))
    assert "Over 100 runs of each policy on 2 tasks, ilp has the largest interquartile mean, 0.900" in sure
    assert "significant over random" in sure and "not significant" not in sure
    unsure = " ".join(verdict(*frames(False), seeds=4, tasks=1))
    assert "Its difference from random is not significant" in unsure and "more seeds may" in unsure
    single = " ".join(verdict(*frames(True), seeds=1, tasks=2))
    assert "no interval and no test" in single and "significant" not in single
    ranking, tests, improvement = frames(True)
    alone = verdict(ranking.head(1), tests.head(0), improvement.head(0), 3, 1)
    assert alone == ["ilp alone was run (3 runs of each policy), so there is nothing to compare it with."]


# ---- the command -----------------------------------------------------------------------------


def test_the_command_ends_in_one_json_line(tmp_path: Path) -> None:
    arguments = ["bench", "policies", "--quick", "--policies", "random,uniform", "--seeds", "2", "--evaluations", "6"]
    result = CliRunner().invoke(app, [*arguments, "--workers", "1", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout.strip().splitlines()[-1])
    assert {"policies", "seeds", "best", "report"} <= set(line)
    assert line["policies"] == ["random", "uniform"] and line["seeds"] == 2
    assert Path(line["report"]).is_file()
