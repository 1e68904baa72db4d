"""`ProgramEvaluator`: scores bit-widths on the lowered integer program, through the record, by one worker or many."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from arqsearch.envs.evaluator import Evaluation
from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import LayerInfo
from arqsearch.recipe import Recipe
from arqsearch.search import terms as reward_terms
from arqsearch.search.claims import LOOK_SECONDS, Claims
from arqsearch.search.executor import Executor, LocalExecutor, OnProgress, Task, gpus_for
from arqsearch.search.record import PARTIAL, Entry, Record, RecordKey, canonical_hash
from arqsearch.search.scorer import Rival, Scorer, smoothed_votes

#: Scorers that this process has opened, the latest last; a worker needs one, rarely a second.
_OPENED: dict[RecordKey, Scorer] = {}
OPENED_AT_MOST = 2


def score_candidate(
    key: RecordKey, reopen: Callable[[], Scorer], bitwidths: BitWidths, rival: Rival | None, known: Entry | None,
    on_progress: OnProgress,
) -> Entry:  # fmt: skip
    """Task of a worker: compute one evaluation. The process opens its scorer once.

    :param key: what the caller's evaluations depend on.
    :raises ArqError: when this machine's weights, data or settings are not the caller's.
    """
    if key not in _OPENED:
        scorer = reopen()
        if scorer.key != key:
            what = "weights" if scorer.key.weights_hash != key.weights_hash else "data or settings"
            raise ArqError(
                f"A worker sees other {what} than the process that started it. Every machine needs the same run "
                "folder (a shared file system) and the same data sets under $ARQSEARCH_DATA."
            )
        _remember(scorer)
    return _OPENED[key].compute(bitwidths, rival, known)


def evaluation_gpus(recipe: Recipe) -> float:
    """GPUs that the computation of an evaluation needs."""
    section = recipe.evaluate
    return max(gpus_for(section.device), gpus_for(section.training.device) if section.mode == "finetune" else 0.0)


def _remember(scorer: Scorer) -> None:
    _OPENED.pop(scorer.key, None)
    _OPENED[scorer.key] = scorer
    while len(_OPENED) > OPENED_AT_MOST:
        del _OPENED[next(iter(_OPENED))]


def _silent(task: str, done: int, total: int, note: str) -> None:
    """Progress that nobody asked for."""


class ProgramEvaluator:
    """Implements the `Evaluator` and `BatchEvaluator` protocols on integer programs.

    With ``evaluate.early_stop`` a candidate is raced against the best candidate before its generation and may be
    stopped (:mod:`arqsearch.search.race`): its terms are then the incumbent's plus the mean difference on the images
    seen, always below the incumbent's reward. Generations are of a fixed size, so that no answer depends on workers.

    :param scorer: computes evaluations; owned by the evaluator.
    :param record: where evaluations are kept.
    :param executor: computes the candidates of a generation; default: this process.
    :param reopen: picklable function that opens the same :class:`Scorer` in another process; None: only this process.
    :param racing: False scores every candidate in full, whatever the recipe says.
    :param on_progress: told how many candidates of a generation are computed.
    """

    def __init__(
        self,
        scorer: Scorer,
        record: Record,
        *,
        executor: Executor | None = None,
        reopen: Callable[[], Scorer] | None = None,
        racing: bool = True,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.scorer, self.record = scorer, record
        self.net, self.recipe, self.key = scorer.net, scorer.recipe, scorer.key
        self.computed = 0
        self._executor = executor if executor is not None and reopen is not None else LocalExecutor(1)
        self._reopen = reopen
        self._racing = racing and self.recipe.evaluate.early_stop.delta > 0
        self._on_progress = on_progress or _silent
        self._claims = Claims(record)
        self._layers = self.net.layer_infos
        self._found: dict[BitWidths, Evaluation] = {}
        self._best = -float("inf")
        self._rival: Rival | None = None
        uniform = BitWidths.uniform(self.net.bitwidths.names, 8, 8)
        #: Terms of the W8A8 program.
        self.reference = self._terms(self._obtain([uniform], None)[uniform])

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every conv and linear layer in execution order."""
        return self._layers

    def evaluate(self, bitwidths: BitWidths) -> Evaluation:
        """Score one assignment, a generation of its own; taken from the record when it is there."""
        return self.evaluate_many([bitwidths])[0]

    def evaluate_many(self, candidates: Sequence[BitWidths]) -> list[Evaluation]:
        """Score assignments, in generations of ``evaluate.early_stop.generation`` where candidates are raced.

        :returns: one evaluation for each, in order; repeated bit-widths get the same one.
        """
        size = self.recipe.evaluate.early_stop.generation if self._racing else max(1, len(candidates))
        for start in range(0, len(candidates), size):
            self._score_generation(candidates[start : start + size])
        return [self._found[bitwidths] for bitwidths in candidates]

    def _score_generation(self, candidates: Sequence[BitWidths]) -> None:
        fresh = [bitwidths for bitwidths in dict.fromkeys(candidates) if bitwidths not in self._found]
        rival, entries = self._rival, self._obtain(fresh, self._rival)
        for bitwidths in fresh:
            entry = entries[bitwidths]
            stopped = self._images(entry)
            found = self._terms(entry) if stopped is None else self._estimate(bitwidths, entry, rival)
            reward = reward_terms.reward(found, self.reference, self.recipe.evaluate)
            self._found[bitwidths] = Evaluation(bitwidths, reward, found, stopped)
            if self._racing and stopped is None and reward > self._best:
                rules = self.recipe.evaluate.early_stop
                self._best, self._rival = reward, Rival(tuple(entry.counts["votes"]), found, rules)

    def _images(self, entry: Entry) -> int | None:
        """After how many images an evaluation was stopped; None for a full one."""
        votes = entry.counts.get("votes")
        return None if votes is None or len(votes) == self.scorer.images else len(votes)

    def _terms(self, entry: Entry) -> dict[str, float]:
        return reward_terms.terms(entry.counts, self.recipe.evaluate, self.recipe.sigma)

    def _estimate(self, bitwidths: BitWidths, entry: Entry, rival: Rival | None) -> dict[str, float]:
        """Terms of a stopped candidate: the smoothed one by the paired difference on the images seen."""
        assert rival is not None
        settings, sigma = self.recipe.evaluate, self.recipe.sigma
        seen = self.scorer.order(bitwidths)[: len(entry.counts["votes"])]
        own = reward_terms.smoothed_values(entry.counts["votes"], settings.smoothed, sigma)
        other = reward_terms.smoothed_values(rival.votes, settings.smoothed, sigma)[seen]
        name = reward_terms.smoothed_name(settings.smoothed)
        smoothed = {name: rival.terms[name] + float((own - other).mean())}
        return smoothed | reward_terms.terms(entry.counts, settings, sigma, skip_smoothed=True)

    def _look_up(self, bitwidths: BitWidths, rival: Rival | None) -> tuple[Entry | None, Entry | None]:
        """The recorded evaluation that decides, and a partial one to go on from.

        What the record holds beyond the point where the candidate is stopped is not used: an answer must not depend on
        what other searches have left there.
        """
        full = self.record.get(self.key, bitwidths)
        if rival is None:
            return full, None if full is not None or not self._racing else self.record.get_partial(self.key, bitwidths)
        entry = full or self.record.get_partial(self.key, bitwidths)
        if entry is None:
            return None, None
        order = self.scorer.order(bitwidths)
        votes = smoothed_votes(entry.counts, order, self.scorer.images)
        values = reward_terms.smoothed_values(votes, self.recipe.evaluate.smoothed, self.recipe.sigma)
        images = self.scorer.race(rival, entry.counts).stops(order, values.tolist())
        if images is not None:
            return Entry(entry.program_hash, entry.counts | {"votes": votes[:images]}, entry.seconds), None
        return full, entry

    def _obtain(self, candidates: Sequence[BitWidths], rival: Rival | None) -> dict[BitWidths, Entry]:
        """The evaluations of different candidates: from the record, else computed, by whoever claims them first."""
        found: dict[BitWidths, Entry] = {}
        try:
            while len(found) < len(candidates):
                mine: dict[BitWidths, Entry | None] = {}
                for bitwidths in candidates:
                    if bitwidths in found:
                        continue
                    entry, known = self._look_up(bitwidths, rival)
                    if entry is None and self._claims.acquire(self.key, bitwidths):
                        # The claim may have come free because the evaluation is there now.
                        entry, known = self._look_up(bitwidths, rival)
                        if entry is None:
                            mine[bitwidths] = known
                            continue
                        self._claims.release(self.key, bitwidths)
                    if entry is not None:
                        found[bitwidths] = entry
                if mine:
                    self._compute(mine, rival, found)
                elif len(found) < len(candidates):
                    time.sleep(LOOK_SECONDS)  # Another process computes the rest.
        finally:
            self._claims.release_all()
        return found

    def _compute(self, work: dict[BitWidths, Entry | None], rival: Rival | None, found: dict[BitWidths, Entry]) -> None:
        """Compute claimed evaluations and put each into the record as soon as it is there."""
        names = {f"evaluate {canonical_hash(bitwidths.to_json())[:16]}": bitwidths for bitwidths in work}

        def keep(name: str, entry: Any) -> None:
            bitwidths, images = names[name], self._images(entry)
            key = self.key if images is None else RecordKey(*self.key.hashes, stage=f"{PARTIAL}{images}")
            self.record.put(key, bitwidths, entry)
            self._claims.release(self.key, bitwidths)
            found[bitwidths] = entry
            self.computed += 1
            done[0] += 1
            if len(names) > 1:
                self._on_progress("candidates of this generation", done[0], len(names), "")

        done = [0]
        _remember(self.scorer)
        gpus = evaluation_gpus(self.recipe)
        tasks = [
            Task(name, score_candidate, (self.key, self._reopen, bitwidths, rival, work[bitwidths]), gpus)
            for name, bitwidths in names.items()
        ]
        # A single candidate is not worth the way to a worker.
        executor = self._executor if len(tasks) > 1 else LocalExecutor(1)
        executor.map(tasks, _silent, keep)
