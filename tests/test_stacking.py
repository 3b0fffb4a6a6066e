"""Stacking and unstacking: bitwise, with layouts, ties and references."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from unisono import Ensemble, UnsupportedModelError
from unisono.stacking import make_template, stack, unstack


def test_memory_formats_are_kept() -> None:
    models = [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    members = stack(models)
    assert members.weight.shape == (2, 4, 3, 3, 3)
    assert members.weight[1].is_contiguous(memory_format=torch.channels_last)
    for model, copy in zip(models, Ensemble(models).unstack(), strict=True):
        assert copy.weight.stride() == model.weight.stride()
        assert torch.equal(copy.weight, model.weight)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.complex64, torch.int8, torch.bool]
)
def test_every_dtype_goes_there_and_back(dtype: torch.dtype) -> None:
    class Holds(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.register_buffer("x", torch.full((2, 3), value).to(dtype))
            self.register_buffer("empty", torch.zeros(0, 3, dtype=dtype))

    models = [Holds(0.0), Holds(1.0)]
    for model, copy in zip(models, Ensemble(models).unstack(), strict=True):
        assert copy.x.dtype == dtype
        assert torch.equal(copy.x.view(torch.uint8), model.x.view(torch.uint8))
        assert copy.empty.shape == (0, 3)


def test_what_is_not_a_number_is_kept_too() -> None:
    models = [nn.Linear(2, 1) for _ in range(2)]
    with torch.no_grad():
        models[1].weight.copy_(torch.tensor([[float("nan"), -0.0]]))
    copy = Ensemble(models).unstack()[1]
    assert torch.equal(copy.weight.view(torch.int32), models[1].weight.view(torch.int32))


def test_sparse_tensors_are_refused() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("graph", torch.eye(3).to_sparse())

    with pytest.raises(
        UnsupportedModelError, match=r"`graph` is a torch.sparse_coo .*to_dense\(\)"
    ):
        Ensemble([Sparse(), Sparse()])


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    class Locked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.lock = threading.Lock()

    with pytest.raises(UnsupportedModelError, match=r"a Locked can't be copied \(cannot pickle"):
        Ensemble([Locked(), Locked()])


class Holder:
    """A plain object that holds a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class RefersTwice(nn.Module):
    """Refers to its parameters from a list, a dict and an object as well."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.parts = [self.linear.weight, {"bias": self.linear.bias}]
        self.holder = Holder(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.parts[0] + self.parts[1]["bias"] * self.holder.tensor


@pytest.mark.parametrize("strategy", ["fused", "vmap", "loop"])
def test_other_references_to_a_parameter_follow_it(strategy: str) -> None:
    models = [RefersTwice().double() for _ in range(3)]
    ens = Ensemble(models, strategy=strategy)
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(ens(x), torch.stack([m(x) for m in models]))
    with torch.no_grad():
        ens.members.linear.bias.zero_()
    torch.testing.assert_close(ens(x)[1], x @ models[1].linear.weight)
    torch.testing.assert_close(ens[1](x), ens(x)[1])
    member = ens[1]
    assert member.parts[0] is member.linear.weight
    assert member.holder.tensor is member.linear.bias


def test_a_parameter_in_a_tuple_is_refused() -> None:
    class InTuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.both = (self.linear.weight, self.linear.bias)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.both[0]

    ens = Ensemble([InTuple(), InTuple()])
    with pytest.raises(
        UnsupportedModelError,
        match=r"`both` is a tuple that holds the tensor `linear.weight`.*use a list",
    ):
        ens(torch.zeros(1, 2))


def test_a_template_has_shapes_and_no_storage() -> None:
    template = make_template(nn.LSTM(3, 4, num_layers=2))
    assert {p.device.type for p in template.parameters()} == {"meta"}
    assert [id(w) for w in template._flat_weights] == [id(p) for p in template.parameters()]


def test_unstack_is_the_inverse_of_stack() -> None:
    models = [nn.Linear(3, 2) for _ in range(2)]
    members = stack(models, shared={"bias"})
    assert members.bias.shape == (2,)
    one = unstack(make_template(models[0]), members, 1, shared={"bias"}, attributes=(), copy=False)
    assert torch.equal(one.weight, models[1].weight)
    assert torch.equal(one.bias, models[0].bias)  # the one that is kept
    assert one.weight.untyped_storage().data_ptr() == members.weight.untyped_storage().data_ptr()
