"""`Ensemble` as a module: members, sub-ensembles, shared tensors, modes, state, errors."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from unisono import (
    CheckpointError,
    Ensemble,
    EnsembleError,
    UnsupportedModelError,
    per_member,
)


class Net(nn.Module):
    """A backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.backbone(x)))


def nets(n: int = 3) -> list[nn.Module]:
    return [Net().double() for _ in range(n)]


def nets_with_one_backbone(n: int = 3) -> list[nn.Module]:
    first, *others = nets(n)
    for other in others:
        other.backbone.load_state_dict(first.backbone.state_dict())
    return [first, *others]


X = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)


# Members


def test_a_member_shares_storage_in_both_directions() -> None:
    ens = Ensemble(nets())
    member = ens[1]
    assert type(member) is Net
    assert isinstance(member.head.weight, nn.Parameter)
    with torch.no_grad():
        member.head.weight.fill_(7.0)
        ens.members.head.bias[1] = 3.0
    assert (ens.members.head.weight[1] == 7.0).all()
    assert (ens.members.head.weight[0] != 7.0).all()
    assert (member.head.bias == 3.0).all()
    torch.testing.assert_close(member.train()(X), ens(X)[1])


def test_a_member_has_the_gradient_of_its_row() -> None:
    ens = Ensemble(nets())
    ens(X).square().sum().backward()
    assert torch.equal(ens[2].head.weight.grad, ens.members.head.weight.grad[2])


def test_a_members_buffers_are_written_through() -> None:
    ens = Ensemble(nets())
    ens[0].train()(X)
    assert ens.members.backbone[1].num_batches_tracked.tolist() == [1, 0, 0]


def test_indices() -> None:
    ens = Ensemble(nets())
    assert torch.equal(ens[-1].head.weight, ens.members.head.weight[2])
    assert [m.head.weight[0, 0].item() for m in ens] == ens.members.head.weight[:, 0, 0].tolist()
    assert len(ens) == 3
    for index in (3, -4):
        with pytest.raises(IndexError, match=rf"ens\[{index}\]: there are 3 members, 0 to 2"):
            ens[index]
    for index in (1.5, "a", [0, 0.5], torch.tensor([[0, 1]]), None):
        with pytest.raises(
            TypeError, match=r"ens\[...\]: the index is an integer, a slice, a list"
        ):
            ens[index]


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, None), [1, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        ([2, 0], [2, 0]),
        ((1, 1), [1, 1]),
        (torch.tensor([0, -1]), [0, 2]),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_a_sub_ensemble_is_a_copy_of_some_members(index: object, rows: list[int]) -> None:
    ens = Ensemble(nets(), strategy="vmap", chunk_size=2).eval()
    part = ens[index]
    assert isinstance(part, Ensemble)
    assert (len(part), part.strategy, part.chunk_size, part.training) == (
        len(rows),
        "vmap",
        2,
        False,
    )
    torch.testing.assert_close(part(X), ens(X)[rows])
    with torch.no_grad():
        part.members.head.weight.zero_()
    assert ens.members.head.weight.all()


def test_a_sub_ensemble_of_nothing_is_refused() -> None:
    ens = Ensemble(nets())
    with pytest.raises(IndexError, match="at least one member; none was chosen"):
        ens[3:]
    with pytest.raises(IndexError, match="one boolean per member, so 3; got 2"):
        ens[torch.tensor([True, False])]
    with pytest.raises(IndexError, match="there are 3 members"):
        ens[[0, 3]]


def test_unstacked_models_are_independent() -> None:
    ens = Ensemble(nets())
    models = ens.unstack()
    with torch.no_grad():
        models[0].head.weight.zero_()
    assert ens.members.head.weight.all()
    assert Ensemble(models).members.head.weight.shape == (3, 2, 6)


def test_the_models_are_left_alone() -> None:
    models = nets()
    before = [copy.deepcopy(m.state_dict()) for m in models]
    ens = Ensemble(models)
    ens(X).sum().backward()
    torch.optim.SGD(ens.parameters(), 1.0).step()
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
        assert all(p.grad is None for p in model.parameters())


# Building


def test_build_gives_member_i_the_same_weights_whatever_n() -> None:
    few, many = Ensemble.build(Net, 2, seed=5), Ensemble.build(Net, 4, seed=5)
    assert torch.equal(few.members.head.weight, many.members.head.weight[:2])
    torch.manual_seed(6)
    assert torch.equal(Net().head.weight, few.members.head.weight[1])


def test_build_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Ensemble.build(Net, 2)
    assert torch.equal(torch.rand(2), expected)


def test_build_with_shared_parts_gives_all_members_those_of_member_0() -> None:
    ens = Ensemble.build(Net, 3, seed=5, shared="backbone.*")
    torch.manual_seed(5)
    first = Net()
    assert torch.equal(ens.members.backbone[0].weight, first.backbone[0].weight)
    assert torch.equal(ens[2].backbone[0].weight, first.backbone[0].weight)
    assert not torch.equal(ens[2].head.weight, first.head.weight)


def test_models_that_are_no_list() -> None:
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), None, 3):
        with pytest.raises(
            UnsupportedModelError, match=r"members come as a list, got one .* Build"
        ):
            Ensemble(model)
    assert len(Ensemble(nn.ModuleList(nets()))) == len(Ensemble(iter(nets()))) == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((Net(), 2, 0), "make_model is a function that returns a new model, got Net; pass the"),
        ((3, 2, 0), "make_model is a function that returns a new model, got int"),
        ((Net, 2.5, 0), "n is an integer, got 2.5"),
        ((Net, 2, "x"), "seed is an integer, got 'x'"),
    ],
)
def test_build_checks_its_arguments(arguments: tuple[object, ...], text: str) -> None:
    make_model, n, seed = arguments
    with pytest.raises(TypeError, match=text):
        Ensemble.build(make_model, n, seed=seed)


def test_run_takes_a_function() -> None:
    with pytest.raises(TypeError, match=r"ens.run: fn is a function fn\(member, ...\); got 3"):
        Ensemble(nets()).run(3)


def test_build_refuses_no_members() -> None:
    with pytest.raises(ValueError, match="n is the number of members, at least 1; got 0"):
        Ensemble.build(Net, 0)


# Shared tensors


def test_shared_parameters_are_stored_and_trained_once() -> None:
    models = nets_with_one_backbone()
    ens = Ensemble(models, shared="backbone.*").eval()
    models = [m.eval() for m in models]
    assert ens.members.backbone[0].weight.shape == (6, 4)
    assert ens.members.head.weight.shape == (3, 2, 6)
    outputs = ens(X)
    torch.testing.assert_close(outputs, torch.stack([m(X) for m in models]))
    outputs.square().sum().backward()
    sum(m(X).square().sum() for m in models).backward()
    alone = sum(m.backbone[0].weight.grad for m in models)
    torch.testing.assert_close(ens.members.backbone[0].weight.grad, alone)
    assert ens[1].backbone[0].weight.data_ptr() == ens.members.backbone[0].weight.data_ptr()


@pytest.mark.parametrize("strategy", ["fused", "vmap", "loop"])
def test_shared_tensors_for_every_strategy(strategy: str) -> None:
    models = nets_with_one_backbone()
    ens = Ensemble(models, shared=["backbone.*"], strategy=strategy).eval()
    xs = torch.stack([X, 2 * X, 3 * X])
    expected = torch.stack([m.eval()(x) for m, x in zip(models, xs, strict=True)])
    torch.testing.assert_close(ens(per_member(xs)), expected)
    torch.testing.assert_close(ens[1:](per_member(xs[1:])), expected[1:])
    torch.testing.assert_close(torch.stack([m(X) for m in ens.unstack()]), ens(X))


@pytest.mark.parametrize("strategy", ["fused", "loop"])
def test_a_shared_batch_norm_in_training_counts_a_batch_once(strategy: str) -> None:
    models = nets_with_one_backbone()
    ens = Ensemble(models, shared="backbone.*", strategy=strategy).train()
    ens(X)
    models[0].train()(X)
    for name, buffer in models[0].named_buffers():
        torch.testing.assert_close(ens.members.get_buffer(name), buffer)


def test_a_shared_buffer_that_members_write_differently_is_an_error() -> None:
    ens = Ensemble(nets_with_one_backbone(), shared="backbone.*", strategy="loop").train()
    before = ens.members.backbone[1].running_mean.clone()
    with pytest.raises(EnsembleError, match=r"the buffer `backbone.1.running_mean` is kept once"):
        ens(per_member(torch.randn(3, 5, 4, dtype=torch.float64)))
    assert torch.equal(ens.members.backbone[1].running_mean, before)


def test_a_trunk_shared_by_all_is_computed_once() -> None:
    ens = Ensemble(nets_with_one_backbone(), shared="backbone.*", strategy="fused").eval()
    with torch.profiler.profile() as profile:
        ens(X)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::addmm"] == 1  # the backbone, on the batch itself
    assert counts["aten::baddbmm"] == 1  # the heads


def test_shared_names_that_match_nothing() -> None:
    with pytest.raises(
        ValueError, match=r"Net: 'trunk\.\*', 'haed.weight' \(did you mean 'head.weight'"
    ):
        Ensemble(nets(), shared=["trunk.*", "haed.weight", "head.*"])


# Modes


class KeepsBatchNormFrozen(Net):
    """Overrides train, as people do who fine-tune."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.backbone[1].eval()
        return self


def test_train_goes_through_the_members_own_method() -> None:
    ens = Ensemble([KeepsBatchNormFrozen() for _ in range(2)]).train()
    assert ens.training
    assert ens.members.training
    assert not ens.members.backbone[1].training
    ens(X.float())
    assert ens.members.backbone[1].num_batches_tracked.tolist() == [0, 0]
    assert not ens[0].backbone[1].training
    assert not ens.eval().members.training


def test_a_submodule_can_be_in_another_mode() -> None:
    ens = Ensemble(nets()).train()
    ens.members.backbone[1].eval()
    ens(X)
    assert ens.members.backbone[1].num_batches_tracked.tolist() == [0, 0, 0]
    assert not ens[0].backbone[1].training
    assert ens[0].head.training


def test_the_models_modes_are_kept() -> None:
    models = [m.eval() for m in nets()]
    for model in models:
        model.head.train()
    ens = Ensemble(models)
    assert not ens.training
    assert ens.members.head.training
    assert not ens.members.backbone.training


# An ordinary module


def test_conversions_and_switches() -> None:
    ens = Ensemble(nets())
    assert ens.half().members.head.weight.dtype == torch.float16
    assert ens.double()[0].head.weight.dtype == torch.float64
    assert ens.to(torch.float32)(X.float()).dtype == torch.float32
    ens.requires_grad_(False)
    assert not ens[0].head.weight.requires_grad
    ens.members.head.requires_grad_()
    ens(X.float()).sum().backward()
    assert ens.members.backbone[0].weight.grad is None
    assert ens.members.head.weight.grad is not None
    ens.zero_grad()
    assert ens.members.head.weight.grad is None


def test_hooks_on_the_ensemble() -> None:
    ens = Ensemble(nets())
    seen = []
    ens.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    ens.register_forward_hook(lambda module, args, output: output + 1)
    outputs = ens(X)
    assert seen == [(5, 4)]
    torch.testing.assert_close(outputs[0] - 1, ens[0](X))


def test_hooks_of_the_members_run_for_all_at_once() -> None:
    models = nets()
    for model in models:
        model.head.register_forward_hook(_double)
    ens = Ensemble(models).eval()
    torch.testing.assert_close(ens(X), torch.stack([m.eval()(X) for m in models]))


def _double(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output


def test_a_state_of_another_number_of_members_is_refused_and_nothing_is_loaded() -> None:
    ens, more = Ensemble(nets(3)), Ensemble(nets(5))
    before = {name: tensor.clone() for name, tensor in ens.state_dict().items()}
    with pytest.raises(
        CheckpointError,
        match=r"the state has 5 members, this ensemble has 3; .* take some .*: big\[:3\]",
    ):
        ens.load_state_dict(more.state_dict())
    assert all(torch.equal(ens.state_dict()[name], tensor) for name, tensor in before.items())
    assert ens.load_state_dict(more[:3].state_dict()).missing_keys == []


def test_a_state_without_member_axis_gets_torchs_own_error() -> None:
    ens = Ensemble(nets())
    count = "members.backbone.1.num_batches_tracked"
    with pytest.raises(RuntimeError, match=f"size mismatch for {count}"):
        ens.load_state_dict({**ens.state_dict(), count: torch.tensor(1)})


def test_torch_func_transforms_work_over_an_ensemble() -> None:
    ens = Ensemble(nets()).eval()
    parameters = {name: p.detach() for name, p in ens.named_parameters()}
    buffers = dict(ens.named_buffers())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(ens, (parameters, buffers), (X,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    ens(X).square().sum().backward()
    for name, parameter in ens.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    batches = torch.stack([X, 2 * X])
    each = torch.func.vmap(ens)(batches)
    torch.testing.assert_close(each, torch.stack([ens(batch) for batch in batches]))


def test_an_ensemble_may_be_part_of_a_module_and_a_member() -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = Ensemble(nets(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x).min(0).values

    critics = [Critic() for _ in range(3)]
    assert "q.members.head.weight" in critics[0].state_dict()
    ens = Ensemble(critics).eval()
    assert ens.members.q.members.head.weight.shape == (3, 2, 2, 6)
    torch.testing.assert_close(ens(X), torch.stack([c.eval()(X) for c in critics]))


def test_repr_tells_members_options_and_tree() -> None:
    text = repr(Ensemble(nets(), strategy="loop", chunk_size=2))
    assert text.startswith(
        "Ensemble(\n  3 members of 56 parameters, strategy='loop', randomness='different',"
        " chunk_size=2\n  (member): Net(\n    (backbone): Sequential("
    )
    assert "(head): Linear(in_features=6, out_features=2, bias=True)" in text
    shared = repr(Ensemble(nets_with_one_backbone(), shared="backbone.*"))
    assert "3 members of 14 parameters, 42 shared by all" in shared


def test_the_tree_of_members_is_no_model() -> None:
    ens = Ensemble(nets())
    with pytest.raises(TypeError, match=r"call ens\(x\) for all members, or ens\[i\]\(x\) for one"):
        ens.members(X)
    assert not any(isinstance(m, nn.Linear) for m in ens.modules())
    assert "weight=(3, 2, 6), bias=(3, 2)" in repr(ens.members)


# Inputs and options


def test_inputs_without_a_member_axis_are_listed_together() -> None:
    ens = Ensemble(nets())
    with pytest.raises(ValueError, match="axis 0 of what `per_member` marks is the member") as info:
        ens(
            per_member(torch.zeros(5, 4)),
            mask=[per_member({"a": torch.tensor(1.0), "b": 3, "c": None})],
        )
    text = str(info.value)
    assert "there are 3 members" in text
    assert "args[0] has shape (5, 4)" in text
    assert "kwargs['mask'][0]['a'] has shape ()" in text
    assert "kwargs['mask'][0]['b'] is of type int, not a tensor" in text
    assert "ens(per_member(torch.stack(inputs)))" in text


def test_a_mark_within_a_mark_is_refused() -> None:
    ens = Ensemble(nets())
    with pytest.raises(ValueError, match=r"args\[0\]\['x'\] is marked twice"):
        ens(per_member({"x": per_member(torch.zeros(3, 5, 4))}))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strategy": "fast"}, "strategy is one of 'auto', 'fused', 'vmap', 'loop'; got 'fast'"),
        ({"randomness": "none"}, "randomness is one of 'different', 'same', 'error'; got 'none'"),
        ({"chunk_size": 0}, 'chunk_size is a positive integer, "auto" or None; got 0'),
        ({"chunk_size": True}, 'chunk_size is a positive integer, "auto" or None; got True'),
        (
            {"memory_limit": 10},
            (
                'memory_limit is a positive number of bytes, with chunk_size="auto"; got'
                " memory_limit=10 with chunk_size=None"
            ),
        ),
    ],
)
def test_options_are_checked_at_construction_and_when_changed(
    options: dict[str, object], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        Ensemble(nets(), **options)
    ens = Ensemble(nets())
    for name, value in options.items():
        setattr(ens, name, value)
    with pytest.raises(ValueError, match=text):
        ens(X)


# Threads


@torch.no_grad()
def test_calls_from_several_threads() -> None:
    ens = Ensemble(nets()).eval()
    # Sizes of their own for each thread, so that no result fits another thread's input.
    inputs = [[torch.randn(2 + k, 4).double() * t for k in range(4)] for t in range(1, 9)]
    expected = [[torch.stack([m(x) for m in ens]) for x in xs] for xs in inputs]
    calls: list[int] = [0] * len(inputs)
    barrier = threading.Barrier(len(inputs))

    @torch.no_grad()  # a setting of each thread
    def work(thread: int) -> None:
        barrier.wait()
        for call in range(500):
            got = ens(inputs[thread][call % 4])
            torch.testing.assert_close(got, expected[thread][call % 4])
            calls[thread] += 1

    threads = [threading.Thread(target=work, args=(t,)) for t in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [500] * 8  # a thread that fails stops counting


class Masked(nn.Module):
    """Runs op by op: torch can't index with a mask for all members at once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).clone()
        y[y > 0] = 0.5
        return y


@pytest.mark.filterwarnings("ignore::unisono.EnsembleWarning")
def test_threads_with_strategies_of_their_own() -> None:
    models, masked = nets(), [Masked() for _ in range(3)]
    ensembles = [Ensemble(models, strategy=s).eval() for s in ("auto", "fused", "vmap", "loop")]
    ensembles += [Ensemble(models, strategy="fused", chunk_size=2).eval(), Ensemble(masked).eval()]
    inputs = [torch.randn(2 + t, 4).double() * t for t in range(1, 9)]
    expected = [[torch.stack([m(x) for m in ens]).detach() for ens in ensembles] for x in inputs]
    calls: list[int] = [0] * len(inputs)
    barrier = threading.Barrier(len(inputs))

    def work(thread: int) -> None:
        barrier.wait()
        for call in range(500):
            which = (call + thread) % len(ensembles)
            with torch.set_grad_enabled(call % 2 == 0):
                got = ensembles[which](inputs[thread])
            torch.testing.assert_close(got.detach(), expected[thread][which])
            calls[thread] += 1

    threads = [threading.Thread(target=work, args=(t,)) for t in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [500] * 8
