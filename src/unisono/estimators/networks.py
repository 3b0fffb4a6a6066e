"""The networks that members are by default, and the layer that standardises their inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SMALLEST_VARIANCE = 1e-6  # of standardised targets


class Standardise(nn.Module):
    """Shift and scale each column: ``(x - mean) / scale``, by statistics of the training data.

    The estimators fill `mean` and `scale` of every layer of this class in a member, if it is
    as wide as X, with the same numbers for all members. A new layer changes nothing.

    Args:
        n_features: Number of columns.

    Shape:
        - input, output: (*, n_features)

    Example:
        >>> layer = Standardise(2)
        >>> layer.mean.copy_(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
        >>> layer(torch.tensor([[1.0, 3.0]]))
        tensor([[0., 1.]])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise ``x``."""
        return (x - self.mean) / self.scale

    def extra_repr(self) -> str:
        """The number of columns."""
        return f"{len(self.mean)}"


class TabularMLP(nn.Module):
    """Standardisation, hidden layers with ReLU and dropout, and a linear layer.

    Args:
        n_features: Number of columns.
        n_outputs: Number of outputs.
        hidden_layer_sizes: Width of each hidden layer; none for a linear model.
        dropout: Probability with which a hidden unit is left out in training.

    Shape:
        - input: (B, n_features)
        - output: (B, n_outputs)

    Example:
        >>> TabularMLP(3, 2)(torch.zeros(8, 3)).shape
        torch.Size([8, 2])
    """

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        hidden_layer_sizes: Sequence[int] = (64, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.standardise = Standardise(n_features)
        self.hidden, width = _hidden_layers(n_features, hidden_layer_sizes, dropout)
        self.output = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or predictions."""
        y: Tensor = self.output(self.hidden(self.standardise(x)))
        return y


class GaussianMLP(nn.Module):
    """A `TabularMLP` that predicts a mean and a variance of each target.

    The variance is a linear function of the last hidden units, through softplus, and doesn't train
    them: what it learns leaves the mean as it would be without it.

    Args:
        n_features: Number of columns.
        n_outputs: Number of targets.
        hidden_layer_sizes: Width of each hidden layer; none for a linear model.
        dropout: Probability with which a hidden unit is left out in training.

    Shape:
        - input: (B, n_features)
        - output: mean and variance, (B, n_outputs) each

    Example:
        >>> mean, variance = GaussianMLP(3, 1)(torch.zeros(8, 3))
        >>> mean.shape, bool((variance > 0).all())
        (torch.Size([8, 1]), True)
    """

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        hidden_layer_sizes: Sequence[int] = (64, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.standardise = Standardise(n_features)
        self.hidden, width = _hidden_layers(n_features, hidden_layer_sizes, dropout)
        self.mean = nn.Linear(width, n_outputs)
        self.variance = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance."""
        units = self.hidden(self.standardise(x))
        variance = F.softplus(self.variance(units.detach())) + _SMALLEST_VARIANCE
        return self.mean(units), variance


def _hidden_layers(width: int, sizes: Sequence[int], dropout: float) -> tuple[nn.Sequential, int]:
    """The layers, and the width of what they return."""
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [nn.Linear(width, size), nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        width = size
    return nn.Sequential(*layers), width
