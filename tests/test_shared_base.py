"""Examples with a shared part: equal to the loop, stored once, computed once."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import frozen_trunk
import lora_adapters
from unisono import Ensemble, member_losses, optim


def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def doubled(base):
    """A copy in float64."""
    return copy.deepcopy(base).double()


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return lora_adapters.Transformer()


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    return frozen_trunk.Net(5).trunk.requires_grad_(False)


CASES = ["trunk", "adapters", "adapters in the last block"]


@pytest.fixture(params=CASES)
def case(request, trunk, base):
    """A function of the number of members, and what they take."""
    torch.manual_seed(1)
    if request.param == "trunk":
        return lambda n: frozen_trunk.build(trunk, n), torch.randn(6, 1, 8, 8)
    blocks = 1 if "last" in request.param else lora_adapters.BLOCKS
    return lambda n: lora_adapters.build(base, n, blocks=blocks), torch.randn(6, 8, 8)


def test_training_equals_the_solo_models(case):
    build, x = case
    ens, x, y = build(3).double(), x.double(), torch.arange(6)
    models = [copy.deepcopy(member) for member in ens.unstack()]
    rates = [1e-2, 1e-3, 3e-3]
    optimizer = optim.Adam(ens, lr=rates)
    solo = [torch.optim.Adam(trainable(m), lr=lr) for m, lr in zip(models, rates, strict=True)]
    before = copy.deepcopy(ens.state_dict())
    for _ in range(3):
        outputs = ens(x)
        torch.testing.assert_close(outputs, torch.stack([m(x) for m in models]))
        member_losses(F.cross_entropy, outputs, y).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for model, own in zip(models, solo, strict=True):
            F.cross_entropy(model(x), y).backward()
            own.step()
            own.zero_grad()
    for i, model in enumerate(models):
        state = ens[i].state_dict()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name], tensor)
    for name, tensor in ens.state_dict().items():
        same = torch.equal(tensor, before[name])
        assert same == (name.removeprefix("members.") in ens.shared), name


def test_the_frozen_part_is_stored_once(case):
    build, _ = case
    member = build(1)[0]
    own = sum(p.numel() for p in trainable(member))
    frozen = sum(p.numel() for p in member.parameters()) - own
    assert own
    assert frozen
    for n in (1, 5):
        assert sum(p.numel() for p in build(n).parameters()) == frozen + n * own


@torch.no_grad()
def test_the_trunk_is_computed_once(trunk):
    x = torch.randn(6, 1, 8, 8)
    once = flops(trunk, x)
    head = flops(frozen_trunk.build(trunk, 1)[0].head, trunk(x))
    for n in (1, 4, 9):
        assert flops(frozen_trunk.build(trunk, n), x) == once + n * head


def test_backward_leaves_the_trunk_out(trunk):
    """The forward once, and of the heads what N solo heads take."""
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6)
    once, own = flops(trunk, x), frozen_trunk.build(trunk, 1)[0].head
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(own(trunk(x)), y).backward()
    solo = counter.get_total_flops() - once
    for n in (1, 4):
        ens = frozen_trunk.build(trunk, n)
        with FlopCounterMode(display=False) as counter:
            member_losses(F.cross_entropy, ens(x), y).sum().backward()
        assert counter.get_total_flops() == once + n * solo


@torch.no_grad()
def test_what_comes_before_the_first_adapter_is_computed_once(base):
    x = torch.randn(6, 8, 8)
    tokens = base.embed(x) + base.place
    embed, block = flops(base.embed, x), flops(base.blocks[0], tokens)
    for blocks in (1, 2):
        one = lora_adapters.build(base, 1, blocks=blocks)[0]
        # The first adapted layer sees what all share: its base is computed once as well.
        first = one.blocks[-blocks].qkv
        shared = embed + (lora_adapters.BLOCKS - blocks) * block + flops(first.base, tokens)
        member = flops(one, x) - shared
        for n in (1, 5):
            ens = lora_adapters.build(base, n, blocks=blocks)
            assert flops(ens, x) == shared + n * member


@torch.no_grad()
def test_adapters_begin_as_the_base_and_merge_into_it(base):
    base, x = doubled(base), torch.randn(6, 8, 8, dtype=torch.float64)
    ens = lora_adapters.build(base, 3).double()
    torch.testing.assert_close(ens(x), base(x).expand(3, -1, -1))
    for name, parameter in ens.named_parameters():
        if name.endswith(".b"):
            parameter.normal_()
    outputs = ens(x)
    assert (outputs - base(x)).abs().max() > 0.1
    for i, member in enumerate(ens):
        assert type(member) is lora_adapters.Transformer
        merged = lora_adapters.merge(member)
        assert merged.state_dict().keys() == base.state_dict().keys()
        torch.testing.assert_close(merged(x), outputs[i])
    torch.testing.assert_close(ens(x), outputs)  # merging changed no base


def test_fit_trains_heads_and_adapters(trunk, base):
    torch.manual_seed(0)
    y = torch.arange(60) % 10
    x = F.one_hot(y, 64).float().reshape(60, 8, 8) + 0.1 * torch.rand(60, 8, 8)
    heads, adapters = frozen_trunk.build(trunk, 3), lora_adapters.build(base, 3)
    for ens, inputs, train in (
        (heads, x.unsqueeze(1), frozen_trunk.train),
        (adapters, x, lora_adapters.train),
    ):
        assert isinstance(ens, Ensemble)
        before = member_losses(F.cross_entropy, ens(inputs), y)
        train(ens, inputs, y, epochs=5)
        assert (member_losses(F.cross_entropy, ens(inputs), y) < before).all()
