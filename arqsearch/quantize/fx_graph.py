"""A module's torch.fx graph, the value of each of its nodes on one run, and each node's place in the source."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from arqsearch.errors import ArqError


def record(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[fx.Graph, Values]:
    """Trace a module in eval mode, also where its forward asks for self.training, and run the trace once.

    :param model: called with float ``(N, C, H, W)``; its modes are put back.
    :param input_shape: ``(C, H, W)``.
    :raises ArqError: naming the line of the user's code when that fails.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return _record(model, input_shape)
    finally:
        for module, training in modes.items():
            module.training = training


def _record(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[fx.Graph, Values]:
    name = type(model).__name__
    tracer = fx.Tracer()
    tracer.record_stack_traces = True
    try:
        graph = tracer.trace(model)
    except Exception as error:  # The user's forward may fail in any way on a tensor without a value.
        frames = traceback.extract_tb(error.__traceback__)
        where = innermost([f'File "{f.filename}", line {f.lineno}, in {f.name}' for f in frames])
        raise ArqError(
            f"{name} cannot be traced ({error}) at {where}. Its forward must not branch on tensor values or sizes; "
            "move such control flow out of forward."
        ) from error
    values = Values(fx.GraphModule(model, graph))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            values.run(torch.zeros(2, *input_shape, device=device))
    except Exception as error:
        where = f" at {place(values.current)}" if values.current is not None else ""
        raise ArqError(
            f"{name} does not accept images of shape (C, H, W) = {input_shape}{where}: {error}. Check the model's "
            "options and data.image_size."
        ) from error
    return graph, values


class Values(fx.Interpreter):
    """Runs the graph once and remembers every node's value: shapes, and numbers computed from shapes.

    A tensor that an in-place operation changed and that is read again under its old name is `stale`: the graph,
    which has no memory, would compute something else there.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.seen: dict[fx.Node, Any] = {}
        self.stale: dict[fx.Node, fx.Node] = {}
        self.current: fx.Node | None = None
        self._versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        for source in n.all_input_nodes:
            if source in self._versions and self.seen[source]._version != self._versions[source]:
                self.stale[n] = source
        value = super().run_node(n)
        self.seen[n] = value
        if isinstance(value, Tensor):
            self._versions[n] = value._version
        return value


#: Files whose frames are never the user's own line.
_INTERNAL = tuple(f'"{Path(file).parent}{os.sep}' for file in (torch.__file__, __file__))


def innermost(lines: Sequence[str]) -> str:
    """Return the innermost of some ``File "...", line n, in f`` that lies in the user's own code."""
    own = [line for line in lines if not any(part in line for part in _INTERNAL)]
    return own[-1] if own else ""


def place(node: fx.Node) -> str:
    """File and line of the forward that made a node."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines()]
    return innermost([line for line in lines if re.match(r'File ".*", line \d+', line)]) or node.format_node() or ""
