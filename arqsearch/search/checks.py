"""The checks of `arqsearch verify`: each recomputes one claim of a run folder, or says what differs."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from arqsearch.certify.base import BaseNetwork
from arqsearch.certify.certificate import read_lines
from arqsearch.certify.linf.boxes import IntervalBounds
from arqsearch.certify.noise import ESTIMATE, NoiseTable, noise
from arqsearch.certify.smoothing import program_classifier
from arqsearch.certify.verify import verify_file
from arqsearch.data import Dataset
from arqsearch.errors import ArqError
from arqsearch.export.c_matrix import TOOLCHAINS
from arqsearch.export.c_package import MODEL_FILE, PACKAGE_DIR, VECTOR_IMAGES, CPackage, export_c
from arqsearch.export.config import apply_config
from arqsearch.export.config_schema import CONFIG_FILE
from arqsearch.export.matrix import FAST_FILE, STRICT_FILE, package_row
from arqsearch.export.onnx_fast import check_fast
from arqsearch.export.onnx_strict import export_strict, run_strict, strict_metadata
from arqsearch.export.runtime import HASH_KEY
from arqsearch.integer.native import compile_program
from arqsearch.integer.program import IntegerProgram
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import format_cost, total_cost
from arqsearch.recipe import Certify
from arqsearch.search.certification import clean_accuracy, find_program, load_program, smoothing_settings
from arqsearch.search.robustness import check_robustness_file, described, robustness_path
from arqsearch.search.stages import FLOAT
from arqsearch.search.workspace import Workspace

#: Noisy test images on which the exported ONNX must equal the program, and the values they may add up to.
ONNX_IMAGES, ONNX_VALUES = 64, 64 * 32 * 32 * 3
#: Test images whose interval verdicts are recomputed, unless all are asked for.
INTERVAL_IMAGES = 8

#: What one check covered: number of items, and the result in words.
Checked: TypeAlias = tuple[int, str]
#: Called with the run, the network and the number of certificate lines to recompute (0 = all).
Check: TypeAlias = Callable[[Workspace, str, int], Checked]


def check_certificates(space: Workspace, name: str, images: int) -> Checked:
    """Certificate lines against the program and the data; counts of some by running the program again."""
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
        path, classify, test, integer.hash, sample=images or None, batch_size=space.recipe.certify.batch_size,
        classes=integer.num_classes, base=verifying_base(path, space.recipe.certify, integer, test, images, space.dir),
    )  # fmt: skip
    return checked.lines, f"lines hold, {len(checked.recomputed)} recomputed with equal counts and radius"


def verifying_base(
    path: Path, section: Certify, program: IntegerProgram, test: Dataset, images: int, folder: Path | None
) -> BaseNetwork | None:
    """The base network of an incremental certificate, itself verified; None for the other rules.

    :param path: the incremental certificate file.
    :param section: names the base network's certificates and, if not in a run folder, its program.
    :raises ArqError: when these are missing, or the base network's certificates do not hold.
    """
    lines = read_lines(path)
    if not lines or lines[0].incremental is None:
        return None
    if section.base is None:
        raise ArqError(f"{path} starts from another network's certificates; name their file: --base CERT.")
    source = Path(section.base).expanduser()
    base = find_program(source, section.base_program, folder)
    if base is None:
        raise ArqError(f"The program behind {source} was not found; name it: --base-program FILE.")
    classify = program_classifier(base, lines[0].sigma)
    verify_file(source, classify, test, base.hash, sample=images or None, classes=base.num_classes)
    return BaseNetwork(source, program.metadata, classify, base.hash, keep=False)


def _never_run(pixels: torch.Tensor) -> torch.Tensor:
    raise AssertionError("no line is recomputed")


def check_bounds(space: Workspace, name: str, images: int) -> Checked:
    """Clean accuracy, and interval verdicts of some images (all, when `images` is 0)."""
    path, test = space.bounds_path(name), space.test_set
    try:
        stated = json.loads(path.read_text())
        identity, count = str(stated["program"]), len(stated["interval"]["images"])
        ids, robust = np.array(stated["interval"]["images"]), stated["interval"]["robust"]
        verdicts = {int(epsilon): np.array(values).reshape(count) for epsilon, values in robust.items()}
        clean = {"correct": int(stated["clean"]["correct"]), "images": int(stated["clean"]["images"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArqError(f"{path} is damaged ({type(error).__name__}: {error}); delete it and certify again.") from error
    program = load_program(space, name)
    problems = [] if identity == program.hash else [f"it is about program {identity}, this is {program.hash}"]
    if not np.array_equal(ids, test.ids[:count]) or set(verdicts) != set(space.recipe.certify.epsilons):
        raise ArqError(f"{path} is not about the test images and ε of this recipe; delete it and certify again.")
    recomputed = clean_accuracy(program_classifier(program, space.recipe.sigma), space)
    if clean != recomputed:
        problems.append(f"clean accuracy: {clean} in the file, {recomputed} recomputed")
    some = random.Random(0).sample(range(count), count if images == 0 else min(INTERVAL_IMAGES, count))
    chosen, bounds = np.array(sorted(some), dtype=np.int64), IntervalBounds(program)
    for epsilon, values in verdicts.items():
        again = bounds.verify(test.images[chosen], test.labels[chosen], epsilon).robust.int().numpy()
        for position in np.flatnonzero(again != values[chosen]):
            image = int(ids[chosen[position]])
            problems.append(f"image {image} at ε = {epsilon}: its verdict is not the one recomputed, {again[position]}")
    if problems:
        raise ArqError("\n  ".join([f"{path} does not hold; delete it and certify again:", *problems[:10]]))
    epsilons = ", ".join(map(str, verdicts))
    return len(chosen), f"images bounded again at ε = {epsilons}, equal verdicts; equal clean accuracy"


def check_robustness(space: Workspace, name: str, images: int) -> Checked:
    """Verdicts at ε: counter-examples run again, robust ones proven again, some of them by complete verification."""
    path = robustness_path(space, name)
    found = check_robustness_file(path, load_program(space, name), space.test_set, images)
    return found.lines, described(found)


def onnx_pixels(program: IntegerProgram, space: Workspace) -> np.ndarray:
    """Noisy test images, and constant images at the ends of the program's input range.

    :returns: int16 ``(N, H, W, C)``.
    """
    test, size = space.test_set, int(np.prod(program.input.shape))
    if test.images.shape[1:] != program.input.shape:
        raise ArqError(f"The program reads images of {program.input.shape}, the test set has {test.images.shape[1:]}.")
    count = min(ONNX_IMAGES, max(4, ONNX_VALUES // size), len(test))
    drawn = noise(
        NoiseTable.for_sigma(space.recipe.sigma), seed=space.recipe.certify.seed, stage=ESTIMATE,
        image_ids=[int(i) for i in test.ids[:count]], sample_start=0, sample_count=1, coordinates=size,
    )  # fmt: skip
    noisy = test.images[:count].astype(np.int16) + drawn.numpy().reshape(count, *program.input.shape)
    extremes = [np.full((1, *program.input.shape), value, np.int16) for value in (program.input.lo, program.input.hi)]
    return np.concatenate([noisy, *extremes])


def check_onnx(space: Workspace, name: str, images: int) -> Checked:
    """The exported strict ONNX: the program's logits by onnxruntime, and the graph that its export gives now.

    Logits alone would not see a change in a bound that these images do not reach.
    """
    path, program = space.export_dir(name) / STRICT_FILE, load_program(space, name)
    again = f"export it again with `arqsearch export {space.dir} --network {name}`"
    pixels = onnx_pixels(program, space)
    try:
        stated = strict_metadata(path).get(HASH_KEY, "no program")
        logits = run_strict(path, pixels)
    except ArqError:
        raise
    except Exception as error:  # A damaged model can fail anywhere in onnx and onnxruntime.
        raise ArqError(f"{path} cannot be run ({type(error).__name__}); {again}.") from error
    if stated != program.hash:
        raise ArqError(f"{path} states program {stated}, this is {program.hash}; {again}.")
    expected = program.run(pixels).numpy()
    wrong = int((logits != expected).sum()) if logits.shape == expected.shape else expected.size
    if wrong:
        raise ArqError(f"{path}: {wrong} of {expected.size} logits differ from those of {program.hash[:12]}; {again}.")
    if not same_as_fresh_export(path, program):
        raise ArqError(f"{path} was altered or made by another version: its graph is not that of an export; {again}.")
    return len(pixels), f"images run by onnxruntime, all {expected.size} logits equal; same graph as a fresh export"


def same_as_fresh_export(path: Path, program: IntegerProgram) -> bool:
    """Whether a strict ONNX file holds exactly the model that exporting the program gives."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / STRICT_FILE
        export_strict(program, fresh)
        return bool(onnx.load(str(path)) == onnx.load(str(fresh)))


def check_fast_onnx(space: Workspace, name: str, images: int) -> Checked:
    """The exported fast ONNX: its program's hash and every logit, by onnxruntime."""
    path, program = space.export_dir(name) / FAST_FILE, load_program(space, name)
    pixels = onnx_pixels(program, space)
    try:
        count = check_fast(path, program, pixels)
    except ArqError:
        raise
    except Exception as error:  # A damaged model can fail anywhere in onnx and onnxruntime.
        raise ArqError(
            f"{path} cannot be run ({type(error).__name__}); export it again with --format onnx-fast."
        ) from error
    return len(pixels), f"images run by onnxruntime, all {count} logits equal"


def check_config(space: Workspace, name: str, images: int) -> Checked:
    """The exported config and its base give the program again."""
    path, program = space.export_dir(name) / CONFIG_FILE, load_program(space, name)
    found = apply_config(path)["program_hash"]
    if found != program.hash:
        raise ArqError(f"{path} gives program {found}, this is {program.hash}; export it again with --format config.")
    return 1, "gives the same program hash again"


def write_package(space: Workspace, program: IntegerProgram, folder: Path) -> CPackage:
    """The C package of a program with the run's certificate settings and test images."""
    test = space.test_set.subset(np.arange(min(VECTOR_IMAGES, len(space.test_set))))
    settings = smoothing_settings(space.recipe)
    return export_c(program, folder, smoothing=settings, images=test.images, image_ids=[int(i) for i in test.ids])


def check_c(space: Workspace, name: str, images: int) -> Checked:
    """The C package: the files that its export gives now, and, where there is a compiler, every logit."""
    folder, program = space.export_dir(name) / PACKAGE_DIR, load_program(space, name)
    again = f"export it again with `arqsearch export {space.dir} --network {name} --format c`"
    with tempfile.TemporaryDirectory() as scratch:
        fresh = write_package(space, program, Path(scratch) / "fresh")
        for path in fresh.files:
            relative = path.relative_to(fresh.folder)
            exported = folder / relative
            if not exported.is_file() or exported.read_bytes() != path.read_bytes():
                raise ArqError(f"{exported} is missing, altered or made by another version; {again}.")
        pixels, chain = onnx_pixels(program, space), TOOLCHAINS["gcc portable"]
        expected = program.run(pixels, backend="torch").numpy()
        # The vector kernels take long to compile; verifying the export folder alone runs them, too.
        row = package_row(program, folder, chain, Path(scratch), pixels, expected, "-O3 -DARQ_PORTABLE_ONLY")
    if row.ran and not row.equal:
        raise ArqError(f"{folder}: {row.result}; {again}.")
    ran = f"{row.images} images run, all {row.logits} logits equal" if row.ran else row.result
    return len(fresh.files), f"files are those of a fresh export; {chain.name}: {ran}"


def check_budget(space: Workspace, name: str, images: int) -> Checked:
    """The bit-widths of a program: those of its file, within every budget, frozen and grouped layers as asked."""
    path, program, net = space.network_dir(name) / "bitwidths.json", load_program(space, name), space.net()
    bitwidths, problems = space.bitwidths(name), []
    if BitWidths.from_mapping(program.metadata["bitwidths"]) != bitwidths:
        problems.append(f"it states other bit-widths than {program.hash[:12]} was lowered with")
    constraints, layers = space.constraints(net), space.layer_infos(net)
    problems += [
        f"layer {layer!r} has {list(bitwidths[layer])}, frozen at {list(pair)}"
        for layer, pair in constraints.fixed.items()
        if bitwidths[layer] != pair
    ]
    problems += [
        f"the group of {members[0]!r} does not share its bits"
        for members in constraints.ties
        if len({bitwidths[member] for member in members}) > 1
    ]
    budget = space.budget(net)
    for cost, limit in budget.limits:
        value = total_cost(cost, layers, bitwidths)
        if cost == "peak_activation_bytes":  # Of the program itself, not of the plan.
            value = compile_program(program).peak_activation_bytes
        if value > limit:
            problems.append(f"{cost} {format_cost(cost, value, layers)} exceeds {format_cost(cost, limit, layers)}")
    if problems:
        raise ArqError("\n  ".join([f"{path} does not hold; search again in another folder:", *problems]))
    limits = ", ".join(f"{cost} <= {format_cost(cost, limit, layers)}" for cost, limit in budget.limits)
    return len(bitwidths), f"layers within {limits or 'no budget'}, frozen and grouped ones as asked"


#: Name of a check: the file it needs, and what it does with it.
CHECKS: dict[str, tuple[Callable[[Workspace, str], Path], Check]] = {
    "certificates": (Workspace.certificate_path, check_certificates),
    "bounds": (Workspace.bounds_path, check_bounds),
    "robustness": (robustness_path, check_robustness),
    "budget": (lambda space, name: space.network_dir(name) / "bitwidths.json", check_budget),
    "strict ONNX": (lambda space, name: space.export_dir(name) / STRICT_FILE, check_onnx),
    "fast ONNX": (lambda space, name: space.export_dir(name) / FAST_FILE, check_fast_onnx),
    "config": (lambda space, name: space.export_dir(name) / CONFIG_FILE, check_config),
    "C package": (lambda space, name: space.export_dir(name) / PACKAGE_DIR / MODEL_FILE, check_c),
}
