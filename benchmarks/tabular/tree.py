"""`PrefixTree`: the counts of every bit-width assignment of a plain network, each shared prefix computed once.

In a plain chain (conv and linear layers one after another) the integers of a program up to layer i depend only on the
bits of the layers up to i. So assignments form a tree: each node is one lowered operation on the tensors of its parent,
and only the leaves are computed once for each assignment. The operations are those that `lower` makes and the torch
reference backend runs; a test compares with programs that are lowered and run one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from arqsearch.errors import ArqError
from arqsearch.integer import ops as O
from arqsearch.integer.backend_torch import RULES, exact_dtype, split_padding
from arqsearch.integer.lowering import lower
from arqsearch.integer.program import IntegerProgram, TensorSpec
from arqsearch.integer.ranges import op_range, partial_sum_bound
from arqsearch.quantize.bitwidths import BitWidths, LayerBits
from arqsearch.quantize.network import QuantizedNet

Kernel = Callable[[Tensor], Tensor]
#: A linear layer's logits times this, plus a code of the class, have no ties; more classes are refused.
CLASSES_AT_MOST = 16


@dataclass(frozen=True)
class Inputs:
    """What every assignment is scored on.

    :param noisy: noisy pixels int16 (images · samples, H, W, C), the samples of an image in a row.
    :param boxes: lower then upper corners of the boxes, int16 (2 · ε · images, H, W, C): all lower ones, then all
        upper ones, each by ε and then by image.
    :param labels: int64 (images,).
    :param samples: noisy copies of each image.
    :param epsilons: number of box sizes.
    """

    noisy: NDArray[np.int16]
    boxes: NDArray[np.int16]
    labels: NDArray[np.int64]
    samples: int
    epsilons: int


@dataclass(frozen=True)
class Counts:
    """Integer counts of one assignment.

    :param votes: noisy copies that get the label, int64 (images,).
    :param robust: images proved at each ε, int64 (ε,).
    """

    votes: NDArray[np.int64]
    robust: NDArray[np.int64]


class PrefixTree:
    """Walks the assignments of a plain network.

    :param net: a calibrated network whose layers form a chain that ends in a linear layer.
    :param choices: bits that a layer may take.
    :param inputs: what to score on.
    :param noise_limit: largest absolute noise in grey levels.
    :raises ArqError: when the network is no such chain, or has more than 16 classes.
    """

    def __init__(self, net: QuantizedNet, choices: Sequence[int], inputs: Inputs, noise_limit: int) -> None:
        self.net = net.eval()
        self.choices = tuple(choices)
        self.inputs = inputs
        self.noise_limit = noise_limit
        self.names = net.bitwidths.names
        self._heads: dict[tuple[int, ...], Kernel] = {}
        self._layers: dict[tuple[int, int, int], tuple[Kernel, Kernel]] = {}
        self._last: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._labels = torch.from_numpy(inputs.labels)
        self._segments(self._lowered({}))

    # ---- walking -----------------------------------------------------------------------------

    @torch.no_grad()
    def walk(self, wanted: Callable[[tuple[LayerBits, ...]], bool], start: Sequence[LayerBits] = ()) -> Iterator[
        tuple[tuple[LayerBits, ...], Counts]
    ]:  # fmt: skip
        """Every wanted assignment that begins with `start`, with its counts.

        :param wanted: whether a prefix can still become a wanted assignment; asked for every prefix.
        :param start: bits of the first layers.
        """
        noisy = torch.from_numpy(self.inputs.noisy).permute(0, 3, 1, 2)
        boxes = torch.from_numpy(self.inputs.boxes).permute(0, 3, 1, 2)
        yield from self._descend((), noisy, boxes, wanted, tuple(start))

    def _descend(
        self, prefix: tuple[LayerBits, ...], noisy: Tensor, boxes: Tensor,
        wanted: Callable[[tuple[LayerBits, ...]], bool], start: tuple[LayerBits, ...],
    ) -> Iterator[tuple[tuple[LayerBits, ...], Counts]]:  # fmt: skip
        depth = len(prefix)
        given = start[depth] if depth < len(start) else None
        for activation in self.choices if given is None else (given.activation,):
            weights = [w for w in (self.choices if given is None else (given.weight,))
                       if wanted((*prefix, LayerBits(w, activation)))]  # fmt: skip
            if not weights:
                continue
            head = self._head(prefix, activation)
            codes, corners = head(noisy.clone()), head(boxes.clone())
            if depth == len(self.names) - 1:
                found = self._leaves(weights, activation, codes, corners)
                yield from (((*prefix, LayerBits(w, activation)), c) for w, c in zip(weights, found, strict=True))
                continue
            for weight in weights:
                plain, interval = self._layer(depth, weight, activation)
                following = (*prefix, LayerBits(weight, activation))
                yield from self._descend(following, plain(codes), interval(corners), wanted, start)

    # ---- operations --------------------------------------------------------------------------

    def _lowered(self, bits: dict[int, LayerBits]) -> IntegerProgram:
        """A program with the given bits in some layers, its tensors stated as wide as any prefix makes them."""
        smallest = LayerBits(self.choices[0], self.choices[0])
        self.net.set_bitwidths(
            BitWidths.from_mapping([(name, bits.get(i, smallest)) for i, name in enumerate(self.names)])
        )
        program = lower(self.net, noise_limit=self.noise_limit)
        tensors = [program.tensors[0]]
        for op in program.ops:
            shape = program.tensors[op.output].shape
            found = op_range(op, *(tensors[source] for source in op.inputs))
            low, high = (op.lo, op.hi) if isinstance(op, O.Requantize | O.InputQuantize) else (found.lo, found.hi)
            tensors.append(TensorSpec(shape, low, high))
        return IntegerProgram(program.ops, tuple(tensors), program.output, program.metadata)

    def _segments(self, program: IntegerProgram) -> list[tuple[list[O.Op], O.Conv2d | O.Linear]]:
        """For each layer, the operations before it and its own.

        :raises ArqError: when the program is no chain that ends in a linear layer.
        """
        segments: list[tuple[list[O.Op], O.Conv2d | O.Linear]] = []
        before: list[O.Op] = []
        for index, op in enumerate(program.ops):
            if op.inputs != (index,) or isinstance(op, O.SumPool2d | O.MaxPool2d):
                raise ArqError(f"{type(op).__name__} is no link of a plain chain; use a network such as cnn_small.")
            if isinstance(op, O.Conv2d | O.Linear):
                segments.append((before, op))
                before = []
            else:
                before.append(op)
        last = segments[-1][1] if segments else None
        if before or not isinstance(last, O.Linear) or len(last.bias) > CLASSES_AT_MOST:
            raise ArqError(f"The network must end in a linear layer of at most {CLASSES_AT_MOST} classes.")
        return segments

    def _head(self, prefix: tuple[LayerBits, ...], activation: int) -> Kernel:
        """Everything between a layer's accumulators and the next layer's input codes."""
        depth = len(prefix)
        key = (depth, *(prefix[-1] if prefix else ()), activation)
        if key not in self._heads:
            bits = {depth: LayerBits(self.choices[0], activation)}
            if prefix:
                bits[depth - 1] = prefix[-1]
            program = self._lowered(bits)
            device = torch.device("cpu")
            kernels = [RULES[type(op)](op, program, device) for op in self._segments(program)[depth][0]]

            def head(x: Tensor) -> Tensor:
                for kernel in kernels:
                    x = kernel(x)
                return x

            self._heads[key] = head
        return self._heads[key]

    def _layer(self, depth: int, weight: int, activation: int) -> tuple[Kernel, Kernel]:
        """A layer on codes, and on boxes of codes (all lower corners, then all upper ones)."""
        key = (depth, weight, activation)
        if key not in self._layers:
            program = self._lowered({depth: LayerBits(weight, activation)})
            op = self._segments(program)[depth][1]
            plain: Kernel = RULES[type(op)](op, program, torch.device("cpu"))
            self._layers[key] = plain, _on_boxes(op, program.tensors[op.inputs[0]])
        return self._layers[key]

    def _leaves(self, weights: Sequence[int], activation: int, codes: Tensor, corners: Tensor) -> list[Counts]:
        """Votes and proofs for several weight bits of the last layer at once."""
        parts = [self._final(weight, activation) for weight in weights]
        keys = torch.cat([p[0] for p in parts]).to(codes.dtype if parts[0][0].dtype == torch.float32 else torch.float64)
        offsets = torch.cat([p[1] for p in parts])
        classes, samples = len(parts[0][1]), self.inputs.samples
        logits = torch.addmm(offsets[:, None].to(keys.dtype), keys, codes.to(keys.dtype).t())
        logits = logits.view(len(weights), classes, -1)
        wanted = self._labels.repeat_interleave(samples)[None, None].expand(len(weights), 1, -1)
        hits = logits.amax(1, keepdim=True) == logits.gather(1, wanted)
        votes = hits.view(len(weights), len(self._labels), samples).sum(-1).numpy()

        half = len(corners) // 2
        both = torch.cat((corners[:half], corners[half:]), 1)
        rows, bias = torch.cat([p[2] for p in parts]), torch.cat([p[3] for p in parts])
        slack = torch.addmm(bias[:, None], rows, both.to(rows.dtype).t())
        worst = slack.view(len(weights), classes, classes, half).amin(2)
        labels = self._labels.repeat(self.inputs.epsilons)[None, None].expand(len(weights), 1, -1)
        proved = (worst.gather(1, labels) >= 0).view(len(weights), self.inputs.epsilons, -1).sum(-1).numpy()
        return [Counts(v, r) for v, r in zip(votes, proved, strict=True)]

    def _final(self, weight: int, activation: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows and offsets of the last layer: of 16·logit + (15 − class), and of the worst-case specification.

        The first maximum of the logits is the only maximum of 16·logit + (15 − class). Row (y, j) of the specification
        bounds z_y − z_j − [j < y] from below, from (lower, upper) codes; every one is ≥ 0 where class y is proved.
        """
        key = weight * 16 + activation
        if key not in self._last:
            depth = len(self.names) - 1
            program = self._lowered({depth: LayerBits(weight, activation)})
            op = self._segments(program)[depth][1]
            spec = program.tensors[op.inputs[0]]
            bound = partial_sum_bound(op, spec)
            count = len(op.bias)
            matrix, bias = torch.from_numpy(op.weight.astype(np.float64)), torch.from_numpy(op.bias.astype(np.float64))
            classes = torch.arange(count)
            kind = exact_dtype(CLASSES_AT_MOST * (bound + 1))
            offsets = CLASSES_AT_MOST * bias + (CLASSES_AT_MOST - 1 - classes)
            rows = (matrix[:, None] - matrix[None]).flatten(0, 1)
            both = torch.cat((rows.clamp(min=0), rows.clamp(max=0)), 1)
            margin = (bias[:, None] - bias[None] - (classes[None] < classes[:, None]).double()).flatten()
            wide = exact_dtype(2 * bound + 1)
            self._last[key] = (CLASSES_AT_MOST * matrix).to(kind), offsets.to(kind), both.to(wide), margin.to(wide)
        return self._last[key]


def _on_boxes(op: O.Conv2d | O.Linear, spec: TensorSpec) -> Kernel:
    """Lower and upper accumulators from lower and upper codes: positive weights keep the corner, negative ones swap it.

    One layer of twice the channels: [lower, upper] through [[W⁺, W⁻], [W⁻, W⁺]].
    """
    dtype = exact_dtype(partial_sum_bound(op, spec))
    weight = torch.from_numpy(op.weight.astype(np.float64))
    if isinstance(op, O.Conv2d):
        if op.groups != 1:
            raise ArqError("Grouped convolutions are no part of a plain chain; use a network such as cnn_small.")
        weight = weight.permute(0, 3, 1, 2)
    keep, swap = weight.clamp(min=0), weight.clamp(max=0)
    block = torch.cat((torch.cat((keep, swap), 1), torch.cat((swap, keep), 1))).to(dtype).contiguous()
    bias = torch.from_numpy(np.tile(op.bias.astype(np.float64), 2)).to(dtype)

    def kernel(corners: Tensor) -> Tensor:
        half = len(corners) // 2
        both = torch.cat((corners[:half], corners[half:]), 1).to(dtype)
        if isinstance(op, O.Linear):
            out = F.linear(both, block, bias)
        else:
            both, padding = split_padding(both, op.padding)
            # Unfold and matrix product: a plain sum, exact in any order.
            shape = [(both.shape[2 + i] + 2 * padding[i] - block.shape[2 + i]) // op.stride[i] + 1 for i in (0, 1)]
            columns = F.unfold(both, block.shape[2:], padding=padding, stride=op.stride)
            out = (block.flatten(1) @ columns + bias[:, None]).view(half, len(bias), *shape)
        middle = out.shape[1] // 2
        return torch.cat((out[:, :middle], out[:, middle:]))

    return kernel
