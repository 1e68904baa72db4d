"""Worker of `test_bound_objectives`: a monitored training that kills itself; ``train_killed.py FOLDER``."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from arqsearch.quantize.monitor import BoundsMonitor
from arqsearch.quantize.training import train
from tests.quantize.test_bound_objectives import IMAGES, LABELS, MONITORED, network


def main(folder: Path) -> None:
    """Checkpoint every step, keep the one of step 7 as `early`, and SIGKILL this process at step 10."""

    def on_step(done: int, total: int, loss: float) -> None:
        if done == 8:
            shutil.copy(folder / "checkpoint", folder / "early")
        if done == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    monitor = BoundsMonitor(MONITORED.monitor, IMAGES, LABELS, folder / "bounds.csv")
    train(
        network(), IMAGES, LABELS, MONITORED, 0.1, checkpoint=folder / "checkpoint", checkpoint_seconds=0.0,
        on_step=on_step, monitor=monitor,
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
