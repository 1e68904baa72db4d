"""Cost models of a bit-width assignment, budgets over them, and which layers are frozen or share their bits.

`layers` has the facts of a layer and the cost models, `budget` the limits, `constraints` resolves names and globs.
"""

from __future__ import annotations

from arqsearch.quantize.cost.budget import Budget, format_cost, parse_limit
from arqsearch.quantize.cost.constraints import Constraints, residual_ties
from arqsearch.quantize.cost.layers import (
    BYTES_PER_CHANNEL,
    COSTS,
    FP32_BOPS_PER_MAC,
    LayerInfo,
    known_costs,
    layer_bops,
    layer_weight_bytes,
    reference_cost,
    total_cost,
)

__all__ = [
    "BYTES_PER_CHANNEL",
    "COSTS",
    "FP32_BOPS_PER_MAC",
    "Budget",
    "Constraints",
    "LayerInfo",
    "format_cost",
    "known_costs",
    "layer_bops",
    "layer_weight_bytes",
    "parse_limit",
    "reference_cost",
    "residual_ties",
    "total_cost",
]
