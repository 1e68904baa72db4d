"""What an environment or a policy asks of whoever scores bit-widths: `Evaluator` and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import LayerInfo


@dataclass(frozen=True)
class Evaluation:
    """The score of one candidate.

    :param bitwidths: the candidate.
    :param reward: what the search maximises (unitless; 0 is the W8A8 program of the same base).
    :param terms: raw value of each term behind the reward, e.g. ``{"smoothed_radius": 0.31, "ibp@1": 0.42}``.
    :param stopped: images after which it was stopped early, so that the score is an estimate from those; None: it was
        scored in full.
    """

    bitwidths: BitWidths
    reward: float
    terms: dict[str, float]
    stopped: int | None = None


class Evaluator(Protocol):
    """A pure function from bit-widths to an :class:`Evaluation`, and the layers it is defined on."""

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every conv and linear layer in execution order."""
        ...

    def evaluate(self, bitwidths: BitWidths) -> Evaluation:
        """Score one candidate; equal bit-widths give equal scores.

        :param bitwidths: bits of every layer of :attr:`layers`, in that order.
        """
        ...


@runtime_checkable
class BatchEvaluator(Evaluator, Protocol):
    """An evaluator that can score several candidates at once, for example in several processes."""

    def evaluate_many(self, candidates: Sequence[BitWidths]) -> list[Evaluation]:
        """Score candidates: the same answers, in the same order, as :meth:`evaluate` gives one by one.

        :param candidates: any number of them, repetitions included.
        """
        ...
