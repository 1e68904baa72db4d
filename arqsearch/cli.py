"""The command line: parses, calls one function a command, prints. No logic, and no heavy import at the top."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from arqsearch.benchmarks.cli import app as bench_app
from arqsearch.errors import ArqError
from arqsearch.search.require_options import with_options

app = typer.Typer(
    name="arqsearch",
    help="Search bit-widths for the integer network you ship, and certify that very network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(bench_app, name="bench")
zoo_app = typer.Typer(name="zoo", help="Trained networks that come with the package.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")

RecipeArgument = Annotated[
    str, typer.Argument(help="Recipe file, name of a packaged recipe, or run folder.", metavar="RECIPE|RUN")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe, as section.key=value.", metavar="[KEY=VALUE]...")
]
RunArgument = Annotated[str, typer.Argument(help="Run folder (or its recipe).", metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, no progress.")]
Network = Annotated[str, typer.Option("--network", help="Which compared network: found, uniform or random.")]


def _run(stage: str, recipe: str, overrides: list[str] | None, as_json: bool) -> None:
    """Run stages up to and including `stage` and print the outcome."""
    from arqsearch.progress import ProgressReporter
    from arqsearch.recipe import load_recipe
    from arqsearch.search import pipeline

    settings = load_recipe(recipe, overrides)
    with ProgressReporter(quiet=as_json) as progress:
        outcome = pipeline.STAGES[stage](settings, progress)
    if os.environ.get("RANK", "0") == "0":  # Of the processes of torchrun, the first one speaks.
        _print(outcome, as_json)


def _print(outcome: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(outcome))
        return
    for key, value in outcome.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            from rich.console import Console
            from rich.table import Table

            columns = list(dict.fromkeys(column for row in value for column in row))
            table = Table(title=key, box=None, pad_edge=False, title_justify="left")
            for column in columns:
                table.add_column(column, justify="left" if isinstance(value[0].get(column), str) else "right")
            for row in value:
                cells = (row.get(column, "-") for column in columns)
                table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in cells))
            Console(width=None if sys.stdout.isatty() else 140).print(table)
        elif isinstance(value, dict):
            typer.echo(f"{key}:")
            for name, item in value.items():
                typer.echo(f"  {name}: {item}")
        else:
            typer.echo(f"{key}: {'-' if value is None else value}")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the recipe.")] = Path("recipe.yaml"),
    source: Annotated[str, typer.Option("--from", help="Packaged recipe to start from.")] = "digits",
) -> None:
    """Write a commented recipe to start from."""
    from arqsearch.recipe import RECIPES, load_recipe

    load_recipe(source)
    if path.exists():
        raise ArqError(f"{path} exists already; give another name: arqsearch init other.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((RECIPES / f"{source}.yaml").read_text())
    typer.echo(f"Wrote {path}. Edit it, then: arqsearch run {path}")


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    what: Annotated[str, typer.Option(help="base, shared (the weights that score candidates) or finetune.")] = "base",
    as_json: Json = False,
) -> None:
    """Train the base network (or check the given weights); also under torchrun, on several GPUs."""
    from arqsearch.errors import nearest
    from arqsearch.search.pipeline import TRAININGS

    if what not in TRAININGS:
        raise ArqError(f"There is no training {what!r}. {nearest(what, TRAININGS)}")
    _run(what, recipe, overrides, as_json)


Bits = Annotated[str | None, typer.Option("--bits", help="Bits that a layer may take, as 2,4,8.")]
Freeze = Annotated[
    list[str] | None,
    typer.Option("--freeze", help="LAYER=W,A: a layer (or glob) whose bits are not searched; repeat for several."),
]
Group = Annotated[
    list[str] | None,
    typer.Option("--group", help="A,B,...: layers (or globs) that share their bits; repeat for several."),
]
Require = Annotated[str | None, typer.Option("--require", help="Minimise cost under a floor: 'certified@0.5 >= 40%'.")]
Objectives = Annotated[
    str | None, typer.Option("--objectives", help="Write the trade-off of these, as bops,certified.")
]


@app.command()
def search(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    bits: Bits = None,
    freeze: Freeze = None,
    group: Group = None,
    require: Require = None,
    objectives: Objectives = None,
    as_json: Json = False,
) -> None:
    """Search the bit-widths; resumes after a kill."""
    _run("search", recipe, with_options(overrides, bits, freeze, group, require, objectives), as_json)


@app.command()
def profile(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The table; default: latency.json of the run folder.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads that share a batch of images.")] = 1,
    as_json: Json = False,
) -> None:
    """Measure how long every layer takes at every pair of bits on the native engine, for budgets of latency."""
    from arqsearch.progress import ProgressReporter
    from arqsearch.recipe import load_recipe
    from arqsearch.search import profile_command

    settings = load_recipe(recipe, overrides)
    with ProgressReporter(quiet=as_json) as progress:
        outcome = profile_command.profile(settings, output, threads, progress)
    _print(outcome, as_json)


DataName = Annotated[str | None, typer.Option("--data", help="Data set of a bare program: name, folder or hf:...")]
DataPath = Annotated[str | None, typer.Option(help="Folder or file of that data set.")]
ImageSize = Annotated[int | None, typer.Option(help="Scale its images to this size.")]
Base = Annotated[str | None, typer.Option(help="incremental: certificate file of the network to start from.")]
BaseProgram = Annotated[str | None, typer.Option(help="incremental: integer program of that network.")]


@app.command()
def certify(
    target: Annotated[
        str,
        typer.Argument(
            help="Recipe, run folder, or one integer program (program.safetensors).", metavar="RECIPE|RUN|PROGRAM"
        ),
    ],
    overrides: Overrides = None,
    rule: Annotated[str | None, typer.Option(help="fixed, sequential or incremental.")] = None,
    radii: Annotated[str | None, typer.Option(help="L2 radii in [0,1] pixels, as 0.25,0.5.")] = None,
    cap: Annotated[int | None, typer.Option(help="sequential: samples after which an image stays undecided.")] = None,
    target_class: Annotated[
        str | None, typer.Option("--target", help="sequential: test the selected class, or the label.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Failure probability for each image.")] = None,
    n0: Annotated[int | None, typer.Option("--n0", help="Samples that select the class.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="fixed: samples that estimate its probability.")] = None,
    images: Annotated[int | None, typer.Option(help="How many test images.")] = None,
    every: Annotated[int | None, typer.Option(help="Every k-th test image.")] = None,
    seed: Annotated[int | None, typer.Option(help="Key of the noise generator.")] = None,
    base: Base = None,
    base_program: BaseProgram = None,
    shared: Annotated[int | None, typer.Option(help="incremental: samples that both networks see.")] = None,
    gained: Annotated[bool | None, typer.Option("--gained", help="incremental: count gained pairs, too.")] = None,
    two_class: Annotated[bool | None, typer.Option("--two-class", help="fixed: two-class radii, apart.")] = None,
    network: Annotated[str | None, typer.Option(help="One network of a run: found, uniform or random.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Certificate file of one network.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: this part of the images, into a file of its own.")] = None,
    data: DataName = None,
    data_path: DataPath = None,
    image_size: ImageSize = None,
    sigma: Annotated[float | None, typer.Option(help="Noise level in [0,1] pixels, of a bare program.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for one network.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Certify the networks of a run (fine-tuning and lowering them first), one of them, or an integer program."""
    from arqsearch.progress import ProgressReporter
    from arqsearch.search import certify_command

    changes = {
        "rule": rule, "radii": certify_command.parse_radii(radii), "cap": cap, "target": target_class, "alpha": alpha,
        "n0": n0, "n": n, "images": images, "every": every, "seed": seed, "base": base, "base_program": base_program,
        "shared": shared, "gained": gained, "two_class": two_class,
    }  # fmt: skip
    options = certify_command.CertifyOptions(
        changes, data, data_path, image_size, sigma, network, output, shard, device
    )
    with ProgressReporter(quiet=as_json) as progress:
        outcome = certify_command.certify(target, overrides or [], options, progress)
    _print(outcome, as_json)


@app.command()
def verify_robustness(
    target: Annotated[
        str, typer.Argument(help="Run folder, or one integer program (program.safetensors).", metavar="RUN|PROGRAM")
    ],
    eps: Annotated[str, typer.Option("--eps", help="L-infinity radii in whole grey levels, as 1,2,4.")],
    images: Annotated[int | None, typer.Option(help="How many test images; default: all.")] = None,
    every: Annotated[int, typer.Option(help="Every k-th test image.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time for one image at one radius; 0 for no limit.")] = 20.0,
    domains: Annotated[int | None, typer.Option(help="Domains bounded for one image at one radius.")] = None,
    milp: Annotated[bool, typer.Option(help="Hand what stays open to integer programming.")] = True,
    boxes_only: Annotated[bool, typer.Option("--boxes-only", help="Interval bounds alone: fast, incomplete.")] = False,
    network: Network = "found",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Robustness file.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: this part of the images, into a file of its own.")] = None,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 1,
    data: DataName = None,
    data_path: DataPath = None,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Prove or refute, image by image, that no change of up to eps grey levels changes the class."""
    from arqsearch.progress import ProgressReporter
    from arqsearch.search import robustness

    options = robustness.RobustnessOptions(
        robustness.parse_epsilons(eps), images, every, seconds or None, domains, milp, not boxes_only, network, output,
        shard, workers, data, data_path, image_size,
    )  # fmt: skip
    with ProgressReporter(quiet=as_json) as progress:
        outcome = robustness.verify_robustness(target, options, progress)
    _print(outcome, as_json)


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Certificate files of the shards.", metavar="FILE...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The joined file.")],
    images: Annotated[int | None, typer.Option(help="How many images were to be certified.")] = None,
    every: Annotated[int | None, typer.Option(help="Every k-th of them.")] = None,
    as_json: Json = False,
) -> None:
    """Join the certificate files of shards; says which images are missing."""
    from arqsearch.search import certify_command

    _print(certify_command.merge(files, output, images, every), as_json)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    bits: Bits = None,
    freeze: Freeze = None,
    group: Group = None,
    require: Require = None,
    objectives: Objectives = None,
    as_json: Json = False,
) -> None:
    """Do everything in order: train, search, certify, export, verify, report."""
    _run("run", recipe, with_options(overrides, bits, freeze, group, require, objectives), as_json)


@app.command()
def export(
    run: Annotated[
        str, typer.Argument(help="Run folder, integer program (.safetensors), or zoo:NAME.", metavar="RUN|PROGRAM")
    ],
    format: Annotated[str, typer.Option("--format", "-f", help="onnx (strict), onnx-fast, qdq, config or c.")] = "onnx",
    network: Network = "found",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder, for a program alone; default: exports/NAME.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the integer network as ONNX (strict, fast or QDQ), as a C99 package, or its quantization config."""
    from arqsearch.search.program_export import export_program, is_program

    if is_program(run):
        _print(export_program(run, format, output), as_json)
        return
    from arqsearch.recipe import load_recipe
    from arqsearch.search import delivery

    _print(delivery.export(load_recipe(run), network, [format]), as_json)


@app.command()
def apply(
    config: Annotated[Path, typer.Argument(help="Quantization config (JSON).")],
    weights: Annotated[Path | None, typer.Option(help="Base weights; default: the file beside the config.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the integer program here.")] = None,
    as_json: Json = False,
) -> None:
    """Rebuild an integer program from a quantization config and its base; checks the hash."""
    from arqsearch.export.config import apply_config

    _print(apply_config(config, weights, output), as_json)


@app.command()
def verify(
    run: Annotated[
        str,
        typer.Argument(
            help="Run folder, certificate file, or an export: folder, C package or ONNX file.",
            metavar="RUN|CERTIFICATE|EXPORT",
        ),
    ],
    images: Annotated[int, typer.Option(help="Certified images to recompute for each network; 0 for all.")] = 3,
    program: Annotated[Path | None, typer.Option(help="Program of a certificate file outside its run.")] = None,
    data: DataName = None,
    data_path: DataPath = None,
    image_size: ImageSize = None,
    base: Base = None,
    base_program: BaseProgram = None,
    as_json: Json = False,
) -> None:
    """Recompute certificates, and run exports against the integer program, logit by logit."""
    from arqsearch.search import delivery
    from arqsearch.search.outside import Behind

    behind = Behind(program, data, data_path, image_size, base, base_program)
    _print(delivery.verify(run, images, behind), as_json)


@app.command()
def report(run: RunArgument, as_json: Json = False) -> None:
    """Write report.html and report.md of a run."""
    _run("report", run, None, as_json)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the recipe."""
    from arqsearch.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@zoo_app.command("list")
def zoo_list(as_json: Json = False) -> None:
    """List the networks, how each was made and what was measured."""
    from arqsearch import zoo

    shown = {}
    for entry in zoo.entries():
        facts = entry.model_dump(exclude_none=True, exclude={"name", "sha256", "file", "measured"})
        shown[entry.name] = {**facts, **entry.measured}
    _print(shown, as_json)


@zoo_app.command("get")
def zoo_get(
    name: Annotated[str, typer.Argument(help="As `arqsearch zoo list` shows it.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File or folder; default: the current folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a network's file out of the package."""
    from arqsearch import zoo

    _print({"file": str(zoo.get(name, output))}, as_json)


def main() -> None:
    """Entry point: errors that a user can mend are one message, not a traceback."""
    # Read when torch is first imported: a waiting thread that spins would starve the other workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app(prog_name="arqsearch")
    except ArqError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED if sys.stderr.isatty() else None)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.secho("Interrupted; run the same command again to continue.", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
