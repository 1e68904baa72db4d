"""ResNet-18/34/50 for ImageNet (He et al. 2016), with torchvision's layout and key names.

The stride of a bottleneck block is in its 3×3 convolution ("v1.5").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Basic (two 3×3) or bottleneck (1×1, 3×3, 1×1) block with an identity or projected shortcut.

    :param in_channels: of the input.
    :param planes: inner width; the output is 4 times as wide for a bottleneck.
    :param stride: of the block.
    :param bottleneck: which of the two.
    """

    def __init__(self, in_channels: int, planes: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = planes * 4 if bottleneck else planes
        self.bottleneck = bottleneck
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(planes)
            self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(planes)
            self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out)
        else:
            self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(planes)
            self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out:
            projection = nn.Conv2d(in_channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, planes or 4·planes, H/stride, W/stride)``."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.bottleneck:
            out = self.bn3(self.conv3(torch.relu(out)))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """7×7 stem with max pool, four stages, average pool, linear layer.

    :param num_classes: width of the logits.
    :param blocks: blocks in each of the four stages.
    :param bottleneck: kind of block.
    :param in_channels: of the images.
    """

    def __init__(self, num_classes: int, blocks: tuple[int, int, int, int], bottleneck: bool, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, width = [], 64
        for stage, count in enumerate(blocks):
            planes = 64 << stage
            made = []
            for index in range(count):
                made.append(Block(width, planes, 2 if stage and not index else 1, bottleneck))
                width = planes * 4 if bottleneck else planes
            stages.append(nn.Sequential(*made))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


_BLOCKS: dict[int, tuple[tuple[int, int, int, int], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
}


def resnet(num_classes: int, *, depth: int, in_channels: int = 3) -> nn.Module:
    """ResNet of this depth.

    :param depth: 18, 34 or 50.
    """
    blocks, bottleneck = _BLOCKS[depth]
    return ResNet(num_classes, blocks, bottleneck, in_channels)
