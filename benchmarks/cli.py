"""``arqsearch bench …``: what is measured by hand or by `make results-…`, each command ending in one JSON line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from arqsearch.benchmarks.integer_speed import Measurement

app = typer.Typer(
    name="bench",
    help="Measure: the last line of the output is one JSON object.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

#: Exit code when a logit of ours is wrong.
MISMATCH = 1


@app.callback()
def bench() -> None:
    """Measure: the last line of the output is one JSON object."""
    # A callback keeps the command's name where there is only one command.


@app.command()
def integer_speed(
    quick: Annotated[bool, typer.Option("--quick", help="32x32 networks, smaller batches; under 50 s.")] = False,
    network: Annotated[
        list[str] | None,
        typer.Option(help="resnet20, mobilenetv2, resnet50_224 or mobilenetv2_224; repeat for several."),
    ] = None,
    isa: Annotated[
        str, typer.Option(help="Instruction set: auto, portable, avx2, avx512 or neon; avx2 limits the peers too.")
    ] = "auto",
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of timing; default 15, or 7 with --quick.")] = None,
    multiplier: Annotated[
        str, typer.Option(help="Requantization multipliers of the integer programs: 15, 31 or pow2.")
    ] = "15",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV file, or a folder, where the file gets its own name.")
    ] = None,
) -> None:
    """Images per second of the integer engine, PyTorch, onnxruntime and OpenVINO, on one thread."""
    from typing import get_args

    from arqsearch.benchmarks import environment
    from arqsearch.errors import ArqError, nearest

    environment.relaunch(isa)
    # From here on in a process whose environment is right: only now come the libraries that read it.
    from arqsearch.benchmarks import integer_speed as speed
    from arqsearch.benchmarks.contenders import require_isa
    from arqsearch.benchmarks.networks import select
    from arqsearch.progress import ProgressReporter
    from arqsearch.quantize.network import Multiplier

    kinds = {str(kind): kind for kind in get_args(Multiplier)}
    if multiplier not in kinds:
        raise ArqError(f"No multiplier {multiplier!r}. {nearest(multiplier, kinds)}")
    require_isa(isa)
    specs, facts, measured = select(network or [], quick), speed.machine(isa) | {"multiplier": multiplier}, []
    if facts["engine"] != "native":
        typer.echo("The native engine is not built: ours runs on the torch backend, which is slower.", err=True)
    turns = rounds or (speed.QUICK_ROUNDS if quick else speed.ROUNDS)
    with ProgressReporter() as progress:
        for spec in specs:
            found = speed.measure(
                spec, speed.lineup(isa), turns, progress, batch=spec.quick_batch if quick else None,
                seconds=speed.QUICK_SECONDS if quick and rounds is None else float("inf"), multiplier=kinds[multiplier],
            )  # fmt: skip
            measured.append(found)
    for found in measured:
        _show(found)
    if output is not None:
        path = speed.csv_path(output, facts)
        speed.write_rows(speed.rows(measured, facts), path)
        typer.echo(f"Wrote {path}")
    outcome = speed.summary(measured, facts)
    typer.echo(json.dumps(outcome, ensure_ascii=False))
    if outcome["mismatches"]:
        typer.echo(f"{outcome['mismatches']} logits differ from the reference backend.", err=True)
        raise typer.Exit(MISMATCH)


@app.command()
def certify_speed(
    quick: Annotated[
        bool, typer.Option("--quick", help="100 images, no full run of the fixed rule; under 50 s.")
    ] = False,
    sigma: Annotated[float, typer.Option(help="Noise level in [0,1] pixels: 0.25 or 0.5.")] = 0.5,
    images: Annotated[int, typer.Option(min=1, help="Test images.")] = 100,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the CSV files, such as results.")
    ] = None,
) -> None:
    """Time to decide r = sigma: Cohen's protocol in PyTorch, and the integer program by each rule, on one thread."""
    import tempfile

    from arqsearch.benchmarks import environment

    environment.relaunch("auto")
    from arqsearch.benchmarks import certify_speed as speed
    from arqsearch.benchmarks.certify_table import GROWTH, RECIPE
    from arqsearch.progress import ProgressReporter

    with ProgressReporter() as progress, tempfile.TemporaryDirectory() as folder:
        item = speed.subject(sigma, images, Path(folder))
        outcome = speed.measure(item, 3 if quick else 9, progress, full=not quick)
        if output is not None:
            rows = speed.growth(item, (0.0, 0.25, 0.5, 1.0, 1.5, 2.0), progress)
            name = f"{RECIPE}-{outcome['hardware']}-s{round(100 * sigma):03d}"
            speed.write_rows([{"recipe": GROWTH, **row} for row in rows], output / f"{name}-growth.csv")
            flat = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in outcome.items()}
            speed.write_rows([{"recipe": RECIPE, **flat}], output / f"{name}.csv")
            typer.echo(f"Wrote {output / name}.csv and {output / name}-growth.csv")
    typer.echo(json.dumps(outcome, ensure_ascii=False))


@app.command()
def verify_speed(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds of boxes; under 50 s.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV file, or a folder, where the file gets its own name.")
    ] = None,
) -> None:
    """Images per second of interval bounds on two threads, and 40 fixed instances of the MNIST benchmark, 2 s each."""
    from arqsearch.benchmarks import environment

    environment.relaunch("auto")
    from arqsearch.benchmarks import verify_speed as speed
    from arqsearch.progress import ProgressReporter

    with ProgressReporter() as progress:
        outcome = speed.measure(quick, progress)
    if output is not None:
        typer.echo(f"Wrote {speed.write(outcome, output)}")
    typer.echo(json.dumps(outcome, ensure_ascii=False))
    if outcome["conflicts"]:
        typer.echo(f"{outcome['conflicts']} verdicts contradict the published ones.", err=True)
        raise typer.Exit(MISMATCH)


@app.command()
def scaling(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer candidates and rounds; under a minute.")] = False,
    workers: Annotated[
        str, typer.Option(help="Numbers of workers, separated by commas; the first is compared with.")
    ] = "1,2",
    executor: Annotated[str, typer.Option(help="local, ray, ray:auto or ray://host:port.")] = "local",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV file, or a folder, where the file gets its own name.")
    ] = None,
) -> None:
    """Evaluations per minute over the number of workers, and what the executor adds to a task."""
    import tempfile

    from arqsearch.errors import ArqError

    try:
        numbers = [int(number) for number in workers.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ArqError(f"--workers {workers!r} are no numbers of workers; write for example --workers 1,2,4.")
    from arqsearch.benchmarks import environment

    environment.relaunch("auto")
    from arqsearch.benchmarks import scaling as benchmark
    from arqsearch.progress import ProgressReporter

    with ProgressReporter() as progress, tempfile.TemporaryDirectory() as folder:
        rows = benchmark.measure(numbers, executor, Path(folder), progress, quick)
    if output is not None:
        typer.echo(f"Wrote {benchmark.write_rows(rows, output)}")
    typer.echo(json.dumps(benchmark.summary(rows), ensure_ascii=False))


@app.command()
def policies(
    target: Annotated[
        str, typer.Argument(help="Recipe, run folder, or the word tabular.", metavar="RECIPE|RUN|tabular")
    ] = "tabular",
    names: Annotated[
        str | None, typer.Option("--policies", help="Policies to compare, as ddpg,ilp,random, or all.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds of each policy; default 5.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Candidates that each run may score; default 100.")] = None,
    budget_seconds: Annotated[
        float | None, typer.Option(help="Budget of the second view, in seconds; default: the median run's.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of the tabular benchmark; default: all.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of runs and report.")] = Path("runs/policies"),
    table: Annotated[
        Path | None, typer.Option(help="Also write one CSV row a policy: a file, or a folder such as results.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.")] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="One task of the tabular benchmark, 3 seeds of 5 policies; under 50 s.")
    ] = False,
) -> None:
    """Compare policies at equal evaluations over seeds: HTML page, Markdown, CSV and JSON; resumes after a kill."""
    from arqsearch.benchmarks import policies as comparison
    from arqsearch.benchmarks.policies_table import write_table
    from arqsearch.progress import ProgressReporter

    settings = comparison.settings(
        target, names, seeds, evaluations, output, workers, budget_seconds, tasks, quick
    )  # fmt: skip
    with ProgressReporter() as progress:
        outcome = comparison.compare(settings, progress)
    for sentence in outcome["verdict"]:
        typer.echo(sentence)
    if table is not None:
        typer.echo(f"Wrote {write_table(settings, table)}")
    typer.echo(json.dumps(outcome, ensure_ascii=False))


tabular_app = typer.Typer(
    name="tabular", help="The tabular benchmark: every assignment of a small network, scored.", no_args_is_help=True
)
app.add_typer(tabular_app, name="tabular")


@tabular_app.command()
def build(
    work: Annotated[Path, typer.Option(help="Folder of the trained weights and scored parts.")] = Path("runs/tabular"),
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The table; default: in that folder.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
) -> None:
    """Train the small network and score every assignment; resumes after a kill."""
    from arqsearch.benchmarks.tabular.build import build as build_table
    from arqsearch.progress import ProgressReporter

    path = output or work / "digits5.npz"
    with ProgressReporter() as progress:
        table = build_table(work, path, workers, progress)
    facts = table.facts
    typer.echo(
        json.dumps({"table": str(path), "assignments": len(table), "weights_hash": facts.weights_hash,
                    "cpu_seconds": facts.cpu_seconds, "bytes": path.stat().st_size})
    )  # fmt: skip


@tabular_app.command()
def tasks() -> None:
    """The tasks on the table, with their budgets and optima."""
    from arqsearch.benchmarks.policies_targets import TabularTarget

    target = TabularTarget()
    for name in target.tasks:
        facts = target.describe(name)
        typer.echo(
            f"{name}: {facts['what']}; {facts['assignments']:,} assignments, best reward {facts['best reward']:.5f}, "
            f"median {facts['median reward']:.5f}"
        )
    typer.echo(json.dumps([target.describe(name) for name in target.tasks], ensure_ascii=False))


@app.command()
def verify_mnist(
    quick: Annotated[bool, typer.Option("--quick", help="40 instances instead of 400.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="Limit for one instance.")] = 60.0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="CSV file, continued if it is there; or a folder, where it gets its name."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Instances side by side, each on one thread.")] = 2,
) -> None:
    """Complete verification of the public MNIST benchmark, against the known verdicts."""
    from arqsearch.benchmarks import environment

    environment.relaunch("auto")
    from arqsearch.benchmarks import verify_mnist as bench
    from arqsearch.progress import ProgressReporter

    path = None if output is None else bench.csv_path(output, quick)
    with ProgressReporter() as progress:
        rows = bench.run(seconds, workers, quick, path, progress)
    if path is not None:
        typer.echo(f"Wrote {path}")
    outcome = bench.summary(rows)
    typer.echo(json.dumps(outcome, ensure_ascii=False))
    if outcome["conflicts"]:
        typer.echo(f"{outcome['conflicts']} verdicts contradict the known ones.", err=True)
        raise typer.Exit(MISMATCH)


def _show(found: Measurement) -> None:
    """Print one network's table."""
    from rich.console import Console
    from rich.table import Table

    from arqsearch.benchmarks import integer_speed as speed

    spec, turns = found.spec, max(map(len, found.table.values()), default=0)
    title = f"{spec.title} {spec.resolution}x{spec.resolution}, batch {found.batch}, median of {turns} rounds"
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    headings = ("contender", "images/s", "spread", "× torch best", "ms/image", "GMAC/s", "isa", "how")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if 1 <= index <= 5 else "left", no_wrap=index < 7)
    for line in speed.table_lines(found):
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for name, reason in found.absent.items():
        typer.echo(f"{name}: not run, {reason}")
