"""Where tensors lie: everything stays on the members' device, and nothing waits for it.

No machine here has a GPU. Fake CUDA tensors have a device and no data: an op that would mix devices
raises, and so does every read of a value (``.item()``, ``if tensor``), which would make a GPU wait.
A build of torch without CUDA can't record gradients for them nor copy into them, so the tests run
without gradients, and batch norm in eval mode.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor

from cases import CASES, Case, Norms, members
from unisono import Ensemble, combine, per_member
from unisono.engine.axis import buffers_of, parameters_of
from unisono.engine.planning import measuring
from unisono.engine.rules import BY_MEMBER
from unisono.engine.tree import leaves, tree_map

CUDA = torch.device("cuda", 0)


def fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A tensor without data that says it is on a GPU."""
    return FakeTensor(mode, torch.empty_like(tensor.detach(), device="meta"), CUDA)


def move(mode: FakeTensorMode, ens: Ensemble) -> None:
    """What ``ens.to("cuda")`` does where there is one."""
    for tree in ens.members.modules():
        for key, parameter in parameters_of(tree).items():
            if parameter is not None:
                parameters_of(tree)[key] = nn.Parameter(fake(mode, parameter), requires_grad=False)
        for key, buffer in buffers_of(tree).items():
            if buffer is not None:
                buffers_of(tree)[key] = fake(mode, buffer)


def skip_if_a_member_fails_by_itself(mode: FakeTensorMode, ens: Ensemble, call: Any) -> None:
    """It makes tensors on the CPU in forward, or runs what needs a torch with CUDA."""
    args, kwargs = call
    member = ens[0]
    try:
        with mode:
            member(*args, **kwargs)
    except Exception as error:
        pytest.skip(f"a member by itself: {type(error).__name__}: {str(error)[:60]}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", ["auto", "fused", "vmap", "loop"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-member"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.vmap's own
@torch.no_grad()
def test_calls_stay_on_the_device_and_never_wait(
    monkeypatch: pytest.MonkeyPatch, case: Case, strategy: str, shared: bool
) -> None:
    # What is timed here on the CPU must not store weights in an order that fakes don't know.
    monkeypatch.setattr(measuring, "formats_of", lambda _: ("contiguous",))
    if strategy == "vmap" and case.rules & set(BY_MEMBER):
        pytest.skip("torch's fallback reads the values")
    if case.make is Norms and strategy in ("auto", "fused"):
        pytest.skip("the fake of a group norm that lies among the channels needs a torch with CUDA")
    mode = FakeTensorMode()
    ens = Ensemble(members(case), strategy=strategy).eval()
    args, kwargs = case.inputs()
    for _ in range(3):  # until there is a template: its placeholders are no fake tensors
        ens(*args, **kwargs)
    for tree in ens.members.modules():  # state in plain attributes, which `.to` doesn't move
        vars(tree).update(
            {k: fake(mode, v) for k, v in vars(tree).items() if isinstance(v, Tensor)}
        )
    move(mode, ens)

    def place_one(leaf: Any) -> Any:
        return fake(mode, leaf) if isinstance(leaf, Tensor) else leaf

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return fake(mode, leaf) if shared else per_member(fake(mode, torch.stack([leaf] * 3)))

    skip_if_a_member_fails_by_itself(mode, ens, tree_map(place_one, (args, kwargs)))
    args, kwargs = tree_map(place, (args, kwargs))
    with mode:
        for _ in range(2):
            outputs = ens(*args, **kwargs)
        for _, leaf in leaves(outputs):
            if isinstance(leaf, Tensor):
                assert leaf.device == CUDA
                assert leaf.shape[0] == 3


@torch.no_grad()
def test_members_and_combinations_stay_on_the_device() -> None:
    mode = FakeTensorMode()
    ens = Ensemble([nn.Linear(3, 4) for _ in range(3)])
    ens(torch.zeros(1, 3))
    move(mode, ens)
    with mode:
        logits = ens(fake(mode, torch.randn(5, 3)))
        assert ens[1].weight.device == CUDA
        for combined in (
            combine.mean(logits),
            combine.median(logits),
            combine.weighted(logits, fake(mode, torch.ones(3))),
            combine.probabilities(logits),
            combine.vote(logits),
        ):
            assert combined.device == CUDA


@pytest.mark.gpu
def test_a_real_gpu_gives_the_numbers_of_the_cpu() -> None:
    models = [nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double() for _ in range(3)]
    ens = Ensemble(models)
    x = torch.randn(3, 4, 2, 6, 6, dtype=torch.float64)
    expected = torch.stack([model(images) for model, images in zip(models, x, strict=True)])
    outputs = ens.to("cuda")(per_member(x.to("cuda")))
    torch.testing.assert_close(outputs.cpu(), expected)
