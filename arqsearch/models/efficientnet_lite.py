"""EfficientNet-Lite0: inverted residuals with ReLU6, no squeeze-and-excitation, TensorFlow's "same" padding.

Architecture: Tan & Le 2019 and the "Lite" variants published with it; key names of the usual PyTorch ports.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

#: Repeats, kernel, stride of the first, expansion, output channels.
SETTINGS = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
BN_EPS = 1e-3


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm with TensorFlow's constants."""
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=0.01)


class SamePad(nn.ZeroPad2d):
    """TensorFlow's "same" padding for a given image size: the odd pixel goes to the bottom and right.

    :param size: height = width of the input.
    :param kernel: of the convolution that follows.
    :param stride: of the convolution that follows.
    """

    def __init__(self, size: int, kernel: int, stride: int) -> None:
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        before = total // 2
        super().__init__((before, total - before, before, total - before))


class MBConv(nn.Module):
    """1×1 expansion, depthwise, linear 1×1 projection; a shortcut where shapes agree.

    :param in_channels: of the input.
    :param channels: of the output.
    :param size: height = width of the input image.
    """

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, expansion: int, size: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.expands, self.shortcut = expansion != 1, stride == 1 and in_channels == channels
        if self.expands:
            self._expand_conv = nn.Conv2d(in_channels, inner, 1, bias=False)
            self._bn0 = batch_norm(inner)
        padding = kernel // 2 if stride == 1 else 0
        self._pad = SamePad(size, kernel, stride) if stride != 1 else nn.Identity()
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, padding, groups=inner, bias=False)
        self._bn1 = batch_norm(inner)
        self._project_conv = nn.Conv2d(inner, channels, 1, bias=False)
        self._bn2 = batch_norm(channels)
        self._relu6 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, channels, ⌈H/stride⌉, ⌈W/stride⌉)``."""
        out = self._relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        out = self._relu6(self._bn1(self._depthwise_conv(self._pad(out))))
        result: Tensor = self._bn2(self._project_conv(out))
        return x + result if self.shortcut else result


class EfficientNetLite(nn.Module):
    """Stem, inverted residuals, 1×1 head, average over the image, dropout, linear layer.

    :param num_classes: width of the logits.
    :param image_size: height = width of the images; it decides the padding.
    :param in_channels: of the images.
    """

    def __init__(self, num_classes: int, image_size: int, in_channels: int) -> None:
        super().__init__()
        self._pad = SamePad(image_size, 3, 2)
        self._conv_stem = nn.Conv2d(in_channels, 32, 3, 2, bias=False)
        self._bn0 = batch_norm(32)
        width, size, blocks = 32, math.ceil(image_size / 2), []
        for repeats, kernel, first, expansion, channels in SETTINGS:
            for index in range(repeats):
                stride = 1 if index else first
                blocks.append(MBConv(width, channels, kernel, stride, expansion, size))
                width, size = channels, math.ceil(size / stride)
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(width, 1280, 1, bias=False)
        self._bn1 = batch_norm(1280)
        self._relu6 = nn.ReLU6()
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        x = self._blocks(self._relu6(self._bn0(self._conv_stem(self._pad(x)))))
        x = self._avg_pooling(self._relu6(self._bn1(self._conv_head(x))))
        logits: Tensor = self._fc(self._dropout(x.flatten(1)))
        return logits


def efficientnet_lite0(num_classes: int, *, image_size: int = 224, in_channels: int = 3) -> nn.Module:
    """EfficientNet-Lite0.

    :param image_size: height = width of the images.
    """
    return EfficientNetLite(num_classes, image_size, in_channels)
