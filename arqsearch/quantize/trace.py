"""From an `nn.Module` to a :class:`arqsearch.quantize.graph.LayerGraph`, by torch.fx: one rule for each call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from arqsearch.errors import ArqError
from arqsearch.integer.ops import Padding
from arqsearch.quantize.fx_graph import Values, place, record
from arqsearch.quantize.graph import LAYERS, TRANSPARENT, Kind, LayerGraph, Node


def trace(model: nn.Module, input_shape: tuple[int, int, int]) -> LayerGraph:
    """Trace a module into a :class:`LayerGraph`.

    :param model: called with float ``(N, C, H, W)``, returns logits ``(N, K)``.
    :param input_shape: ``(C, H, W)``.
    :raises ArqError: naming the operation and its place in the source when one is not supported.
    """
    graph, values = record(model, input_shape)
    return _Builder(model, values).build(graph)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, Sequence):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


def _symmetric(value: Any) -> Padding:
    rows, columns = _pair(value)
    return (rows, rows, columns, columns)


class _Builder:
    """Turns fx nodes into our nodes, one rule for each module, function and method."""

    def __init__(self, model: nn.Module, values: Values) -> None:
        self.modules = dict(model.named_modules())
        self.layers = {n for n, m in self.modules.items() if isinstance(m, nn.Conv2d | nn.Linear)}
        self.stale = values.stale
        self.values = values.seen
        self.nodes: dict[str, Node] = {}
        self.names: dict[fx.Node, str] = {}

    def build(self, graph: fx.Graph) -> LayerGraph:
        output = ""
        for node in graph.nodes:
            if node in self.stale and isinstance(self.values.get(node), Tensor):
                raise ArqError(
                    f"{self.stale[node].name!r} is read at {place(node)} after an in-place operation changed it. "
                    "Use the form that makes a new tensor: x = x + y, F.relu(x), ReLU(inplace=False)."
                )
            if node.op == "output":
                argument = node.args[0]
                if not isinstance(argument, fx.Node):
                    raise ArqError("The model must return one tensor of logits; it returns a structure. Wrap it.")
                output = self.names[argument]
            elif isinstance(self.values.get(node), Tensor) and node.op != "get_attr":
                self.names[node] = self._convert(node)
        nodes = tuple(self.nodes.values())
        last = self.nodes[output]
        if last.kind != "linear" or last.relu:
            what = f"an activation on {output!r}" if last.relu else f"{output!r} ({last.kind})"
            raise ArqError(
                f"The logits come from {what}; the last operation must be a linear layer without activation, which "
                "gives (N, classes). Remove what follows it."
            )
        return LayerGraph(nodes, output)

    def _convert(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return self._put(Node("input", "input", (), self._shape(node)))
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            for kind, rule in _MODULES.items():
                if isinstance(module, kind):
                    return rule(self, node, module)
            raise self._unsupported(node, f"module {type(module).__name__} ({node.target})")
        if node.target in _FUNCTIONS:
            return _FUNCTIONS[node.target](self, node)
        if node.op == "call_method" and node.target in _METHODS:
            return _METHODS[str(node.target)](self, node)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        raise self._unsupported(node, f"operation {name!r}")

    def _unsupported(self, node: fx.Node, what: str) -> ArqError:
        return ArqError(
            f"Unsupported {what} at {place(node)}. Supported: conv, linear, batch norm after them, ReLU, ReLU6, add, "
            "average and max pool, zero pad, strided slice, flatten, dropout."
        )

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.values[node].shape[1:])

    def source(self, node: fx.Node, position: int = 0) -> str:
        argument = node.args[position] if len(node.args) > position else node.kwargs.get("input")
        if not isinstance(argument, fx.Node) or argument not in self.names:
            raise self._unsupported(node, f"operand {argument!r} of {node.target}")
        return self.names[argument]

    def image(self, node: fx.Node) -> tuple[str, tuple[int, int, int]]:
        """The operand of an operation on images, and its (C, H, W)."""
        name = self.source(node)
        if len(self.nodes[name].shape) != 3:
            raise self._unsupported(node, f"{node.target} on a tensor that is not (N, C, H, W)")
        channels, height, width = self.nodes[name].shape
        return name, (channels, height, width)

    def argument(self, node: fx.Node, position: int, name: str, default: Any) -> Any:
        """A call's argument with numbers computed from shapes put in."""
        value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
        return fx.node.map_arg(value, lambda n: self.values[n])

    def _put(self, node: Node) -> str:
        if node.name == "input" and node.kind in LAYERS:
            raise ArqError("A layer is called 'input', the name of the images here; rename that module.")
        # A function's own name may be that of a layer which is called later.
        if node.name in self.nodes or (node.kind not in LAYERS and node.name in self.layers):
            if node.kind in LAYERS:
                raise ArqError(f"Module {node.name!r} is called twice; bit-widths belong to layers: one module a call.")
            serial = sum(1 for n in self.nodes if n.split("#")[0] == node.name)
            node = replace(node, name=f"{node.name}#{serial}")
        self.nodes[node.name] = node
        return node.name

    def emit(self, node: fx.Node, kind: Kind, **attrs: Any) -> str:
        return self._put(Node(str(node.name), kind, (self.source(node),), self._shape(node), attrs=attrs))

    def single_use(self, name: str) -> bool:
        """Whether one fx node reads what `name` stands for so far."""
        users = {user for n, own in self.names.items() if own == name for user in n.users}
        alias = {n for n, own in self.names.items() if own == name}
        return len([u for u in users if u not in alias and isinstance(self.values.get(u), Tensor)]) <= 1

    # One rule for each kind of call -----------------------------------------------------------

    def conv(self, node: fx.Node, module: nn.Conv2d) -> str:
        if module.dilation != (1, 1) or module.padding_mode != "zeros":
            raise self._unsupported(node, f"dilation or padding mode of {node.target}")
        if isinstance(module.padding, str):
            totals = [k - 1 if module.padding == "same" else 0 for k in module.kernel_size]
            rows, columns = totals
            padding: Padding = (rows // 2, rows - rows // 2, columns // 2, columns - columns // 2)
        else:
            padding = _symmetric(module.padding)
        attrs = {
            "kernel": _pair(module.kernel_size), "stride": _pair(module.stride), "padding": padding,
            "groups": module.groups,
        }  # fmt: skip
        return self._put(Node(str(node.target), "conv", (self.source(node),), self._shape(node), attrs=attrs))

    def linear(self, node: fx.Node, module: nn.Linear) -> str:
        source = self.source(node)
        if len(self.nodes[source].shape) != 1:
            raise self._unsupported(node, f"linear layer {node.target} on a tensor that is not flat")
        return self._put(Node(str(node.target), "linear", (source,), self._shape(node)))

    def batch_norm(self, node: fx.Node, module: nn.BatchNorm1d | nn.BatchNorm2d) -> str:
        name = self.source(node)
        layer = self.nodes[name]
        if not module.affine or not module.track_running_stats:
            raise self._unsupported(node, f"batch norm {node.target} without weights or running statistics")
        if layer.kind not in LAYERS or layer.relu or layer.batch_norm or not self.single_use(name):
            raise self._unsupported(
                node, f"batch norm {node.target} that does not directly follow a conv or linear layer"
            )
        self.nodes[name] = replace(layer, batch_norm=str(node.target))
        return name

    def relu(self, node: fx.Node, cap: float | None = None) -> str:
        name = self.source(node)
        chain = [name]
        while self.nodes[chain[-1]].kind in TRANSPARENT and self.single_use(chain[-1]):
            chain.append(self.nodes[chain[-1]].inputs[0])
        root = self.nodes[chain[-1]]
        if root.kind in {"conv", "linear", "add", "act"} and self.single_use(root.name):
            caps = [c for c in (root.cap, cap) if c is not None]
            self.nodes[root.name] = replace(root, relu=True, cap=min(caps) if caps else None)
            return name
        return self._put(Node(str(node.name), "act", (name,), self._shape(node), relu=True, cap=cap))

    def add(self, node: fx.Node) -> str:
        if node.kwargs or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
            raise self._unsupported(node, "addition of something that is not a tensor of the network")
        left, right = self.source(node, 0), self.source(node, 1)
        if self.nodes[left].shape != self.nodes[right].shape:
            raise self._unsupported(node, "addition that broadcasts")
        return self._put(Node(str(node.name), "add", (left, right), self._shape(node)))

    def identity(self, node: fx.Node, *_: Any) -> str:
        return self.source(node)

    def flatten(self, node: fx.Node, *_: Any) -> str:
        source = self.source(node)
        before, after = self.nodes[source].shape, self._shape(node)
        if before == after:
            return source
        if len(after) != 1 or self.values[node].shape[0] != 2:
            raise self._unsupported(node, f"reshape from {before} to {after}")
        return self._put(Node(str(node.name), "flatten", (source,), after))

    def average(self, node: fx.Node, kernel: Any, stride: Any, padding: Any, *, keep: bool = True) -> str:
        source, (channels, _, _) = self.image(node)
        attrs = {"kernel": _pair(kernel), "stride": _pair(stride), "padding": _symmetric(padding)}
        shape = self._shape(node) if keep else (channels, 1, 1)
        name = self._put(Node(str(node.name), "avgpool", (source,), shape, attrs=attrs))
        if keep:
            return name
        return self._put(Node(f"{node.name}.flat", "flatten", (name,), (channels,)))

    def avg_pool_module(self, node: fx.Node, module: nn.AvgPool2d) -> str:
        plain = not module.ceil_mode and (module.count_include_pad or _pair(module.padding) == (0, 0))
        if not plain or module.divisor_override:
            raise self._unsupported(node, f"ceil_mode, count_include_pad=False or divisor_override of {node.target}")
        return self.average(node, module.kernel_size, module.stride, module.padding)

    def avg_pool(self, node: fx.Node) -> str:
        kernel = self.argument(node, 1, "kernel_size", None)
        stride = self.argument(node, 2, "stride", None) or kernel
        padding = self.argument(node, 3, "padding", 0)
        inside = _pair(padding) != (0, 0) and not self.argument(node, 5, "count_include_pad", True)
        if self.argument(node, 4, "ceil_mode", False) or inside or self.argument(node, 6, "divisor_override", None):
            raise self._unsupported(node, "average pool with ceil_mode, count_include_pad=False or divisor_override")
        return self.average(node, kernel, stride, padding)

    def adaptive(self, node: fx.Node, output_size: Any) -> str:
        _, (_, height, width) = self.image(node)
        wanted = output_size if isinstance(output_size, Sequence) else (output_size, output_size)
        rows, columns = (int(w or size) for w, size in zip(wanted, (height, width), strict=True))
        if height % rows or width % columns:
            raise self._unsupported(node, f"adaptive average pool from {height}x{width} to {rows}x{columns}")
        size = (height // rows, width // columns)
        return self.average(node, size, size, 0)

    def mean(self, node: fx.Node) -> str:
        axes = self.argument(node, 1, "dim", None)
        _, (_, height, width) = self.image(node)
        if not isinstance(axes, Sequence) or sorted(a % 4 for a in axes) != [2, 3]:
            raise self._unsupported(node, "mean over other axes than height and width")
        keep = bool(self.argument(node, 2, "keepdim", False))
        return self.average(node, (height, width), (height, width), 0, keep=keep)

    def max_pool(self, node: fx.Node, kernel: Any, stride: Any, padding: Any, plain: bool) -> str:
        self.image(node)
        if not plain:
            raise self._unsupported(node, "max pool with dilation, ceil_mode or indices")
        return self.emit(
            node, "maxpool", kernel=_pair(kernel), stride=_pair(stride or kernel), padding=_symmetric(padding)
        )

    def max_pool_module(self, node: fx.Node, module: nn.MaxPool2d) -> str:
        plain = _pair(module.dilation) == (1, 1) and not module.ceil_mode and not module.return_indices
        return self.max_pool(node, module.kernel_size, module.stride, module.padding, plain)

    def max_pool_function(self, node: fx.Node) -> str:
        kernel = self.argument(node, 1, "kernel_size", None)
        plain = _pair(self.argument(node, 4, "dilation", 1)) == (1, 1) and not self.argument(
            node, 5, "ceil_mode", False
        )
        return self.max_pool(
            node, kernel, self.argument(node, 2, "stride", None), self.argument(node, 3, "padding", 0), plain
        )

    def zero_pad(self, node: fx.Node, module: nn.Module) -> str:
        return self.pad_amounts(node, tuple(int(v) for v in module.padding))  # type: ignore[union-attr]

    def pad(self, node: fx.Node) -> str:
        amounts = tuple(self.argument(node, 1, "pad", ()))
        mode, value = self.argument(node, 2, "mode", "constant"), self.argument(node, 3, "value", 0)
        if mode != "constant" or value not in (None, 0):
            raise self._unsupported(node, f"padding with mode {mode!r} and value {value!r}")
        return self.pad_amounts(node, amounts)

    def pad_amounts(self, node: fx.Node, amounts: tuple[int, ...]) -> str:
        name, (channels, height, width) = self.image(node)
        if len(amounts) > 6 or min(amounts, default=0) < 0:
            raise self._unsupported(node, f"padding amounts {amounts}")
        left, right, top, bottom, before, after = (*amounts, *(0,) * (6 - len(amounts)))
        if any((left, right, top, bottom)):
            shape = (channels, height + top + bottom, width + left + right)
            name = self._put(
                Node(f"{node.name}.spatial", "pad", (name,), shape, attrs={"padding": (top, bottom, left, right)})
            )
        if before or after:
            attrs = {"before": before, "after": after}
            name = self._put(Node(f"{node.name}.channels", "padchannels", (name,), self._shape(node), attrs=attrs))
        return name

    def getitem(self, node: fx.Node) -> str:
        name = self.source(node)
        index = self.argument(node, 1, "index", ())
        index = index if isinstance(index, tuple) else (index,)
        shape = self.nodes[name].shape
        if len(shape) != 3 or not all(isinstance(i, slice) for i in index) or index[0] != slice(None):
            raise self._unsupported(node, f"indexing with {index}")
        padded = (*index[1:], *(slice(None),) * (4 - len(index)))
        bounds = [s.indices(size) for s, size in zip(padded, shape, strict=True)]
        if any(step <= 0 for _, _, step in bounds):
            raise self._unsupported(node, f"indexing with {index}")
        return self.emit(node, "slice", channels=bounds[0], rows=bounds[1], columns=bounds[2])


_MODULES: dict[Any, Callable[[_Builder, fx.Node, Any], str]] = {
    nn.Conv2d: _Builder.conv,
    nn.Linear: _Builder.linear,
    (nn.BatchNorm2d, nn.BatchNorm1d): _Builder.batch_norm,
    nn.ReLU: lambda b, n, m: b.relu(n),
    nn.ReLU6: lambda b, n, m: b.relu(n, 6.0),
    nn.MaxPool2d: _Builder.max_pool_module,
    nn.AvgPool2d: _Builder.avg_pool_module,
    nn.AdaptiveAvgPool2d: lambda b, n, m: b.adaptive(n, m.output_size),
    nn.ZeroPad2d: _Builder.zero_pad,
    nn.Flatten: _Builder.flatten,
    (nn.Identity, nn.Dropout, nn.Dropout2d): _Builder.identity,
}

_FUNCTIONS: dict[Any, Callable[[_Builder, fx.Node], str]] = {
    F.relu: lambda b, n: b.relu(n),
    torch.relu: lambda b, n: b.relu(n),
    F.relu6: lambda b, n: b.relu(n, 6.0),
    operator.add: _Builder.add,
    operator.iadd: _Builder.add,
    torch.add: _Builder.add,
    torch.flatten: _Builder.flatten,
    torch.reshape: _Builder.flatten,
    torch.mean: _Builder.mean,
    F.avg_pool2d: _Builder.avg_pool,
    F.adaptive_avg_pool2d: lambda b, n: b.adaptive(n, b.argument(n, 1, "output_size", None)),
    F.max_pool2d: _Builder.max_pool_function,
    F.pad: _Builder.pad,
    operator.getitem: _Builder.getitem,
    F.dropout: _Builder.identity,
}

_METHODS: dict[str, Callable[[_Builder, fx.Node], str]] = {
    "relu": lambda b, n: b.relu(n),
    "relu_": lambda b, n: b.relu(n),
    "add": _Builder.add,
    "add_": _Builder.add,
    "view": _Builder.flatten,
    "reshape": _Builder.flatten,
    "flatten": _Builder.flatten,
    "mean": _Builder.mean,
    "contiguous": _Builder.identity,
    "clone": _Builder.identity,
}
