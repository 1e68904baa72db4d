"""`arqsearch/BitWidth-v0`: one layer per step, one action for its (weight, activation) bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from arqsearch.envs.evaluator import Evaluator
from arqsearch.envs.feasibility import nearest_pair
from arqsearch.envs.features import scaled_bits
from arqsearch.envs.layerwise import LayerwiseEnv, Observation
from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import ALL_BITS, MAX_BITS, BitWidths, LayerBits
from arqsearch.quantize.cost import Budget


class BitWidthEnv(LayerwiseEnv[np.int64]):
    """Assign weight and activation bits to the layers of a network, one layer per step.

    ## Description
    An episode walks the searched layers in execution order and ends with one evaluation of the whole
    assignment. Fixed layers are not stepped; they count to the cost and to the layer index. Layers that share
    their bits (`LayerInfo.tie`) are one step, at the place and with the features of the first one. Every episode
    ends within every budget, by construction: bits are *feasible* when the budgets can still be met with the
    smallest choice for all open layers, and an action that is not feasible is replaced by the nearest feasible one.

    ## Action Space
    ``Discrete(n * n)`` for n choices (49 for 2..8 bits): action ``i * n + j`` gives ``choices[i]`` bits to the
    weights and ``choices[j]`` bits to the input activations. :meth:`action_masks` tells the feasible ones.
    An infeasible action becomes the feasible pair with the smallest L1 distance in bits; on ties the
    fewest bits in sum, then the fewest weight bits.

    ## Observation Space
    ``Box(0, 1, (10 + number of budgets,), float32)``: HAQ's features of the current layer, then the slacks.
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
    | 8 | weight bits of the layer searched before (8 at the start) | bits | 2 .. 8 |
    | 9 | activation bits of that layer (8 at the start) | bits | 2 .. 8 |
    | 10.. | slack left of each budget, in the budget's order | share of the slack at the start | 0 .. 1 |

    HAQ has one previous action and a weight/activation flag in 8 and 9: with both bits in one action the flag
    would be constant. Slack = limit minus the cost with the smallest bits for all open layers.

    ## Starting State
    The first searched layer, every searched layer open. Deterministic.

    ## Reward
    0 before the last step; there, the evaluator's reward of the assignment. Meant for discount 1.

    `info` holds ``layer`` (name), ``projected`` (whether the action was replaced), ``requested`` and
    ``bits`` (the asked and the given :class:`LayerBits`). On the last step also ``bitwidths``, ``terms``
    (raw term values), ``cost`` (every additive cost, in its own unit) and ``reward``.

    ## Episode End
    Terminates after one step per searched layer. Never truncates.

    ## Arguments
    - ``evaluator``: scores the assignment. Default: an embedded synthetic six-layer network with a
      closed-form score (:class:`arqsearch.envs.analytic.AnalyticEvaluator`).
    - ``budget``: limits to meet at once. Default: the embedded task's own, or no limit for a given evaluator.
    - ``choices``: bits that a searched layer may take. Default: 2..8.
    - ``fixed``: ``{layer: (weight bits, activation bits)}`` of layers that are not searched. Default: none.

    ## Version History
    - v0: initial version.
    """

    id = "arqsearch/BitWidth-v0"
    steps_per_layer = 1

    def __init__(
        self,
        evaluator: Evaluator | None = None,
        budget: Budget | None = None,
        choices: Sequence[int] = ALL_BITS,
        fixed: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(evaluator, budget, choices, fixed)
        self.action_space = gymnasium.spaces.Discrete(len(self.feasibility.pairs))
        self._previous = LayerBits(MAX_BITS, MAX_BITS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode; see :meth:`LayerwiseEnv.reset`."""
        self._previous = LayerBits(MAX_BITS, MAX_BITS)
        return super().reset(seed=seed, options=options)

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are feasible for the current layer.

        :returns: bool array (number of actions,), True = feasible; at least one is True. All True when the
            episode is over.
        """
        if self._step_index >= self.steps_per_episode:
            return np.ones(len(self.feasibility.pairs), dtype=np.bool_)
        return np.array(self._allocation.feasible(self._layer), dtype=np.bool_)

    def action_for(self, bitwidths: BitWidths) -> np.int64:
        """The action that gives the current layer its bits in `bitwidths`."""
        name = self.feasibility.searched[self._layer].name
        return np.int64(self.feasibility.pairs.index(bitwidths[name]))

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Give bits to the current layer.

        :param action: index of the (weight, activation) pair.
        :raises ArqError: when the action is outside the space or the episode is over.
        """
        self._require_running()
        pairs, layer = self.feasibility.pairs, self._layer
        index = int(action)
        if not 0 <= index < len(pairs):
            raise ArqError(f"Action {action!r} is outside Discrete({len(pairs)}); use 0 to {len(pairs) - 1}.")
        requested = bits = pairs[index]
        if not self._allocation.fits(layer, requested):
            bits = nearest_pair(requested, [pair for pair in pairs if self._allocation.fits(layer, pair)])
        self._allocation.assign(layer, bits)
        self._previous = bits
        return self._advance(
            {
                "layer": self.feasibility.searched[layer].name,
                "projected": bits != requested,
                "requested": requested,
                "bits": bits,
            }
        )

    def _dynamic_features(self) -> tuple[float, float]:
        return scaled_bits(self._previous.weight), scaled_bits(self._previous.activation)
