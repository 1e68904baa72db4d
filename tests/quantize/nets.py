"""Small networks that between them hold every convertible construct."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Stem, option-A residual block with stride, max pool, average pool, two-layer head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = self.conv2(F.relu(self.conv1(x)))
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        x = self.pool(x).mean((2, 3))
        return self.out(F.relu(self.head(x)))


class Bottleneck(nn.Module):
    """Asymmetric padding, ReLU6, depthwise, linear bottleneck with a signed residual sum, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem = nn.Conv2d(2, 6, 3, stride=2)
        self.expand = nn.Conv2d(6, 12, 1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 6, 1)
        self.act = nn.ReLU6()
        self.last = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.pad(x))
        y = self.act(self.bn(self.expand(x)))
        x = x + self.project(self.act(self.depthwise(y)))
        return self.last(torch.flatten(x, 1))


class Plain(nn.Module):
    """Strided convolutions with a grouped one, average pool with padding, no residual."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU(), nn.AvgPool2d(3, 2, 1), nn.Flatten(),
        )  # fmt: skip
        self.fc = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


NETS = (Residual, Bottleneck, Plain)


def build(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A network with random weights and non-trivial batch norm statistics, in eval mode."""
    torch.manual_seed(seed)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()
