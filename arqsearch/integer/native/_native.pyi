from typing import Any

import numpy as np
from numpy.typing import NDArray

def isas() -> tuple[str, ...]: ...
def open(words: NDArray[np.uint32], isa: str, /) -> Any: ...
def describe(handle: Any, /) -> tuple[int, int, int, int, int, str]: ...
def run(handle: Any, pixels: NDArray[np.uint8] | NDArray[np.int16], logits: NDArray[np.int32], /) -> None: ...
def noise_table(high: NDArray[np.uint32], low: NDArray[np.uint32], lo: int, guided: bool, /) -> Any: ...
def noise(table: Any, seed: int, stage: int, image_id: int, first: int, out: NDArray[np.int16], /) -> None: ...
def count_votes(
    handle: Any,
    table: Any,
    seed: int,
    stage: int,
    image_ids: NDArray[np.uint32],
    images: NDArray[np.uint8],
    first: int,
    samples: int,
    votes: NDArray[np.uint32],
    /,
) -> None: ...
def classes(
    handle: Any,
    table: Any,
    seed: int,
    stage: int,
    image_id: int,
    image: NDArray[np.uint8],
    first: int,
    out: NDArray[np.uint16],
    /,
) -> None: ...
