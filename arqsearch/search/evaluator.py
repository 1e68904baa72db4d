"""`ProgramEvaluator`: scores bit-widths on the lowered integer program, through the record."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arqsearch.certify.linf.boxes import IntervalBounds
from arqsearch.certify.noise import SEARCH, NoiseTable
from arqsearch.certify.smoothing import count_votes as count_class_votes
from arqsearch.certify.smoothing import program_classifier
from arqsearch.data import Dataset
from arqsearch.envs.evaluator import Evaluation
from arqsearch.integer.lowering import lower
from arqsearch.integer.program import IntegerProgram
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import LayerInfo
from arqsearch.quantize.network import QuantizedNet
from arqsearch.quantize.training import train
from arqsearch.recipe import Evaluate, Recipe
from arqsearch.search import terms as reward_terms
from arqsearch.search.record import Entry, Record, RecordKey, canonical_hash
from arqsearch.search.weights import state_hash

#: Noisy images in one forward pass.
BATCH = 400


def count_votes(
    program: IntegerProgram, dataset: Dataset, table: NoiseTable, samples: int, seed: int, batch: int = BATCH
) -> list[int]:
    """Samples of each image that the program gives the label, on the search stage's noise.

    :param samples: noise samples for each image, the same for every program.
    """
    votes = count_class_votes(
        program_classifier(program, table.sigma), dataset.images, dataset.ids.tolist(), table=table, seed=seed,
        stage=SEARCH, samples=samples, batch_size=batch,
    )  # fmt: skip
    unseen = max(0, int(dataset.labels.max(initial=-1)) + 1 - votes.shape[1])  # Labels that no copy was given.
    padded = np.pad(votes, ((0, 0), (0, unseen)))
    found: list[int] = padded[np.arange(len(padded)), dataset.labels].tolist()
    return found


def score_program(
    program: IntegerProgram, holdout: Dataset, settings: Evaluate, table: NoiseTable, seed: int
) -> dict[str, Any]:
    """Integer counts behind every weighted term of the reward.

    :returns: ``votes`` (true-label votes of each image), and for each ε ``robust`` (0 or 1 for each image) and
        ``margins`` (clipped worst-case margins in thousandths of a logit unit).
    """
    counts: dict[str, Any] = {}
    if settings.smoothed.weight > 0:
        part = holdout.subset(np.arange(min(settings.smoothed.images, len(holdout))))
        counts["votes"] = count_votes(program, part, table, settings.smoothed.samples, seed)
    if settings.interval.weight > 0:
        part = holdout.subset(np.arange(min(settings.interval.images, len(holdout))))
        bounds = IntervalBounds(program)
        scale, clip = float(program.metadata["logit_scale"]), settings.interval.margin_clip
        counts["robust"], counts["margins"] = {}, {}
        for epsilon in settings.interval.epsilons:
            result = bounds.verify(part.images, part.labels, epsilon)
            clipped = (result.margins.double() * scale).clamp(-clip, clip) * reward_terms.MARGIN_UNIT
            counts["robust"][str(epsilon)] = result.robust.int().tolist()
            counts["margins"][str(epsilon)] = clipped.round().to(torch.int64).tolist()
    return counts


class ProgramEvaluator:
    """Implements the `Evaluator` protocol on integer programs.

    :param net: the quantized network with its (shared or base) trained weights; owned by the evaluator.
    :param holdout: held-out training images that score candidates.
    :param recipe: the resolved recipe.
    :param record: where evaluations are kept.
    :param train_set: images and labels for the short fine-tune of ``evaluate.mode: finetune``.
    :param teacher: float network that this fine-tune distils from, where its objective does.
    """

    def __init__(
        self,
        net: QuantizedNet,
        holdout: Dataset,
        recipe: Recipe,
        record: Record,
        train_set: Dataset | None = None,
        teacher: QuantizedNet | None = None,
    ) -> None:
        self.net = net
        self.holdout = holdout
        self.recipe = recipe
        self.record = record
        self.train_set = train_set
        self.teacher = teacher
        self.table = NoiseTable.for_sigma(recipe.sigma)
        self._state: dict[str, Tensor] = {k: v.clone() for k, v in net.state_dict().items()}
        self.key = RecordKey(state_hash(net.state_dict()), self._settings_hash())
        self.computed = 0
        self._layers = net.layer_infos
        self.reference = self._terms(BitWidths.uniform(net.bitwidths.names, 8, 8))

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every conv and linear layer in execution order."""
        return self._layers

    def evaluate(self, bitwidths: BitWidths) -> Evaluation:
        """Score one assignment; taken from the record when it is there."""
        found = self._terms(bitwidths)
        return Evaluation(bitwidths, reward_terms.reward(found, self.reference, self.recipe.evaluate), found)

    def _settings_hash(self) -> str:
        evaluate = self.recipe.evaluate.model_dump(mode="json", exclude={"allow_constant_term"})
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

    def _terms(self, bitwidths: BitWidths) -> dict[str, float]:
        entry = self.record.get(self.key, bitwidths)
        if entry is None:
            entry = self._compute(bitwidths)
            self.record.put(self.key, bitwidths, entry)
        return reward_terms.terms(entry.counts, self.recipe.evaluate, self.recipe.sigma)

    def _compute(self, bitwidths: BitWidths) -> Entry:
        start = time.perf_counter()
        self.computed += 1
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
        program = lower(self.net, noise_limit=self.table.hi)
        counts = score_program(program, self.holdout, self.recipe.evaluate, self.table, self.recipe.seed)
        return Entry(program.hash, counts, time.perf_counter() - start)
