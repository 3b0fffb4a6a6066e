"""`ens.save` and `Ensemble.load`: everything comes back bitwise, and only where it belongs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

from cases import CASES, N
from unisono import CheckpointError, Ensemble, EnsembleWarning
from unisono.module_tree import named_tensors


def make_net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def assert_same(found, expected):
    """Bitwise, with strides, kinds, ties, modes and gradients' flags."""
    a, b = named_tensors(found.members), named_tensors(expected.members)
    assert list(a) == list(b)
    firsts = [{}, {}]
    for name in b:
        assert type(a[name]) is type(b[name]), name
        facts = [(t.dtype, t.shape, t.requires_grad) for t in (a[name], b[name])]
        assert a[name].stride() == b[name].stride() or not b[name].numel(), name
        assert facts[0] == facts[1], name
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a[name], b[name])]
        assert torch.equal(*bits), name
        assert firsts[0].setdefault(id(a[name]), name) == firsts[1].setdefault(id(b[name]), name)
    modes = [{p: m.training for p, m in ens.members.named_modules()} for ens in (found, expected)]
    assert modes[0] == modes[1]
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert found.shared == expected.shared
    assert len(found) == len(expected)


@pytest.mark.parametrize("case", CASES)
def test_round_trips_of_every_model(tmp_path, case):
    ens = Ensemble([case.make() for _ in range(N)])
    ens.save(tmp_path / "ens.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(Ensemble.load(tmp_path / "ens.safetensors", case.make), ens)
        some = Ensemble.load(tmp_path / "ens.safetensors", case.make, members=[2, 0])
    assert_same(some, ens[[2, 0]])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_members_go_out_and_come_in(tmp_path, case, suffix):
    ens = Ensemble([case.make() for _ in range(N)])
    paths = [tmp_path / f"{i}.{suffix}" for i in range(N)]
    if case.dtype.is_complex and suffix == "safetensors":
        pytest.skip("safetensors has no complex128; `test_member_file` has the message")
    for i, path in enumerate(paths):
        ens.save_member(i, path)
    back = Ensemble.from_checkpoints(case.make, paths)
    for name, tensor in ens.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    plain = case.make()
    if suffix == "pt":
        plain.load_state_dict(torch.load(paths[1]))  # strict
    else:
        load_model(plain, paths[1])
    for name, tensor in ens[1].state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
)
def test_dtypes_of_a_whole_ensemble(tmp_path, dtype):
    ens = Ensemble([nn.Linear(3, 2, dtype=dtype) for _ in range(N)])
    ens.save(tmp_path / "f")
    assert_same(Ensemble.load(tmp_path / "f", lambda: nn.Linear(3, 2, dtype=dtype)), ens)


class Buffers(nn.Module):
    """Buffers of all sorts: integers, booleans, of no size, and not in the state dict."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3).t())
        self.register_buffer("steps", torch.randint(9, ()))
        self.register_buffer("mask", torch.rand(4) > 0.5)
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("eight_bits", torch.randn(5).to(torch.float8_e4m3fn))
        self.register_buffer("transient", torch.randn(2), persistent=False)

    def forward(self, x):
        return x @ self.weight


def test_buffers_of_all_sorts(tmp_path):
    ens = Ensemble([Buffers() for _ in range(N)])
    ens.save(tmp_path / "f")
    back = Ensemble.load(tmp_path / "f", Buffers)
    assert_same(back, ens)
    assert torch.equal(back.members.transient, ens.members.transient)


def test_what_isn_t_a_tensor_comes_back(tmp_path):
    models = [make_net() for _ in range(N)]
    for model in models:
        model[0].requires_grad_(False)
        model[1].eval()
    ens = Ensemble(models, strategy="loop", randomness="same", chunk_size=2)
    ens.combination.set(weights=[0.5, 0.0, 0.5], temperatures=[1.0, 2.0, 3.0])
    ens.save(tmp_path / "f")
    back = Ensemble.load(tmp_path / "f", make_net)
    assert_same(back, ens)
    assert (back.strategy, back.randomness, back.chunk_size) == ("loop", "same", 2)
    assert torch.equal(back.combination.weights, ens.combination.weights)
    assert torch.equal(back.combination.temperatures, ens.combination.temperatures)
    assert back.combination.pooled_temperature is None
    middle = Ensemble.load(tmp_path / "f", make_net, members=[1])
    assert middle.combination.weights.tolist() == [0.0]
    assert middle.combination.temperatures.tolist() == [2.0]


def test_shared_tensors_are_kept_once(tmp_path):
    ens = Ensemble.build(make_net, 5, shared="0.*")
    ens.save(tmp_path / "f")
    assert load_file(tmp_path / "f")["members.0.weight"].shape == (6, 4)
    assert_same(Ensemble.load(tmp_path / "f", make_net), ens)
    assert_same(Ensemble.load(tmp_path / "f", make_net, members=[4]), ens[[4]])


def test_the_names_are_those_of_the_state_dict(tmp_path):
    ens = Ensemble.build(make_net, 5)
    ens.save(tmp_path / "f")
    found = load_file(tmp_path / "f")
    assert found.keys() == ens.state_dict().keys()
    other = Ensemble.build(make_net, 5, seed=7)
    other.load_state_dict(found)
    assert_same(other, ens)


def test_channels_last_stays(tmp_path):
    def make():
        return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    ens = Ensemble.build(make, 3)
    ens.save(tmp_path / "f")
    assert_same(Ensemble.load(tmp_path / "f", make), ens)
    assert_same(Ensemble.load(tmp_path / "f", make, members=[1]), ens[[1]])


def test_a_model_without_values_will_do(tmp_path):
    ens = Ensemble.build(make_net, 5)
    ens.save(tmp_path / "f")

    def make_meta():
        with torch.device("meta"):
            return make_net()

    assert_same(Ensemble.load(tmp_path / "f", make_meta), ens)
    assert Ensemble.load(tmp_path / "f", make_meta, device="cpu")(torch.randn(2, 4)).shape == (
        *(5, 2, 2),
    )


def test_loading_leaves_the_random_state_alone(tmp_path):
    ens = Ensemble.build(make_net, 2)
    ens.save(tmp_path / "f")
    before = torch.get_rng_state()
    Ensemble.load(tmp_path / "f", make_net)
    ens.save_member(0, tmp_path / "0.pt")
    Ensemble.from_checkpoints(make_net, [tmp_path / "0.pt"])
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_in_inference_mode_it_can_be_trained(tmp_path):
    Ensemble.build(make_net, 2).save(tmp_path / "f")
    with torch.inference_mode():
        ens = Ensemble.load(tmp_path / "f", make_net)
    ens(torch.randn(3, 4)).sum().backward()
    assert ens.members.get_parameter("0.weight").grad is not None


def test_a_folder_with_the_file(tmp_path):
    ens = Ensemble.build(make_net, 2)
    ens.save(tmp_path / "model.safetensors")
    assert_same(Ensemble.load(tmp_path, make_net), ens)


def test_an_ensemble_without_tensors(tmp_path):
    Ensemble.build(nn.ReLU, 3).save(tmp_path / "f")
    assert len(Ensemble.load(tmp_path / "f", nn.ReLU)) == 3
    assert len(Ensemble.load(tmp_path / "f", nn.ReLU, members=[2])) == 1


# Where it doesn't belong --------------------------------------------------------------------------


def saved(tmp_path, make=make_net, n=3):
    Ensemble.build(make, n).save(tmp_path / "f")
    return tmp_path / "f"


def test_all_that_differs_is_told_at_once(tmp_path):
    path = saved(tmp_path)

    def make_other():
        net = nn.Sequential(
            nn.Linear(4, 7), nn.BatchNorm1d(6, eps=0.1), nn.Tanh(), nn.Linear(6, 2).double()
        )
        del net[3].bias
        net[3].register_parameter("bias", None)
        net[3].extra = nn.Parameter(torch.zeros(1))
        return net

    with pytest.raises(CheckpointError, match="Ensemble") as caught:
        Ensemble.load(path, make_other)
    assert str(caught.value) == (
        f"Ensemble.load: {path} was saved from another architecture than make_model() makes:\n\n"
        "  `0.bias` has shape (6,) in the file, (7,) in the model\n"
        "  `0.weight` has shape (6, 4) in the file, (7, 4) in the model\n"
        "  `3.bias` is in the file, and not in the model\n"
        "  `3.extra` is in the model, and not in the file\n"
        "  `3.weight` is torch.float32 in the file, torch.float64 in the model;"
        " make_model=lambda: Model().to(torch.float32) makes it so\n"
        "  `0`: out_features was 6, now 7\n"
        "  `1`: eps was 1e-05, now 0.1\n"
        "  `2`: saved as torch.nn.modules.activation.ReLU, now torch.nn.modules.activation.Tanh\n\n"
        "Pass the make_model of the saved ensemble. To take tensors of equal names and shapes all"
        " the same:\n"
        "  ens = Ensemble.build(make_model, 3)\n"
        f"  ens.load_state_dict(safetensors.torch.load_file({str(path)!r}), strict=False)"
    )


def test_other_ties_are_told(tmp_path):
    class Tied(nn.Module):
        def __init__(self, tied=True):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            if tied:
                self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    path = saved(tmp_path, Tied)
    with pytest.raises(CheckpointError, match=r"`b.weight` was the tensor `a.weight`, in the mod"):
        Ensemble.load(path, lambda: Tied(tied=False))
    path = saved(tmp_path, lambda: Tied(tied=False))
    with pytest.raises(CheckpointError, match=r"`b.weight` was the tensor `b.weight`, in the mod"):
        Ensemble.load(path, Tied)


class Own(nn.Module):
    def __init__(self, width=3, act=torch.relu):
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.width = width
        self.act = act
        self._calls = width

    def forward(self, x):
        return self.act(self.lin(x))


def test_attributes_of_own_classes_are_told_and_do_not_keep_anyone_out(tmp_path):
    path = saved(tmp_path, Own)
    with pytest.warns(EnsembleWarning) as caught:
        Ensemble.load(path, lambda: Own(5, torch.tanh))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message) == (
        f"Ensemble.load: {path} was saved from a model that differs in attributes of classes of"
        " your own; the values of make_model() are taken:\n"
        "  the model: act was function _VariableFunctionsClass.relu, now function"
        " _VariableFunctionsClass.tanh\n"
        "  the model: width was 3, now 5"
    )


def test_a_class_may_move_to_another_file(tmp_path):
    path = saved(tmp_path, Own)
    moved = type("Own", (Own,), {"__module__": "elsewhere"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Ensemble.load(path, moved)


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        (3, TypeError, r"members= is a list of integers, got 3; one: members=\[0\]"),
        ([True], TypeError, r"members= is a list of integers, got \[True\]"),
        ([0.5], TypeError, r"members= is a list of integers, got \[0.5\]"),
        ("01", TypeError, "members= is a list of integers, got '01'"),
        ([], ValueError, "an ensemble has at least one member; members= is empty"),
        ([0, 3], IndexError, "f has 3 members, 0 to 2; there is no member 3"),
        ([-1], IndexError, "f has 3 members, 0 to 2; there is no member -1"),
    ],
)
def test_members_that_there_are_not(tmp_path, members, error, message):
    path = saved(tmp_path)
    with pytest.raises(error, match=message):
        Ensemble.load(path, make_net, members=members)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_net(), "Ensemble.load: make_model is a function that returns a new model, got Seq"),
        (dict, r"Ensemble.load: make_model\(\) returned a dict, not a module"),
    ],
)
def test_what_makes_no_model(tmp_path, make, message):
    with pytest.raises(TypeError, match=message):
        Ensemble.load(saved(tmp_path), make)


def test_the_file_of_one_member_isn_t_an_ensemble(tmp_path):
    ens = Ensemble.build(make_net, 2)
    ens.save_member(0, tmp_path / "0.safetensors")
    with pytest.raises(CheckpointError, match=r"a single member's goes into Ensemble.from_ch"):
        Ensemble.load(tmp_path / "0.safetensors", make_net)


def test_what_forward_keeps_in_attributes_is_told(tmp_path):
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)
            self.last = torch.zeros(2, 2)

        def forward(self, x):
            self.last = self.lin(x).detach()
            return self.last

    ens = Ensemble.build(Keeps, 2, strategy="fused")
    ens(torch.randn(2, 2))
    with pytest.warns(EnsembleWarning, match=r"leaves out what forward keeps in plain attributes"):
        ens.save(tmp_path / "f")
    assert Ensemble.load(tmp_path / "f", Keeps)(torch.randn(2, 2)).shape == (2, 2, 2)


def test_extra_state_is_told(tmp_path):
    class Counted(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    ens = Ensemble.build(lambda: nn.Sequential(Counted(2, 2)), 2)
    with pytest.warns(EnsembleWarning, match=r"what modules add \(`0.get_extra_state\(\)`\); make"):
        ens.save(tmp_path / "f")


def test_saving_leaves_the_ensemble_alone(tmp_path):
    ens = Ensemble.build(make_net, 3)
    ens(torch.randn(5, 4)).sum().backward()
    before = copy.deepcopy(ens)
    ens.save(tmp_path / "f")
    assert_same(ens, before)
    assert ens.members.get_parameter("0.weight").grad is not None
