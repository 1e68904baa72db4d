"""From operations to steps: what the runtime does in one pass over the data. No integer of the program changes.

A step runs at the place of its last operation, so everything that it reads has been computed before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from arqsearch.integer import ops as O
from arqsearch.integer.native.storage import Kind, Tensor, narrow_storage
from arqsearch.integer.program import IntegerProgram


@dataclass(frozen=True, eq=False)
class Step:
    """One pass: an operation and what is done to its operands and its result on the way.

    :param op: what the step is named for.
    :param reads: tensors read; of a convolution the input and, where `add` is set, the residual.
    :param writes: the tensor written.
    :param before: for each tensor read, the requantization of its values on reading.
    :param after: requantization of a convolution's accumulators.
    :param add: sum of a convolution's requantized accumulators and the residual.
    """

    op: O.Op
    reads: tuple[int, ...]
    writes: int
    before: tuple[O.Requantize | None, ...]
    after: O.Requantize | None = None
    add: O.Add | None = None


def fuse(program: IntegerProgram, tensors: Mapping[int, Tensor]) -> tuple[Step, ...]:
    """Steps in the order of execution; `tensors` is the storage of every tensor."""
    return _Fusion(program, tensors).steps()


class _Fusion:
    """Which operations have been taken into the step of another one."""

    def __init__(self, program: IntegerProgram, tensors: Mapping[int, Tensor]) -> None:
        self.program, self.tensors = program, tensors
        self.ops = program.ops
        self.producer = {op.output: index for index, op in enumerate(self.ops)}
        self.readers: dict[int, list[int]] = defaultdict(list)
        for index, op in enumerate(self.ops):
            for source in op.inputs:
                self.readers[source].append(index)
        self.taken: set[int] = set()
        self.layers = [i for i, op in enumerate(self.ops) if isinstance(op, O.Conv2d | O.Linear)]
        #: Index of a layer -> index of the requantization of its accumulators, and of the sum behind that.
        self.after: dict[int, int] = {}
        self.sums: dict[int, int] = {}
        #: (Index of a reader, position of the operand) -> index of the requantization on reading.
        self.before: dict[tuple[int, int], int] = {}

    def steps(self) -> tuple[Step, ...]:
        self._accumulators()
        self._sums()
        self._layer_inputs()
        placed = []
        for index, op in enumerate(self.ops):
            if index in self.taken or self._is_view(index):
                continue
            if index in self.layers:
                last = self.sums.get(index, self.after.get(index, index))
                placed.append((last, self._layer(index, last)))
            else:
                placed.append((index, self._plain(index, op)))
        return tuple(step for _, step in sorted(placed, key=lambda entry: entry[0]))

    # ---- what is fused -----------------------------------------------------------------------

    def _accumulators(self) -> None:
        for index in self.layers:
            reader = self._only_reader(self.ops[index].output)
            if reader is not None and isinstance(self.ops[reader], O.Requantize):
                self.after[index] = reader
                self.taken.add(reader)

    def _sums(self) -> None:
        """A sum belongs to the later of the layers that feed it; the other operand is its residual."""
        layer_of = {requantize: layer for layer, requantize in self.after.items()}
        for index, op in enumerate(self.ops):
            if not isinstance(op, O.Add):
                continue
            producers = [self.producer.get(source, -1) for source in op.inputs]
            fusable = [
                (layer_of[producer], position)
                for position, producer in enumerate(producers)
                if producer in layer_of and self._only_reader(op.inputs[position]) == index
            ]
            operands = {0, 1}
            if fusable:
                layer, position = max(fusable)
                operands = {1 - position}
                self.sums[layer] = index
                self.taken.add(index)
            for position in operands:
                self._read_through(index, position)

    def _layer_inputs(self) -> None:
        """Streams of 8 bits are requantized by each layer that reads them."""
        for index in self.layers:
            producer = self._requantize_before(index, 0)
            if producer is not None:
                codes, stream = self.ops[producer].output, self.ops[producer].inputs[0]
                fits = narrow_storage(self.tensors[codes].lo, self.tensors[codes].hi) is not None
                if fits and self.tensors[stream].storage.kind == Kind.U8:
                    self._read_through(index, 0)

    def _read_through(self, index: int, position: int) -> None:
        producer = self._requantize_before(index, position)
        if producer is not None:
            self.before[index, position] = producer
            self.taken.add(producer)

    # ---- steps -------------------------------------------------------------------------------

    def _layer(self, index: int, last: int) -> Step:
        op = self.ops[index]
        source, before = self._operand(index, 0)
        reads, requantized = [self._image_for(op, source)], [before]
        add = None
        if index in self.sums:
            found = self.ops[last]
            assert isinstance(found, O.Add) and index in self.after
            add = found
            own = self.ops[self.after[index]].output
            tensor, before = self._operand(last, add.inputs.index(own) ^ 1)
            reads.append(tensor)
            requantized.append(before)
        after = self._requantize_at(self.after.get(index))
        return Step(op, tuple(reads), self.ops[last].output, tuple(requantized), after, add)

    def _plain(self, index: int, op: O.Op) -> Step:
        if isinstance(op, O.Requantize):
            return Step(op, op.inputs, op.output, (op,))
        operands = [self._operand(index, position) for position in range(len(op.inputs))]
        return Step(op, tuple(tensor for tensor, _ in operands), op.output, tuple(before for _, before in operands))

    def _operand(self, index: int, position: int) -> tuple[int, O.Requantize | None]:
        """The tensor that is read for an operand, and its requantization on reading."""
        before = self._requantize_at(self.before.get((index, position)))
        return (before.inputs[0] if before else self.ops[index].inputs[position]), before

    # ---- questions ---------------------------------------------------------------------------

    def _only_reader(self, tensor: int) -> int | None:
        """Index of the one operation that reads a tensor; None if there are others, or it is the output."""
        readers = self.readers[tensor]
        return readers[0] if len(readers) == 1 and tensor != self.program.output else None

    def _requantize_before(self, index: int, position: int) -> int | None:
        """Index of the requantization that makes an operand for this reader alone and is in no step yet."""
        source = self.ops[index].inputs[position]
        producer = self.producer.get(source)
        if producer is None or producer in self.taken or self._only_reader(source) != index:
            return None
        return producer if isinstance(self.ops[producer], O.Requantize) else None

    def _requantize_at(self, index: int | None) -> O.Requantize | None:
        if index is None:
            return None
        op = self.ops[index]
        assert isinstance(op, O.Requantize)
        return op

    def _is_view(self, index: int) -> bool:
        """Whether a flatten needs no step: its tensor is a view, or linear layers read the image itself."""
        op = self.ops[index]
        if not isinstance(op, O.Flatten):
            return False
        if self.tensors[op.output].root != op.output:
            return True
        linear = all(isinstance(self.ops[reader], O.Linear) for reader in self.readers[op.output])
        return op.inputs[0] == 0 and linear and op.output != self.program.output

    def _image_for(self, op: O.Op, source: int) -> int:
        """A linear layer on the flattened image reads the image."""
        producer = self.producer.get(source)
        if isinstance(op, O.Linear) and producer is not None:
            flatten = self.ops[producer]
            if isinstance(flatten, O.Flatten) and flatten.inputs[0] == 0:
                return 0
        return source
