"""Models and data of the checks, and one process' answers to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unisono import Ensemble


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def whole(n: int, **options: object) -> Ensemble:
    """The ensemble of one process."""
    return Ensemble.build(make_model, n, seed=3, strategy="fused", **options)


def batch(rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (rows,), generator=generator)


def equal(found: object, wanted: object) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@contextmanager
def refused(kind: type[Exception], *parts: str) -> Iterator[None]:
    """An error of this kind is raised on this rank, with all these parts in its text."""
    try:
        yield
    except kind as error:
        for part in parts:
            if part not in str(error):
                raise AssertionError(f"{part!r} is not in:\n{error}") from error
    else:
        raise AssertionError(f"no {kind.__name__} was raised")
