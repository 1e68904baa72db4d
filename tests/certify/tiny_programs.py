"""Integer programs of one to three pixels whose classes meet near a given grey level."""

from __future__ import annotations

import itertools

import numpy as np

from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from tests.integer.random_programs import Builder, activation_range, requantize, weights

#: One to three pixels as rows, columns and channels.
SHAPES = ((1, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 1), (1, 1, 3), (1, 3, 1))


def tiny_program(seed: int, shape: tuple[int, int, int], centre: int, limit: int, reach: int) -> IntegerProgram:
    """A random program, quantizer, hidden layer, requantization and logits, that has structure within `reach`.

    :param centre: grey level that the classes meet at.
    :param limit: largest absolute noise.
    """
    rng = np.random.default_rng((seed, *shape))
    builder = Builder(rng, TensorSpec(shape, -limit, 255 + limit))
    shift = builder.integer(0, 12)
    slope = rng.uniform(0.6, 5.0, size=shape[2])  # Codes for each grey level.
    multiplier = np.maximum(np.round(slope * 2**shift), 1).astype(np.int64)
    offset = -centre * multiplier + rng.integers(-3, 4, shape[2])
    lo, hi = activation_range(builder, builder.integer(4, 8))
    offset += (lo + hi + 1) // 2 << shift
    pre = (0, 255) if rng.random() < 0.5 else (-limit, 255 + limit)
    assert builder.append(
        O.InputQuantize((0,), 1, multiplier, offset, shift, O.ROUNDINGS[builder.integer(0, 2)], *pre, lo, hi)
    )
    hidden = builder.integer(3, 8)
    kernel = (builder.integer(1, shape[0]), builder.integer(1, shape[1]))
    weight = weights(rng, (hidden, *kernel, shape[2]), builder.integer(3, 8))
    bias = rng.integers(-200, 201, hidden).astype(np.int32)
    assert builder.append(O.Conv2d((1,), 2, weight, bias, (1, 1), (0, 0, 0, 0), 1))
    requantize(builder, builder.last, *activation_range(builder, builder.integer(3, 8)))
    builder.append(O.Flatten((builder.last,), builder.last + 1))
    features = builder.specs[builder.last].shape[0]
    classes = builder.integer(2, 4)
    last = weights(rng, (classes, features), builder.integer(4, 8))
    source = builder.last
    level = np.full(classes, 0, dtype=np.int32)
    body = IntegerProgram(tuple(builder.ops), tuple(builder.specs), source)
    near = np.array(list(itertools.product(range(centre - reach, centre + reach + 1, 2), repeat=int(np.prod(shape)))))
    values = body.run(near.reshape(-1, *shape).astype(np.int16), backend="torch").numpy().astype(np.int64) @ last.T
    level -= np.median(values, axis=0).astype(np.int32)
    assert builder.append(O.Linear((source,), source + 1, last, level))
    return builder.program()


def half_space(normal: tuple[int, ...], threshold: int, limit: int) -> IntegerProgram:
    """Class 1 where ⟨normal, x⟩ ≥ threshold, else 0: the worst case of every smoothing bound."""
    spec = TensorSpec((1, 1, len(normal)), -limit, 255 + limit)
    builder = Builder(np.random.default_rng(0), spec)
    assert builder.append(O.Flatten((0,), 1), widen=False)
    weight = np.array([[0] * len(normal), normal], dtype=np.int16)
    # The first maximum wins, so class 1 needs a logit of 1 and more.
    assert builder.append(O.Linear((1,), 2, weight, np.array([0, 1 - threshold], dtype=np.int32)), widen=False)
    return builder.program()
