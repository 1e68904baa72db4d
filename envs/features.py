"""The observation: HAQ's ten features of a layer, each min-max scaled over the network's layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from arqsearch.quantize.bitwidths import MAX_BITS, MIN_BITS
from arqsearch.quantize.cost import LayerInfo

#: Features that depend on the layer alone.
STATIC_FEATURES: tuple[str, ...] = (
    "depthwise",
    "c_in",
    "c_out",
    "stride",
    "kernel",
    "weights",
    "in_h*in_w",
    "layer index",
)


def static_features(layers: Sequence[LayerInfo]) -> NDArray[np.float32]:
    """Features of every layer, scaled to [0, 1] over the layers; a feature that is the same for all is 0.

    Source: HAQ (Wang et al., CVPR 2019), section 3.1.

    :param layers: all layers in execution order, fixed ones included.
    :returns: array (layers, 8), columns as in :data:`STATIC_FEATURES`.
    """
    raw = np.array(
        [
            [
                layer.depthwise,
                layer.c_in,
                layer.c_out,
                layer.stride,
                layer.kernel,
                layer.weights,
                layer.in_hw[0] * layer.in_hw[1],
                index,
            ]
            for index, layer in enumerate(layers)
        ],
        dtype=np.float64,
    )
    low, span = raw.min(axis=0), np.ptp(raw, axis=0)
    scaled: NDArray[np.float32] = ((raw - low) / np.where(span > 0, span, 1.0)).astype(np.float32)
    return scaled


def scaled_bits(bits: int) -> float:
    """Bits 2..8 as 0..1."""
    return (bits - MIN_BITS) / (MAX_BITS - MIN_BITS)
