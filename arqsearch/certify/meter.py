"""`Meter`: how fast certification goes and when it will be done, as a note for progress."""

from __future__ import annotations

import time
from collections.abc import Callable


class Meter:
    """Counts samples and images from its making on.

    :param clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._samples = 0
        self._images = 0

    def took(self, samples: int) -> None:
        """Count samples."""
        self._samples += samples

    def finished(self) -> None:
        """Count an image whose samples were taken now."""
        self._images += 1

    @property
    def samples(self) -> int:
        """Samples since the start."""
        return self._samples

    def note(self, left: int) -> str:
        """Samples and images by time, and the time that is left; empty before the first sample.

        :param left: images still to do.
        """
        seconds = max(self._clock() - self._start, 1e-9)
        if not self._samples:
            return ""
        parts = [f"{self._samples / seconds:,.0f} samples/s"]
        if self._images:
            parts.append(f"{60 * self._images / seconds:,.1f} images/min")
            if left:
                parts.append(f"{duration(left * seconds / self._images)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """Time in words, such as ``45 s``, ``12 min`` or ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
