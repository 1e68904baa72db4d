"""What an environment or a policy asks of whoever scores bit-widths: `Evaluator` and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import LayerInfo


@dataclass(frozen=True)
class Evaluation:
    """The score of one candidate.

    :param bitwidths: the candidate.
    :param reward: what the search maximises (unitless; 0 is the W8A8 program of the same base).
    :param terms: raw value of each term behind the reward, e.g. ``{"smoothed_radius": 0.31, "ibp@1": 0.42}``.
    """

    bitwidths: BitWidths
    reward: float
    terms: dict[str, float]


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
