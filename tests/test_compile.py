"""`torch.compile` and `torch.export` of an ensemble: one graph, compiled once, the same numbers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import oracles
from cases import CASES, B, Case, N, members
from unisono import Ensemble, EnsembleError, per_member
from unisono.engine.planning import measuring
from unisono.engine.tree import leaves, tree_map

pytestmark = [
    pytest.mark.compile,
    # torch's own, of its own parts
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
]

X = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
BY_NAME: dict[str, Case] = {param.id: param.values[0] for param in CASES}


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    # pytest listens to everything, and torch then writes all that it compiles into this log.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)


def compiled(target: Any, backend: str = "aot_eager") -> tuple[Callable[..., Any], Any]:
    """The compiled target, and a counter of what was compiled for it."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(target, fullgraph=True, backend=counter), counter


def compilations_of_a_member(case: Case, training: bool) -> int:
    """How often a member by itself is compiled for two batches; skips where it can't be."""
    member, counter = compiled(members(case, 1)[0].train(training), "eager")
    try:
        for _ in range(2):
            args, kwargs = case.inputs()
            member(*args, **kwargs)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"the member itself doesn't compile: {str(error).splitlines()[0]}")
    return counter.frame_count


def check(case: Case, training: bool, sharing: str, strategy: str = "auto") -> None:
    """Outputs, buffers and gradients of two calls, and how often was compiled for them."""
    allowed = compilations_of_a_member(case, training)
    models = [model.train(training) for model in members(case)]
    ens = Ensemble(models, strategy=strategy)
    call, counter = compiled(ens)
    tolerance = oracles.TOLERANCES.get(case.dtype, {})
    for _ in range(2):
        inputs = [case.inputs()] * N if sharing == "shared" else [case.inputs() for _ in range(N)]
        args, kwargs = inputs[0] if sharing == "shared" else oracles.stack_inputs(inputs)
        outputs = call(*args, **kwargs)
        if case.random_in_training and training:
            continue  # equal in distribution only: see test_randomness
        expected = oracles.loop_outputs(models, inputs)
        oracles.assert_outputs_equal(outputs, expected, **tolerance)
        oracles.assert_state_equal(ens, models, **tolerance)
        if any(leaf.requires_grad for _, leaf in leaves(outputs) if isinstance(leaf, Tensor)):
            sum(oracles.total(member_of(outputs, i)) for i in range(N)).backward()
            sum(oracles.total(output) for output in expected).backward()
            oracles.assert_gradients_equal(ens, models, **tolerance)
    assert counter.frame_count <= allowed


def member_of(outputs: Any, i: int) -> Any:
    return tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, outputs)


# One case for each way to be traced; the whole table takes minutes.
QUICK = (
    *("mlp", "batchnorm-mlp", "dropout", "two-paths", "embedding-padding-index", "keywords"),
    *("nested-outputs", "reassigned-buffer", "plain-attributes", "weight-norm"),
)
ALL = [
    pytest.param(*param.values, id=param.id, marks=() if param.id in QUICK else pytest.mark.slow)
    for param in CASES
]


@pytest.mark.parametrize("case", ALL)
def test_what_compiles_by_itself_compiles_as_an_ensemble(case: Case) -> None:
    check(case, training=True, sharing="per-member")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("training", "sharing"), [(True, "shared"), (False, "shared"), (False, "per-member")]
)
def test_so_it_does_in_every_mode(case: Case, training: bool, sharing: str) -> None:
    check(case, training, sharing)


# Native attention is switched off where all members run at once: it has no derivative.
def test_native_attention_in_eval_mode() -> None:
    check(BY_NAME["native-attention"], training=False, sharing="shared")


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
@pytest.mark.parametrize(
    "name", ["batchnorm-mlp", pytest.param("plain-attributes", marks=pytest.mark.slow)]
)
def test_strategies(name: str, strategy: str) -> None:
    check(BY_NAME[name], training=True, sharing="per-member", strategy=strategy)


@pytest.mark.parametrize("name", ["batchnorm-mlp", "reassigned-buffer"])
def test_chunks_of_members(name: str) -> None:
    case = BY_NAME[name]
    models = members(case)
    ens = Ensemble(models, chunk_size=2)
    call, _ = compiled(ens)
    inputs = [case.inputs() for _ in range(N)]
    args, kwargs = oracles.stack_inputs(inputs)
    oracles.assert_outputs_equal(call(*args, **kwargs), oracles.loop_outputs(models, inputs))
    oracles.assert_state_equal(ens, models)


def test_other_batch_sizes_are_compiled_once() -> None:
    models = members(BY_NAME["batchnorm-mlp"])
    call, counter = compiled(Ensemble(models))
    counts = []
    for size in (4, 4, 5, 6, 7):
        x = torch.randn(size, 5, dtype=torch.float64)
        oracles.assert_outputs_equal(call(x), [model(x) for model in models])
        counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 2, 2]


def train(backend: str) -> None:
    """Three steps, equal to the loop's."""
    case = BY_NAME["batchnorm-mlp"]
    models = members(case)
    ens = Ensemble(models)
    call, counter = compiled(ens, backend)
    together = torch.optim.SGD(ens.parameters(), 0.1, momentum=0.9)
    alone = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in models]
    batches = [case.inputs()[0][0] for _ in range(3)]
    mine, theirs = iter(batches), iter(batches)

    def loop_step() -> Tensor:
        x = next(theirs)
        return sum(model(x).square().sum() for model in models)

    got = oracles.train_steps(lambda: call(next(mine)).square().sum(), [together])
    want = oracles.train_steps(loop_step, alone)
    torch.testing.assert_close(got, want)
    oracles.assert_state_equal(ens, models)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_equals_the_loop(backend: str) -> None:
    train(backend)


def test_the_default_backend() -> None:
    models = members(BY_NAME["mlp"])
    x = torch.randn(B, 5, dtype=torch.float64)
    with torch.no_grad():
        call = torch.compile(Ensemble(models), fullgraph=True)
        oracles.assert_outputs_equal(call(x), [model(x) for model in models])


def test_the_modes_are_followed() -> None:
    models = members(BY_NAME["batchnorm-mlp"])
    ens = Ensemble(models)
    call, _ = compiled(ens)
    for change in (
        lambda module: module.train(),
        lambda module: module.eval(),
        lambda module: module.train(),
    ):
        x = torch.randn(B, 5, dtype=torch.float64)
        change(ens)
        oracles.assert_outputs_equal(call(x), [change(model)(x) for model in models])
    ens.members[1].training = False  # a batch norm that is frozen by hand
    for model in models:
        model[1].training = False
    oracles.assert_outputs_equal(call(x), [model(x) for model in models])
    oracles.assert_state_equal(ens, models)


def test_eager_and_compiled_calls_share_their_state() -> None:
    for name in ("batchnorm-mlp", "reassigned-buffer", "plain-attributes"):
        case = BY_NAME[name]
        models = members(case)
        ens = Ensemble(models)
        call, _ = compiled(ens)
        for run in (ens, call, ens, call):
            args, kwargs = case.inputs()
            oracles.assert_outputs_equal(
                run(*args, **kwargs), [model(*args, **kwargs) for model in models]
            )
            oracles.assert_state_equal(ens, models)


class KeepsEverything(nn.Module):
    """A list, a dict and a new attribute, changed in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.history: list[Tensor] = []
        self.cache: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.cache:
            self.cache[len(x)] = torch.ones(len(x), 1, dtype=x.dtype)
        self.history.append(self.linear(x).detach())
        self.activation = self.linear(x).detach()
        return sum(self.history) * self.cache[len(x)] + self.linear(self.activation)


@pytest.mark.parametrize("strategy", ["fused", "loop"])
def test_what_forward_keeps_in_attributes_belongs_to_each_member(strategy: str) -> None:
    models = [KeepsEverything().double() for _ in range(3)]
    ens = Ensemble(models, strategy=strategy)
    call, _ = compiled(ens)
    for run in (call, call, ens, call):
        oracles.assert_outputs_equal(run(X), [model(X) for model in models])
    torch.testing.assert_close(ens[2].activation, models[2].activation)


class Counts(nn.Module):
    count: Tensor

    def __init__(self, by_member: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(3, dtype=torch.float64))
        self.by_member = by_member

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.count = self.count + (y.detach().mean(0) if self.by_member else 1)
        return y + self.count


def test_a_buffer_that_is_kept_once_is_assigned_once() -> None:
    models = [Counts().double() for _ in range(3)]
    ens = Ensemble(models, shared="count")
    call, counter = compiled(ens)
    for _ in range(3):
        oracles.assert_outputs_equal(call(X), [model(X) for model in models])
    assert ens.members.count.tolist() == [3, 3, 3]
    assert counter.frame_count == 1


@pytest.mark.parametrize("strategy", ["fused", "loop"])
def test_a_shared_batch_norm_counts_a_batch_once(strategy: str) -> None:
    frozen, own = nn.BatchNorm1d(3).double(), [nn.Linear(3, 2).double() for _ in range(3)]
    models = [nn.Sequential(copy.deepcopy(frozen), linear) for linear in own]
    ens = Ensemble(models, shared="0.*", strategy=strategy)
    call, _ = compiled(ens)
    oracles.assert_outputs_equal(call(X), [model(X) for model in models])
    for name, buffer in models[0][0].named_buffers():
        torch.testing.assert_close(ens.members[0].get_buffer(name), buffer)


def test_a_buffer_that_is_kept_once_cannot_differ() -> None:
    call, _ = compiled(Ensemble([Counts(True).double() for _ in range(3)], shared="count"))
    with pytest.raises((EnsembleError, torch._dynamo.exc.Unsupported), match="kept once for all"):
        call(X)


# Other entry points


def loss(member: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (member(x) - y).square().mean()


def gradient(member: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.func.grad(lambda x: loss(member, x, y))(x)


@pytest.mark.parametrize("fn", [loss, gradient])
def test_run(fn: Callable[..., Tensor]) -> None:
    models = members(BY_NAME["mlp"])
    ens = Ensemble(models)
    call, counter = compiled(lambda x, y: ens.run(fn, x, y))
    for _ in range(2):
        x, ys = torch.randn(B, 5).double(), torch.randn(N, B, 2).double()
        expected = [fn(model, x, y) for model, y in zip(models, ys, strict=True)]
        torch.testing.assert_close(call(x, per_member(ys)), torch.stack(expected))
    assert counter.frame_count == 1


def test_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    models = members(BY_NAME["mlp"])
    ens = Ensemble(models)
    monkeypatch.setattr(measuring, "measure", None)  # to call it is an error
    call, _ = compiled(ens)
    x = torch.randn(B, 5, dtype=torch.float64)
    oracles.assert_outputs_equal(call(x), [model(x) for model in models])


def test_marks_may_be_put_inside_the_compiled_function() -> None:
    models = [nn.Linear(3, 2).double() for _ in range(3)]
    ens = Ensemble(models)
    xs = torch.randn(3, 5, 3).double()
    call, _ = compiled(lambda xs: ens(per_member(xs)).mean(0))
    expected = [model(x) for model, x in zip(models, xs, strict=True)]
    torch.testing.assert_close(call(xs), torch.stack(expected).mean(0))


def test_an_output_that_is_the_same_for_all_can_be_written_to() -> None:
    ens = Ensemble([nn.Linear(3, 2).double() for _ in range(3)])
    call, _ = compiled(lambda x: ens.run(lambda member, x: 2 * x, x))
    outputs = call(X)
    outputs[1].zero_()
    torch.testing.assert_close(outputs[0], 2 * X)


class Committee(nn.Module):
    """An ensemble inside of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = Ensemble([nn.Linear(4, 2) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.trunk(x).relu()).mean(0)


def test_an_ensemble_inside_a_module_and_inside_an_ensemble() -> None:
    models = [Committee().double() for _ in range(2)]
    call, counter = compiled(copy.deepcopy(models[0]))  # torch.compile leaves a mark in it
    torch.testing.assert_close(call(X), models[0](X))
    assert counter.frame_count == 1
    ens = Ensemble(models)
    call, counter = compiled(ens)
    outputs = call(X)
    oracles.assert_outputs_equal(outputs, [model(X) for model in models])
    outputs.square().sum().backward()
    sum(model(X).square().sum() for model in models).backward()
    oracles.assert_gradients_equal(ens, models)
    assert counter.frame_count == 1


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_randomness(randomness: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double()
    with torch.no_grad():
        model[0].bias.fill_(1)
        model[0].weight.zero_()
    call, _ = compiled(Ensemble([copy.deepcopy(model) for _ in range(3)], randomness=randomness))
    x = torch.ones(400, 3).double()
    outputs = call(x)
    assert bool((outputs[0] == outputs[1]).all()) == (randomness == "same")
    for output in outputs:  # 1200 draws: five standard deviations
        assert abs(output.count_nonzero().item() - 600) < 5 * 300**0.5
    assert not torch.equal(call(x), outputs)


# Our rules inside of a graph


def ops_of(ens: Ensemble, *inputs: Any) -> list[str]:
    """Names of the ops that are left when the graph has been traced to the end."""
    ops: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        ops.extend(
            str(node.target).removeprefix("aten.").partition(".")[0]
            for node in graph.graph.nodes
            if node.op == "call_function"
        )
        return graph.forward

    with torch.no_grad():
        torch.compile(ens, fullgraph=True, backend=aot_autograd(fw_compiler=record))(*inputs)
    return ops


def test_rules_hold_inside_a_graph_and_leave_nothing_in_it() -> None:
    models = [nn.Linear(3, 2) for _ in range(3)]
    x = per_member(torch.randn(3, 5, 3))
    by_rule, by_torch = ops_of(Ensemble(models), x), ops_of(Ensemble(models, strategy="vmap"), x)
    assert "baddbmm" in by_rule
    assert "baddbmm" not in by_torch
    assert not [op for op in by_rule if "rules" in op]


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(7, 7)


def test_after_a_failed_trace_the_rules_hold_for_nobody_else() -> None:
    def plain(weights: Tensor, x: Tensor) -> list[str]:
        with torch.profiler.profile() as profile:
            torch.vmap(nn.functional.linear, in_dims=(None, 0))(x, weights)
        return sorted(event.key for event in profile.key_averages() if "aten" in event.key)

    weights, x = torch.randn(4, 2, 3), torch.randn(5, 3)
    before = plain(weights, x)
    call, _ = compiled(Ensemble([Raises() for _ in range(3)]))
    with pytest.raises(Exception, match="fake tensor"):
        call(torch.ones(5, 3))
    assert plain(weights, x) == before
    models = [nn.Linear(3, 2) for _ in range(3)]
    oracles.assert_outputs_equal(Ensemble(models)(x), [model(x) for model in models])
    assert plain(weights, x) == before


# torch.export


class FailsInExport(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.fails = True

    def forward(self, x: Tensor) -> Tensor:
        if self.fails and torch.compiler.is_exporting():
            raise ValueError("not like this")
        return self.linear(x)


def test_an_export_that_fails_leaves_the_ensemble_as_it_was() -> None:
    models = [FailsInExport() for _ in range(3)]
    ens = Ensemble(models, strategy="loop")
    x = torch.ones(5, 3)
    with pytest.raises(ValueError, match="not like this"):
        torch.export.export(ens, (x,))
    assert torch.backends.mha.get_fastpath_enabled()
    oracles.assert_outputs_equal(ens(x), [model(x) for model in models])
    assert "meta" in {p.device.type for p in ens._planner.pool.module.parameters()}


@pytest.mark.parametrize(
    "name", ["mlp", "cnn-batchnorm", pytest.param("transformer", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("strategy", ["auto", "loop"])
def test_export(name: str, strategy: str) -> None:
    case = BY_NAME[name]
    models = [model.eval() for model in members(case)]
    ens = Ensemble(models, strategy=strategy).eval()
    program = torch.export.export(ens, *case.inputs())
    args, kwargs = case.inputs()
    expected = [model(*args, **kwargs) for model in models]
    oracles.assert_outputs_equal(program.module()(*args, **kwargs), expected)
    core = program.run_decompositions()
    oracles.assert_outputs_equal(core.module()(*args, **kwargs), expected)
    assert program.state_dict.keys() == ens.state_dict().keys()
    oracles.assert_outputs_equal(ens(*args, **kwargs), expected)  # the ensemble itself is as before


def test_export_with_a_batch_of_any_size() -> None:
    models = [model.eval() for model in members(BY_NAME["mlp"])]
    ens = Ensemble(models)
    x = torch.randn(B, 5, dtype=torch.float64)
    size = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(ens, (x,), dynamic_shapes=((size,),))
    x = torch.randn(9, 5, dtype=torch.float64)
    oracles.assert_outputs_equal(program.module()(x), [model(x) for model in models])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what torch doesn't compile
def test_a_recurrent_ensemble_runs_outside_of_compilation_afterwards() -> None:
    torch.manual_seed(0)
    models = [nn.GRU(3, 4).double() for _ in range(3)]
    ens = Ensemble(models)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    ens(x)
    call = torch.compile(ens, backend="eager")
    oracles.assert_outputs_equal(call(x), [model(x) for model in models])
    for model in models:  # its list of weights is no state, of which a copy were kept
        with torch.no_grad():
            model.weight_hh_l0.mul_(1.5)
    with torch.no_grad():
        ens.members.weight_hh_l0.mul_(1.5)
    wanted = [model(x) for model in models]
    oracles.assert_outputs_equal(ens(x), wanted)
    oracles.assert_outputs_equal(call(x), wanted)
    assert not hasattr(ens.members, "_flat_weights")
