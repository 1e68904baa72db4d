"""What a report says in words: headline facts, the guarantee, remarks and provenance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from arqsearch import __version__
from arqsearch.certify.line import INCREMENTAL, SEQUENTIAL
from arqsearch.data import data_root
from arqsearch.data.parquet import has_parquet, image_column, split_files
from arqsearch.errors import ArqError
from arqsearch.integer.program import ARITHMETIC_VERSION
from arqsearch.search.results import display_name
from arqsearch.search.stages import FLOAT, FOUND, SPREAD_CONFIGURATIONS

if TYPE_CHECKING:
    from arqsearch.search.reporting import RunFiles

_TITLES = {
    "digits": "scikit-learn digits", "mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10",
    "cifar-10": "CIFAR-10", "imagenet": "ImageNet",
}  # fmt: skip
#: A space at which no line breaks.
_FIXED = "\N{NO-BREAK SPACE}"
_JPEG = b"\xff\xd8\xff"


def data_title(files: RunFiles) -> str:
    """Name of the data set; CIFAR-10, published without loss, gets a remark when it was read from JPEGs."""
    section = files.recipe.data
    name = section.name
    if name == "folder" or (name not in _TITLES and section.path is None and Path(name).exists()):
        return Path(section.path or name).name
    title = _TITLES.get(name, name)
    place = Path(section.path).expanduser() if section.path else data_root() / "data" / "cifar10"
    return f"{title} (JPEG copy)" if title == "CIFAR-10" and holds_jpeg(place) else title


def holds_jpeg(place: Path) -> bool:
    """Whether the test images of a parquet data set are JPEGs; False where there are none to look at.

    :param place: file or folder.
    """
    if not place.exists() or (place.is_dir() and not has_parquet(place)):
        return False
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(split_files(place, "test")[0])
        column = image_column(file.schema_arrow.names, file.schema_arrow, place)
        first = next(file.iter_batches(batch_size=1, columns=[column])).column(0).to_pylist()[0]
    except (ArqError, OSError, ValueError, StopIteration):
        return False
    return bytes(first["bytes"] or b"").startswith(_JPEG)


def budget(files: RunFiles) -> str:
    """The limits of the search in words."""
    limits = files.recipe.search.budget
    parts = [
        f"{label} ≤ {str(limit).replace('%', f'{_FIXED}% of FP32')}"
        for label, limit in (("BOPs", limits.bops), ("weight bytes", limits.weight_bytes))
        if limit is not None
    ]
    return " and ".join(parts) or "no budget"


def title(files: RunFiles) -> str:
    """Model, data, noise and budget."""
    return f"{files.recipe.model.name} on {data_title(files)}, σ = {files.recipe.sigma:g}, {budget(files)}"


def summary(files: RunFiles) -> dict[str, object]:
    """Headline facts, label to value."""
    recipe = files.recipe
    counts = {policy: len(result["history"]) for policy, result in files.searches.items()}
    weights = "" if recipe.model.weights is None else f", base {Path(recipe.model.weights).name}"
    return {
        "Data set": data_title(files),
        "Model": recipe.model.name + weights,
        "Noise": f"σ = {recipe.sigma:g} in units of [0,1] pixels: s = {255 * recipe.sigma:g} grey levels",
        "Budget": budget(files),
        "Evaluations": ", ".join(f"{policy}{_FIXED}{count:,}" for policy, count in counts.items()) or "none yet",
        "Certificates": _protocol(files),
        "Test images": _test_images(files),
        "Input": _input(files),
    }


def _protocol(files: RunFiles) -> str:
    """The rule of the certificates with its numbers."""
    certify = files.recipe.certify
    select = f"n0 = {certify.n0:,}"
    if certify.rule == SEQUENTIAL:
        radii = ", ".join(f"{radius:g}" for radius in sorted(certify.radii))
        first = "the label is tested" if certify.target == "label" else select
        words = f"rule sequential, {first}, up to {certify.cap:,} samples to decide r = {radii}"
    elif certify.rule == INCREMENTAL:
        words = f"rule incremental, {certify.shared:,} samples shared with {certify.base}"
    else:
        words = f"{select} and n = {certify.n:,} samples"
    return f"{words}, α = {certify.alpha:g} per image"


def _test_images(files: RunFiles) -> str:
    """How many images stand behind each kind of figure: what was done, else what the recipe asks for."""
    certify = files.recipe.certify
    certified = max((len(lines) for lines in files.lines.values()), default=certify.images)
    every = f"first {certified:,}" if certified is not None else "all"
    if certify.every > 1:
        every += f" of every {certify.every}th"
    clean = max((bounds["clean"]["images"] for bounds in files.bounds.values()), default=certify.clean_images)
    verdicts = [len(bounds["interval"]["images"]) for bounds in files.bounds.values() if "interval" in bounds]
    bounded = max(verdicts, default=certify.interval_images)
    return f"{every} certified, first {bounded:,} bounded, first {clean:,} for clean accuracy"


def _input(files: RunFiles) -> str:
    mode = files.recipe.quantize.input_mode
    if FOUND not in files.programs:
        return mode
    width = files.programs[FOUND].metadata["grey_levels_per_code"]
    return f"{mode}; one input code of the found network spans {width:.3g} grey levels"


def guarantee(files: RunFiles) -> str:
    """What is guaranteed and what is not; empty before anything was certified."""
    certify = files.recipe.certify
    certified = [display_name(files.space, name) for name in files.lines if name != FLOAT]
    if not certified:
        return ""
    paragraphs = [
        f"Certified are the integer programs of {', '.join(certified)}, each named by its hash below; an exported "
        "strict-integer ONNX computes the same logits. The smoothed network answers the class that the program gives "
        f"most often when integer Gaussian noise of σ = {files.recipe.sigma:g} is added to the image.",
        f"For each image by itself, with probability at least {100 * (1 - certify.alpha):g} % over the noise samples: "
        "the smoothed network gives the same answer for every image of whole grey levels within the stated L2 radius, "
        "in units of [0,1] pixels. The noise is taken to come from independent, uniform random bits; its distance from "
        "the ideal noise is accounted for. Pixels, noise and arithmetic are integers: no rounding is left out.",
        "Interval bounds at ε hold without any chance: for every image within ε grey levels (L∞) of a counted test "
        "image, one run of the program without noise gives the true class.",
        "Not guaranteed: the answer of a single run at an L2 radius, other images, other changes, and the FP32 "
        "network, whose floating-point row is an estimate by the same protocol. Scores of the search are estimates on "
        f"held-out training images. Of many certified images, a share of up to {certify.alpha:g} may be wrong on "
        f"average: at most {_expected_wrong(files)} of all certificates of this table.",
    ]
    return "\n\n".join(paragraphs)


def _expected_wrong(files: RunFiles) -> str:
    """Bound on the expected number of wrong certificates, over all certified networks."""
    lines = [line for name, found in files.lines.items() if name != FLOAT for line in found]
    total = math.fsum(line.alpha for line in lines if line.estimated)
    return f"{math.ceil(1000 * total - 1e-9) / 1000:g}"


def notes(files: RunFiles) -> list[str]:
    """Remarks on how the numbers were made."""
    recipe, remarks = files.recipe, []
    title = data_title(files)
    if title.endswith("(JPEG copy)"):
        remarks.append(f"{title}: the images were compressed with loss, so figures are not those of the original data.")
    shared = "with one set of weights, trained for all bit-widths at once"
    how = shared if recipe.evaluate.mode == "shared" else "after a short fine-tune of each"
    remarks.append(f"Candidates were scored on held-out training images, {how}.")
    remarks.append("Every network of the table was fine-tuned by the same recipe, the FP32 one included.")
    if recipe.evaluate.mode == "shared":
        remarks.append(
            "The quantized networks start that fine-tuning from the shared weights, the FP32 one from the base network."
        )
    if files.spread:
        remarks.append(
            "A candidate's reward is the weighted sum of its terms less those of the W8A8 network; the spread of the "
            f"terms is that of {SPREAD_CONFIGURATIONS} random configurations within the budget."
        )
    asked = recipe.certify.images or 0
    for name, lines in files.lines.items():
        if len(lines) < asked:
            done = f"{len(lines):,} of {asked:,} images are done"
            remarks.append(f"{display_name(files.space, name)}: {done}; its figures are of those.")
    rules = {line.rule for name, lines in files.lines.items() if name != FLOAT for line in lines}
    if SEQUENTIAL in rules:
        remarks.append(
            "Rule sequential: sampling stops when the asked radii are decided, so a radius beyond them is a lower "
            "bound, and so are ACR and the curves between asked radii. Undecided images are not certified."
        )
    if INCREMENTAL in rules:
        remarks.append("Rule incremental: radii follow from another network's votes and are lower bounds, ACR as well.")
    if recipe.certify.skip_misclassified and files.lines:
        remarks.append("Images whose selected class is wrong were not estimated: they count 0 at every radius.")
    return remarks


def provenance(files: RunFiles) -> dict[str, object]:
    """Hashes, identities, seeds and versions, label to value."""
    recipe = files.recipe
    found: dict[str, object] = {}
    for name, lines in files.lines.items():
        kind = "Weights of" if name == FLOAT else "Program of"
        found[f"{kind} {display_name(files.space, name)}"] = lines[0].program.removeprefix("float:")
    for name, program in files.programs.items():
        found.setdefault(f"Program of {display_name(files.space, name)}", program.hash)
    if files.lines:
        found["Test data"] = next(iter(files.lines.values()))[0].data
    if "holdout_identity" in files.facts:
        found["Held-out training data"] = files.facts["holdout_identity"]
    seeds = {"run": recipe.seed, "search": recipe.search.seed, "certificates": recipe.certify.seed}
    found["Seeds"] = ", ".join(f"{name} {seed}" for name, seed in seeds.items())
    found["Versions"] = f"arqsearch {__version__}, integer arithmetic {ARITHMETIC_VERSION}"
    return found
