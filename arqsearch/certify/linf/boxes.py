"""Interval bounds of the integer program in exact integers: QA-IBP certified accuracy.

A box of pixels becomes a box of every tensor; the last linear layer is fused with the specification ``z_y - z_j``
(Lechner et al., AAAI 2023). A verified image is robust under the shipped program: for every integer image within ε
grey levels the class stays the label.

Batches of boxes run as an interval program (`interval_program`) on whatever runs programs, the native engine first.
Where splits or bounds of inner tensors are taken in, boxes are computed tensor by tensor (`boxes_torch`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arqsearch.certify.linf.boxes_specification import LastLayer
from arqsearch.certify.linf.boxes_torch import RULES as RULES
from arqsearch.certify.linf.boxes_torch import TensorBoxes
from arqsearch.certify.linf.domain import Bound, Domain, needed
from arqsearch.certify.linf.interval_program import interleave, interval_program
from arqsearch.integer import ops as O
from arqsearch.integer.program import IntegerProgram
from arqsearch.integer.ranges import prove

#: Boxes whose last tensors are held at once.
CHUNK = 1024
#: Domains whose every tensor is held at once.
DOMAIN_CHUNK = 128


def box(images: np.ndarray, epsilon: int) -> tuple[np.ndarray, np.ndarray]:
    """All images within `epsilon` grey levels (L∞), clipped to 0..255.

    :param images: uint8 ``(N, H, W, C)``.
    :param epsilon: whole grey levels.
    :returns: int16 lower and upper images.
    """
    wide = images.astype(np.int16)
    return np.clip(wide - epsilon, 0, 255).astype(np.int16), np.clip(wide + epsilon, 0, 255).astype(np.int16)


def is_robust(margins: Tensor, labels: Tensor) -> Tensor:
    """Whether lower bounds of ``z_y - z_j`` prove class y: at least 1 for j < y, at least 0 for j > y.

    :param margins: ``(N, K)``.
    :param labels: ``(N,)``.
    :returns: bool ``(N,)``.
    """
    classes = torch.arange(margins.shape[1])
    return ((margins >= needed(labels, len(classes))) | (classes[None] == labels[:, None])).all(1)


@dataclass(frozen=True)
class IntervalResult:
    """Outcome for a set of images at one ε.

    :param robust: bool ``(N,)``, proven.
    :param margins: int64 ``(N,)``, smallest lower bound of ``z_y - z_j`` over j != y.
    """

    robust: Tensor
    margins: Tensor


class IntervalBounds:
    """Exact boxes of one program; a `Bounder`.

    :param program: ranges are proven first.
    :param device: torch device.
    :param chunk: boxes held at once; does not change the result.
    :param backend: what runs boxes: "native", "torch", or "auto" for the fastest; does not change the result.
    """

    name = "boxes"

    def __init__(
        self, program: IntegerProgram, device: str = "cpu", chunk: int = CHUNK, backend: str = "auto"
    ) -> None:  # fmt: skip
        prove(program)
        self.program, self.device, self.chunk = program, torch.device(device), chunk
        last = program.ops[-1]
        self._last: LastLayer | None = None
        self._source = program.output
        if isinstance(last, O.Linear) and last.output == program.output:
            self._source = last.inputs[0]
            self._last = LastLayer(last, program.tensors[self._source], self.device)
        self._backend = interval_program(program, self._source).backend(device=device, backend=backend)
        self._boxes: TensorBoxes | None = None

    @torch.no_grad()
    def margins(self, lo: Any, hi: Any, labels: Any) -> Tensor:
        """Lower bounds of ``z_label - z_j`` over boxes of pixels.

        :param lo: integer lower pixels ``(N, H, W, C)``.
        :param hi: integer upper pixels.
        :param labels: ``(N,)``.
        :returns: int64 ``(N, K)``, 0 at the label.
        """
        low, high = np.asarray(lo), np.asarray(hi)
        wanted = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        parts = [
            self._margins(interleave(low[at : at + self.chunk], high[at : at + self.chunk]), wanted[at:][: self.chunk])
            for at in range(0, len(low), self.chunk)
        ]
        return torch.cat(parts) if parts else torch.zeros((0, self.program.num_classes), dtype=torch.int64)

    def verify(self, images: NDArray[np.uint8], labels: Any, epsilon: int) -> IntervalResult:
        """Bound uint8 images ``(N, H, W, C)`` at `epsilon` grey levels."""
        wanted = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        margins = self.margins(*_narrow_box(images, epsilon), wanted)
        others = margins.clone()
        others[torch.arange(len(wanted)), wanted] = torch.iinfo(torch.int64).max
        return IntervalResult(is_robust(margins, wanted), others.min(1).values)

    @torch.no_grad()
    def bound(self, domain: Domain, known: Bound | None = None) -> Bound:
        """Bound every domain of the batch, and every tensor.

        :param known: bounds proven for these domains or for larger ones that contain them, position by position.
        """
        self._boxes = self._boxes or TensorBoxes(self.program, self.device)
        parts = [
            self._bound(domain[at], None if known is None else _part(known, at))
            for at in torch.split(torch.arange(len(domain)), DOMAIN_CHUNK)
        ]
        tensors = {
            tensor: (torch.cat([p.tensors[tensor][0] for p in parts]), torch.cat([p.tensors[tensor][1] for p in parts]))
            for tensor in parts[0].tensors
        }
        return Bound(torch.cat([p.margins for p in parts]), torch.cat([p.empty for p in parts]), tensors)

    def _bound(self, domain: Domain, known: Bound | None) -> Bound:
        assert self._boxes is not None
        limits = [domain.limits] + ([] if known is None else [known.tensors])
        tensors, empty = self._boxes.bound(domain.lo, domain.hi, limits)
        margins = _unfused(*tensors[self.program.output], domain.labels)
        if self._last is not None:
            low, high = tensors[self._source]
            both = torch.stack([low, high], dim=2).reshape(len(low), -1)
            margins = torch.maximum(margins, self._last.margins(both, domain.labels))
        if known is not None:
            margins, empty = torch.maximum(margins, known.margins), empty | known.empty
        return Bound(margins, empty, tensors)

    def _margins(self, pixels: NDArray[np.integer[Any]], labels: Tensor) -> Tensor:
        bounds = self._backend.run(pixels)
        if self._last is not None:
            return self._last.margins(bounds, labels)
        return _unfused(bounds[:, 0::2], bounds[:, 1::2], labels)


def _narrow_box(images: NDArray[np.uint8], epsilon: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """As `box`, in bytes."""
    by = np.uint8(min(epsilon, 255))
    return np.maximum(images, by) - by, np.minimum(images, 255 - by) + by


def _unfused(low: Tensor, high: Tensor, labels: Tensor) -> Tensor:
    """Margins from bounds of the logits ``(N, K)``."""
    margins = low.to(torch.int64).gather(1, labels[:, None]) - high.to(torch.int64)
    return margins.scatter_(1, labels[:, None], 0)


def _part(known: Bound, at: Tensor) -> Bound:
    tensors = {tensor: (lo[at], hi[at]) for tensor, (lo, hi) in known.tensors.items()}
    return Bound(known.margins[at], known.empty[at], tensors)
