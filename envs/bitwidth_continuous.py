"""`arqsearch/BitWidthContinuous-v0`: HAQ's continuous action, two steps per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from arqsearch.envs.evaluator import Evaluator
from arqsearch.envs.feasibility import nearest_bits
from arqsearch.envs.features import scaled_bits
from arqsearch.envs.layerwise import LayerwiseEnv, Observation
from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import ALL_BITS, MAX_BITS, BitWidths, LayerBits
from arqsearch.quantize.cost import Budget


class BitWidthContinuousEnv(LayerwiseEnv[NDArray[np.float32]]):
    """Assign bits with one continuous action per step: a layer's activations, then its weights.

    ## Description
    As `arqsearch/BitWidth-v0`, with HAQ's action: an episode walks the searched layers in execution order with
    two steps a layer (or group of layers that share their bits) and ends with one evaluation, within every
    budget by construction. Activation bits are
    *feasible* when the budgets can still be met with the smallest weight bits of this layer and the smallest
    choice for all open layers; weight bits likewise, given the activation bits.

    ## Action Space
    ``Box(-1, 1, (1,), float32)``. x is mapped to a = (x + 1) / 2 in [0, 1] and, for n choices, to the
    choice number min(floor(a * n), n - 1). For consecutive bits this is HAQ's
    b = round(b_min - 0.5 + a * (b_max - b_min + 1)): intervals of equal width for all bits. Infeasible bits
    become the nearest feasible ones (fewer bits on a tie).

    ## Observation Space
    ``Box(0, 1, (10 + number of budgets,), float32)``: HAQ's ten features of the current layer, then the slacks.
    Features 0 to 7 are min-max scaled over all layers (0 where all layers agree).

    | index | feature | unit | range before scaling |
    | --- | --- | --- | --- |
    | 0 | depthwise convolution | flag | 0, 1 |
    | 1 | input channels | count | >= 1 |
    | 2 | output channels | count | >= 1 |
    | 3 | stride | pixels | >= 1 |
    | 4 | kernel height | pixels | >= 1 |
    | 5 | weights | count | >= 1 |
    | 6 | input height times width | pixels | >= 1 |
    | 7 | layer index | count | 0 .. layers - 1 |
    | 8 | bits given by the previous step (8 at the start) | bits | 2 .. 8 |
    | 9 | this step sets the weights (0: the activations) | flag | 0, 1 |
    | 10.. | slack left of each budget, in the budget's order | share of the slack at the start | 0 .. 1 |

    Slack = limit minus the cost with the smallest bits for everything open.

    ## Starting State
    The activations of the first searched layer, everything open. Deterministic.

    ## Reward
    0 before the last step; there, the evaluator's reward of the assignment. Meant for discount 1.

    `info` holds ``layer`` (name), ``part`` (``"activation"`` or ``"weight"``), ``projected`` (whether the
    bits were replaced), ``requested`` and ``bits`` (the asked and the given bits). On the last step also
    ``bitwidths``, ``terms`` (raw term values), ``cost`` (every additive cost, in its own unit) and ``reward``.

    ## Episode End
    Terminates after two steps per searched layer. Never truncates.

    ## Arguments
    - ``evaluator``: scores the assignment. Default: an embedded synthetic six-layer network with a
      closed-form score (:class:`arqsearch.envs.analytic.AnalyticEvaluator`).
    - ``budget``: limits to meet at once. Default: the embedded task's own, or no limit for a given evaluator.
    - ``choices``: bits that a searched layer may take. Default: 2..8.
    - ``fixed``: ``{layer: (weight bits, activation bits)}`` of layers that are not searched. Default: none.

    ## Version History
    - v0: initial version.
    """

    id = "arqsearch/BitWidthContinuous-v0"
    steps_per_layer = 2

    def __init__(
        self,
        evaluator: Evaluator | None = None,
        budget: Budget | None = None,
        choices: Sequence[int] = ALL_BITS,
        fixed: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(evaluator, budget, choices, fixed)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._previous = MAX_BITS
        self._activation: int | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode; see :meth:`LayerwiseEnv.reset`."""
        self._previous = MAX_BITS
        self._activation = None
        return super().reset(seed=seed, options=options)

    def feasible_bits(self) -> tuple[int, ...]:
        """The feasible bits of the current step, ascending; at least the smallest choice."""
        return tuple(b for b in self.feasibility.choices if self._allocation.fits(self._layer, self._pair(b)))

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Give bits to the activations or the weights of the current layer.

        :param action: array (1,) in [-1, 1]; values outside are clipped.
        :raises ArqError: when the action is not finite or the episode is over.
        """
        self._require_running()
        layer = self._layer
        requested = self._requested_bits(action)
        bits = nearest_bits(requested, self.feasible_bits())
        part = "activation" if self._activation is None else "weight"
        self._allocation.assign(layer, self._pair(bits))
        self._activation = bits if self._activation is None else None
        self._previous = bits
        return self._advance(
            {
                "layer": self.feasibility.searched[layer].name,
                "part": part,
                "projected": bits != requested,
                "requested": requested,
                "bits": bits,
            }
        )

    def action_for(self, bitwidths: BitWidths) -> NDArray[np.float32]:
        """The action that, in the current step, gives the current layer its bits in `bitwidths`."""
        bits = bitwidths[self.feasibility.searched[self._layer].name]
        return self._centre(bits.activation if self._activation is None else bits.weight)

    def actions_of(self, bitwidths: BitWidths) -> NDArray[np.float32]:
        """The actions of a whole episode that ends with `bitwidths`, ``(steps, 1)``."""
        pairs = [bitwidths[layer.name] for layer in self.feasibility.searched]
        return np.stack([self._centre(b) for pair in pairs for b in (pair.activation, pair.weight)])

    def _centre(self, bits: int) -> NDArray[np.float32]:
        choices = self.feasibility.choices
        return np.array([(choices.index(bits) + 0.5) / len(choices) * 2 - 1], dtype=np.float32)

    def _pair(self, bits: int) -> LayerBits:
        """The pair that the current step means by `bits`, with the smallest weight bits while they are open."""
        if self._activation is None:
            return LayerBits(self.feasibility.minimum.weight, bits)
        return LayerBits(bits, self._activation)

    def _requested_bits(self, action: NDArray[np.float32]) -> int:
        value = float(np.asarray(action, dtype=np.float64).reshape(-1)[0])
        if not math.isfinite(value):
            raise ArqError(f"Action {action!r} is not finite; use a number in [-1, 1].")
        choices = self.feasibility.choices
        number = math.floor((min(max(value, -1.0), 1.0) + 1) / 2 * len(choices))
        return choices[min(number, len(choices) - 1)]

    def _dynamic_features(self) -> tuple[float, float]:
        return scaled_bits(self._previous), float(self._activation is not None)
