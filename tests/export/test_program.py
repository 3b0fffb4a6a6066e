"""`export.program`: batch axes, containers, combinations, state, and what is refused."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_placement import fake, move
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from exports import SimpleMLP, exported_case
from unisono import Ensemble, EnsembleWarning, combine, export, per_member, uncertainty
from unisono.engine.planning import measuring
from unisono.errors import ExportError

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")

X = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)


def linear_ensemble(n: int = 3, classes: int = 4) -> Ensemble:
    torch.manual_seed(1)
    return Ensemble([nn.Linear(3, classes).double() for _ in range(n)]).eval()


def ops_of(program: torch.export.ExportedProgram) -> list[str]:
    """The ops of a program that compute something."""
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    views = ("view", "expand", "unsqueeze", "transpose", "permute", "sym_size", ".t.", "clone")
    kept = [name for name in names if name.startswith("aten.")]
    return [name.split(".")[1] for name in kept if not any(view in name for view in views)]


def test_the_graph_of_the_tutorial_holds_each_layer_once() -> None:
    ens = Ensemble([SimpleMLP() for _ in range(10)]).eval()
    program = export.program(ens, torch.randn(64, 1, 28, 28))
    assert ops_of(program) == ["addmm", "relu", "baddbmm", "relu", "baddbmm"]
    assert [node.name for node in program.graph.nodes if node.op == "placeholder"][-1] == "x"
    x = torch.randn(7, 1, 28, 28)
    torch.testing.assert_close(program.module()(x), ens(x))


def test_per_member_inputs_keep_their_member_axis() -> None:
    ens = linear_ensemble()
    program = export.program(ens, per_member(torch.stack([X] * 3)))
    xs = torch.randn(3, 8, 3, dtype=torch.float64)
    torch.testing.assert_close(program.module()(xs), ens(per_member(xs)))
    with pytest.raises(
        AssertionError, match=r"Guard failed: input.size\(\)\[0\] == 3"
    ):  # the number of members is fixed
        program.module()(torch.randn(4, 8, 3, dtype=torch.float64))


def test_a_batch_of_one_row_is_an_example_too() -> None:
    ens = linear_ensemble()
    module = export.program(ens, X[:1]).module()
    for rows in (X[:1], X):
        torch.testing.assert_close(module(rows), ens(rows))


def test_nothing_is_measured_or_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    ens = linear_ensemble()
    before = {name: tensor.clone() for name, tensor in ens.state_dict().items()}
    strides = [parameter.stride() for parameter in ens.parameters()]
    monkeypatch.setattr(measuring, "measure", None)  # to call it is an error
    export.program(ens, X)
    assert strides == [parameter.stride() for parameter in ens.parameters()]
    assert all(torch.equal(before[name], tensor) for name, tensor in ens.state_dict().items())
    assert not ens._planner._plans


class Weighs(nn.Module):
    """Takes keywords in another order than they are given, and numbers."""

    def forward(self, x: Tensor, *, scale: Tensor, shift: Tensor, power: int = 1) -> Tensor:
        return (x + shift) ** power * scale


def test_keywords_in_any_order() -> None:
    ens = Ensemble([Weighs() for _ in range(2)])
    kwargs = {"power": 2, "shift": X + 1, "scale": X.sin()}
    program = export.program(ens, (X,), kwargs)
    want = Weighs()(X, **kwargs)
    torch.testing.assert_close(program.module()(X, **kwargs)[1], want)
    got = program.module()(X, scale=X.sin(), shift=X + 1, power=2)
    torch.testing.assert_close(got[0], want)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, sequence: Tensor, options: dict[str, Any], *more: Tensor) -> Tensor:
        return self.linear(sequence).mean(0) + options["table"].sum() + sum(more)


def test_batch_axes_by_name() -> None:
    ens = Ensemble([TwoInputs().double() for _ in range(2)])
    args = (torch.stack([X] * 2), {"table": torch.ones(7, 7).double()}, X[:, :1])
    axes = {"sequence": 1, "options": None}
    program = export.program(ens, args, batch_axes=axes)
    other = (torch.randn(2, 9, 3).double(), args[1], torch.randn(9, 1).double())
    torch.testing.assert_close(program.module()(*other), ens(*other))
    with pytest.raises(
        ValueError,
        match=r"export.program: the batch axes differ in length: `sequence` has 2,"
        r" `options.table` has 7, `more.0` has 5.\n(?s:.*)batch_axes={'more.0': None}",
    ):
        export.program(ens, args)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"y": 0}, "batch_axes names 'y', but the inputs are 'input'"),
        ({"input": 2}, r"`input` has no axis 2: a member sees shape \(5, 3\)"),
        (-3, r"`input` has no axis -3"),
    ],
)
def test_axes_that_there_are_not(axes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"export.program: {message}"):
        export.program(linear_ensemble(), X, batch_axes=axes)


def test_an_axis_of_marked_inputs_is_counted_as_a_member_sees_it() -> None:
    ens = linear_ensemble()
    program = export.program(ens, per_member(X.expand(3, 2, 5, 3)), batch_axes=-2)
    xs = torch.randn(3, 2, 9, 3, dtype=torch.float64)
    torch.testing.assert_close(program.module()(xs), ens(per_member(xs)))


def test_arguments_are_a_tuple() -> None:
    with pytest.raises(TypeError, match=r"one tensor; got list: write \(x,\) for a call ens\(x\)"):
        export.program(linear_ensemble(), [X])


class FixesTheSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        weights = torch.ones(int(x.shape[0]), dtype=x.dtype)
        return weights @ y


def test_what_fixes_the_batch_is_named() -> None:
    ens = Ensemble([FixesTheSize().double() for _ in range(3)])
    with pytest.raises(ExportError, match="can't stay open") as caught:
        export.program(ens, X)
    text = str(caught.value)
    assert text.startswith(
        "export.program: the size of the batch (`x`) can't stay open: in `FixesTheSize.forward`,"
        " test_program.py:"
    )
    assert "it was fixed to 5 when `aten.ones.default` ran" in text
    assert "batch_axes=None" in text
    program = export.program(ens, X, batch_axes=None)
    torch.testing.assert_close(program.module()(X), ens(X))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 4 else x


def test_a_branch_on_the_size_is_refused() -> None:
    with pytest.raises(ExportError, match=r"can't stay open; torch.export says:(?s:.*)batch_axes"):
        export.program(Ensemble([Branches() for _ in range(2)]), X)


class ReadsElements(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(self.gate(x).sum().detach()) > 0 else x


def test_what_depends_on_elements_is_refused_with_its_place() -> None:
    ens = Ensemble([ReadsElements().double() for _ in range(2)])
    with pytest.raises(
        ExportError,
        match=r"export.program: torch.export can't follow this model: .*`ReadsElements.forward`"
        r".*must not depend on the elements of a tensor",
    ):
        export.program(ens, X)
    with pytest.warns(EnsembleWarning, match='strategy "loop"'):
        ens(X)  # the ensemble is as before


# Outputs

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Prediction:
    mean: Tensor
    rows: int


class Nested(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"pair": Pair(x, [x + 1, "text"]), "more": Prediction(x * 2, x.shape[0])}


def test_outputs_lie_in_containers_of_python() -> None:
    module = export.program(Ensemble([Nested() for _ in range(2)]), X).module()
    got = module(X[:3])
    assert got["pair"]["right"][1] == "text"
    assert got["more"]["rows"] == 3
    torch.testing.assert_close(got["pair"]["right"][0], torch.stack([X[:3] + 1] * 2))
    torch.testing.assert_close(got["more"]["mean"], torch.stack([X[:3] * 2] * 2))


class Returns(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return {"x": x, "kind": self.value}


def test_outputs_of_other_kinds_are_refused() -> None:
    with pytest.raises(ExportError, match=r"export.program: the output `kind` is a dtype; an"):
        export.program(Ensemble([Returns(torch.float32) for _ in range(2)]), X)


# Combinations


@pytest.mark.parametrize("fitted", [False, True])
def test_combinations(fitted: bool) -> None:
    ens = linear_ensemble()
    if fitted:
        ens.combination.set(weights=[0.2, 0.3, 0.5], temperatures=[0.5, 1.0, 2.0])
    logits = ens(X)
    scaled = logits / torch.tensor([0.5, 1, 2]).view(3, 1, 1) if fitted else logits
    want = {
        "probabilities": ens.combination.probabilities(logits),
        "vote": combine.vote(logits),
        "uncertainty": uncertainty.classification(
            scaled, weights=[0.2, 0.3, 0.5] if fitted else None
        )._asdict(),
    }
    for name, expected in want.items():
        module = export.program(ens, X[:2], combination=name).module()
        torch.testing.assert_close(module(X), expected)


def test_a_mean_takes_weights() -> None:
    ens = linear_ensemble()
    module = export.program(ens, X, combination="mean").module()
    torch.testing.assert_close(module(X), ens(X).mean(0))
    ens.combination.set(weights=[1, 0, 3])
    module = export.program(ens, X, combination="mean").module()
    torch.testing.assert_close(module(X), combine.weighted(ens(X), [1, 0, 3]))


def test_votes_with_ties_and_abstentions() -> None:
    ens = Ensemble([nn.Identity() for _ in range(4)])
    votes = torch.eye(3)[torch.tensor([[2, 2, 0, 0], [1, 2, 2, 1], [0, 1, 2, 2]])].mT  # (3, 3, 4)
    logits = votes.permute(2, 0, 1).contiguous()  # (4, 3, 3)
    logits[:, 2] = torch.nan  # all abstain
    logits[0, 1] = torch.nan
    module = export.program(ens, per_member(logits), combination="vote").module()
    torch.testing.assert_close(module(logits), combine.vote(logits))
    assert module(logits).tolist()[2] == -1


def test_votes_of_labels() -> None:
    ens = Ensemble([nn.Identity() for _ in range(3)])
    labels = torch.tensor([[1, 2, 0], [1, 0, 0], [2, 2, 1]])
    module = export.program(ens, per_member(labels), combination="vote").module()
    assert module(labels).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mean", {"temperatures": [1, 2, 3]}, 'combination="mean" averages outputs as they are'),
        (
            "uncertainty",
            {"pooled_temperature": 2},
            'combination="uncertainty" .* has a pooled_temperature',
        ),
    ],
)
def test_settings_without_a_meaning(name: Any, settings: Any, message: str) -> None:
    ens = linear_ensemble()
    ens.combination.set(**settings)
    with pytest.raises(ExportError, match=f"export.program: {message}"):
        export.program(ens, X, combination=name)


def test_only_one_tensor_is_combined() -> None:
    with pytest.raises(ExportError, match="one tensor of outputs, but the members return a dict"):
        export.program(Ensemble([Nested() for _ in range(2)]), X, combination="mean")
    with pytest.raises(ValueError, match="'mean', 'probabilities', 'vote', 'uncertainty'; got 'm'"):
        export.program(linear_ensemble(), X, combination="m")  # type: ignore[arg-type]


# State


def test_in_train_mode_a_program_counts_and_draws() -> None:
    ens, (x,), _ = exported_case("batchnorm-mlp")
    ens.train()
    program = export.program(ens, x)
    module = program.module()
    torch.testing.assert_close(module(x), ens(x))
    for name, buffer in ens.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer)


def test_buffers_that_are_assigned() -> None:
    ens, (x,), _ = exported_case("reassigned-buffer")
    ens.train()
    module = export.program(ens, x).module()
    for _ in range(3):
        torch.testing.assert_close(module(x), ens(x))
    torch.testing.assert_close(module.get_buffer("members.mean"), ens.members.mean)


def test_attributes_stay_as_they_were_and_that_is_said() -> None:
    ens, (x,), _ = exported_case("plain-attributes")
    with pytest.warns(EnsembleWarning) as told:
        program = export.program(ens, x)
    assert [str(each.message).split(",")[0] for each in told] == [
        "torch.export: forward assigns the attribute `hidden`",
        "torch.export: forward assigns the attribute `calls`",
    ]
    assert {each.filename for each in told} == {__file__}
    first = program.module()(x)
    torch.testing.assert_close(program.module()(x), first)
    torch.testing.assert_close(ens(x), first)  # of the ensemble this is the first call


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_strategies(strategy: Any) -> None:
    ens = linear_ensemble()
    ens.strategy = strategy
    program = export.program(ens, X)
    torch.testing.assert_close(program.module()(X[:2]), ens(X[:2]))


def test_the_loop_keeps_recurrent_layers_whole() -> None:
    ens = Ensemble([nn.LSTM(3, 2, batch_first=True) for _ in range(2)], strategy="loop").eval()
    program = export.program(ens, torch.randn(4, 5, 3))
    assert ops_of(program).count("lstm") == 2
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(program.module()(x)[0], ens(x)[0])
    again = export.program(ens, torch.randn(4, 5, 3)).module()  # nothing of the export stayed
    torch.testing.assert_close(again(x)[0], ens(x)[0])


@pytest.mark.parametrize("name", ["reassigned-buffer", "plain-attributes"])
@pytest.mark.filterwarnings("ignore:.*forward assigns the attribute:unisono.EnsembleWarning")
def test_the_loop_writes_buffers_too(name: str) -> None:
    ens, (x,), _ = exported_case(name)
    ens.train()
    ens.strategy = "loop"
    state = dict(vars(ens.members))
    program = torch.export.export(ens, (x,))
    assert vars(ens.members).keys() == state.keys()
    torch.testing.assert_close(export.program(ens, x).module()(x), program.module()(x))
    if name == "reassigned-buffer":
        module = export.program(ens, x).module()
        for _ in range(2):
            torch.testing.assert_close(module(x), ens(x))


def test_shared_parts_are_in_it_once() -> None:
    trunk = nn.Linear(3, 3).double()
    models = [nn.Sequential(trunk, nn.Linear(3, 2).double()) for _ in range(3)]
    ens = Ensemble(models, shared="0.*")
    program = export.program(ens, X)
    assert program.state_dict["members.0.weight"].shape == (3, 3)
    assert ops_of(program) == ["addmm", "addmm"]
    torch.testing.assert_close(program.module()(X[:2]), ens(X[:2]))


def test_it_is_saved_and_loaded_without_the_class(tmp_path: Path) -> None:
    ens = Ensemble([SimpleMLP() for _ in range(3)]).eval()
    path = tmp_path / "ens.pt2"
    torch.export.save(export.program(ens, torch.randn(4, 784)), path)
    x = torch.randn(6, 784)
    torch.testing.assert_close(torch.export.load(path).module()(x), ens(x))


@torch.no_grad()
def test_devices_are_followed() -> None:
    ens = Ensemble([nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)) for _ in range(2)]).eval()
    mode = FakeTensorMode()
    move(mode, ens)
    program = torch.export.export(ens, (fake(mode, torch.empty(5, 3)),))
    devices = {
        node.meta["val"].device.type
        for node in program.graph.nodes
        if isinstance(node.meta.get("val"), Tensor)
    }
    assert devices == {"cuda"}
