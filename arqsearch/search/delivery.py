"""Artefacts of a finished network, and the check that recomputes what a run folder claims."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import torch

from arqsearch.certify.certificate import read_lines
from arqsearch.certify.noise import ESTIMATE, NoiseTable, noise
from arqsearch.certify.smoothing import program_classifier
from arqsearch.certify.verify import verify_file
from arqsearch.errors import ArqError, nearest
from arqsearch.export.config import apply_config, write_config
from arqsearch.export.config_schema import CONFIG_FILE
from arqsearch.export.onnx_qdq import export_qdq
from arqsearch.export.onnx_strict import HASH_KEY, export_strict, run_strict, strict_metadata
from arqsearch.integer.lowering import lower
from arqsearch.integer.program import IntegerProgram
from arqsearch.models import image_options
from arqsearch.quantize.network import QuantizedNet
from arqsearch.recipe import Export, Recipe, load_recipe
from arqsearch.search.certification import interval_verdicts, load_program
from arqsearch.search.stages import FLOAT, compared
from arqsearch.search.weights import load_state
from arqsearch.search.workspace import Workspace

STRICT_FILE, QDQ_FILE = "strict.onnx", "qdq.onnx"
#: Noisy test images on which the exported ONNX must equal the program, and the pixels they may add up to.
ONNX_IMAGES, ONNX_PIXELS = 64, 64 * 32 * 32 * 3
#: Test images whose interval verdicts are recomputed, unless all are asked for.
INTERVAL_IMAGES = 8

#: What one check covered: (number of items, remark).
Checked: TypeAlias = tuple[int, str]


def formats() -> tuple[str, ...]:
    """Names of the export formats."""
    return get_args(get_args(Export.model_fields["formats"].annotation)[0])


# ---- export ----------------------------------------------------------------------------------


def export(recipe: Recipe, network: str, formats: Sequence[str]) -> dict[str, Any]:
    """Write artefacts of one compared network into ``exports/<network>`` of the run folder.

    :param network: name of a quantized network of the final table: found, uniform or random.
    :param formats: of ``onnx`` (strict integers), ``qdq`` and ``config``.
    :returns: ``network``, ``program_hash`` and ``files``: format, path and size in bytes of each.
    :raises ArqError: for an unknown name, or when the network was not fine-tuned yet.
    """
    for name in formats:
        if name not in EXPORTERS:
            raise ArqError(f"No export format {name!r}. {nearest(name, EXPORTERS)}")
    choices = quantized_names(recipe)
    if network not in choices:
        reason = "The float network has no integer program" if network == FLOAT else f"No compared network {network!r}"
        raise ArqError(f"{reason}. {nearest(network, choices)}")
    space = Workspace(recipe)
    program = load_program(space, network)
    files: list[dict[str, Any]] = []
    for name in formats:
        for path in EXPORTERS[name](space, network, program):
            files.append({"format": name, "path": str(path), "bytes": path.stat().st_size})
    return {"network": network, "program_hash": program.hash, "files": files}


def quantized_names(recipe: Recipe) -> list[str]:
    """Compared networks that are integer programs."""
    return [name for name in compared(recipe) if name != FLOAT]


def rebuilt_network(space: Workspace, network: str, program: IntegerProgram) -> QuantizedNet:
    """The fine-tuned quantized network behind a program, in evaluation mode.

    :raises ArqError: when its weights do not lower to that program.
    """
    net = space.net()
    net.quantized = True
    folder = space.network_dir(network)
    load_state(net, folder / "weights.safetensors")
    net.set_bitwidths(space.bitwidths(network))
    net.eval()
    found = lower(net, noise_limit=-program.input.lo).hash
    if found != program.hash:
        raise ArqError(
            f"The weights and bit-widths in {folder} lower to program {found[:12]}, its program.safetensors is "
            f"{program.hash[:12]}; delete program.safetensors and run `arqsearch certify {space.dir}` again."
        )
    return net


def _export_onnx(space: Workspace, network: str, program: IntegerProgram) -> list[Path]:
    path = space.export_dir(network) / STRICT_FILE
    export_strict(program, path)
    return [path]


def _export_qdq(space: Workspace, network: str, program: IntegerProgram) -> list[Path]:
    path = space.export_dir(network) / QDQ_FILE
    export_qdq(rebuilt_network(space, network, program), path, program=program)
    return [path]


def _export_config(space: Workspace, network: str, program: IntegerProgram) -> list[Path]:
    section, (height, width, channels) = space.recipe.model, space.facts["shape"]
    model = {
        "name": section.name,
        "options": {**image_options(section.name, (height, width, channels)), **section.options},
        "num_classes": space.facts["num_classes"],
    }
    net, folder = rebuilt_network(space, network, program), space.export_dir(network)
    path = write_config(net, program, folder, model=model, sigma=space.recipe.sigma)
    return [path, folder / json.loads(path.read_text())["base"]["file"]]


EXPORTERS: dict[str, Callable[[Workspace, str, IntegerProgram], list[Path]]] = {
    "onnx": _export_onnx,
    "qdq": _export_qdq,
    "config": _export_config,
}


# ---- verify ----------------------------------------------------------------------------------


def verify(run_or_certificate: str, images: int) -> dict[str, Any]:
    """Recompute what a run folder claims and report every difference.

    Certificates are checked line by line and some recomputed by running the program; interval verdicts are
    bounded again; an exported strict ONNX is run by onnxruntime and compared with the program on every logit;
    an exported config is lowered to its program again.

    :param run_or_certificate: run folder (or its recipe), or one certificate file in a run folder.
    :param images: certificate lines recomputed for each network, chosen at random; 0 = all.
    :returns: ``verified`` (True) and ``checks``: check, network, items and result of each.
    :raises ArqError: listing every difference, or when there is nothing to verify yet.
    """
    if images < 0:
        raise ArqError(f"{images} certificate lines cannot be recomputed; give a number from 1, or 0 for all.")
    path = Path(run_or_certificate)
    if path.suffix == ".jsonl":
        space = Workspace(open_run(path.parent.parent, path))
        names, kinds = [path.stem], ["certificates"]
        if path.stem not in compared(space.recipe):
            raise ArqError(f"{path} is of no network of this run. {nearest(path.stem, compared(space.recipe))}")
        if not path.is_file():
            raise ArqError(f"No certificate file at {path}; run `arqsearch certify {space.dir}` first.")
    else:
        space = Workspace(open_run(path) if path.is_dir() else load_recipe(path))
        names, kinds = compared(space.recipe), list(CHECKS)
    checks: list[dict[str, Any]] = []
    problems: list[str] = []
    for name in names:
        _verify_network(space, name, kinds, images, checks, problems)
    if problems:
        raise ArqError(f"{path} was checked and does not hold:\n  " + "\n  ".join(dict.fromkeys(problems)))
    if not checks:
        raise ArqError(f"There is nothing to verify in {space.dir} yet; run `arqsearch certify {space.dir}` first.")
    return {"verified": True, "checks": checks}


def open_run(folder: Path, wanted: Path | None = None) -> Recipe:
    """The recipe of a run folder, pointing at that folder wherever it was moved.

    :param wanted: named in the error.
    :raises ArqError: when it is no run folder.
    """
    if not (folder / "recipe.yaml").is_file():
        raise ArqError(f"{wanted or folder} lies in no run folder: {folder} has no recipe.yaml. Give the folder of a run.")
    return load_recipe(folder).model_copy(update={"run": str(folder)})


def _verify_network(
    space: Workspace, name: str, kinds: Sequence[str], images: int, checks: list[dict[str, Any]], problems: list[str]
) -> None:
    """Run every check whose file is there; adds to `checks` and `problems`."""
    for kind in kinds:
        locate, check = CHECKS[kind]
        if not locate(space, name).is_file():
            continue
        try:
            items, result = check(space, name, images)
            checks.append({"check": kind, "network": name, "items": items, "result": result})
        except ArqError as error:
            problems.append(str(error).replace("\n", "\n  "))


def _check_certificates(space: Workspace, name: str, images: int) -> Checked:
    path, test = space.certificate_path(name), space.test_set
    if name == FLOAT:
        # Floating point is not reproducible from machine to machine: only what the lines state is checked.
        stated = read_lines(path)
        program = stated[0].program if stated else ""
        checked = verify_file(path, _never_run, test, program, sample=0)
        return checked.lines, "lines consistent; an estimate, so not recomputed"
    integer = load_program(space, name)
    classify = program_classifier(integer, space.recipe.sigma)
    checked = verify_file(
        path, classify, test, integer.hash, sample=images or None, batch_size=space.recipe.certify.batch_size
    )
    return checked.lines, f"lines hold, {len(checked.recomputed)} recomputed with equal counts and radius"


def _never_run(pixels: torch.Tensor) -> torch.Tensor:
    raise AssertionError("no line is recomputed")


def _check_intervals(space: Workspace, name: str, images: int) -> Checked:
    path = space.bounds_path(name)
    try:
        stated = json.loads(path.read_text())
        identity, ids, robust = stated["program"], stated["interval"]["images"], stated["interval"]["robust"]
        rows = {e: list(v) for e, v in robust.items()}
        if any(len(v) != len(ids) for v in rows.values()):
            raise ValueError("verdicts and images differ in number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArqError(
            f"{path} cannot be read ({type(error).__name__}: {error}); delete it and run `arqsearch certify {space.dir}`."
        ) from error
    program = load_program(space, name)
    problems = [] if identity == program.hash else [f"it is about program {identity}, this is {program.hash}"]
    count = len(ids) if images == 0 else min(INTERVAL_IMAGES, len(ids))
    chosen = sorted(random.Random(0).sample(range(len(ids)), count))
    test = space.test_set
    if ids != test.ids[: len(ids)].tolist():
        problems.append("its images are not the first of the test set")
    else:
        again = interval_verdicts(program, space, chosen)["robust"]
        for epsilon, verdicts in rows.items():
            if epsilon not in again:
                problems.append(f"ε = {epsilon} is not in the recipe")
            for index, position in enumerate(chosen if epsilon in again else ()):
                if verdicts[position] != again[epsilon][index]:
                    problems.append(
                        f"image {ids[position]} at ε = {epsilon}: robust is {verdicts[position]} in the file, "
                        f"{again[epsilon][index]} recomputed"
                    )
    if problems:
        raise ArqError(f"{path} does not hold; delete it and certify again:\n  " + "\n  ".join(problems[:10]))
    return count, f"images bounded again at ε = {', '.join(rows)}, equal verdicts"
