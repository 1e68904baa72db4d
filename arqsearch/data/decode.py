"""From encoded images (PNG, JPEG, ...) to one uint8 array, on several threads."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from arqsearch.errors import ArqError

if TYPE_CHECKING:
    from PIL import Image

#: An encoded image: its bytes or its file.
Source: TypeAlias = bytes | Path


def decode_images(
    sources: Sequence[Source],
    describe: Callable[[int], str],
    *,
    channels: int | None = None,
    image_size: int | None = None,
) -> NDArray[np.uint8]:
    """Decode images of one size.

    :param sources: bytes or files, in order.
    :param describe: how to name the i-th image in a message.
    :param channels: 1 (grey) or 3 (RGB); None = 1 when every image is grey, otherwise 3.
    :param image_size: scale the shorter side to this, then cut the centre square; None = leave as they are.
    :returns: uint8 ``(N, H, W, C)``.
    :raises ArqError: when an image cannot be decoded, or sizes differ and `image_size` is None.
    """
    if not len(sources):
        raise ArqError("There are no images to decode.")
    threads = min(8, os.cpu_count() or 1)
    bounds = np.linspace(0, len(sources), min(len(sources), 16 * threads) + 1).astype(int)

    def decode_part(part: int) -> list[NDArray[np.uint8]]:
        return [_decode(sources[i], describe, i, channels, image_size) for i in range(bounds[part], bounds[part + 1])]

    with ThreadPoolExecutor(threads) as pool:
        decoded = [array for part in pool.map(decode_part, range(len(bounds) - 1)) for array in part]
    for index, array in enumerate(decoded):
        if array.shape[:2] != decoded[0].shape[:2]:
            raise ArqError(
                f"Images have different sizes: {describe(0)} is {_size(decoded[0])}, {describe(index)} is "
                f"{_size(array)}. Set data.image_size to bring all to one size."
            )
    depth = channels or max(1 if array.ndim == 2 else 3 for array in decoded)
    result = np.empty((len(decoded), *decoded[0].shape[:2], depth), dtype=np.uint8)
    for index, array in enumerate(decoded):
        result[index] = array[:, :, None] if array.ndim == 2 else array
    return result


def _size(array: NDArray[np.uint8]) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _decode(
    source: Source, describe: Callable[[int], str], index: int, channels: int | None, image_size: int | None
) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            grey = channels == 1 or (channels is None and opened.mode in {"1", "L", "LA"})
            image: Image.Image = opened.convert("L" if grey else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ArqError(f"{describe(index)} cannot be decoded ({error}); replace it or leave it out.") from error
    return np.asarray(image if image_size is None else _resize(image, image_size), dtype=np.uint8)


def _resize(image: Image.Image, size: int) -> Image.Image:
    from PIL import Image

    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    return scaled.crop((left, top, left + size, top + size))
