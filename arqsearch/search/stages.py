"""The steps of a run, in order: base, weights for scoring, search, fine-tune. Each resumes where it stopped.

A stage reads files of the run folder and writes files of the run folder; workers get a recipe and a
name, and build the rest themselves.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from arqsearch import models
from arqsearch.certify.base import PROVENANCE
from arqsearch.certify.noise import SEARCH
from arqsearch.envs.evaluator import Evaluation
from arqsearch.envs.feasibility import Feasibility
from arqsearch.errors import ArqError
from arqsearch.integer.lowering import lower
from arqsearch.policies import SearchProblem, create
from arqsearch.policies.random_search import sample_feasible
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import total_cost
from arqsearch.quantize.network import QuantizedNet
from arqsearch.quantize.objectives import needs_teacher
from arqsearch.quantize.ranks import Ranks
from arqsearch.quantize.training import OnStep, train
from arqsearch.recipe import Recipe, Train
from arqsearch.search import terms as reward_terms
from arqsearch.search.evaluator import ProgramEvaluator
from arqsearch.search.executor import LocalExecutor, OnProgress, Task, use_threads
from arqsearch.search.weights import load_state, save_state, state_hash
from arqsearch.search.workspace import Workspace

#: Random configurations over which the spread of each reward term is measured before a search.
SPREAD_CONFIGURATIONS = 20
#: Sweeps of the sampler for one configuration; training wants speed more than exact uniformity.
SPREAD_SWEEPS, TRAINING_SWEEPS = 30, 4
FLOAT, FOUND = "float", "found"


def _on_step(name: str, on_progress: OnProgress) -> OnStep:
    return lambda done, total, loss: on_progress(name, done, total, f"loss {loss:.3f}")


def train_base(recipe: Recipe, on_progress: OnProgress) -> Path:
    """Train the base network, unless the recipe names weights or it is trained already."""
    space = Workspace(recipe)
    if recipe.model.weights is not None or space.base_path.is_file():
        return space.base_weights()
    use_threads(1)
    net = space.net(space.find_weights(recipe.train.start) if recipe.train.start else None)
    data, checkpoint, ranks = space.train_set, space.dir / "base.checkpoint", Ranks.current()
    train(
        net, data.images, data.labels, recipe.train, recipe.sigma, recipe.seed, checkpoint=checkpoint,
        on_step=_on_step("train base", on_progress), teacher=teacher(space, recipe.train),
    )  # fmt: skip
    if ranks.first:
        models.save_weights(net.source, space.base_path, {"recipe": recipe.name, "sigma": str(recipe.sigma)})
        checkpoint.unlink(missing_ok=True)
    ranks.wait()
    return space.base_path


def teacher(space: Workspace, settings: Train) -> QuantizedNet | None:
    """The float network that a training's distillation follows: the named weights, else the base."""
    if not needs_teacher(settings.objective):
        return None
    named = settings.teacher
    if named is None and settings is space.recipe.train:
        raise ArqError("The base distils, but from whom? Name the float weights of a teacher in train.teacher.")
    return space.net(space.find_weights(named) if named else space.base_weights())


def prepare_weights(recipe: Recipe, on_progress: OnProgress) -> Path:
    """Calibrate the step sizes and, in `shared` mode, train one set of weights for all bit-widths."""
    space = Workspace(recipe)
    if space.shared_path.is_file():
        return space.shared_path
    use_threads(1)
    net = calibrated(space)
    if recipe.evaluate.mode == "shared":
        data, checkpoint = space.train_set, space.dir / "shared.checkpoint"
        choices, fixed = tuple(recipe.search.bits), space.fixed(net)
        feasibility = Feasibility(net.layer_infos, space.budget(net), choices, fixed)

        def choose(step: int, generator: np.random.Generator) -> list[BitWidths]:
            """Sandwich sampling within the budget: an extreme assignment in turn, the others random."""
            extreme = max(choices) if step % 2 else min(choices)
            picked = [BitWidths.uniform(net.bitwidths.names, extreme, extreme, fixed)]
            source = random.Random(int(generator.integers(2**32)))
            for _ in range(recipe.evaluate.configs_per_step - 1):
                picked.append(sample_feasible(feasibility, source, TRAINING_SWEEPS).bitwidths())
            return picked

        on_step = _on_step("train shared weights", on_progress)
        train(
            net, data.images, data.labels, recipe.evaluate.training, recipe.sigma, recipe.seed, choose=choose,
            checkpoint=checkpoint, on_step=on_step, teacher=teacher(space, recipe.evaluate.training),
        )  # fmt: skip
        if Ranks.current().first:
            save_state(net, space.shared_path)
            checkpoint.unlink(missing_ok=True)
        Ranks.current().wait()
    else:
        save_state(net, space.shared_path)
    return space.shared_path


def calibrated(space: Workspace) -> QuantizedNet:
    """The base network with step sizes fitted on noisy training images, in quantized mode."""
    net = space.net(space.base_weights())
    net.calibrate(space.calibration_pixels())
    net.quantized = True
    return net.eval()


def open_evaluator(space: Workspace) -> ProgramEvaluator:
    """The evaluator on the weights that score candidates."""
    net = space.net()
    net.quantized = True
    load_state(net, space.shared_path)
    if space.recipe.evaluate.mode != "finetune":
        return ProgramEvaluator(net.eval(), space.holdout, space.recipe, space.record())
    guide = teacher(space, space.recipe.evaluate.training)
    return ProgramEvaluator(net.eval(), space.holdout, space.recipe, space.record(), space.train_set, guide)


def measure_spread(recipe: Recipe, on_progress: OnProgress) -> dict[str, Any]:
    """Score random configurations and refuse reward terms that do not vary.

    :raises ArqError: when a weighted term is constant and the recipe does not allow that.
    """
    space = Workspace(recipe)
    evaluator = open_evaluator(space)
    net = evaluator.net
    feasibility = Feasibility(net.layer_infos, space.budget(net), tuple(recipe.search.bits), space.fixed(net))
    # A generator of its own: the random policy must not start with the same candidates.
    source = random.Random(f"spread {recipe.search.seed}")
    found = []
    for index in range(SPREAD_CONFIGURATIONS):
        found.append(evaluator.evaluate(sample_feasible(feasibility, source, SPREAD_SWEEPS).bitwidths()).terms)
        on_progress("spread of reward terms", index + 1, SPREAD_CONFIGURATIONS, "")
    spreads = reward_terms.spread(found)
    result = {"reference": evaluator.reference, "spread": spreads, "values": found}
    write_json(space.dir / "search" / "spread.json", result)
    reward_terms.require_varying(spreads, recipe.evaluate)
    return result


def run_policy(recipe: Recipe, policy: str, on_progress: OnProgress) -> dict[str, Any]:
    """Run one policy's search; replaying the record makes this resume after a kill."""
    space = Workspace(recipe)
    path = space.search_path(policy)
    if path.is_file():
        return dict(json.loads(path.read_text()))
    start = time.perf_counter()
    evaluator = open_evaluator(space)
    fixed, budget = space.fixed(evaluator.net), space.budget(evaluator.net)
    problem = SearchProblem(evaluator, budget, tuple(recipe.search.bits), fixed)
    best = -np.inf

    def on_evaluation(index: int, evaluation: Evaluation) -> None:
        nonlocal best
        best = max(best, evaluation.reward)
        on_progress(f"search {policy}", index + 1, recipe.search.evaluations, f"best {best:+.4f}")

    options = recipe.search.options if policy == recipe.search.policy else {}
    outcome = create(policy, **options).search(problem, recipe.search.evaluations, recipe.search.seed, on_evaluation)
    history = [
        {
            "reward": e.reward,
            "terms": e.terms,
            "bops": total_cost("bops", evaluator.layers, e.bitwidths),
            "weight_bytes": total_cost("weight_bytes", evaluator.layers, e.bitwidths),
            "bitwidths": json.loads(e.bitwidths.to_json()),
        }
        for e in outcome.history
    ]
    result = {
        "policy": policy,
        "seed": recipe.search.seed,
        "best": json.loads(outcome.best.bitwidths.to_json()),
        "best_reward": outcome.best.reward,
        "computed": evaluator.computed,
        "seconds": time.perf_counter() - start,
        "weights_hash": evaluator.key.weights_hash,
        "history": history,
    }
    write_json(path, result)
    return result


def check_search(recipe: Recipe) -> None:
    """Refuse what a search would refuse, before any training: policies, their options, the budget.

    :raises ArqError: naming the nearest valid choice, or the attainable minimum of the budget.
    """
    create(recipe.search.policy, **recipe.search.options)
    for name in recipe.search.compare:
        create(name)
    space = Workspace(recipe)
    space.budget(space.net())


def search(recipe: Recipe, on_progress: OnProgress) -> dict[str, BitWidths]:
    """Weights for scoring, spread check, every policy; writes the bit-widths of each compared network."""
    space = Workspace(recipe)
    check_search(recipe)
    prepare_weights(recipe, on_progress)
    measure_spread(recipe, on_progress)
    names = [recipe.search.policy, *(p for p in recipe.search.compare if p != recipe.search.policy)]
    tasks = [Task(f"search {name}", run_policy, (recipe, name)) for name in names]
    results = LocalExecutor(recipe.workers).map(tasks, on_progress)
    chosen: dict[str, BitWidths] = {}
    for name in names:
        label = FOUND if name == recipe.search.policy else name
        chosen[label] = BitWidths.from_json(json.dumps(results[f"search {name}"]["best"]))
        write_json(space.network_dir(label) / "bitwidths.json", results[f"search {name}"]["best"])
    return chosen


def compared(recipe: Recipe) -> list[str]:
    """Names of the networks of the final table: float, each compared policy, found."""
    others = [name for name in recipe.search.compare if name != recipe.search.policy]
    return [FLOAT, *others, FOUND]


def finetune_network(recipe: Recipe, name: str, on_progress: OnProgress) -> str:
    """Fine-tune one network (the same recipe for all) and lower it; returns its program or weights hash."""
    space = Workspace(recipe)
    folder = space.network_dir(name)
    weights, program_path = folder / "weights.safetensors", folder / "program.safetensors"
    net = space.net(space.base_weights()) if name == FLOAT else space.net()
    net.quantized = name != FLOAT
    if net.quantized:
        load_state(net, space.shared_path)
        net.set_bitwidths(space.bitwidths(name))
    if weights.is_file():
        load_state(net, weights)
    else:
        data, checkpoint = space.train_set, folder / "checkpoint"
        train(
            net, data.images, data.labels, recipe.finetune, recipe.sigma, recipe.seed, checkpoint=checkpoint,
            on_step=_on_step(f"fine-tune {name}", on_progress), teacher=teacher(space, recipe.finetune),
        )  # fmt: skip
        if Ranks.current().first:
            save_state(net, weights)
            checkpoint.unlink(missing_ok=True)
        Ranks.current().wait()
    net.eval()
    if name == FLOAT:
        return state_hash(net.state_dict())
    metadata = {
        "run": recipe.name,
        "sigma": recipe.sigma,
        "weights_hash": state_hash(net.state_dict()),
        "network": name,
        # Certification draws other streams; training draws from torch's generators, which are none of these.
        PROVENANCE: [[recipe.seed, SEARCH]],
    }
    program = lower(net, noise_limit=space.table.hi, metadata=metadata)
    if Ranks.current().first:
        program.save(program_path)
    return program.hash


def finetune(recipe: Recipe, on_progress: OnProgress) -> dict[str, str]:
    """Fine-tune and lower every compared network, in parallel."""
    if not Workspace(recipe).shared_path.is_file():
        raise ArqError(f"Nothing was searched in {recipe.run_dir}; run `arqsearch search` first.")
    tasks = [Task(name, finetune_network, (recipe, name)) for name in compared(recipe)]
    # The processes of torchrun train one network together, one after the other.
    workers = recipe.workers if Ranks.current().size == 1 else 1
    return LocalExecutor(workers).map(tasks, on_progress)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file of the run folder in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)
