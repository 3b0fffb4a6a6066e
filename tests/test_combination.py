"""Weights and temperatures stay with the ensemble: in states, pickles, copies, parts."""

import copy
import pickle

import pytest
import torch
from torch import nn

from unisono import CheckpointError, Ensemble, calibration, combine

KEYS = [f"combination.{name}" for name in ("weights", "temperatures", "pooled_temperature")]


def build(n=4, seed=0):
    return Ensemble.build(lambda: nn.Linear(3, 5), n, seed=seed, strategy="fused").double()


def with_all(n=4):
    ens = build(n)
    ens.combination.set(
        weights=torch.arange(n).double() + 1,
        temperatures=torch.linspace(0.5, 2, n).double(),
        pooled_temperature=0.8,
    )
    return ens


def by_hand(ens, logits, members=None):
    """In float64, member by member."""
    kept, total, share = ens.combination, 0, 0
    for i in range(len(logits)):
        p = (logits[i] / kept.temperatures[i]).softmax(-1)
        total, share = total + kept.weights[i] * p, share + kept.weights[i]
    return ((total / share).log() / kept.pooled_temperature).softmax(-1)


@pytest.fixture
def x():
    return torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def assert_same(one, other):
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name


# What they do -------------------------------------------------------------------------------------


def test_probabilities_equal_the_formula(x):
    ens = with_all()
    logits = ens(x)
    torch.testing.assert_close(ens.combination.probabilities(logits), by_hand(ens, logits))
    moved = ens.combination.probabilities(logits.mT, dim=1)
    torch.testing.assert_close(moved.mT, by_hand(ens, logits))


def test_what_is_not_set_is_left_out(x):
    ens = build()
    logits, t, w = ens(x), torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([1.0, 0.0, 2.0, 0.0])
    kept = ens.combination
    assert torch.equal(kept.probabilities(logits), combine.probabilities(logits))
    assert torch.equal(kept.weighted(logits), combine.mean(logits))
    kept.set(weights=w)
    expected = combine.weighted(logits.softmax(-1), w)
    torch.testing.assert_close(kept.probabilities(logits), expected)
    torch.testing.assert_close(kept.weighted(logits), combine.weighted(logits, w))
    kept.set(temperatures=t)
    assert kept.weights is None  # set says all there is to say
    expected = combine.probabilities(calibration.apply(logits, t))
    torch.testing.assert_close(kept.probabilities(logits), expected)
    kept.set(pooled_temperature=2.0)
    expected = (combine.probabilities(logits).log() / 2).softmax(-1)
    torch.testing.assert_close(kept.probabilities(logits), expected)
    kept.set()
    assert list(ens.state_dict()) == ["members.weight", "members.bias"]


def test_the_call_stays_as_it_is(x):
    ens = build()
    before = ens(x)
    ens.combination.set(weights=[0, 0, 0, 1], temperatures=[2, 2, 2, 2])
    assert torch.equal(ens(x), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(x, dtype):
    ens = with_all()
    logits = ens(x)
    found = ens.combination.probabilities(logits.to(dtype))
    assert found.dtype == dtype
    tolerance = {"atol": 3 * torch.finfo(dtype).eps, "rtol": 0}
    torch.testing.assert_close(found.double(), by_hand(ens, logits), **tolerance)
    half = ens.to(dtype).combination.probabilities(logits.to(dtype))
    torch.testing.assert_close(half, found, **tolerance)


def test_what_is_set_is_a_copy_without_a_gradient():
    ens = build()
    weights = torch.ones(4, requires_grad=True)
    ens.combination.set(weights=weights)
    with torch.no_grad():
        weights.zero_()
    assert ens.combination.weights.tolist() == [1, 1, 1, 1]
    assert not ens.combination.weights.requires_grad
    assert list(dict(ens.named_parameters())) == ["members.weight", "members.bias"]


def test_gradients_go_through(x):
    ens = with_all()
    ens.combination.probabilities(ens(x))[:, 0].sum().backward()
    assert ens.members.weight.grad.abs().sum() > 0


# Where they go ------------------------------------------------------------------------------------


def test_copies_and_round_trips(x):
    ens = with_all()
    expected = ens.combination.probabilities(ens(x))
    loaded = build(seed=9)
    loaded.load_state_dict(ens.state_dict())
    for other in (copy.deepcopy(ens), pickle.loads(pickle.dumps(ens)), loaded):
        assert_same(ens, other)
        torch.testing.assert_close(other.combination.probabilities(other(x)), expected)
    other.combination.weights.zero_()
    assert ens.combination.weights.tolist() == [1, 2, 3, 4]


def test_states_have_them_where_they_are_set():
    assert list(with_all().state_dict()) == ["members.weight", "members.bias", *KEYS]
    assert list(build().state_dict()) == ["members.weight", "members.bias"]


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_says_what_is_set(assign):
    old, ens = build(seed=3).state_dict(), with_all()
    ens.load_state_dict(old, strict=True, assign=assign)  # from before there were weights
    assert_same(ens, build(seed=3))
    ens.load_state_dict(with_all().state_dict(), assign=assign)
    assert_same(ens, with_all())
    part = with_all()
    part.combination.set(temperatures=[1, 1, 1, 2])
    ens.load_state_dict(part.state_dict(), assign=assign)
    assert_same(ens, part)
    assert ens.combination.weights is None


def test_a_state_without_the_members_leaves_them():
    ens = with_all()
    found = ens.load_state_dict({}, strict=False)
    assert found.missing_keys == list(ens.state_dict())
    assert ens.combination.weights.tolist() == [1, 2, 3, 4]


def test_inside_another_module():
    one, other = nn.Sequential(nn.Identity(), with_all()), nn.Sequential(nn.Identity(), build())
    other.load_state_dict(one.state_dict())
    assert_same(one, other)
    other.load_state_dict(nn.Sequential(nn.Identity(), build()).state_dict())
    assert other[1].combination.weights is None


def test_a_state_of_other_members_is_refused():
    ens = build()
    with pytest.raises(CheckpointError, match="the state has 3 members, this ensemble has 4"):
        ens.load_state_dict(with_all(3).state_dict())
    assert ens.combination.weights is None
    state = build().state_dict() | {"combination.weights": torch.ones(3)}
    with pytest.raises(RuntimeError, match=r"size mismatch for combination\.weights"):
        ens.load_state_dict(state)


@pytest.mark.parametrize(
    ("index", "members"),
    [
        ([0, 2], [0, 2]),
        (slice(1, 3), [1, 2]),
        ([3, 3, -4], [3, 3, 0]),
        (torch.tensor([True, False, False, True]), [0, 3]),
    ],
)
def test_a_part_has_the_rows_of_its_members(x, index, members):
    ens = with_all().eval()
    part = ens[index]
    assert part.combination.weights.tolist() == [i + 1 for i in members]
    assert torch.equal(part.combination.temperatures, ens.combination.temperatures[members])
    assert part.combination.pooled_temperature == ens.combination.pooled_temperature
    assert not any(module.training for module in part.modules())
    logits = part(x)
    torch.testing.assert_close(part.combination.probabilities(logits), by_hand(part, logits))
    part.combination.weights.zero_()
    part.combination.pooled_temperature.zero_()
    assert_same(ens, with_all())


def test_a_part_of_an_ensemble_without_has_none():
    assert list(build()[[0, 1]].state_dict()) == ["members.weight", "members.bias"]


def test_copies_over_other_members_bring_theirs():
    ens = with_all()
    ens.copy_([3, 0], [0, 1])
    assert ens.combination.weights.tolist() == [4, 1, 3, 4]
    assert ens.combination.temperatures.tolist() == [2.0, 0.5, 1.5, 2.0]
    expected = with_all()[[3, 0, 2, 3]]
    assert_same(ens, expected)


def test_members_by_themselves_are_as_ever(x):
    ens = with_all()
    assert list(ens[1].state_dict()) == ["weight", "bias"]
    assert list(ens.unstack()[1].state_dict()) == ["weight", "bias"]


def test_conversions():
    ens = with_all().to(torch.float16)
    assert {tensor.dtype for tensor in ens.state_dict().values()} == {torch.float16}
    meta = with_all().to("meta")
    assert {tensor.device.type for tensor in meta.state_dict().values()} == {"meta"}
    meta.load_state_dict(with_all().state_dict(), assign=True)
    assert_same(meta, with_all())


def test_a_state_is_loaded_to_where_the_ensemble_is():
    ens, state = build().to("meta"), with_all().state_dict()
    with pytest.warns(UserWarning, match="no-op"):  # torch: nothing is copied to meta
        ens.load_state_dict(state)
    assert {tensor.device.type for tensor in ens.state_dict().values()} == {"meta"}


@torch.no_grad()
def test_nothing_is_read_back_from_the_device():
    kept = with_all().combination
    with torch._subclasses.FakeTensorMode():  # reading a value of a fake tensor raises
        for name, buffer in list(kept.named_buffers()):
            setattr(kept, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
        logits = torch.empty(4, 7, 5, device="cuda")
        found = [kept.probabilities(logits), kept.select([0, 2]).weights]
        kept.copy_members([0], [1])
        # The ensemble may be there, and what was set still here.
        kept.pooled_temperature = torch.empty(())
        found.append(kept.probabilities(logits))
    assert {tensor.device.type for tensor in found} == {"cuda"}


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_graph_breaks(x):
    ens = with_all()

    def predict(x):
        return ens.combination.probabilities(ens(x))

    compiled = torch.compile(predict, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), predict(x))


# Messages -----------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_told_at_once():
    ens = with_all()
    before = copy.deepcopy(ens)
    with pytest.raises(
        ValueError,
        match=r"^ens\.combination\.set: weights has shape \(4,\), got \(3,\);"
        r" temperatures: finite and above zero, got 0\.0;"
        r" pooled_temperature has shape \(\), got \(1,\)$",
    ):
        ens.combination.set(
            weights=[1, 2, 3], temperatures=[1, 0, 1, 1], pooled_temperature=torch.ones(1)
        )
    assert_same(ens, before)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"weights: finite and not negative, got {bad}"):
            ens.combination.set(weights=[1, bad, 1, 1])
        with pytest.raises(ValueError, match=f"temperature: finite and above zero, got {bad}"):
            ens.combination.set(pooled_temperature=bad)
    for bad in ("1234", [1, None, 1, 1]):
        with pytest.raises(TypeError, match=r"set: weights: a tensor or numbers, got ['\[]1"):
            ens.combination.set(weights=bad)
    with pytest.raises(ValueError, match="weights: all 4 are zero"):
        ens.combination.set(weights=torch.zeros(4))
    with pytest.raises(ValueError, match=r"weights are real numbers, got torch\.complex64"):
        ens.combination.set(weights=torch.ones(4, dtype=torch.complex64))
    assert_same(ens, before)


def test_errors_about_outputs(x):
    ens = with_all()
    with pytest.raises(
        ValueError,
        match=r"^ens\.combination\.weighted: temperatures are set, and they divide logits; use"
        r" ens\.combination\.probabilities\(logits\), or ens\.combination\.set\(weights=",
    ):
        ens.combination.weighted(ens(x))
    for method in (ens.combination.probabilities, ens.combination.weighted):
        here = rf"^ens\.combination\.{method.__name__}: "
        with pytest.raises(
            ValueError, match=here + r".* there are 4, but their shape is \(3, 7, 5"
        ):
            method(ens(x)[:3])
        with pytest.raises(ValueError, match=here + r".* there are 4, but their shape is \(\)"):
            method(torch.tensor(1.0))
        with pytest.raises(TypeError, match=here + "expected one tensor of outputs, got dict"):
            method({"logits": ens(x)})
    with pytest.raises(ValueError, match="dim=0 is the member axis"):
        ens.combination.probabilities(ens(x), dim=0)


def test_a_part_without_weight_says_so(x):
    ens = build()
    ens.combination.set(weights=[0, 1, 1, 0])
    part = ens[[0, 3]]
    with pytest.raises(ValueError, match="the 2 weights sum to zero"):
        part.combination.probabilities(part(x))


def test_the_repr_says_what_is_set():
    assert repr(with_all().combination) == (
        "Combination(weights=(4,), temperatures=(4,), pooled_temperature=())"
    )
    assert repr(build().combination) == "Combination()"
