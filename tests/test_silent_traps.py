"""Mistakes that raise no error with PyTorch's own recipe, one test for each.

They are what people report after weeks: the run looks right and isn't.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unisono import (
    Ensemble,
    EnsembleError,
    IncompatibleMembersError,
    clip_grad_norm_,
    member_losses,
    optim,
    per_member,
)

N = 4
X = torch.randn(6, 5, dtype=torch.float64)
Y = torch.randint(3, (6,))


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def build(**options):
    models = [mlp() for _ in range(N)]
    return Ensemble(models, **options), models


@pytest.mark.parametrize("strategy", ["auto", "fused", "vmap", "loop"])
def test_the_optimizer_holds_the_parameters_that_the_calls_use(strategy):
    """Stacking anew in the loop leaves the optimizer with tensors that nobody computes with."""
    ens, _ = build(strategy=strategy)
    optimizer = torch.optim.SGD(ens.parameters(), lr=0.1)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for _ in range(3):
        before = ens(X).detach()
        member_losses(F.cross_entropy, ens(X), Y).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.allclose(ens(X), before)
    assert [id(p) for p in ens.parameters()] == held


def test_the_sum_of_the_losses_gives_the_gradients_of_solo_runs_and_the_mean_does_not():
    """The mean over members divides every gradient by N."""
    ens, models = build()
    losses = member_losses(F.cross_entropy, ens(X), Y)
    (by_sum,) = torch.autograd.grad(losses.sum(), ens.members[0].weight, retain_graph=True)
    (by_mean,) = torch.autograd.grad(losses.mean(), ens.members[0].weight)
    for i, model in enumerate(models):
        (own,) = torch.autograd.grad(F.cross_entropy(model(X), Y), model[0].weight)
        torch.testing.assert_close(by_sum[i], own)
        torch.testing.assert_close(by_mean[i], own / N)


def test_apply_reaches_the_weights_of_every_member():
    """A function that looks for ``nn.Linear`` finds none among stacked parameters."""

    def init(module):
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
            nn.init.constant_(module.bias, 7.0)

    ens, models = build()
    torch.manual_seed(1)
    assert ens.apply(init) is ens
    torch.manual_seed(1)
    for i, model in enumerate(models):
        model.apply(init)
        for name, p in model.named_parameters():
            assert torch.equal(ens.members.get_parameter(name)[i], p)
    outer = nn.Sequential(build()[0])
    torch.manual_seed(1)
    outer.apply(init)
    assert torch.equal(outer[0].members[0].weight, ens.members[0].weight)


def test_apply_refuses_what_would_be_lost():
    def change(module):
        if isinstance(module, nn.Dropout):
            module.p = 0.9
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.zeros_like(module.weight))

    ens = Ensemble([nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)) for _ in range(2)])
    with pytest.raises(EnsembleError) as caught:  # noqa: PT011 - the text is compared below
        ens.apply(change)
    assert str(caught.value) == (
        "ens.apply: fn writes to tensors in place, but in member 0 it changed more than that:\n\n"
        "  `1.p`: 0.9; it had 0.1\n"
        "  `0.weight`: another tensor instead of the same one with other elements\n\n"
        "A member is put together anew whenever it is asked for, so this would be lost.\n"
        "Apply fn to the models, and build the ensemble from them:\n\n"
        "    ens = Ensemble([model.apply(fn) for model in ens.unstack()])"
    )


def test_clipping_takes_the_norm_of_each_member():
    """One norm over all members lets a wild one shorten the steps of the others."""
    ens, models = build()
    scale = torch.tensor([1.0, 1.0, 1e6, 1.0], dtype=torch.float64)
    (member_losses(F.cross_entropy, ens(X), Y) * scale).sum().backward()
    norms = clip_grad_norm_(ens, 0.5)
    for i, model in enumerate(models):
        (F.cross_entropy(model(X), Y) * scale[i]).backward()
        want = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        torch.testing.assert_close(norms[i], want)
        torch.testing.assert_close(ens.members[0].weight.grad[i], model[0].weight.grad)


def test_keyword_arguments_are_marked_like_others():
    """``torch.vmap`` hands keyword arguments to every member whole."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3).double()

        def forward(self, x, *, scale):
            return self.linear(x) * scale

    models = [Scaled() for _ in range(N)]
    scales = torch.rand(N, 1, dtype=torch.float64)
    out = Ensemble(models)(X, scale=per_member(scales))
    for i, model in enumerate(models):
        torch.testing.assert_close(out[i], model(X, scale=scales[i]))


def test_a_call_leaves_tied_modules_and_the_models_as_they_were():
    """``functional_call`` has corrupted modules that are reached by two names."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 5).double()
            self.second = self.first

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    models = [Tied() for _ in range(N)]
    before = [[p.detach().clone() for p in model.parameters()] for model in models]
    ens = Ensemble(models)
    out = ens(X)
    for i, model in enumerate(models):
        assert model.first is model.second
        assert all(map(torch.equal, model.parameters(), before[i]))
        torch.testing.assert_close(out[i], model(X))
    assert len(list(ens.parameters())) == 2


def test_one_model_n_times_is_refused():
    """``[model] * N`` is N equal members, which never disagree."""
    with pytest.raises(IncompatibleMembersError, match="one and the same"):
        Ensemble([mlp()] * N)


def test_a_torch_optimizer_with_a_rate_for_each_member_is_torchs_error_and_ours_works():
    ens, _ = build()
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        torch.optim.Adam(ens.parameters(), lr=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    optim.Adam(ens, lr=torch.tensor([0.1, 0.2, 0.3, 0.4]))
