"""Run by `torchrun` from the test of several processes: PREFIX STOP [quantized]; writes each rank's weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from arqsearch.quantize.ranks import Ranks
from arqsearch.quantize.training import train
from tests.quantize.test_training import IMAGES, LABELS, SETTINGS, network


def main(prefix: str, stop: int, quantized: bool) -> None:
    torch.set_num_threads(1)
    net = network()
    net.quantized = quantized

    def on_step(done: int, total: int, loss: float) -> None:
        if stop and done == stop:
            raise SystemExit(3)

    train(
        net, IMAGES, LABELS, SETTINGS, 0.1, seed=3, checkpoint=Path(f"{prefix}.checkpoint"), checkpoint_seconds=0.0,
        on_step=on_step,
    )  # fmt: skip
    torch.save(net.state_dict(), f"{prefix}.rank{Ranks.current().rank}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["quantized"])
