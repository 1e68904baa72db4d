"""A public benchmark of complete verification with known verdicts: an integer network for MNIST, 400 instances.

Network, images and radii are those of Henzinger, Lechner and Žikelić, "Scalable Verification of Quantized Neural
Networks" (AAAI 2021): a 6-bit MLP 784-64-32 on raw pixels. The verdicts and seconds to compare with are those of QVIP
(Zhang et al., "QVIP: An ILP-based Formal Verification Approach for Quantized Neural Networks", ASE 2022). Behind
``arqsearch bench verify-mnist``.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np

from arqsearch.data import Dataset, data_root, load
from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import infer, prove

NETWORK, VERDICTS = "henzinger2021_mnist_int6.npz", "henzinger2021_mnist_verdicts.csv"
#: Fractional bits: of the first layer's sums (7 of the weights, 2 of the codes' scale), and of the second's.
HIDDEN_SHIFT, OUTPUT_SHIFT = 9, 5
#: Ranges of the 6-bit codes: unsigned after the first layer, signed logits.
HIDDEN_RANGE, OUTPUT_RANGE = (0, 63), (-32, 31)

#: What QVIP found; NA stands for an image that is misclassified.
Known: TypeAlias = Literal["Robust", "Non-robust", "NA"]


@dataclass(frozen=True)
class Instance:
    """One question of the benchmark.

    :param image: index in the MNIST test set.
    :param epsilon: L∞ radius in grey levels.
    :param known: QVIP's verdict.
    :param known_seconds: QVIP's time (Gurobi, another machine); None for NA.
    """

    image: int
    epsilon: int
    known: Known
    known_seconds: float | None


def load_benchmark(folder: str | Path | None = None) -> tuple[IntegerProgram, tuple[Instance, ...]]:
    """The network as an integer program, and the 400 instances by ε and image.

    :param folder: where network and verdicts lie; default: ``data/verification`` below the data root.
    :raises ArqError: when a file is missing or is not what it should be.
    """
    place = Path(folder) if folder is not None else data_root() / "data" / "verification"
    return load_network(_existing(place / NETWORK)), load_instances(_existing(place / VERDICTS))


def load_network(path: str | Path) -> IntegerProgram:
    """Read ``W1, b1, W2, b2`` (integers, ``(inputs, outputs)`` and ``(outputs,)``) into an integer program.

    ``hidden = clip((x W1 + (b1 << 9) + 256) >> 9, 0, 63)``, ``logits = clip((hidden W2 + (b2 << 5) + 16) >> 5, -32,
    31)``: the logits are rounded and clipped, so they tie often, and the first maximum is the class.

    :raises ArqError: when an array is missing or shapes do not fit 28x28 images.
    """
    with np.load(path) as arrays:
        absent = sorted({"W1", "b1", "W2", "b2"} - set(arrays.files))
        if absent:
            raise ArqError(f"{path} has no array {absent[0]!r}; expected W1, b1, W2 and b2.")
        w1, b1, w2, b2 = (arrays[name].astype(np.int32) for name in ("W1", "b1", "W2", "b2"))
    if w1.ndim != 2 or w1.shape != (784, b1.size) or w2.shape != (b1.size, b2.size):
        raise ArqError(
            f"{path}: W1 {w1.shape}, b1 {b1.shape}, W2 {w2.shape}, b2 {b2.shape} are no network on 784 pixels; "
            "expected W1 (784, h), b1 (h,), W2 (h, k), b2 (k,)."
        )
    operations = (
        O.Flatten((0,), 1),
        O.Linear((1,), 2, np.ascontiguousarray(w1.T), b1 << HIDDEN_SHIFT),
        _rescale(2, HIDDEN_SHIFT, HIDDEN_RANGE),
        O.Linear((3,), 4, np.ascontiguousarray(w2.T), b2 << OUTPUT_SHIFT),
        _rescale(4, OUTPUT_SHIFT, OUTPUT_RANGE),
    )
    tensors = infer(operations, TensorSpec((28, 28, 1), 0, 255))
    program = IntegerProgram(operations, tensors, 5, {"origin": "Henzinger, Lechner, Žikelić 2021, MNIST, 6 bit"})
    prove(program)
    return program


def _rescale(source: int, shift: int, limits: tuple[int, int]) -> O.Requantize:
    one, places = np.array([1], dtype=np.int64), np.array([shift], dtype=np.int64)
    return O.Requantize((source,), source + 1, one, places, "half_up", *limits)


def load_instances(path: str | Path) -> tuple[Instance, ...]:
    """Read the table of verdicts: columns eps, image, verdict, qvip_s."""
    found = []
    with Path(path).open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                known, spent = row["verdict"], row["qvip_s"]
                if known not in get_args(Known):
                    raise ValueError(f"verdict {known!r} is none of {', '.join(get_args(Known))}")
                seconds = float(spent) if known != "NA" and spent else None
                found.append(Instance(int(row["image"]), int(row["eps"]), cast(Known, known), seconds))
            except (KeyError, ValueError, TypeError) as error:
                raise ArqError(f"{path}, line {number}: not an instance of the benchmark ({error}).") from error
    return tuple(sorted(found, key=lambda instance: (instance.epsilon, instance.image)))


def images_of(instances: tuple[Instance, ...] | list[Instance], dataset: Dataset | None = None) -> Any:
    """Images uint8 ``(N, 28, 28, 1)`` and labels int64 ``(N,)`` of instances, from the MNIST test set.

    :param dataset: the MNIST test set; default: loaded from the data root.
    """
    data = dataset if dataset is not None else load("mnist", "test")
    which = [instance.image for instance in instances]
    return data.images[which], np.asarray(data.labels)[which].astype(np.int64)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ArqError(f"{path} is missing: set ARQSEARCH_DATA to the folder whose data/verification holds it.")
    return path
