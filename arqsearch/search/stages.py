"""The steps of a run, in order: base, weights for scoring, search, fine-tune. Each resumes where it stopped.

A stage reads files of the run folder and writes files of the run folder; workers get a recipe and a
name, and build the rest themselves.
"""

from __future__ import annotations

import json
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from arqsearch import models
from arqsearch.certify.base import PROVENANCE
from arqsearch.certify.noise import SEARCH
from arqsearch.envs.evaluator import Evaluation
from arqsearch.errors import ArqError
from arqsearch.integer.lowering import lower
from arqsearch.policies import create
from arqsearch.policies.random_search import sample_feasible
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import known_costs, total_cost
from arqsearch.quantize.initialization import initialize_for_intervals
from arqsearch.quantize.monitor import BoundsMonitor
from arqsearch.quantize.network import QuantizedNet
from arqsearch.quantize.objectives import needs_teacher
from arqsearch.quantize.ranks import Ranks
from arqsearch.quantize.training import OnStep, train
from arqsearch.recipe import Recipe, Train
from arqsearch.search import require_problem
from arqsearch.search import terms as reward_terms
from arqsearch.search.evaluator import ProgramEvaluator, evaluation_gpus
from arqsearch.search.executor import Executor, OnProgress, Task, gpus_for, open_executor, use_threads
from arqsearch.search.require_problem import front_path, requirement_path
from arqsearch.search.scorer import Scorer
from arqsearch.search.weights import load_state, save_state, state_hash
from arqsearch.search.workspace import Workspace

#: Random configurations over which the spread of each reward term is measured before a search.
SPREAD_CONFIGURATIONS = 20
#: Sweeps of the sampler for one configuration; training wants speed more than exact uniformity.
SPREAD_SWEEPS, TRAINING_SWEEPS = 30, 4
FLOAT, FOUND = "float", "found"
#: What certified points of the trade-off and candidates below the floor are called, before their number.
FRONT, TRIED = "front-", "tried-"


def _on_step(name: str, on_progress: OnProgress, monitor: BoundsMonitor | None) -> OnStep:
    def report(done: int, total: int, loss: float) -> None:
        on_progress(name, done, total, f"loss {loss:.3f}{monitor.summary if monitor else ''}")

    return report


def _monitor(space: Workspace, settings: Train, path: Path, bitwidths: BitWidths | None = None) -> BoundsMonitor | None:
    """Box estimates on held-out images, when the training asks for them."""
    if settings.monitor.every == 0:
        return None
    return BoundsMonitor(settings.monitor, space.holdout.images, space.holdout.labels, path, bitwidths)


def train_base(recipe: Recipe, on_progress: OnProgress) -> Path:
    """Train the base network, unless the recipe names weights or it is trained already."""
    space = Workspace(recipe)
    if recipe.model.weights is not None or space.base_path.is_file():
        return space.base_weights()
    use_threads(1)
    net = space.net(space.find_weights(recipe.train.start) if recipe.train.start else None)
    if recipe.train.initialization == "ibp" and recipe.train.start is None:
        initialize_for_intervals(net, recipe.seed)
    data, checkpoint, ranks = space.train_set, space.dir / "base.checkpoint", Ranks.current()
    monitor = _monitor(space, recipe.train, space.dir / "base_bounds.csv")
    train(
        net, data.images, data.labels, recipe.train, recipe.sigma, recipe.seed, checkpoint=checkpoint,
        on_step=_on_step("train base", on_progress, monitor), teacher=teacher(space, recipe.train), monitor=monitor,
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
        feasibility = space.feasibility(net)

        def choose(step: int, generator: np.random.Generator) -> list[BitWidths]:
            """Sandwich sampling within the budget: an extreme assignment in turn, the others random."""
            extreme = max(choices) if step % 2 else min(choices)
            picked = [BitWidths.uniform(net.bitwidths.names, extreme, extreme, fixed)]
            source = random.Random(int(generator.integers(2**32)))
            for _ in range(recipe.evaluate.configs_per_step - 1):
                picked.append(sample_feasible(feasibility, source, TRAINING_SWEEPS).bitwidths())
            return picked

        widest = BitWidths.uniform(net.bitwidths.names, max(choices), max(choices), fixed)
        monitor = _monitor(space, recipe.evaluate.training, space.dir / "shared_bounds.csv", widest)
        on_step = _on_step("train shared weights", on_progress, monitor)
        train(
            net, data.images, data.labels, recipe.evaluate.training, recipe.sigma, recipe.seed, choose=choose,
            checkpoint=checkpoint, on_step=on_step, teacher=teacher(space, recipe.evaluate.training), monitor=monitor,
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


def open_scorer(recipe: Recipe) -> Scorer:
    """What computes evaluations, on the weights that score candidates; every worker opens its own."""
    space = Workspace(recipe)
    net = space.net()
    net.quantized = True
    load_state(net, space.shared_path)
    if recipe.evaluate.mode != "finetune":
        return Scorer(net.eval(), space.holdout, recipe)
    return Scorer(net.eval(), space.holdout, recipe, space.train_set, teacher(space, recipe.evaluate.training))


def open_evaluator(
    space: Workspace, executor: Executor | None = None, *, racing: bool = True, on_progress: OnProgress | None = None
) -> ProgramEvaluator:
    """The evaluator on the weights that score candidates.

    :param executor: computes the candidates of a generation.
    :param racing: False scores every candidate in full.
    :param on_progress: told about the candidates of a generation.
    """
    reopen = partial(open_scorer, space.recipe)
    return ProgramEvaluator(
        reopen(), space.record(), executor=executor, reopen=reopen, racing=racing, on_progress=on_progress
    )


def random_candidates(space: Workspace, net: QuantizedNet, count: int, seed: str) -> list[BitWidths]:
    """Assignments within the budget, nearly uniform among them.

    :param seed: of the generator that draws them.
    """
    feasibility = space.feasibility(net)
    source = random.Random(seed)
    return [sample_feasible(feasibility, source, SPREAD_SWEEPS).bitwidths() for _ in range(count)]


def measure_spread(recipe: Recipe, on_progress: OnProgress, executor: Executor | None = None) -> dict[str, Any]:
    """Score random configurations and refuse reward terms that do not vary.

    :param executor: computes them.
    :raises ArqError: when a weighted term is constant and the recipe does not allow that.
    """
    space = Workspace(recipe)
    name = "spread of reward terms"
    evaluator = open_evaluator(
        space, executor, racing=False, on_progress=lambda _, done, total, note: on_progress(name, done, total, note)
    )
    # A generator of its own: the random policy must not start with the same candidates.
    drawn = random_candidates(space, evaluator.net, SPREAD_CONFIGURATIONS, f"spread {recipe.search.seed}")
    found = [evaluation.terms for evaluation in evaluator.evaluate_many(drawn)]
    on_progress(name, SPREAD_CONFIGURATIONS, SPREAD_CONFIGURATIONS, "")
    spreads = reward_terms.spread(found)
    result = {"reference": evaluator.reference, "spread": spreads, "values": found}
    write_json(space.dir / "search" / "spread.json", result)
    reward_terms.require_varying(spreads, recipe.evaluate)
    return result


def run_policy(
    recipe: Recipe, policy: str, on_progress: OnProgress, executor: Executor | None = None
) -> dict[str, Any]:
    """Run one policy's search; replaying the record makes this resume after a kill.

    :param executor: computes the candidates that the policy proposes together.
    """
    space = Workspace(recipe)
    path = space.search_path(policy)
    if path.is_file():
        return dict(json.loads(path.read_text()))
    start = time.perf_counter()
    evaluator = open_evaluator(
        space, executor, racing=not require_problem.needs_full_scores(recipe), on_progress=on_progress
    )
    searched = require_problem.constrained(space, evaluator)
    problem = require_problem.problem(space, searched, evaluator.net)
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
            **({} if e.stopped is None else {"stopped": e.stopped}),
            **{cost: total_cost(cost, searched.layers, e.bitwidths) for cost in known_costs(searched.layers)},
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
    """Refuse what a search would refuse, before any training: policies, options, constraints, budget, floor.

    :raises ArqError: naming the nearest valid choice, or the attainable minimum of the budget.
    """
    create(recipe.search.policy, **recipe.search.options)
    for name in recipe.search.compare:
        create(name)
    require_problem.check(recipe, Workspace(recipe).net())


def _is_agent(policy: str) -> bool:
    """Whether a policy learns after each evaluation, so that its candidates cannot be scored together."""
    from arqsearch.policies.agent import AgentPolicy

    return isinstance(create(policy), AgentPolicy)


def search(recipe: Recipe, on_progress: OnProgress) -> dict[str, BitWidths]:
    """Weights for scoring, spread check, every policy; writes the bit-widths of each compared network."""
    space = Workspace(recipe)
    check_search(recipe)
    prepare_weights(recipe, on_progress)
    names = [recipe.search.policy, *(p for p in recipe.search.compare if p != recipe.search.policy)]
    with open_executor(recipe.executor, recipe.workers) as executor:
        measure_spread(recipe, on_progress, executor)
        # An agent learns after each evaluation, so agents run side by side; the others share out their candidates.
        agents = [name for name in names if _is_agent(name)]
        tasks = [Task(f"search {name}", run_policy, (recipe, name), evaluation_gpus(recipe)) for name in agents]
        results = dict(executor.map(tasks, on_progress)) if tasks else {}
        for name in names:
            if name not in agents:
                results[f"search {name}"] = run_policy(recipe, name, on_progress, executor)
    chosen: dict[str, BitWidths] = {}
    for name in names:
        label = FOUND if name == recipe.search.policy else name
        chosen[label] = BitWidths.from_json(json.dumps(results[f"search {name}"]["best"]))
        if label != FOUND or not requirement_path(space.dir).is_file():  # A candidate may have taken its place.
            write_json(space.network_dir(label) / "bitwidths.json", results[f"search {name}"]["best"])
    if recipe.search.objectives and not front_path(space.dir).is_file():
        from arqsearch.search.front import write_front

        write_front(recipe, chosen)
    return chosen


def compared(recipe: Recipe) -> list[str]:
    """Names of the networks of the final table: float, each compared policy, what was certified besides, found.

    That is points of the trade-off (``front-N``), and candidates that fell short of a floor (``tried-N``).
    """
    others = [name for name in recipe.search.compare if name != recipe.search.policy]
    besides: list[str] = []
    if recipe.search.objectives and front_path(recipe.run_dir).is_file():
        points = json.loads(front_path(recipe.run_dir).read_text())["points"]
        besides += [point["network"] for point in points if point["network"].startswith(FRONT)]
    if recipe.search.require and requirement_path(recipe.run_dir).is_file():
        tried = json.loads(requirement_path(recipe.run_dir).read_text())["attempts"]
        besides += [f"{TRIED}{number}" for number in range(1, len(tried) + 1)]
    return [FLOAT, *others, *besides, FOUND]


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
        monitor = _monitor(space, recipe.finetune, folder / "bounds.csv")
        train(
            net, data.images, data.labels, recipe.finetune, recipe.sigma, recipe.seed, checkpoint=checkpoint,
            on_step=_on_step(f"fine-tune {name}", on_progress, monitor), teacher=teacher(space, recipe.finetune),
            monitor=monitor,
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
    gpus = gpus_for(recipe.finetune.device)
    tasks = [Task(name, finetune_network, (recipe, name), gpus) for name in compared(recipe)]
    # The processes of torchrun train one network together, one after the other.
    workers = recipe.workers if Ranks.current().size == 1 else 1
    with open_executor(recipe.executor if Ranks.current().size == 1 else "local", workers) as executor:
        return dict(executor.map(tasks, on_progress))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file of the run folder in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)
