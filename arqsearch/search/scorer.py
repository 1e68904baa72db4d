"""`Scorer`: from bit-widths to the integer counts behind their reward, a pure function that any worker can compute."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arqsearch.certify.linf.boxes import IntervalBounds
from arqsearch.certify.noise import SEARCH, NoiseTable
from arqsearch.certify.smoothing import count_votes as count_class_votes
from arqsearch.certify.smoothing import program_classifier
from arqsearch.data import Dataset
from arqsearch.integer.lowering import lower
from arqsearch.integer.program import IntegerProgram
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.network import QuantizedNet
from arqsearch.quantize.training import train
from arqsearch.recipe import EarlyStop, Evaluate, Recipe
from arqsearch.search import terms as reward_terms
from arqsearch.search.race import Race, random_order
from arqsearch.search.record import Entry, RecordKey, canonical_hash
from arqsearch.search.weights import state_hash

#: Noisy images in one forward pass.
BATCH = 400
#: Settings of ``evaluate`` that no count depends on.
NOT_IN_KEY = {"allow_constant_term", "early_stop", "device"}


def count_votes(
    program: IntegerProgram, dataset: Dataset, table: NoiseTable, samples: int, seed: int, batch: int = BATCH,
    device: str = "cpu",
) -> list[int]:  # fmt: skip
    """Samples of each image that the program gives the label, on the search stage's noise.

    :param samples: noise samples for each image, the same for every program.
    :param device: torch device; does not change the result.
    """
    votes = count_class_votes(
        program_classifier(program, table.sigma, device), dataset.images, dataset.ids.tolist(), table=table, seed=seed,
        stage=SEARCH, samples=samples, batch_size=batch, device=device,
    )  # fmt: skip
    unseen = max(0, int(dataset.labels.max(initial=-1)) + 1 - votes.shape[1])  # Labels that no copy was given.
    padded = np.pad(votes, ((0, 0), (0, unseen)))
    found: list[int] = padded[np.arange(len(padded)), dataset.labels].tolist()
    return found


def score_intervals(program: IntegerProgram, holdout: Dataset, settings: Evaluate) -> dict[str, Any]:
    """The interval term's counts: for each ε ``robust`` (0 or 1 for each image) and ``margins`` (clipped worst-case
    margins in thousandths of a logit unit); empty where the term has no weight.
    """
    if settings.interval.weight <= 0:
        return {}
    part = holdout.subset(np.arange(min(settings.interval.images, len(holdout))))
    bounds = IntervalBounds(program)
    scale, clip = float(program.metadata["logit_scale"]), settings.interval.margin_clip
    counts: dict[str, Any] = {"robust": {}, "margins": {}}
    for epsilon in settings.interval.epsilons:
        result = bounds.verify(part.images, part.labels, epsilon)
        clipped = (result.margins.double() * scale).clamp(-clip, clip) * reward_terms.MARGIN_UNIT
        counts["robust"][str(epsilon)] = result.robust.int().tolist()
        counts["margins"][str(epsilon)] = clipped.round().to(torch.int64).tolist()
    return counts


@dataclass(frozen=True)
class Rival:
    """The frozen incumbent that a candidate is raced against, and the rules of the race.

    :param votes: true-label votes on each image of a full evaluation.
    :param terms: its reward terms.
    :param rules: how the race is run; no part of a scorer's key, so they come along.
    """

    votes: tuple[int, ...]
    terms: dict[str, float]
    rules: EarlyStop


class Scorer:
    """Computes evaluations.

    :param net: the quantized network with its (shared or base) trained weights; owned by the scorer.
    :param holdout: held-out training images that score candidates.
    :param recipe: the resolved recipe.
    :param train_set: images and labels for the short fine-tune of ``evaluate.mode: finetune``.
    :param teacher: float network that this fine-tune distils from, where its objective does.
    """

    def __init__(
        self,
        net: QuantizedNet,
        holdout: Dataset,
        recipe: Recipe,
        train_set: Dataset | None = None,
        teacher: QuantizedNet | None = None,
    ) -> None:
        self.net = net
        self.holdout = holdout
        self.recipe = recipe
        self.train_set = train_set
        self.teacher = teacher
        self.table = NoiseTable.for_sigma(recipe.sigma)
        self._state: dict[str, Tensor] = {k: v.clone() for k, v in net.state_dict().items()}
        self.key = RecordKey(state_hash(net.state_dict()), self._settings_hash())

    @property
    def images(self) -> int:
        """Images of a full evaluation of the smoothing term."""
        return min(self.recipe.evaluate.smoothed.images, len(self.holdout))

    def order(self, bitwidths: BitWidths) -> list[int]:
        """A candidate's random order of the images."""
        return random_order(self.recipe.seed, bitwidths.to_json(), self.images)

    def race(self, rival: Rival, counts: dict[str, Any]) -> Race:
        """The race of a candidate against an incumbent.

        :param counts: the candidate's, with the interval term's in full.
        """
        settings, sigma = self.recipe.evaluate, self.recipe.sigma
        weights = reward_terms.weights(settings)
        fixed = reward_terms.terms(counts, settings, sigma, skip_smoothed=True)
        ahead = sum(weights[name] * (value - rival.terms[name]) for name, value in fixed.items())
        return Race(
            values=tuple(reward_terms.smoothed_values(rival.votes, settings.smoothed, sigma).tolist()),
            high=reward_terms.largest_value(settings.smoothed, sigma),
            goal=-ahead / settings.smoothed.weight,
            delta=rival.rules.delta,
            block=rival.rules.block,
        )

    def compute(self, bitwidths: BitWidths, rival: Rival | None = None, known: Entry | None = None) -> Entry:
        """Lower a candidate and score it, on every image or until it has lost the race.

        :param rival: what it is raced against; None scores it in full.
        :param known: an evaluation of it that was stopped early, which goes on from there.
        :returns: a full evaluation, or one of the first images of the candidate's order.
        """
        start = time.perf_counter()
        program = self._lower(bitwidths)
        settings = self.recipe.evaluate
        counts = score_intervals(program, self.holdout, settings)
        if settings.smoothed.weight > 0:
            counts["votes"] = self._votes(program, bitwidths, counts, rival, known)
        earlier = known.seconds if known else 0.0
        return Entry(program.hash, counts, earlier + time.perf_counter() - start)

    def _votes(
        self, program: IntegerProgram, bitwidths: BitWidths, counts: dict[str, Any], rival: Rival | None,
        known: Entry | None,
    ) -> list[int]:  # fmt: skip
        """Votes on every image, or those until the candidate is stopped, in its order."""
        settings, order = self.recipe.evaluate, self.order(bitwidths)
        race = self.race(rival, counts) if rival else None
        votes: list[int] = list(known.counts["votes"]) if known else []
        block = race.block if race else self.images
        while len(votes) < self.images:
            part = self.holdout.subset(order[len(votes) : len(votes) + block])
            votes += count_votes(
                program, part, self.table, settings.smoothed.samples, self.recipe.seed, device=settings.device
            )
            values = reward_terms.smoothed_values(votes, settings.smoothed, self.recipe.sigma)
            if race and race.stops(order, values.tolist()):
                return votes
        return [vote for _, vote in sorted(zip(order, votes, strict=True))]

    def _lower(self, bitwidths: BitWidths) -> IntegerProgram:
        self.net.load_state_dict(self._state)
        self.net.set_bitwidths(bitwidths)
        if self.recipe.evaluate.mode == "finetune":
            assert self.train_set is not None
            data, settings = self.train_set, self.recipe.evaluate.training
            train(
                self.net, data.images, data.labels, settings, self.recipe.sigma, seed=self.recipe.seed,
                teacher=self.teacher,
            )  # fmt: skip
        self.net.eval()
        return lower(self.net, noise_limit=self.table.hi)

    def _settings_hash(self) -> str:
        evaluate = self.recipe.evaluate.model_dump(mode="json", exclude=NOT_IN_KEY)
        if self.recipe.evaluate.mode == "shared":
            # The shared training shows in the weights hash already.
            evaluate = {k: v for k, v in evaluate.items() if k not in {"training", "configs_per_step"}}
        for name in ("smoothed", "interval"):
            evaluate[name] = {k: v for k, v in evaluate[name].items() if k != "weight"} | {
                "on": evaluate[name]["weight"] > 0
            }
        return canonical_hash(
            {
                "evaluate": evaluate,
                "sigma": str(self.recipe.sigma),
                "model": [self.recipe.model.name, self.recipe.model.options],
                "input": [self.net.input_shape, self.net.mean.flatten().tolist(), self.net.std.flatten().tolist()],
                "quantize": self.recipe.quantize.model_dump(mode="json"),
                "holdout": [self.holdout.identity, self.holdout.ids.tolist()],
                "train": self.train_set.identity if self.train_set is not None else None,
                "seed": self.recipe.seed,
            }
        )


def smoothed_votes(counts: dict[str, Any], order: Sequence[int], images: int) -> list[int]:
    """Votes in a candidate's order of images, from a full evaluation or one that was stopped early."""
    votes: list[int] = counts["votes"]
    return votes if len(votes) < images else [votes[position] for position in order]
