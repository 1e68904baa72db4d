"""What cannot be converted is refused by name, with the line of the user's forward."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arqsearch.errors import ArqError
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.quantize.trace import trace
from tests.quantize.test_graph import FLAT, SHAPE, Body, Net, graph, pooled, sized_view


def sigmoid(n: Net, x: Tensor) -> Tensor:
    return pooled(torch.sigmoid(n.first(x)))  # here


def transposed(n: Net, x: Tensor) -> Tensor:
    return pooled(n.up(n.first(x)))  # here


def dilated(n: Net, x: Tensor) -> Tensor:
    return pooled(n.conv(n.first(x)))  # here


def broadcast(n: Net, x: Tensor) -> Tensor:
    x = n.first(x)
    return pooled(x + F.adaptive_avg_pool2d(x, 1))  # here


def constant(n: Net, x: Tensor) -> Tensor:
    return pooled(n.first(x) + 1)  # here


def scaled_sum(n: Net, x: Tensor) -> Tensor:
    x = n.first(x)
    return pooled(torch.add(x, n.second(x), alpha=2))  # here


def branch(n: Net, x: Tensor) -> Tensor:
    if x.sum() > 0:  # here
        return pooled(n.first(x))
    return pooled(n.second(x))


def loop(n: Net, x: Tensor) -> Tensor:
    return pooled(sum(n.first(part) for part in x))  # type: ignore[arg-type]  # here


def late_batch_norm(n: Net, x: Tensor) -> Tensor:
    return pooled(n.bn(F.relu(n.first(x))))  # here


def shared_batch_norm(n: Net, x: Tensor) -> Tensor:
    x = n.first(x)
    return pooled(n.bn(x) + x)  # here


def bare_batch_norm(n: Net, x: Tensor) -> Tensor:
    return pooled(n.bare(n.first(x)))  # here


def divisor(n: Net, x: Tensor) -> Tensor:
    return F.avg_pool2d(n.first(x), 8, divisor_override=3).flatten(1)  # here


def border(n: Net, x: Tensor) -> Tensor:
    return pooled(F.avg_pool2d(n.first(x), 3, 2, 1, count_include_pad=False))  # here


def uneven(n: Net, x: Tensor) -> Tensor:
    return pooled(F.adaptive_avg_pool2d(n.first(x), 3))  # here


def one_axis(n: Net, x: Tensor) -> Tensor:
    return n.first(x).mean(3).mean(2)  # here


def negative_pad(n: Net, x: Tensor) -> Tensor:
    return pooled(F.pad(n.first(x), (-1, 0, 0, 0)))  # here


def batch_pad(n: Net, x: Tensor) -> Tensor:
    return pooled(F.pad(n.first(x), (0, 0, 0, 0, 0, 0, 1, 0)))  # here


def reflected(n: Net, x: Tensor) -> Tensor:
    return pooled(F.pad(n.first(x), (1, 1, 1, 1), mode="reflect"))  # here


def ones(n: Net, x: Tensor) -> Tensor:
    return pooled(F.pad(n.first(x), (1, 1), value=1.0))  # here


def batch_slice(n: Net, x: Tensor) -> Tensor:
    return pooled(n.first(x)[:1])  # here


def across_batch(n: Net, x: Tensor) -> Tensor:
    return n.first(x).view(-1, 4)  # here


def joined(n: Net, x: Tensor) -> Tensor:
    x = n.first(x)
    return pooled(torch.cat([x[:, :2], x[:, 2:]], 1))  # here


def functional(n: Net, x: Tensor) -> Tensor:
    return pooled(F.conv2d(x, n.first.weight, padding=1))  # here


def dilated_max(n: Net, x: Tensor) -> Tensor:
    return pooled(F.max_pool2d(n.first(x), 2, dilation=2))  # here


REFUSED: list[tuple[Body, str, dict[str, nn.Module]]] = [
    (sigmoid, "operation 'sigmoid'", {}),
    (transposed, r"module ConvTranspose2d \(up\)", {"up": nn.ConvTranspose2d(4, 4, 2)}),
    (dilated, "dilation or padding mode of conv", {"conv": nn.Conv2d(4, 4, 3, dilation=2)}),
    (dilated, "dilation or padding mode of conv", {"conv": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")}),
    (broadcast, "addition that broadcasts", {}),
    (constant, "addition of something that is not a tensor", {}),
    (scaled_sum, "addition of something", {}),
    (branch, "must not branch on tensor values", {}),
    (loop, "cannot be traced", {}),
    (late_batch_norm, "batch norm bn that does not directly follow", {"bn": nn.BatchNorm2d(4)}),
    (shared_batch_norm, "batch norm bn that does not directly follow", {"bn": nn.BatchNorm2d(4)}),
    (bare_batch_norm, "batch norm bare without weights", {"bare": nn.BatchNorm2d(4, affine=False)}),
    (bare_batch_norm, "or running statistics", {"bare": nn.BatchNorm2d(4, track_running_stats=False)}),
    (bare_batch_norm, "module GroupNorm", {"bare": nn.GroupNorm(2, 4)}),
    (divisor, "divisor_override", {}),
    (border, "count_include_pad=False", {}),
    (uneven, "adaptive average pool from 8x8 to 3x3", {}),
    (one_axis, "mean over other axes", {}),
    (negative_pad, r"padding amounts \(-1, 0, 0, 0\)", {}),
    (batch_pad, "padding amounts", {}),
    (reflected, "padding with mode 'reflect'", {}),
    (ones, r"padding with mode 'constant' and value 1\.0", {}),
    (batch_slice, "indexing with", {}),
    (across_batch, "reshape from", {}),
    (joined, "operation 'cat'", {}),
    (functional, "operation 'conv2d'", {}),
    (dilated_max, "max pool with dilation", {}),
]


def line_of(body: Body) -> int:
    """Number of the line that ends with the mark."""
    lines, start = inspect.getsourcelines(body)
    return start + next(index for index, line in enumerate(lines) if line.rstrip().endswith("# here"))


@pytest.mark.parametrize(("body", "message", "parts"), REFUSED, ids=lambda v: getattr(v, "__name__", None))
def test_an_unsupported_operation_is_named_with_its_line(body: Body, message: str, parts: dict[str, Any]) -> None:
    with pytest.raises(ArqError, match=message) as error:
        graph(body, **parts)
    assert re.search(rf'File "[^"]*test_trace_errors\.py", line {line_of(body)}, in {body.__name__}', str(error.value))


def relu_then_read(n: Net, x: Tensor) -> Tensor:
    x = n.first(x)
    y = F.relu(x, inplace=True)
    return pooled(n.second(y) + x)  # here


def ignored_result(n: Net, x: Tensor) -> Tensor:
    x = n.first(x)
    x.add_(n.second(x))
    return pooled(x)  # here


def through_a_view(n: Net, x: Tensor) -> Tensor:
    x = n.first(x)
    half = x[:, 2:]
    half.relu_()
    return pooled(x)  # here


@pytest.mark.parametrize("body", [relu_then_read, ignored_result, through_a_view])
def test_a_value_changed_in_place_is_not_read_as_it_was(body: Body) -> None:
    """In the module the old name holds the new value; a graph that ignored that would be silently wrong."""
    inner = {"relu_then_read": "here", "ignored_result": "pooled", "through_a_view": "pooled"}[body.__name__]
    with pytest.raises(ArqError, match="after an in-place operation changed it") as error:
        graph(body)
    place = line_of(body) if inner == "here" else inspect.getsourcelines(pooled)[1] + 1
    assert f"line {place}, in" in str(error.value)


def test_a_layer_called_twice_and_names_that_are_taken() -> None:
    with pytest.raises(ArqError, match="Module 'first' is called twice"):
        graph(lambda n, x: pooled(n.first(F.pad(n.first(x)[:, :2], (0, 0)))))
    with pytest.raises(ArqError, match=r"called 'input'.*rename"):
        graph(lambda n, x: pooled(n.get_submodule("input")(x)), input=nn.Conv2d(2, 4, 1))


class Tail(nn.Module):
    """A head and what follows it."""

    def __init__(self, head: nn.Module, tail: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.head, self.tail = head, tail

    def forward(self, x: Tensor) -> Any:
        return self.tail(self.head(x))


@pytest.mark.parametrize(
    ("head", "tail", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), F.relu, "an activation on 'head.1'.*Remove what follows"),
        (nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), lambda x: x + x, r"\(add\).*must be a linear layer"),
        (nn.Conv2d(2, 3, 8), lambda x: x, r"'head' \(conv\)"),
        (nn.Conv2d(2, 3, 8), lambda x: x.flatten(1), r"\(flatten\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), lambda x: (x, x), "must return one tensor"),
    ],
)
def test_the_logits_come_from_a_linear_layer(head: nn.Module, tail: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ArqError, match=message):
        trace(Tail(head, tail), SHAPE)


def test_images_of_another_shape_are_refused_with_the_line_that_failed() -> None:
    with pytest.raises(
        ArqError, match=r"does not accept images of shape \(C, H, W\) = \(3, 8, 8\).*test_trace_errors\.py"
    ):
        trace(Net(lambda n, x: pooled(n.first(x))), (3, 8, 8))
    with pytest.raises(ArqError, match="does not accept images"):
        trace(Net(sized_view, FLAT), (2, 4, 4))
    with pytest.raises(ArqError, match="normalisation has 1 channels, the images 2"):
        QuantizedNet(Net(lambda n, x: pooled(n.first(x))), SHAPE, (0.5,), (0.5,), QuantizeSettings())
