"""No image escapes: margins, tensor bounds and emptiness against enumeration, on random programs of all operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arqsearch.certify.linf.boxes import IntervalBounds
from arqsearch.certify.linf.domain import Domain
from arqsearch.certify.linf.linear import LinearBounds
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram
from tests.certify.linf.linear.worlds import (
    check_sound,
    corner_box,
    domain_of,
    every_image,
    random_limits,
    tensors_of,
)
from tests.integer.random_programs import random_program

SEEDS = [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 120))]


def bounders(program: IntegerProgram) -> list[LinearBounds]:
    return [
        LinearBounds(program),
        LinearBounds(program, mixed=False),
        LinearBounds(program, iterations=7, refine=40),
    ]


def with_limits(domain: Domain, program: IntegerProgram, limits: dict[int, tuple[int, int, int]]) -> Domain:
    result = {}
    for tensor, (place, lo, hi) in limits.items():
        spec = program.tensors[tensor]
        low, high = (torch.full((len(domain), int(np.prod(spec.shape))), v) for v in (spec.lo, spec.hi))
        low[:, place], high[:, place] = lo, hi
        result[tensor] = low.reshape(-1, *spec.shape), high.reshape(-1, *spec.shape)
    return Domain(domain.lo, domain.hi, domain.labels, result)


def inside(values: dict[int, np.ndarray], limits: dict[int, tuple[int, int, int]]) -> dict[int, np.ndarray]:
    keep = np.ones(len(values[0]), dtype=bool)
    for tensor, (place, lo, hi) in limits.items():
        column = values[tensor].reshape(len(keep), -1)[:, place]
        keep &= (column >= lo) & (column <= hi)
    return {tensor: value[keep] for tensor, value in values.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_enumeration(seed: int) -> None:
    program = random_program(seed)
    low, high = corner_box(program, seed, 3, 5)
    values = tensors_of(program, every_image(low, high))
    label = int(values[program.output][0].argmax())
    domain = domain_of(low, high, label)
    boxes = IntervalBounds(program).margins(low[None], high[None], [label])
    for bounder in bounders(program):
        bound = bounder.bound(domain)
        check_sound(bound, label, values, program)
        if bounder.mixed:
            assert (bound.margins >= boxes).all()
        again = bounder.bound(domain, bound)
        check_sound(again, label, values, program)
        assert (again.margins >= bound.margins).all()
        for tensor, (lo, hi) in bound.tensors.items():
            assert (again.tensors[tensor][0] >= lo).all() and (again.tensors[tensor][1] <= hi).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_split_limits(seed: int) -> None:
    program = random_program(seed)
    low, high = corner_box(program, seed, 3, 5)
    values = tensors_of(program, every_image(low, high))
    label = int(values[program.output][0].argmax())
    splits = [op.output for op in program.ops if isinstance(op, O.Requantize | O.Add | O.InputQuantize)]
    sums = [op.inputs[0] for op in program.ops if isinstance(op, O.Requantize)]
    for attempt in range(3):
        limits = random_limits(values, sorted({*splits, *sums}), seed * 10 + attempt)
        domain = with_limits(domain_of(low, high, label), program, limits)
        part = inside(values, limits)
        for bounder in bounders(program):
            known = bounder.bound(domain_of(low, high, label))
            for bound in (bounder.bound(domain), bounder.bound(domain, known)):
                check_sound(bound, label, part, program)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_points_of_wide_boxes(seed: int) -> None:
    program = random_program(seed)
    rng = np.random.default_rng(seed)
    spec = program.input
    centre = rng.integers(max(spec.lo, -100), min(spec.hi, 300), size=spec.shape, endpoint=True)
    reach = int(rng.integers(1, 40))
    low, high = (np.clip(centre + r, spec.lo, spec.hi).astype(np.int16) for r in (-reach, reach))
    images = rng.integers(low, high, size=(200, *spec.shape), endpoint=True)
    images[:60] = np.where(rng.random((60, *spec.shape)) < 0.5, low, high)
    values = tensors_of(program, images)
    label = int(values[program.output][0].argmax())
    for bounder in bounders(program):
        check_sound(bounder.bound(domain_of(low, high, label)), label, values, program)
