"""`Normalization`: how a network wants its pixels."""

from __future__ import annotations

from dataclasses import dataclass

from arqsearch.errors import ArqError


@dataclass(frozen=True)
class Normalization:
    """The network sees (x/255 − mean) / std for uint8 pixels x, per channel.

    :param mean: of [0,1] pixels, one for each channel.
    :param std: of [0,1] pixels, positive, one for each channel.
    :raises ArqError: when the lengths differ or a deviation is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ArqError(f"mean has {len(self.mean)} channels but std {len(self.std)}; give one of each per channel.")
        if min(self.std) <= 0:
            raise ArqError(f"std {self.std} must be positive.")


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: (x − 127) / 128 in grey levels.
SYMMETRIC = Normalization((127 / 255,) * 3, (128 / 255,) * 3)


def centred(channels: int) -> Normalization:
    """Mean 0.5 and deviation 0.25 for any number of channels: pixels become −2..2."""
    return Normalization((0.5,) * channels, (0.25,) * channels)
