"""ResNet-18, MobileNetV3-small and U-Net, layer by layer as in their papers and in torchvision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


def resnet18(classes: int = 1000) -> nn.Sequential:
    """11,689,512 parameters with 1000 classes."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    width = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [ResidualBlock(width, outputs, stride), ResidualBlock(outputs, outputs, 1)]
        width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=0.001, momentum=0.01)


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int, groups: int, act: Callable[[], nn.Module]
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, _norm(outputs), act())


class SqueezeExcite(nn.Module):
    """Weights the channels by what the whole image shows."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        weights = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        return F.hardsigmoid(weights) * x


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, excite, project (Howard et al. 2019)."""

    def __init__(
        self, inputs: int, kernel: int, wide: int, outputs: int, excite: int, act: str, stride: int
    ) -> None:
        super().__init__()
        activation = nn.Hardswish if act == "HS" else nn.ReLU
        layers: list[nn.Module] = []
        if wide != inputs:
            layers.append(_conv(inputs, wide, 1, 1, 1, activation))
        layers.append(_conv(wide, wide, kernel, stride, wide, activation))
        if excite:
            layers.append(SqueezeExcite(wide, excite))
        layers.append(_conv(wide, outputs, 1, 1, 1, nn.Identity))
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = self.layers(x)
        return x + y if self.adds else y


# kernel, expanded, outputs, squeezed (0: no excitation), activation, stride
MOBILENET_V3_SMALL = (
    (3, 16, 16, 8, "RE", 2),
    (3, 72, 24, 0, "RE", 2),
    (3, 88, 24, 0, "RE", 1),
    (5, 96, 40, 24, "HS", 2),
    (5, 240, 40, 64, "HS", 1),
    (5, 240, 40, 64, "HS", 1),
    (5, 120, 48, 32, "HS", 1),
    (5, 144, 48, 40, "HS", 1),
    (5, 288, 96, 72, "HS", 2),
    (5, 576, 96, 144, "HS", 1),
    (5, 576, 96, 144, "HS", 1),
)


def mobilenet_v3_small(classes: int = 1000) -> nn.Sequential:
    """2,542,856 parameters with 1000 classes; the published dropout is left out."""
    layers: list[nn.Module] = [_conv(3, 16, 3, 2, 1, nn.Hardswish)]
    width = 16
    for kernel, wide, outputs, excite, act, stride in MOBILENET_V3_SMALL:
        layers.append(InvertedResidual(width, kernel, wide, outputs, excite, act, stride))
        width = outputs
    layers += [_conv(96, 576, 1, 1, 1, nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    head = (nn.Linear(576, 1024), nn.Hardswish(), nn.Linear(1024, classes))
    return nn.Sequential(*layers, *head)


def _double_conv(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with padded convolutions and batch norm.

    Args:
        widths: Channels from the top to the bottom; the published ones are the default.
        classes: Channels of the output.
    """

    def __init__(
        self, widths: tuple[int, ...] = (64, 128, 256, 512, 1024), classes: int = 2
    ) -> None:
        super().__init__()
        inputs = (3, *widths)
        self.downs = nn.ModuleList(_double_conv(a, b) for a, b in zip(inputs, widths, strict=False))
        pairs = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.joins = nn.ModuleList(_double_conv(a, b) for a, b in pairs)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, classes, H, W)."""
        skipped: list[Tensor] = []
        for down in self.downs:
            x = down(F.max_pool2d(x, 2) if skipped else x)
            skipped.append(x)
        skipped.pop()
        for up, join in zip(self.ups, self.joins, strict=True):
            x = join(torch.cat([skipped.pop(), up(x)], dim=1))
        return self.head(x)
