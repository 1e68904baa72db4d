"""Box estimates during training: how much of the held-out set interval bounds would prove, so far.

The bounds are those of the network in training (float or fake-quantized), so every figure is an estimate; the verdicts
that count are taken on the lowered integer program.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.intervals import bounded_forward
from arqsearch.quantize.network import QuantizedNet
from arqsearch.quantize.small_boxes import statistics_kept
from arqsearch.recipe import Monitor

BATCH = 250


class BoundsMonitor:
    """Writes one CSV row every so many epochs: step, epoch, running loss, clean accuracy, box estimate at each ε.

    :param settings: how often, on how many images, at which ε.
    :param images: uint8 ``(N, H, W, C)``, held out; the first ones are used.
    :param labels: ``(N,)``.
    :param path: the CSV file.
    :param bitwidths: assignment that is estimated; None = the network's current one.
    """

    def __init__(
        self, settings: Monitor, images: np.ndarray, labels: np.ndarray, path: Path, bitwidths: BitWidths | None = None
    ) -> None:
        self.settings, self.path, self.bitwidths = settings, path, bitwidths
        pixels = np.ascontiguousarray(images[: settings.images])
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        self.labels = torch.from_numpy(labels[: settings.images])
        self.columns = ["step", "epoch", "loss", "accuracy", *(f"box_estimate@{e}" for e in settings.epsilons)]
        #: The latest row in words, for progress lines.
        self.summary = ""

    def due(self, step: int, total: int, steps_per_epoch: int) -> bool:
        """Whether a row belongs after this many steps; the last step always has one."""
        if self.settings.every == 0:
            return False
        return step == total or step % max(1, round(self.settings.every * steps_per_epoch)) == 0

    def resume(self, step: int) -> None:
        """Forget the rows after a checkpoint: the steps behind them are run again."""
        rows = [row for row in self._rows() if int(row["step"]) <= step]
        if rows or self.path.is_file():
            self._write(rows)

    def record(self, net: QuantizedNet, step: int, epoch: float, loss: float) -> None:
        """Estimate, and add the row; the network is left as it was."""
        shares = self.estimate(net)
        values = [str(step), f"{epoch:.3f}", f"{loss:.4f}", *(f"{share:.4f}" for share in shares)]
        self._write([*self._rows(), dict(zip(self.columns, values, strict=True))])
        named = zip(self.settings.epsilons, shares[1:], strict=True)
        boxes = ", ".join(f"{100 * share:.1f} at ε={epsilon}" for epsilon, share in named)
        self.summary = f"; held-out accuracy {100 * shares[0]:.1f} %, box estimate {boxes}"

    @torch.no_grad()
    def estimate(self, net: QuantizedNet) -> list[float]:
        """Clean accuracy, then the share of images whose bounds show the label to win, at each ε."""
        device, before = next(net.parameters()).device, net.bitwidths
        good = [0] * (1 + len(self.settings.epsilons))
        if self.bitwidths is not None:
            net.set_bitwidths(self.bitwidths)
        with statistics_kept(net):
            for pixels, labels in zip(torch.split(self.pixels, BATCH), torch.split(self.labels, BATCH), strict=True):
                x, y = pixels.to(device).contiguous(memory_format=torch.channels_last), labels.to(device)
                for index, epsilon in enumerate(self.settings.epsilons, start=1):
                    low, high = (x - epsilon).clamp(0, 255), (x + epsilon).clamp(0, 255)
                    good[index] += _wins(bounded_forward(net, low, high, y).margins, y)
                good[0] += int((net(x).argmax(1) == y).sum())
        net.set_bitwidths(before)
        return [count / len(self.labels) for count in good]

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)


def _wins(margins: Tensor, labels: Tensor) -> int:
    others = margins.scatter(1, labels[:, None], float("inf"))
    return int((others.min(1).values > 0).sum())
