"""A captured batch norm by running statistics: part of the convolutions before it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from unisono import Ensemble, per_member
from unisono.engine.capture import folding
from unisono.engine.steps import pairs

RULE = importlib.import_module("unisono.engine.rules.conv")  # there is a function of that name
N, B = 3, 4


@pytest.fixture(autouse=True)
def _small_is_many(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(pairs, "_MANY", 1)


@pytest.fixture(params=[True, False], ids=["one by one", "as groups"])
def one_by_one(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the convolutions of the members run."""
    monkeypatch.setattr(RULE, "is_large", lambda *args: request.param)


def trained(make: Callable[[], nn.Module]) -> list[nn.Module]:
    """Models whose norms have statistics and weights unlike those of the start."""
    models = [make().double() for _ in range(N)]
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data.uniform_(0.5, 1.5)
    return [model.eval() for model in models]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)),
    "bias": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    "no weights": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False)),
    "two": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)
    ),
    "groups": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)),
    "pointwise": lambda: nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False)),
        *(nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)),
    ),
}


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("marked", [False, True], ids=["shared", "per-member"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_folded(name: str, memory_format: torch.memory_format, marked: bool) -> None:
    models = [model.to(memory_format=memory_format) for model in trained(MODELS[name])]
    ens = Ensemble(models, strategy="fused")
    x = torch.randn(N, B, 2, 16, 16, dtype=torch.float64)
    given = per_member(x) if marked else x[0]
    captured = ens.capture(given)
    is_rearranged = name == "groups" and not marked  # what lies between is rearranged
    assert ("batch_norm" in captured.code) == is_rearranged

    def expected() -> Tensor:
        with torch.no_grad():
            return torch.stack([member(x[i if marked else 0]) for i, member in enumerate(ens)])

    torch.testing.assert_close(captured(given), expected())
    with torch.no_grad():  # weights and statistics are live
        for tensor in (*ens.parameters(), *ens.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.5)
    torch.testing.assert_close(captured(given), expected())


class Watched(nn.Module):
    """Uses what is between convolution and norm once more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


class Pointwise(Watched):
    """A product, looked at once more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x))


class Split(Pointwise):
    """The channels of the norm are others than those of the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.first(x))
        return self.norm(y.transpose(1, 2)[:, :4])


class Returned(Watched):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.conv(x)
        return y, self.norm(y)


class Written(Watched):
    """Changes the statistics after the convolution; the norm has to see it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.norm.running_mean.add_(1)
        return self.norm(y)


class Other(Watched):
    """An op between the two."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).exp())


KEPT: dict[str, Callable[[], nn.Module]] = {
    "read twice": Watched,
    "a product that is read twice": Pointwise,
    "rows for channels": Split,
    "returned": Returned,
    "statistics change": Written,
    "an op between": Other,
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.BatchNorm2d(4)),
    "no convolution": lambda: nn.Sequential(nn.BatchNorm2d(2)),
    "no statistics": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
    ),
}


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("name", KEPT)
def test_it_stays_where_it_is_needed(name: str) -> None:
    ens = Ensemble(trained(KEPT[name]), strategy="fused")
    x = torch.randn(B, 2, 8, 8, dtype=torch.float64)
    captured = ens.capture(x)
    assert "batch_norm" in captured.code
    with torch.no_grad():
        state = {key: value.clone() for key, value in ens.state_dict().items()}
        expected = ens(x)
        ens.load_state_dict(state)
        torch.testing.assert_close(captured(x), expected)


def test_it_stays_in_train_mode() -> None:
    ens = Ensemble(trained(MODELS["plain"]), strategy="fused").train()
    captured = ens.capture(torch.randn(B, 2, 8, 8, dtype=torch.float64))
    assert "batch_norm" in captured.code


def test_it_stays_where_there_are_few_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "pays_to_fold", lambda results, filters: False)
    ens = Ensemble(trained(MODELS["plain"]), strategy="fused")
    captured = ens.capture(torch.randn(B, 2, 8, 8, dtype=torch.float64))
    assert "batch_norm" in captured.code


def test_it_stays_under_autocast() -> None:
    ens = Ensemble([model.float() for model in trained(MODELS["bias"])], strategy="fused")
    x = torch.randn(B, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        captured = ens.capture(x)
        assert "batch_norm" in captured.code
        torch.testing.assert_close(captured(x), ens(x))


class Last(nn.Module):
    """A norm of the input; the last op joins two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.left, self.right = nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1), nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([self.left(y), self.right(y)], 1)


class Twice(nn.Module):
    """One convolution stands twice before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(torch.cat([y, y], 1))


@pytest.mark.parametrize("make", [Last, Twice])
def test_what_is_joined_otherwise_is_left_alone(make: Callable[[], nn.Module]) -> None:
    model = trained(make)[0]
    copies = [copy.deepcopy(model) for _ in range(2)]
    # All is shared, so the ops are those of one model.
    ens = Ensemble([model, *copies], strategy="fused", shared=["*"])
    x = torch.randn(B, 2, 8, 8, dtype=torch.float64)
    captured = ens.capture(x)
    assert "batch_norm" in captured.code
    with torch.no_grad():
        torch.testing.assert_close(captured(x), torch.stack([model(x)] * 3))
