"""Networks of a few layers: MLPs, a small CNN, an LSTM, a transformer encoder."""

from __future__ import annotations

import itertools

from torch import Tensor, nn


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them, on flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(first: int, second: int) -> nn.Sequential:
    """Two convolutions with batch norm, on 28x28 images."""
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(second, 10),
    )


def transformer(width: int = 64, layers: int = 2) -> nn.TransformerEncoder:
    """The encoder of torch itself, with four heads and without dropout."""
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class LSTMClassifier(nn.Module):
    """A two-layer LSTM and a linear layer on its last step.

    Args:
        inputs: Features of a step.
        hidden: Width of both layers.
        classes: Outputs.
    """

    def __init__(self, inputs: int = 32, hidden: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs) to (B, classes)."""
        return self.head(self.lstm(x)[0][:, -1])
