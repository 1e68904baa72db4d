"""Every registered network: shapes, sizes, tracing, options; and the user's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from arqsearch import models
from arqsearch.errors import ArqError
from arqsearch.quantize.trace import trace

#: Images, classes, parameters, MACs: the large networks as published, the small ones worked out by hand.
CIFAR = (32, 32, 3)
IMAGENET = (224, 224, 3)
DIGITS = (8, 8, 1)
MNIST = (28, 28, 1)
FACTS = {
    "resnet20": (CIFAR, 10, 269_722, 40_551_040),
    "resnet32": (CIFAR, 10, 464_154, 68_862_592),
    "resnet44": (CIFAR, 10, 658_586, 97_174_144),
    "resnet56": (CIFAR, 10, 853_018, 125_485_696),
    "resnet110": (CIFAR, 10, 1_727_962, 252_887_680),
    "resnet18": (IMAGENET, 1000, 11_689_512, 1_814_073_344),
    "resnet34": (IMAGENET, 1000, 21_797_672, 3_663_761_408),
    "resnet50": (IMAGENET, 1000, 25_557_032, 4_089_184_256),
    "mobilenet_v2": (IMAGENET, 1000, 3_504_872, 300_774_272),
    "efficientnet_lite0": (IMAGENET, 1000, 4_652_008, 385_187_552),
    "cnn_tiny": (DIGITS, 10, 1_922, 6_400),
    "cnn_small": (DIGITS, 10, 23_034, 128_640),
    "cnn_medium": (DIGITS, 10, 237_738, 973_824),
    "cnn_residual": (DIGITS, 10, 4_962, 133_792),
    "cnn_qaibp": (CIFAR, 10, 582_282, 12_079_104),
    "cnn_qaibp_small": (MNIST, 10, 235_290, 1_070_080),
}


def test_the_table_is_the_registry() -> None:
    assert sorted(FACTS) == models.available()


@pytest.mark.parametrize("name", FACTS)
def test_parameters_and_macs(name: str) -> None:
    (height, width, channels), classes, parameters, macs = FACTS[name]
    model = models.build(name, classes, **models.image_options(name, (height, width, channels)))
    assert sum(p.numel() for p in model.parameters()) == parameters
    layers = trace(model, (channels, height, width)).layer_infos()
    assert sum(layer.macs for layer in layers) == macs


@pytest.mark.parametrize("name", FACTS)
def test_a_traced_network_computes_the_same(name: str) -> None:
    shape = FACTS[name][0] if name.startswith("cnn") else CIFAR
    model = models.build(name, 7, **models.image_options(name, shape)).eval()
    images = torch.randn(2, shape[2], *shape[:2])
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (2, 7)
        assert torch.equal(fx.symbolic_trace(model)(images), logits)


def test_resnet20_has_the_weights_that_costs_are_stated_for() -> None:
    model = models.build("resnet20", 10)
    weights = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert (len(weights), sum(weights)) == (20, 268_336)


def test_option_a_shortcut_takes_every_second_pixel_between_zero_channels() -> None:
    block = models.build("resnet20", 10).get_submodule("layer2.0").eval()
    nn.init.zeros_(block.get_submodule("bn2").weight)
    x = torch.rand(1, 16, 4, 6)
    with torch.no_grad():
        out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_cifar_strides_keep_the_image_four_times_larger() -> None:
    with torch.no_grad():
        images = torch.randn(1, 3, 32, 32)
        assert models.build("mobilenet_v2", 10).eval().get_submodule("features")(images).shape[2:] == (1, 1)
        small = models.build("mobilenet_v2", 10, strides="cifar", width_mult=0.5).eval()
        assert small.get_submodule("features")(images).shape == (1, 1280, 4, 4)
    assert small.get_submodule("features.0.0").weight.shape[0] == 16


@pytest.mark.parametrize("size", [31, 32, 37, 224])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2)])
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int) -> None:
    from arqsearch.models.efficientnet_lite import SamePad

    left, right, top, bottom = SamePad(size, kernel, stride).padding
    assert (left, right) == (top, bottom)
    assert right - left in (0, 1), "the odd pixel goes to the right"
    assert (size + left + right - kernel) // stride + 1 == -(-size // stride)
    assert (size + left + right - kernel) % stride == 0, "not one pixel more than needed"


@pytest.mark.parametrize("name", ["cnn_tiny", "cnn_small", "cnn_medium"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (12, 20, 2)])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_small_family_takes_any_image(name: str, shape: tuple[int, int, int], batch_norm: bool) -> None:
    options = models.image_options(name, shape)
    model = models.build(name, 4, **options, width=6, batch_norm=batch_norm).eval()
    assert model(torch.zeros(1, shape[2], *shape[:2])).shape == (1, 4)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) is batch_norm
    first = model.get_submodule("conv1")
    assert (first.weight.shape[0], first.bias is None) == (6, batch_norm)


def test_wrong_names_and_options() -> None:
    with pytest.raises(ArqError, match="Did you mean 'resnet20'"):
        models.build("resnet-20", 10)
    with pytest.raises(ArqError, match="Did you mean 'width_mult'"):
        models.build("mobilenet_v2", 10, width_multi=0.5)
    with pytest.raises(ArqError, match="no option 'depth'"):
        models.build("resnet20", 10, depth=32)
    with pytest.raises(ArqError, match="Did you mean 'cifar'"):
        models.build("mobilenet_v2", 10, strides="cifar10")
    with pytest.raises(ArqError, match="use 8"):
        models.build("resnet20", 10, width=7)
    with pytest.raises(ArqError, match="too small for cnn_medium"):
        models.build("cnn_medium", 10, image_size=1)
    with pytest.raises(ArqError, match="square images"):
        models.image_options("efficientnet_lite0", (32, 40, 3))


def test_normalization_defaults() -> None:
    assert models.default_normalization("resnet20").mean == (0.485, 0.456, 0.406)
    assert models.default_normalization("mobilenet_v2").std == (0.229, 0.224, 0.225)
    lite = models.default_normalization("efficientnet_lite0")
    assert [(x / 255 - lite.mean[0]) / lite.std[0] for x in (127, 255)] == pytest.approx([0, 1])
    assert models.default_normalization("cnn_small", 1) == models.Normalization((0.5,), (0.25,))
    assert models.default_normalization("resnet20", 1).mean == (0.5,)
    assert models.default_normalization("mine:net", 2).std == (0.25, 0.25)
    with pytest.raises(ArqError, match="Did you mean 'resnet20'"):
        models.default_normalization("resnet_20")
    with pytest.raises(ArqError, match="must be positive"):
        models.Normalization((0.5,), (0.0,))
    with pytest.raises(ArqError, match="3 channels but std 1"):
        models.Normalization((0.5,) * 3, (0.1,))


# ---- the user's own network --------------------------------------------------------------------

OWN = """
from torch import nn

def net(num_classes, hidden=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

def fixed():
    return nn.Linear(3, 2)

def needy(num_classes, depth):
    return nn.Linear(depth, num_classes)

def anything(**options):
    return nn.Linear(options["width"], options["num_classes"])

def not_a_network():
    return [1, 2]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "arq_own_nets.py").write_text(OWN)
    (tmp_path / "arq_needs_more.py").write_text("import arq_absent_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("arq_own_nets", "arq_needs_more"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("own")
def test_own_networks_are_found_in_the_current_folder() -> None:
    model = models.build("arq_own_nets:net", 5, hidden=6)
    assert model(torch.zeros(2, 3, 2, 2)).shape == (2, 5)
    assert models.build("arq_own_nets:fixed", 5).get_parameter("weight").shape == (2, 3)
    assert models.build("arq_own_nets:anything", 5, width=9).get_parameter("weight").shape == (5, 9)
    assert models.image_options("arq_own_nets:net", (8, 8, 1)) == {}


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("arq_own_nets:nett", {}, "no function 'nett'.*Did you mean 'net'"),
        ("arq_own_net:net", {}, "No module 'arq_own_net'"),
        ("arq_needs_more:net", {}, "Importing arq_needs_more failed: No module named 'arq_absent_package'"),
        ("arq_own_nets:", {}, "package.module:function"),
        ("arq_own_nets:net", {"hiden": 3}, "no argument 'hiden'.*Did you mean 'hidden'"),
        ("arq_own_nets:needy", {}, r"needs the argument 'depth'; set model\.options\.depth"),
        ("arq_own_nets:not_a_network", {}, "returned a list"),
    ],
)
def test_what_is_wrong_with_an_own_network_is_said(target: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ArqError, match=message):
        models.build(target, 5, **options)


def test_a_cnn_takes_layers_of_its_own() -> None:
    """The networks of Lechner et al. by their published lists, and options that change one thing."""
    options = {"in_channels": 1, "image_size": 28, "batch_norm": False}
    listed = models.build("cnn_small", 10, convs=[[48, 5, 2], [64, 3, 2]], dense=[128], padding=0, **options)
    named = models.build("cnn_qaibp_small", 10, **options)
    shapes = [{key: value.shape for key, value in net.state_dict().items()} for net in (listed, named)]
    assert shapes[0] == shapes[1]
    assert models.build("cnn_qaibp", 10, dense=[], **options).get_submodule("fc1").in_features == 4 * 4 * 128
    wide = models.build("cnn_qaibp", 10, width=16, padding=1, **options)
    assert [m.out_channels for m in wide.modules() if isinstance(m, nn.Conv2d)] == [32, 48, 64]
    with pytest.raises(ArqError, match="kernel, stride"):
        models.build("cnn_qaibp", 10, convs=[[48, 5]], **options)
    with pytest.raises(ArqError, match="too small"):
        models.build("cnn_qaibp", 10, in_channels=1, image_size=8)
