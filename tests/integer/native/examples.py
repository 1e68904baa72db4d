"""Programs that several tests compile: random ones with their logits, and lowered networks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from arqsearch import models
from arqsearch.integer.lowering import lower
from arqsearch.integer.program import IntegerProgram
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from tests.integer.interpreter import interpret
from tests.integer.random_programs import random_pixels, random_program
from tests.quantize.nets import NETS, build


@lru_cache
def example(seed: int) -> tuple[IntegerProgram, np.ndarray[Any, Any], list[list[int]]]:
    """A random program, images and the interpreter's logits."""
    program = random_program(seed)
    pixels = random_pixels(program, seed)
    return program, pixels, interpret(program, pixels)


@lru_cache
def lowered(name: str, bits: tuple[int, int], **settings: Any) -> tuple[IntegerProgram, np.ndarray[Any, Any]]:
    """A calibrated network with random weights, and images."""
    kinds = {kind.__name__: kind for kind in NETS}
    shape, mean, std = (2, 8, 8), (0.4, 0.55), (0.25, 0.3)
    if name in kinds:
        model = build(kinds[name])
    else:
        torch.manual_seed(0)
        model, shape = models.build(name, 10).eval(), (3, 32, 32)
        mean, std = (0.5, 0.45, 0.4), (0.25, 0.25, 0.3)
    net = QuantizedNet(model, shape, mean, std, QuantizeSettings(**settings)).eval()
    pixels = torch.randint(0, 256, (4, *shape), generator=torch.Generator().manual_seed(1))
    net.calibrate([pixels.float()])
    net.set_bitwidths(BitWidths.uniform(net.bitwidths.names, *bits))
    return lower(net, noise_limit=30), pixels.permute(0, 2, 3, 1).numpy().astype(np.int16)
