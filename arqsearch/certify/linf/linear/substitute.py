"""From linear forms over any tensor down to the pixels, and their minimum over the box of pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arqsearch.certify.linf.linear.maximum import WindowLines
from arqsearch.certify.linf.linear.propagate import Layers, Network, alike
from arqsearch.certify.linf.linear.rounding import gamma
from arqsearch.certify.linf.linear.rules import Form, Multipliers, Slopes, inner, magnitude, total
from arqsearch.certify.linf.linear.staircase import Lines

#: The chosen lines of one operation for the rows at hand, and its Lagrangian terms.
Choice = Callable[[int], tuple[Any, Multipliers | None]]


@dataclass
class Minimum:
    """Lower bounds of R forms.

    :param lower: ``(R,)``, as computed.
    :param error: ``(R,)`` bound on the rounding in `lower`, or None where it was not followed.
    :param coefficients: by operation index, coefficients of its output on the way down, where they were asked for.
    """

    lower: Tensor
    error: Tensor | None
    coefficients: dict[int, Tensor] = field(default_factory=dict)


def joined(parts: list[Minimum]) -> Minimum:
    """The rows of several in one."""
    if len(parts) == 1:
        return parts[0]
    errors = [part.error for part in parts if part.error is not None]
    kept = {i: torch.cat([part.coefficients[i] for part in parts]) for i in parts[0].coefficients}
    return Minimum(torch.cat([part.lower for part in parts]), torch.cat(errors) if errors else None, kept)


def substitute(
    network: Network, form: Form, start: int, choose: Choice, pixels: tuple[Tensor, Tensor], keep: bool = False
) -> Minimum:
    """Substitute operations ``start-1 .. 0`` and minimise over the pixels.

    :param form: over tensors written before operation `start`; used up.
    :param choose: lines and Lagrangian terms for a non-linear operation.
    :param pixels: centre and radius of the box, ``(R, C, H, W)``.
    :param keep: give back the coefficients of the outputs of non-linear operations.
    """
    kept = {}
    for index in range(start - 1, -1, -1):
        op, rule = network.program.ops[index], network.rules[index]
        coefficient = form.coefficients.pop(op.output, None)
        if coefficient is None:
            continue
        if rule.nonlinear:
            chosen, extra = choose(index)
            if keep:
                kept[index] = coefficient.detach()
            rule.back(form, coefficient, chosen, extra)
        else:
            rule.back(form, coefficient, None, None)
    bottom = form.coefficients.get(0)
    if bottom is not None:
        size = bottom.abs()
        form.add(inner(bottom, pixels[0]) - inner(size, pixels[1]))
        if form.error is not None:
            terms = gamma(2 * int(np.prod(bottom.shape[1:])))
            form.charge(total(size) * (magnitude(network.program, 0) * terms))
    return Minimum(form.constant, form.error, kept)


def box_of(layers: Layers, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and radius of the pixels' box for each row, or one for all rows; halves of integers, exact."""
    low, high = layers.tensors[0]
    if (alike(low) and alike(high)) or alone(owner):
        low, high = low[owner[:1]], high[owner[:1]]
        return (low + high) / 2, (high - low) / 2
    return ((low + high) / 2)[owner], ((high - low) / 2)[owner]


def starting_slopes(lines: Lines) -> Slopes:
    """The lines that are closest in the middle of each interval, for N domains."""
    start = lines.start[:, None]
    slope, height = (torch.gather(x, 1, start)[:, 0] for x in (lines.slopes, lines.heights))
    return Slopes.between((slope[0], slope[1]), (height[0], height[1]), lines.mass)


def spread(chosen: Slopes | WindowLines, owner: Tensor) -> Slopes | WindowLines:
    """From domains to rows; a single one serves all rows of one domain."""
    if alone(owner):
        owner = owner[:1]
    if isinstance(chosen, WindowLines):
        return chosen[owner]
    mass = None if chosen.mass is None else chosen.mass[owner]
    slope, height = (chosen.slope[owner], chosen.slope_half[owner]), (chosen.height[owner], chosen.height_half[owner])
    return Slopes(*slope, *height, mass)


def alone(owner: Tensor) -> bool:
    """Whether all rows belong to one domain."""
    return bool((owner == owner[0]).all())
