"""Small ensembles and data whose metrics scikit-learn knows."""

import pytest
import torch
from torch import nn

from unisono import Ensemble

ROWS = 53  # no multiple of any batch size


class Gaussian(nn.Module):
    """A mean and a variance."""

    def __init__(self, outputs=1):
        super().__init__()
        self.mean, self.log_variance = nn.Linear(4, outputs), nn.Linear(4, outputs)

    def forward(self, x):
        return self.mean(x), self.log_variance(x).exp()


@pytest.fixture
def classes():
    """Three members, three classes, 53 rows."""
    torch.manual_seed(0)
    ens = Ensemble.build(lambda: nn.Linear(4, 3).double(), 3, strategy="fused")
    return ens, torch.randn(ROWS, 4, dtype=torch.float64), torch.randint(3, (ROWS,))


@pytest.fixture
def numbers():
    """Three members that return points."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, 4, dtype=torch.float64)
    ens = Ensemble.build(lambda: nn.Linear(4, 1).double(), 3, strategy="fused")
    return ens, x, x.sum(1, keepdim=True) + torch.randn(ROWS, 1, dtype=torch.float64)


@pytest.fixture
def gaussians(numbers):
    """Three members that return means and variances."""
    _, x, y = numbers
    return Ensemble.build(lambda: Gaussian().double(), 3, strategy="fused"), x, y
