"""Export of a finished network, and `verify`, which recomputes what a run folder claims."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arqsearch.certify.linf.robustness_file import is_robustness_file
from arqsearch.errors import ArqError, nearest
from arqsearch.export.c_package import PACKAGE_DIR, PROGRAM_FILE, package_sizes
from arqsearch.export.config import write_config
from arqsearch.export.matrix import FAST_FILE, STRICT_FILE, is_export, verify_export
from arqsearch.export.onnx_fast import export_fast
from arqsearch.export.onnx_qdq import export_qdq
from arqsearch.export.onnx_strict import export_strict
from arqsearch.integer.lowering import lower
from arqsearch.integer.program import IntegerProgram
from arqsearch.models import image_options
from arqsearch.quantize.network import QuantizedNet
from arqsearch.recipe import Recipe, load_recipe
from arqsearch.search.certification import load_program
from arqsearch.search.checks import CHECKS, write_package
from arqsearch.search.outside import Behind, verify_certificate
from arqsearch.search.stages import FLOAT, compared
from arqsearch.search.weights import load_state
from arqsearch.search.workspace import Workspace

QDQ_FILE = "qdq.onnx"


# ---- export ----------------------------------------------------------------------------------


def export(recipe: Recipe, network: str, formats: Sequence[str]) -> dict[str, Any]:
    """Write artefacts of one compared network into ``exports/<network>`` of the run folder.

    :param network: name of a quantized network of the final table: found, uniform or random.
    :param formats: of ``onnx`` (strict integers), ``onnx-fast``, ``qdq``, ``config`` and ``c``.
    :returns: ``network``, ``program_hash`` and ``files``: format, path and size in bytes of each; with ``c`` also the
        sizes that a device needs.
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
    # What `arqsearch verify` of this folder alone compares the artefacts with.
    program.save(space.export_dir(network) / PROGRAM_FILE)
    outcome = {"network": network, "program_hash": program.hash, "files": files}
    return outcome | ({"c": package_sizes(space.export_dir(network) / PACKAGE_DIR)} if "c" in formats else {})


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


def _export_fast(space: Workspace, network: str, program: IntegerProgram) -> list[Path]:
    path = space.export_dir(network) / FAST_FILE
    export_fast(program, path)
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


def _export_c(space: Workspace, network: str, program: IntegerProgram) -> list[Path]:
    package = write_package(space, program, space.export_dir(network) / PACKAGE_DIR)
    return [path for path in package.files if path.name in {"README.md", "model.c", "smoothing.c", "test_vectors.c"}]


EXPORTERS: dict[str, Callable[[Workspace, str, IntegerProgram], list[Path]]] = {
    "onnx": _export_onnx,
    "onnx-fast": _export_fast,
    "qdq": _export_qdq,
    "config": _export_config,
    "c": _export_c,
}


# ---- verify ----------------------------------------------------------------------------------


def verify(run_or_certificate: str, images: int, behind: Behind | None = None) -> dict[str, Any]:
    """Recompute what a run folder claims, or run what an export folder holds, and report every difference.

    Certificates are checked line by line and some recomputed by running the program; clean accuracy and
    interval verdicts are computed again; an exported strict ONNX is run by onnxruntime and compared with the
    program on every logit; an exported config is lowered to its program again; a C package is built and run. An
    export folder outside its run, a C package or an ONNX file is compared with the program beside it, on every
    backend that this machine can run.

    :param run_or_certificate: run folder (or its recipe), one certificate file in a run folder, export folder, C
        package or exported ONNX file.
    :param images: certificate lines recomputed for each network, chosen at random; 0 = all.
    :param behind: program and data of a certificate file that lies outside its run.
    :returns: ``verified`` (True) and ``checks``: check, network, items and result of each; for an export ``matrix``:
        backend, images, logits and result of each.
    :raises ArqError: listing every difference, or when there is nothing to verify yet.
    """
    if images < 0:
        raise ArqError(f"{images} certificate lines cannot be recomputed; give a number from 1, or 0 for all.")
    path = Path(run_or_certificate).expanduser().absolute()
    if is_export(path):
        return verify_export(path)
    if path.suffix == ".jsonl" and behind is not None and (behind.program or behind.data or behind.base):
        inside = (path.parent.parent / "recipe.yaml").is_file()
        return verify_certificate(path, behind, images, open_run(path.parent.parent, path) if inside else None)
    if is_robustness_file(path):
        return verify_certificate(path, behind or Behind(), images, open_run(path.parent.parent, path))
    if path.suffix == ".jsonl":
        space = Workspace(open_run(path.parent.parent, path))
        names, kinds = [path.stem], ["certificates"]
        known = [space.certificate_path(name) for name in compared(space.recipe)]
        if path not in known:
            raise ArqError(f"{path} is no certificate file of this run. {nearest(str(path), map(str, known))}")
        if not path.is_file():
            raise ArqError(f"No certificate file at {path}; run `arqsearch certify {space.dir}` first.")
    else:
        space = Workspace(open_run(path) if path.is_dir() else load_recipe(run_or_certificate))
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
        outside = " or, for a certificate file, --program and --data" if wanted is not None else ""
        raise ArqError(
            f"{wanted or folder}: {folder} is no run folder (no recipe.yaml there). Give a run's folder{outside}."
        )
    return load_recipe(folder).model_copy(update={"run": str(folder)})


def _verify_network(
    space: Workspace, name: str, kinds: Sequence[str], images: int, checks: list[dict[str, Any]], problems: list[str]
) -> None:
    """Run every check whose file is there; adds to `checks` and `problems`."""
    for kind in kinds:
        locate, check = CHECKS[kind]
        if not locate(space, name).is_file() or (name == FLOAT and kind != "certificates"):
            continue
        try:
            items, result = check(space, name, images)
            checks.append({"check": kind, "network": name, "items": items, "result": result})
        except ArqError as error:
            problems.append(str(error).replace("\n", "\n  "))
