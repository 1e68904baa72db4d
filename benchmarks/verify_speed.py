"""Speed of robustness verification: batched boxes on two threads, and 40 fixed instances of the public benchmark.

Behind ``arqsearch bench verify-speed``. Boxes are timed from uint8 images to verdicts. Speed does not depend on what a
network has learned, so its weights are random; every verdict of the timed call is compared with the boxes of another
implementation first.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from arqsearch.benchmarks import environment
from arqsearch.benchmarks.qnn_benchmark import Instance, images_of, load_benchmark
from arqsearch.benchmarks.results import FOLDER, this_machine
from arqsearch.certify.linf.boxes import IntervalBounds
from arqsearch.certify.linf.domain import Domain
from arqsearch.certify.linf.verdict import Limits, Verdict
from arqsearch.integer.lowering import lower
from arqsearch.integer.program import IntegerProgram
from arqsearch.models.cnn import cnn
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings

#: Told ``(task, done, total, note)``.
OnProgress: TypeAlias = Callable[[str, int, int, str], None]

RECIPE = "verify-speed"
THREADS = 2
#: Images in one timed call, rounds, and ε.
IMAGES, ROUNDS, QUICK_ROUNDS, EPSILON = 2000, 41, 15, 1
#: Images whose margins are compared with those of the tensor-by-tensor implementation.
COMPARED = 64
#: Instances by ε, and the time for each.
INSTANCES_EACH, SECONDS = 10, 2.0


def network(seed: int = 0) -> tuple[IntegerProgram, NDArray[np.uint8]]:
    """28x28x1 → conv (48, 5, stride 2) → conv (64, 3, stride 2) → dense 128 → dense 10, 8 bit, and smooth images.

    :returns: the program, and uint8 images ``(IMAGES, 28, 28, 1)``.
    """
    source = torch.Generator().manual_seed(seed)
    coarse = torch.rand((IMAGES, 1, 7, 7), generator=source) * 255
    pixels = torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bilinear").round()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cnn(10, size="qaibp_small", in_channels=1, image_size=28, batch_norm=False)
    net = QuantizedNet(model.eval(), (1, 28, 28), (0.286,), (0.5,), QuantizeSettings(input_mode="clip"))
    net.calibrate([pixels[:64]])
    images = np.ascontiguousarray(pixels.permute(0, 2, 3, 1).to(torch.uint8).numpy())
    return lower(net.eval()), images


def boxes(rounds: int, on_progress: OnProgress) -> dict[str, Any]:
    """Images per second of boxes on two threads: median, least and greatest of the rounds.

    ``images_per_cpu_second_x2`` is twice the images for each second of processor time: what two cores give that do
    nothing else.

    :raises RuntimeError: when a margin differs from that of the other implementation.
    """
    torch.set_num_threads(THREADS)
    program, images = network()
    labels = program.run(images).argmax(1)
    bounds = IntervalBounds(program)
    compare(bounds, images[:COMPARED], labels[:COMPARED])
    bounds.verify(images, labels, EPSILON)
    walls, cpus = [], []
    for turn in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        bounds.verify(images, labels, EPSILON)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        on_progress("boxes", turn + 1, rounds, f"{IMAGES / walls[-1]:,.0f} images/s")
    return {
        "images_per_second_boxes": round(IMAGES / median(walls)),
        "images_per_second_boxes_least": round(IMAGES / max(walls)),
        "images_per_second_boxes_greatest": round(IMAGES / min(walls)),
        "images_per_cpu_second_x2": round(THREADS * IMAGES / median(cpus)),
        "threads": THREADS, "epsilon": EPSILON, "images": IMAGES, "rounds": rounds,
    }  # fmt: skip


def compare(bounds: IntervalBounds, images: NDArray[np.uint8], labels: torch.Tensor) -> None:
    """Margins of the fast path against those computed tensor by tensor.

    :raises RuntimeError: when one differs.
    """
    domain = Domain.around(images, labels.numpy(), EPSILON)
    if not torch.equal(bounds.margins(domain.lo, domain.hi, labels), bounds.bound(domain).margins):
        raise RuntimeError("The two implementations of boxes give different margins.")


def chosen(instances: Sequence[Instance], each: int = INSTANCES_EACH) -> list[Instance]:
    """The same instances always: evenly spaced ones of each ε that QVIP decided."""
    found: list[Instance] = []
    for epsilon in sorted({instance.epsilon for instance in instances}):
        here = [i for i in instances if i.epsilon == epsilon and i.known != "NA"]
        found += here[:: max(1, len(here) // each)][:each]
    return found


def instances(seconds: float, on_progress: OnProgress) -> dict[str, Any]:
    """Complete verification of the fixed instances, on one thread: how many stay open, and which contradict QVIP."""
    from arqsearch.certify.linf.verifier import CompleteVerifier

    torch.set_num_threads(1)
    program, everything = load_benchmark()
    asked = chosen(everything)
    images, labels = images_of(asked)
    verifier = CompleteVerifier(program, Limits(seconds))
    verdicts: list[Verdict] = []
    for number, (instance, image, label) in enumerate(zip(asked, images, labels.tolist(), strict=True), 1):
        verdicts.append(verifier.verify(image, label, instance.epsilon))
        on_progress("instances", number, len(asked), f"{sum(v.status == 'unknown' for v in verdicts)} open")
    expected = {"Robust": "robust", "Non-robust": "non-robust"}
    return {
        f"open_of_{len(asked)}": sum(verdict.status == "unknown" for verdict in verdicts),
        "conflicts": sum(
            verdict.status not in ("unknown", expected[instance.known])
            for verdict, instance in zip(verdicts, asked, strict=True)
        ),
        "seconds_each": seconds,
        "mean_seconds": round(sum(verdict.seconds for verdict in verdicts) / len(asked), 3),
    }  # fmt: skip


def measure(quick: bool, on_progress: OnProgress) -> dict[str, Any]:
    """Both measurements and the machine.

    :param quick: fewer rounds.
    """
    found = boxes(QUICK_ROUNDS if quick else ROUNDS, on_progress) | instances(SECONDS, on_progress)
    return found | {"hardware": this_machine(), "cpu": environment.processor(), "versions": environment.versions()}


def csv_path(output: Path, hardware: str) -> Path:
    """The file itself, or its place in a folder."""
    return output if output.suffix == ".csv" else output / f"{RECIPE}-{hardware}.csv"


def write(outcome: dict[str, Any], output: Path | None = None) -> Path:
    """One row with everything that was measured."""
    path = csv_path(output or Path(FOLDER), outcome["hardware"])
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"recipe": RECIPE} | outcome
    row["versions"] = " ".join(f"{name}={version}" for name, version in outcome["versions"].items())
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        table.writeheader()
        table.writerow(row)
    return path
