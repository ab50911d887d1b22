"""VGG16 with batch normalisation for 32x32 images (arXiv 1409.1556), in five blocks and a head."""

import torch
from torch import nn

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions


def stage(inputs: int, channels: int, convolutions: int) -> nn.Sequential:
    """Convolutions with batch normalisation and ReLU, then a pooling that halves the sides."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        inputs = channels
    return nn.Sequential(*layers, nn.MaxPool2d(2))


def build(batch: int = 512) -> tuple[nn.Module, tuple]:
    """The network, and a batch of images (batch, 3, 32, 32) with labels (batch,)."""
    widths = [3, *(channels for channels, _ in STAGES)]
    stages = [stage(below, *size) for below, size in zip(widths, STAGES, strict=False)]
    network = nn.Sequential(*stages, nn.Sequential(nn.Flatten(), nn.Linear(512, 10)))
    return network, (torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)))
