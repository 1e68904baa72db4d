"""Build the table: train recipe `digits` on a smaller network, then score every assignment within the limit.

The work is cut by the bits of the first layer into parts; a part is a file in the work folder as soon as it is done, so
that a killed build goes on where it stopped.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arqsearch.benchmarks.tabular.table import RADIUS_UNIT, Facts, Table, every_cost
from arqsearch.benchmarks.tabular.tree import Inputs, PrefixTree
from arqsearch.certify.linf.boxes import box
from arqsearch.certify.noise import SEARCH, noise
from arqsearch.data import Dataset
from arqsearch.integer.program import ARITHMETIC_VERSION
from arqsearch.quantize.bitwidths import BitWidths, LayerBits
from arqsearch.quantize.cost import layer_bops, parse_limit
from arqsearch.recipe import Recipe, load_recipe
from arqsearch.search import stages
from arqsearch.search.executor import LocalExecutor, OnProgress, Task
from arqsearch.search.scorer import Scorer
from arqsearch.search.terms import estimated_radii
from arqsearch.search.weights import load_state
from arqsearch.search.workspace import Workspace

RECIPE = "digits"
#: What differs from the recipe: five layers of about the sizes of a plain network's, and fewer choices.
CHANGES = (
    "model.options={batch_norm: false, convs: [[8,3,1],[16,3,2],[16,3,2]], dense: [32]}",
    "search.bits=[2,3,4,8]",
    "search.budget.bops=0.9%",
    "evaluate.interval.epsilons=[4,8]",
)
#: The tree of the run folder that this process works on.
_OPENED: dict[str, tuple[Scorer, PrefixTree]] = {}


def build(work: Path, output: Path, workers: int, on_progress: OnProgress) -> Table:
    """Train what is not trained yet, score what is not scored yet, and write the table.

    :param work: run folder with the trained weights and the scored parts.
    :param output: the table's file.
    :param workers: processes of one thread each; the scores do not depend on their number.
    """
    recipe = load_recipe(RECIPE, [*CHANGES, f"run={work}", f"workers={workers}"])
    Workspace(recipe).save_recipe()
    stages.train_base(recipe, on_progress)
    stages.prepare_weights(recipe, on_progress)
    scorer, tree = _open(recipe)
    pairs = len(recipe.search.bits) ** 2
    (work / "parts").mkdir(exist_ok=True)
    paths = {f"part {index}": work / "parts" / f"{index}.npz" for index in range(pairs)}
    tasks = [
        Task(name, score_part, (recipe, index))
        for index, (name, path) in enumerate(paths.items())
        if not path.is_file()
    ]

    def keep(name: str, result: Any) -> None:
        partial = paths[name].with_suffix(".partial.npz")
        np.savez(partial, **result)
        partial.replace(paths[name])

    with LocalExecutor(workers) as executor:
        executor.map(tasks, on_progress, keep)
    parts = [dict(np.load(path)) for path in paths.values()]
    numbers = np.concatenate([part["numbers"] for part in parts])
    order = np.argsort(numbers)
    layers = scorer.net.layer_infos
    widest = scorer.compute(BitWidths.uniform(tree.names, 8, 8)).counts
    reference = [_radius(np.array(widest["votes"]), recipe)]
    reference += [sum(widest["robust"][str(epsilon)]) for epsilon in recipe.evaluate.interval.epsilons]
    facts = Facts(
        layers=layers, choices=tuple(recipe.search.bits), bops_limit=_limit(recipe, scorer),
        epsilons=tuple(recipe.evaluate.interval.epsilons), sigma=recipe.sigma,
        samples=recipe.evaluate.smoothed.samples, images=len(scorer.holdout), reference=tuple(reference),
        recipe=(RECIPE, *CHANGES), weights_hash=scorer.key.weights_hash, settings_hash=scorer.key.settings_hash,
        arithmetic_version=ARITHMETIC_VERSION, cpu_seconds=round(sum(float(part["seconds"]) for part in parts), 1),
    )  # fmt: skip
    table = Table(
        facts,
        np.concatenate([part["radius"] for part in parts])[order].astype(np.uint16),
        np.concatenate([part["robust"] for part in parts])[order].astype(np.uint16),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    table.save(output)
    return table


def score_part(recipe: Recipe, first: int, on_progress: OnProgress) -> dict[str, Any]:
    """Task of a worker: every assignment within the limit that gives the first layer its pair number `first`."""
    begun = time.process_time()
    scorer, tree = _open(recipe)
    layers, limit = scorer.net.layer_infos, _limit(recipe, scorer)
    smallest = LayerBits(tree.choices[0], tree.choices[0])
    pairs = [LayerBits(w, a) for w in tree.choices for a in tree.choices]
    numbered = {pair: index for index, pair in enumerate(pairs)}
    total = int((every_cost("bops", layers[1:], pairs) <= limit - layer_bops(layers[0], pairs[first])).sum())

    def wanted(prefix: tuple[LayerBits, ...]) -> bool:
        bits = [*prefix, *[smallest] * (len(layers) - len(prefix))]
        return sum(layer_bops(layer, pair) for layer, pair in zip(layers, bits, strict=True)) <= limit

    numbers: list[int] = []
    radius: list[int] = []
    robust: list[NDArray[np.int64]] = []
    for bits, counts in tree.walk(wanted, [pairs[first]]):
        number = 0
        for pair in bits:
            number = number * len(pairs) + numbered[pair]
        numbers.append(number)
        radius.append(_radius(counts.votes, recipe))
        robust.append(counts.robust)
        if len(numbers) % 500 == 0:
            on_progress(f"part {first}", len(numbers), total, "")
    return {
        "numbers": np.array(numbers, np.int64), "radius": np.array(radius, np.int64),
        "robust": np.array(robust, np.int64).reshape(-1, tree.inputs.epsilons),
        "seconds": np.float64(time.process_time() - begun),
    }  # fmt: skip


def _limit(recipe: Recipe, scorer: Scorer) -> int:
    value = recipe.search.budget.bops
    assert value is not None
    return parse_limit("bops", value, scorer.net.layer_infos)


def _radius(votes: NDArray[np.int64], recipe: Recipe) -> int:
    """Mean estimated radius in stored units."""
    radii = estimated_radii(votes.tolist(), recipe.evaluate.smoothed.samples, recipe.sigma)
    return round(float(radii.mean()) / RADIUS_UNIT)


def scoring_inputs(recipe: Recipe, holdout: Dataset) -> Inputs:
    """The noisy images and boxes that the search's scorer sees, all at once."""
    space, samples = Workspace(recipe), recipe.evaluate.smoothed.samples
    drawn = noise(
        space.table, seed=recipe.seed, stage=SEARCH, image_ids=holdout.ids.tolist(), sample_start=0,
        sample_count=samples, coordinates=holdout.images[0].size,
    ).numpy()  # fmt: skip
    shape = holdout.images.shape[1:]
    noisy = holdout.images.astype(np.int16)[:, None] + drawn.reshape(len(holdout), samples, *shape)
    corners = [box(holdout.images, epsilon) for epsilon in recipe.evaluate.interval.epsilons]
    boxes = [np.asarray(lo, np.int16) for lo, _ in corners] + [np.asarray(hi, np.int16) for _, hi in corners]
    return Inputs(
        noisy.reshape(-1, *shape).astype(np.int16), np.concatenate(boxes), holdout.labels.astype(np.int64), samples,
        len(corners),
    )  # fmt: skip


def _open(recipe: Recipe) -> tuple[Scorer, PrefixTree]:
    key = str(recipe.run_dir.absolute())
    if key not in _OPENED:
        space = Workspace(recipe)
        net = space.net()
        net.quantized = True
        load_state(net, space.shared_path)
        inputs = scoring_inputs(recipe, space.holdout)
        tree = PrefixTree(net.eval(), tuple(recipe.search.bits), inputs, space.table.hi)
        _OPENED[key] = Scorer(net, space.holdout, recipe), tree
    return _OPENED[key]
