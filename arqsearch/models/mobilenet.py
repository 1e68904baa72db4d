"""MobileNetV2 (Sandler et al. 2018), with torchvision's layout and key names."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from arqsearch.errors import ArqError, nearest

#: Expansion, output channels, repeats, stride of the first (table 2 of the paper).
SETTINGS = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


def conv_bn(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU6."""
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU6())


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, linear 1×1 projection; a shortcut where shapes agree.

    :param in_channels: of the input.
    :param channels: of the output.
    :param stride: of the depthwise convolution.
    :param expansion: inner width = expansion · in_channels; 1 leaves the first convolution out.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.shortcut = stride == 1 and in_channels == channels
        expand = [] if expansion == 1 else [conv_bn(in_channels, inner, 1)]
        depthwise = conv_bn(inner, inner, 3, stride, groups=inner)
        project = nn.Conv2d(inner, channels, 1, bias=False)
        self.conv = nn.Sequential(*expand, depthwise, project, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, channels, H/stride, W/stride)``."""
        out: Tensor = self.conv(x)
        return x + out if self.shortcut else out


class MobileNetV2(nn.Module):
    """Stem, inverted residuals, 1×1 head, average over the image, dropout, linear layer.

    :param num_classes: width of the logits.
    :param strides: stride 2 in the stem and in four stages (imagenet), or in the last three of these only (cifar).
    :param width_mult: factor on all widths, rounded to multiples of 8.
    :param in_channels: of the images.
    """

    def __init__(self, num_classes: int, strides: str, width_mult: float, in_channels: int) -> None:
        super().__init__()
        small = strides == "cifar"
        width = multiple_of_8(32 * width_mult)
        features: list[nn.Module] = [conv_bn(in_channels, width, 3, 1 if small else 2)]
        for stage, (expansion, planes, repeats, stride) in enumerate(SETTINGS):
            channels = multiple_of_8(planes * width_mult)
            first = 1 if small and stage == 1 else stride
            for index in range(repeats):
                features.append(InvertedResidual(width, channels, 1 if index else first, expansion))
                width = channels
        last = multiple_of_8(1280 * max(1.0, width_mult))
        features.append(conv_bn(width, last, 1))
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits

    def folded_layers(self) -> dict[str, tuple[str, str | None]]:
        """Names that weight files with folded batch norm use, each with its layer and batch norm here."""
        last = len(self.features) - 1
        names: dict[str, tuple[str, str | None]] = {"classifier": ("classifier.1", None)}
        for index, module in enumerate(self.features):
            if index in (0, last):
                names[f"features.{index}"] = (f"features.{index}.0", f"features.{index}.1")
                continue
            assert isinstance(module, InvertedResidual)
            project = len(module.conv) - 2
            for part, name in enumerate(("expand", "depthwise")[2 - project :]):
                place = f"features.{index}.conv.{part}"
                names[f"features.{index}.{name}"] = (f"{place}.0", f"{place}.1")
            place = f"features.{index}.conv"
            names[f"features.{index}.project"] = (f"{place}.{project}", f"{place}.{project + 1}")
        return names


def multiple_of_8(value: float) -> int:
    """The multiple of 8 nearest to `value`, at least 8, and not below 90 % of it."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def mobilenet_v2(
    num_classes: int,
    *,
    strides: Literal["imagenet", "cifar"] = "imagenet",
    width_mult: float = 1.0,
    in_channels: int = 3,
) -> nn.Module:
    """MobileNetV2.

    :param strides: imagenet divides the image by 32, cifar by 8.
    :param width_mult: factor on all widths.
    :raises ArqError: for other strides.
    """
    if strides not in ("imagenet", "cifar"):
        raise ArqError(f"model.options.strides is {strides!r}. {nearest(str(strides), ['imagenet', 'cifar'])}")
    return MobileNetV2(num_classes, strides, width_mult, in_channels)
