"""Weight files: round trips, foreign layouts, refusals, and the accuracy of the published weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arqsearch import data, models
from arqsearch.data import Dataset
from arqsearch.errors import ArqError

Finder = Callable[[str], Path]


def tiny(seed: int, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = models.build("cnn_residual", 3, in_channels=1, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.get_buffer("running_mean"))
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8))
    return result


def accuracy(name: str, weights: Path, images: Dataset) -> float:
    """Part of the images that the network classifies correctly, in per cent."""
    shape = (images.images.shape[1], images.images.shape[2], images.images.shape[3])
    model = models.build(name, images.num_classes, **models.image_options(name, shape)).eval()
    models.load_weights(model, weights)
    normal = models.default_normalization(name)
    pixels = (images.images / 255 - np.array(normal.mean)) / np.array(normal.std)
    with torch.no_grad():
        predicted = model(torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)).argmax(1)
    return 100 * float((predicted.numpy() == images.labels).mean())


def test_round_trip_with_metadata(tmp_path: Path) -> None:
    source, target = tiny(0), tiny(1)
    models.save_weights(source, tmp_path / "new" / "net.safetensors", {"sigma": "0.25"})
    models.load_weights(target, tmp_path / "new" / "net.safetensors")
    assert torch.equal(logits(source), logits(target))
    with safe_open(tmp_path / "new" / "net.safetensors", "pt") as file:
        assert file.metadata()["sigma"] == "0.25"


@pytest.mark.parametrize("wrap", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_torch_files_as_training_scripts_write_them(tmp_path: Path, wrap: str, prefix: str, suffix: str) -> None:
    source, target = tiny(0), tiny(1)
    tensors = OrderedDict((prefix + key, value) for key, value in source.state_dict().items())
    torch.save({wrap: tensors, "epoch": 3} if wrap else tensors, tmp_path / f"net{suffix}")
    models.load_weights(target, tmp_path / f"net{suffix}")
    assert torch.equal(logits(source), logits(target))


def test_a_pickled_model_is_refused_and_its_code_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Trap()}, tmp_path / "net.pt")
    with pytest.raises(ArqError, match=r"more than tensors.*state_dict"):
        models.load_weights(tiny(0), tmp_path / "net.pt")
    assert not (tmp_path / "ran").exists()


def test_wrong_keys_and_shapes_are_named(tmp_path: Path) -> None:
    tensors = tiny(0).state_dict()
    tensors["fc.weight"] = tensors.pop("linear.weight")
    tensors["linear.bias"] = torch.zeros(5)
    save_file(tensors, tmp_path / "net.safetensors")
    model = tiny(1)
    before = logits(model)
    with pytest.raises(ArqError) as caught:
        models.load_weights(model, tmp_path / "net.safetensors")
    message = str(caught.value)
    assert "1 missing: linear.weight (Did you mean 'fc.weight'?)" in message
    assert "1 unexpected: fc.weight" in message
    assert "linear.bias is (5,), expected (3,)" in message
    assert torch.equal(logits(model), before), "a refused file changes nothing"


def test_long_lists_are_cut(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "net.safetensors")
    with pytest.raises(ArqError, match=r"missing: conv1\.weight, bn1\.weight, bn1\.bias, bn1\.running_mean, \.\.\.;"):
        models.load_weights(tiny(0), tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("net.safetensors", None, "No weights at"),
        ("net.safetensors", b"\x00" * 4, "cannot be read as safetensors"),
        ("net.pt", b"PK\x03\x04 cut", "cannot be read as a torch file|more than tensors"),
        ("net.onnx", b"x", r"unknown ending; use \.safetensors"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ArqError, match=message):
        models.load_weights(tiny(0), tmp_path / name)


def test_a_torch_file_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "net.pt")
    with pytest.raises(ArqError, match="no dictionary of tensors"):
        models.load_weights(tiny(0), tmp_path / "net.pt")


def folded_file(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Random int8 weights in the layout of the published file, for this network."""
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for source, (layer, _) in model.folded_layers().items():  # type: ignore[operator]
        shape = model.get_submodule(layer).weight.shape
        rows = 1 if source == "classifier" else shape[0]
        tensors[f"{source}.weight"] = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
        tensors[f"{source}.weight_scale"] = torch.rand(rows, generator=generator) / 1000
        tensors[f"{source}.weight_zero_point"] = torch.randint(-3, 4, (rows,), generator=generator, dtype=torch.int32)
        tensors[f"{source}.bias"] = torch.randn(shape[0], generator=generator)
    save_file(tensors, path)
    return tensors


def test_folded_int8_layers_become_ordinary_ones(tmp_path: Path) -> None:
    model = models.build("mobilenet_v2", 4, strides="cifar", width_mult=0.25).eval()
    tensors = folded_file(tmp_path / "int8.safetensors", model)
    models.load_weights(model, tmp_path / "int8.safetensors")
    for source, (layer, norm) in model.folded_layers().items():  # type: ignore[operator]
        conv = model.get_submodule(layer)
        scale, zero = (tensors[f"{source}.weight_{part}"] for part in ("scale", "zero_point"))
        column = (-1, *(1,) * (conv.weight.ndim - 1))
        codes = tensors[f"{source}.weight"].double() - zero.reshape(column)
        torch.testing.assert_close(conv.weight.double(), codes * scale.reshape(column), rtol=1e-6, atol=0)
        x = torch.randn(1, conv.weight.shape[0], 2, 2)
        if norm:
            expected = x + tensors[f"{source}.bias"].reshape(1, -1, 1, 1)
            torch.testing.assert_close(model.get_submodule(norm)(x), expected)
        else:
            assert torch.equal(conv.bias, tensors[f"{source}.bias"])


def test_folded_files_that_do_not_fit(tmp_path: Path) -> None:
    model = models.build("mobilenet_v2", 4, width_mult=0.25)
    tensors = folded_file(tmp_path / "int8.safetensors", model)
    with pytest.raises(ArqError, match="such files fit mobilenet_v2"):
        models.load_weights(tiny(0), tmp_path / "int8.safetensors")
    del tensors["features.3.expand.bias"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(ArqError, match=r"lacks 'features\.3\.expand\.bias'"):
        models.load_weights(model, tmp_path / "cut.safetensors")


# ---- the published weights ---------------------------------------------------------------------


def test_resnet20_weights(shared_data: Finder) -> None:
    images = data.load("cifar10", "test", path=shared_data("data/cifar10/test_lossless_1000.parquet"))
    weights = shared_data("weights/resnet20_cifar10.safetensors")
    assert accuracy("resnet20", weights, images.subset(range(200))) > 85


@pytest.mark.parametrize("sigma", ["025", "050"])
def test_noise_trained_resnet20_weights(shared_data: Finder, sigma: str) -> None:
    images = data.load("cifar10", "test", path=shared_data("data/cifar10/test_lossless_1000.parquet"))
    weights = shared_data(f"weights/resnet20_cifar10_noise_s{sigma}.safetensors")
    assert accuracy("resnet20", weights, images.subset(range(100))) > 50


@pytest.mark.parametrize(
    ("name", "weights"),
    [("mobilenet_v2", "mobilenetv2_imagenet_int8"), ("efficientnet_lite0", "efficientnet_lite0_imagenet")],
)
def test_imagenet_weights(shared_data: Finder, name: str, weights: str) -> None:
    images = data.load("imagenet", "test", path=shared_data("data/imagenet-sample"))
    assert accuracy(name, shared_data(f"weights/{weights}.safetensors"), images.subset(range(0, 500, 16))) > 60


def test_saved_keys_are_those_of_the_published_file(shared_data: Finder, tmp_path: Path) -> None:
    published = load_file(shared_data("weights/resnet20_cifar10.safetensors"))
    models.save_weights(models.build("resnet20", 10), tmp_path / "net.safetensors")
    saved = load_file(tmp_path / "net.safetensors")
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in published.items()}
