"""The optimizers of torch on an ensemble's parameters do what docs/optimizers.md says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from solo_training import N
from torch import Tensor, nn

from unisono import Ensemble, per_member

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"
ROW = re.compile(r"^\| `(\w+)` \| (equal|mixes|refuses) \|", re.MULTILINE)
TABLE = dict(ROW.findall(PAGE.read_text(encoding="utf-8")))
CLASSES = {
    name
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
} - {"Optimizer"}


def make(name: str) -> tuple[list[nn.Module], list[Tensor]]:
    if name == "SparseAdam":
        models = [nn.Embedding(5, 3, sparse=True).double() for _ in range(N)]
        return models, list(torch.randint(5, (4, N, 6)))
    models = [nn.Linear(4, 3, bias=False).double() for _ in range(N)]
    return models, list(torch.randn(4, N, 6, 4, dtype=torch.float64))


def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def test_the_table_has_each_optimizer_of_torch() -> None:
    assert set(TABLE) == CLASSES


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_table_is_true(name: str) -> None:
    optimizer = getattr(torch.optim, name)
    models, data = make(name)
    ens = Ensemble(models, strategy="fused")
    solo = [optimizer(model.parameters()) for model in models]
    for x in data:
        for i, model in enumerate(models):
            step(solo[i], lambda model=model, x=x[i]: model(x).square().mean())
    expected = torch.stack([model.weight.detach() for model in models])

    def train() -> None:
        together = optimizer(ens.parameters())
        for x in data:
            step(together, lambda x=x: ens(per_member(x)).square().flatten(1).mean(1).sum())

    if TABLE[name] == "refuses":
        with pytest.raises((ValueError, RuntimeError), match=r"^\w+ (only|does not) support"):
            train()
        return
    train()
    trained = ens.members.weight.detach()
    if TABLE[name] == "equal":
        torch.testing.assert_close(trained, expected)
    else:
        assert (trained - expected).abs().max() > 1e-5
