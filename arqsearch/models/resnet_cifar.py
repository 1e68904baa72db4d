"""ResNet-20/32/44/56/110 for small images, with parameter-free shortcuts (He et al. 2016, section 4.2, option A)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from arqsearch.errors import ArqError


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; the shortcut takes every second pixel and pads channels with zeros on both sides.

    :param in_channels: of the input.
    :param channels: of the output; at least `in_channels`, by an even number.
    :param stride: of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.extra = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, channels, H/stride, W/stride)``."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.extra:
            x = F.pad(x, (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """Stem, stages that halve the image and double the channels, average over the image, linear layer.

    :param num_classes: width of the logits.
    :param blocks: blocks in each stage.
    :param in_channels: of the images.
    :param width: channels of the first stage.
    """

    def __init__(self, num_classes: int, blocks: tuple[int, ...], in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        if width % 2:
            raise ArqError(
                f"width {width} is odd, but option-A shortcuts pad half of it on each side; use {width + 1}."
            )
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = [f"layer{stage + 1}" for stage in range(len(blocks))]
        before = width
        for stage, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            channels = width << stage
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            sources = [before] + [channels] * (count - 1)
            made = [BasicBlock(c, channels, s) for c, s in zip(sources, strides, strict=True)]
            self.add_module(name, nn.Sequential(*made))
            before = channels
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        logits: Tensor = self.linear(self.pool(x).flatten(1))
        return logits


def resnet(num_classes: int, *, depth: int, in_channels: int = 3, width: int = 16) -> nn.Module:
    """ResNet of depth 6n+2: three stages of n blocks.

    :param depth: 20, 32, 44, 56 or 110.
    :param width: channels of the first stage.
    """
    return CifarResNet(num_classes, ((depth - 2) // 6,) * 3, in_channels, width)


def cnn_residual(num_classes: int, *, in_channels: int = 3, width: int = 8) -> nn.Module:
    """The smallest network with both kinds of shortcut: one plain block, one that halves the image."""
    return CifarResNet(num_classes, (1, 1), in_channels, width)
