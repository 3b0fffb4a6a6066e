"""Training an ensemble equals N solo trainings: parameters, buffers and state."""

from __future__ import annotations

import pytest
import torch
from solo_training import (
    KINDS,
    MODELS,
    Kind,
    N,
    SharedBackbone,
    assert_trained_alike,
    everything,
    make_data,
    make_models,
    mlp,
    pair,
    row,
    train_ensemble,
    train_solo,
)
from torch import nn

from unisono import Ensemble, per_member
from unisono.optim import elementwise, paths

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
models = pytest.mark.parametrize("name", MODELS)
# Each way of an update with values per member, whatever the size of the models.
WAYS = {"members": (0, 2**15), "blocks": (10**9, 4), "whole": (10**9, 2**15)}
CASES = [("default", "whole"), ("equal", "whole"), *(("each", way) for way in WAYS)]


def go(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    large, block = WAYS[way]
    monkeypatch.setattr(paths, "LARGE_MEMBER", large)
    monkeypatch.setattr(elementwise, "BLOCK", block)


@kinds
@models
@pytest.mark.parametrize(("which", "way"), CASES)
def test_five_steps_equal_solo_trainings(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, name: str, which: str, way: str
) -> None:
    go(monkeypatch, way)
    data = make_data(name, 5)
    ens, ours, solo, theirs = pair(kind, which, make_models(name))
    train_ensemble(ens, ours, data)
    train_solo(solo, theirs, data)
    assert_trained_alike(ens, ours, solo, theirs)


@kinds
@pytest.mark.parametrize("which", ["default", "equal", "each"])
def test_a_shared_backbone_is_trained_by_all(kind: Kind, which: str) -> None:
    backbone = mlp()
    backbone[2] = nn.Linear(6, 6)
    models = [SharedBackbone(backbone).double() for _ in range(N)]
    data = make_data("mlp", 5)
    ens = Ensemble(models, shared="backbone.*", strategy="fused")
    own = list(ens.members.head.parameters())
    shared = list(ens.members.backbone.parameters())
    given, for_all = kind.values(which), row(kind.values(which), 0)
    groups = [{"params": own}, {"params": shared, **for_all}]
    ours = kind.ours(ens, **given, params=None if which == "default" else groups)

    heads = [kind.torchs(m.head.parameters(), **row(given, i)) for i, m in enumerate(models)]
    theirs = [*heads, kind.torchs(backbone.parameters(), **for_all)]
    for x in data:
        for optimizer in (ours, *theirs):
            optimizer.zero_grad()
        ens(per_member(x)).square().sum().backward()
        sum(m(x[i]).square().sum() for i, m in enumerate(models)).backward()
        for optimizer in (ours, *theirs):
            optimizer.step()

    for name, p in ens.members.named_parameters():
        for i, model in enumerate(models):
            is_shared = name.startswith("backbone.")
            theirs_p = model.get_parameter(name)
            state = (theirs[-1] if is_shared else heads[i]).state[theirs_p]
            torch.testing.assert_close(p if is_shared else p[i], theirs_p)
            for key in state:
                kept = ours.state[p][key]
                torch.testing.assert_close(kept if is_shared else kept[i], state[key].to(kept))


@kinds
def test_a_member_depends_on_its_own_data_alone(kind: Kind) -> None:
    models, data = make_models("mlp"), make_data("mlp", 3)
    other = [x.clone() for x in data]
    for x in other:
        x[1] += 1.0
    (ens, ours, _, _), (ens2, theirs, _, _) = (pair(kind, "each", models) for _ in range(2))
    train_ensemble(ens, ours, data)
    train_ensemble(ens2, theirs, other)
    first, second = everything(ens, ours), everything(ens2, theirs)
    for name, tensor in first.items():
        assert torch.equal(second[name][[0, 2]], tensor[[0, 2]]), name
        if name.startswith("ens."):
            assert not torch.equal(second[name][1], tensor[1]), name
