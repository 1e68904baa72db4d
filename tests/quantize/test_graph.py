"""Tracing: every supported construct computes the same, streams are where they belong, the rest is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arqsearch import models
from arqsearch.quantize.graph import LayerGraph
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.quantize.trace import trace

SHAPE = (2, 8, 8)
Body = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A convolution, what a test puts between, and a linear head over whatever comes out."""

    def __init__(self, body: Body, features: int = 4, **parts: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.body = body
        for name, part in parts.items():
            self.add_module(name, part)
        self.last = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.body(self, x))
        return out


def pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def settle(model: nn.Module) -> nn.Module:
    """Batch norm statistics that matter."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
            module.running_mean.normal_(0.0, 0.2)
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()


# ---- what is supported computes the same ------------------------------------------------------


def add_in_place(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.first(x))
    y = net.second(x)
    y += x
    return pooled(torch.relu(y))


def sized_view(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    return x.view(x.size(0), -1)


def eval_branch(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    return pooled(net.second(x) if net.training else F.relu(x))


FLAT = 4 * 8 * 8
#: Between the layers, number of features at the head, further modules.
CONSTRUCTS: dict[str, tuple[Body, int, dict[str, nn.Module]]] = {
    "batch norm": (lambda n, x: pooled(n.bn(n.first(x))), 4, {"bn": nn.BatchNorm2d(4)}),
    "batch norm 1d": (
        lambda n, x: F.relu(n.bn(n.fc(pooled(n.first(x))))), 5, {"fc": nn.Linear(4, 5), "bn": nn.BatchNorm1d(5)},
    ),
    "relu module": (lambda n, x: pooled(n.act(n.first(x))), 4, {"act": nn.ReLU()}),
    "relu in place": (lambda n, x: pooled(n.act(n.first(x))), 4, {"act": nn.ReLU(inplace=True)}),
    "relu function": (lambda n, x: pooled(F.relu(input=n.first(x))), 4, {}),
    "relu method": (lambda n, x: pooled(n.first(x).relu()), 4, {}),
    "relu in-place method": (lambda n, x: pooled(n.first(x).relu_()), 4, {}),
    "relu6 module": (lambda n, x: pooled(n.act(n.first(x))), 4, {"act": nn.ReLU6()}),
    "relu6 function": (lambda n, x: pooled(F.relu6(n.first(x))), 4, {}),
    "relu after relu6": (lambda n, x: pooled(F.relu(F.relu6(n.first(x)))), 4, {}),
    "relu after pool and pad": (lambda n, x: pooled(F.relu(F.pad(F.max_pool2d(n.first(x), 2), (1, 0, 2, 1)))), 4, {}),
    "relu after average": (lambda n, x: pooled(F.relu(F.avg_pool2d(n.first(x), 2))), 4, {}),
    "relu of a shared value": (lambda n, x: (lambda y: pooled(F.relu(y) + y))(n.first(x)), 4, {}),
    "relu of a shared slice": (
        lambda n, x: (lambda y: pooled(F.relu(y[:, :, ::2, ::2])) + pooled(y))(n.first(x)), 4, {},
    ),
    "add operator": (lambda n, x: (lambda y: pooled(y + n.second(y)))(F.relu(n.first(x))), 4, {}),
    "add function": (lambda n, x: (lambda y: pooled(torch.add(y, n.second(y))))(n.first(x)), 4, {}),
    "add method": (lambda n, x: (lambda y: pooled(n.second(y).add(y)))(n.first(x)), 4, {}),
    "add in place": (add_in_place, 4, {}),
    "add to itself": (lambda n, x: (lambda y: pooled(y + y))(n.first(x)), 4, {}),
    "add flat": (lambda n, x: (lambda y: y + n.fc(y))(pooled(n.first(x))), 4, {"fc": nn.Linear(4, 4)}),
    "average module": (lambda n, x: n.pool(n.first(x)).flatten(1), 16, {"pool": nn.AvgPool2d(4)}),
    "average, padded": (lambda n, x: n.pool(n.first(x)).flatten(1), 64, {"pool": nn.AvgPool2d(3, 2, 1)}),
    "average function": (lambda n, x: F.avg_pool2d(n.first(x), (2, 4), padding=(0, 1)).flatten(1), 32, {}),
    "adaptive module": (lambda n, x: n.pool(n.first(x)).flatten(1), 8, {"pool": nn.AdaptiveAvgPool2d((2, 1))}),
    "adaptive, one axis": (lambda n, x: F.adaptive_avg_pool2d(n.first(x), (None, 1)).flatten(1), 32, {}),
    "mean": (lambda n, x: n.first(x).mean((2, 3)), 4, {}),
    "mean, kept": (lambda n, x: torch.mean(n.first(x), dim=[-1, -2], keepdim=True).flatten(1), 4, {}),
    "max module": (lambda n, x: pooled(n.pool(n.first(x))), 4, {"pool": nn.MaxPool2d(3, 2, 1)}),
    "max function": (lambda n, x: pooled(F.max_pool2d(n.first(x), 3, stride=1, padding=1)), 4, {}),
    "zero pad module": (lambda n, x: pooled(n.second(n.pad(n.first(x)))), 4, {"pad": nn.ZeroPad2d((0, 1, 2, 3))}),
    "pad function": (lambda n, x: pooled(F.pad(n.first(x), (1, 2))), 4, {}),
    "pad channels": (lambda n, x: pooled(F.pad(n.first(x), (0, 1, 0, 0, 1, 2))), 7, {}),
    "pad images": (lambda n, x: pooled(n.first(F.pad(x, (1, 0, 1, 0)))), 4, {}),
    "strided slice": (lambda n, x: pooled(n.first(x)[:, :, ::2, 1:-1:3]), 4, {}),
    "channel slice": (lambda n, x: pooled(n.first(x)[:, 1:3]), 2, {}),
    "flatten module": (lambda n, x: n.flat(n.first(x)), FLAT, {"flat": nn.Flatten()}),
    "flatten function": (lambda n, x: torch.flatten(n.first(x), 1), FLAT, {}),
    "view": (sized_view, FLAT, {}),
    "reshape": (lambda n, x: torch.reshape(n.first(x), (-1, FLAT)), FLAT, {}),
    "dropout and identity": (
        lambda n, x: n.same(n.drop(F.dropout(pooled(n.first(x)), training=n.training))), 4,
        {"drop": nn.Dropout(0.5), "same": nn.Identity()},
    ),
    "in-place relu after dropout": (lambda n, x: n.act(n.drop(pooled(n.first(x)))), 4,
                                    {"drop": nn.Dropout(), "act": nn.ReLU(inplace=True)}),
    "same padding": (lambda n, x: pooled(n.conv(n.first(x))), 5, {"conv": nn.Conv2d(4, 5, (2, 4), padding="same")}),
    "asymmetric strides": (
        lambda n, x: pooled(n.conv(n.first(x))), 6,
        {"conv": nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), groups=2, bias=False)},
    ),
    "depthwise, twice as wide": (
        lambda n, x: pooled(n.conv(n.first(x))), 8, {"conv": nn.Conv2d(4, 8, 3, padding=1, groups=4)},
    ),
    "one activation module, two uses": (
        lambda n, x: pooled(n.act(n.second(n.act(n.first(x))))), 4, {"act": nn.ReLU()},
    ),
    "self.training": (eval_branch, 4, {}),
    "layers named like functions": (
        lambda n, x: (lambda y: pooled(F.relu(y) + n.relu(n.add(y))))(n.first(x)), 4,
        {"add": nn.Conv2d(4, 4, 1), "relu": nn.Conv2d(4, 4, 1)},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONSTRUCTS)
def test_float_mode_computes_what_the_module_computes(name: str) -> None:
    body, features, parts = CONSTRUCTS[name]
    torch.manual_seed(0)
    model = settle(Net(body, features, **parts))
    with torch.no_grad():
        model.first.weight.mul_(6.0)  # type: ignore[union-attr, operator]  # So that ReLU6 clips.
    net = QuantizedNet(model.train(), SHAPE, (0.4, 0.5), (0.25, 0.3), QuantizeSettings()).eval()
    net.quantized = False
    pixels = torch.randint(0, 256, (3, *SHAPE)).float()
    normal = (pixels / 255 - torch.tensor([0.4, 0.5]).reshape(1, 2, 1, 1)) / torch.tensor([0.25, 0.3]).reshape(
        1, 2, 1, 1
    )
    with torch.no_grad():
        # In-place modules change their own intermediate tensors only, so the module comes second.
        got, expected = net(pixels), model.eval()(normal)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    # Quantized to 8 bits it is still about the same function.
    net.calibrate([pixels])
    net.quantized = True
    with torch.no_grad():
        assert (net(pixels) - expected).abs().mean() < 0.1 * expected.std() + 0.02


def test_relu6_clips_in_that_test() -> None:
    model = settle(Net(lambda n, x: pooled(F.relu6(n.first(x)))))
    with torch.no_grad():
        model.first.weight.mul_(6.0)  # type: ignore[union-attr, operator]
        assert model.first(torch.full((1, *SHAPE), 2.0)).max() > 6  # type: ignore[operator]


# ---- placement --------------------------------------------------------------------------------


def graph(body: Body, features: int = 4, **parts: nn.Module) -> LayerGraph:
    return trace(Net(body, features, **parts), SHAPE)


def test_a_value_with_one_reading_layer_takes_that_layers_bits() -> None:
    g = graph(lambda n, x: pooled(n.second(F.max_pool2d(F.relu(n.first(x)), 2))))
    assert g.placement("input") == ("layer", "first")
    assert g.placement("first") == ("layer", "second"), "through the max pool"
    assert g.placement("second") == ("stream", "second"), "read by a pool"
    assert g.placement("adaptive_avg_pool2d") == ("layer", "last")
    assert g.placement("last") == ("output", "last")
    assert g.streams == ("second",)


def test_a_value_with_several_readers_and_every_sum_are_streams() -> None:
    def body(n: Net, x: Tensor) -> Tensor:
        x = F.relu(n.first(x))
        return pooled(F.relu(x + n.second(x)))

    g = graph(body)
    assert g.placement("first") == ("stream", "first")
    assert g.placement("second") == ("add", "add"), "the operand of a sum is requantized by the sum"
    assert g.placement("add") == ("stream", "add")
    assert g["add"].relu and g["first"].relu and not g["second"].relu
    assert g.streams == ("first", "add")


def test_a_sum_with_one_reading_layer_is_a_stream_all_the_same() -> None:
    g = graph(lambda n, x: n.fc(pooled(n.first(x)) + pooled(n.second(n.first2(x)))), fc=nn.Linear(4, 4),
              first2=nn.Conv2d(2, 4, 1))  # fmt: skip
    assert g.placement("add") == ("stream", "add")
    assert g.placement("input") == ("stream", "input"), "two layers read the image"


def test_an_operand_that_was_moved_first_is_a_stream() -> None:
    g = graph(lambda n, x: pooled(n.first(x)[:, :, ::2, ::2] + n.conv(n.second(x))),
              second=nn.Conv2d(2, 4, 1), conv=nn.Conv2d(4, 4, 3, 2, 1))  # fmt: skip
    assert g.placement("first") == ("stream", "first")
    assert g.placement("conv") == ("add", "add")


def test_signedness() -> None:
    def body(n: Net, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(n.first(x)), 2)
        y = n.second(x)
        return pooled(x + y)

    g = graph(body)
    assert not g.signed("first") and not g.signed("max_pool2d")
    assert g.signed("input") and g.signed("second") and g.signed("add")
    assert g.signed("adaptive_avg_pool2d"), "of a signed sum"
    g = graph(lambda n, x: pooled(F.pad(F.relu6(n.first(x)), (1, 1, 1, 1))))
    assert not g.signed("pad.spatial") and not g.signed("adaptive_avg_pool2d") and not g.signed("flatten")
    assert g["first"].cap == 6.0


def test_a_shared_value_keeps_its_sign_where_only_one_reader_activates_it() -> None:
    g = graph(lambda n, x: (lambda y: pooled(F.relu(y) + y))(n.first(x)))
    assert g.signed("first") and not g["first"].relu
    assert g["relu"].kind == "act" and not g.signed("relu")


# ---- facts of the layers ----------------------------------------------------------------------


def test_macs_count_padded_positions() -> None:
    deep, wide = nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.Conv2d(4, 6, (1, 2), padding=(0, 1))
    body: Body = lambda n, x: F.pad(n.wide(n.deep(n.first(x))), (1, 1, 1, 1)).flatten(1)  # noqa: E731
    g = graph(body, 6 * 6 * 7, deep=deep, wide=wide)
    infos = {info.name: info for info in g.layer_infos()}
    assert infos["first"].macs == 4 * 2 * 9 * 64
    info = infos["deep"]
    assert info.depthwise and (info.weights, info.macs) == (4 * 9, 4 * 9 * 16)
    assert (info.in_hw, info.out_hw, info.stride, info.groups) == ((8, 8), (4, 4), 2, 4)
    assert (infos["wide"].kernel, infos["wide"].kernel_w, infos["wide"].macs) == (1, 2, 6 * 4 * 2 * 4 * 5)
    assert infos["last"].kind == "linear" and infos["last"].macs == 3 * 6 * 6 * 7
    assert not infos["last"].depthwise


def test_macs_of_resnet20() -> None:
    infos = trace(models.build("resnet20", 10), (3, 32, 32)).layer_infos()
    assert len(infos) == 20
    assert sum(info.macs for info in infos) == 40_551_040
    assert infos[0].name == "conv1" and infos[-1].name == "linear"
    assert "layer2.0.conv1" in {info.name for info in infos}


def test_tracing_leaves_the_modes_as_they_are() -> None:
    model = Net(lambda n, x: pooled(n.bn(n.first(x))), bn=nn.BatchNorm2d(4)).train()
    model.get_submodule("bn").eval()
    mean = model.get_buffer("bn.running_mean").clone()
    trace(model, SHAPE)
    assert model.training and model.first.training and not model.get_submodule("bn").training
    assert torch.equal(model.get_buffer("bn.running_mean"), mean)
