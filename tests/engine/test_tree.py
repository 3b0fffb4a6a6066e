"""Trees: mapping keeps containers, whatever they are; joining needs one structure."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch import distributions as D
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree

from unisono import Ensemble, UnsupportedModelError, per_member
from unisono.engine.tree import leaves, transpose, tree_map

Point = namedtuple("Point", ["x", "y"])


@dataclass(frozen=True)
class Frozen:
    value: Any
    rest: list[Any] = field(default_factory=list)
    late: int = field(init=False, default=7)


trees = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Point, inner, inner)
        | st.builds(Frozen, inner, st.lists(inner, max_size=2))
        | st.dictionaries(st.integers(), inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=12,
)


@given(trees)
def test_mapping_changes_leaves_and_nothing_else(tree: Any) -> None:
    mapped = tree_map(lambda leaf: ("mapped", leaf).__hash__(), tree)
    assert [path for path, _ in leaves(mapped)] == [path for path, _ in leaves(tree)]
    assert type(mapped) is (type(tree) if leaves_of(tree) and is_container(tree) else type(mapped))
    assert [leaf for _, leaf in leaves(mapped)] == [
        ("mapped", leaf).__hash__() for _, leaf in leaves(tree)
    ]


def leaves_of(tree: Any) -> list[Any]:
    return [leaf for _, leaf in leaves(tree)]


def is_container(tree: Any) -> bool:
    return isinstance(tree, list | dict | tuple | Frozen)


@given(trees)
def test_a_tree_that_does_not_change_is_not_copied(tree: Any) -> None:
    assert tree_map(lambda leaf: leaf, tree) is tree


@given(trees)
def test_joining_copies_of_a_tree(tree: Any) -> None:
    joined = transpose([tree, tree, tree], lambda path, column: (path, len(column)).__hash__())
    assert leaves_of(joined) == [(path, 3).__hash__() for path, _ in leaves(tree)]


def test_paths_read_as_python() -> None:
    tree = {"a": [1, Point(2, 3)], "b": Frozen({"c": 4}, [5])}
    assert [path for path, _ in leaves(tree)] == [
        "['a'][0]",
        "['a'][1][0]",
        "['a'][1][1]",
        "['b'].value['c']",
        "['b'].rest[0]",
        "['b'].late",
    ]


def test_special_containers_keep_what_their_constructor_would_lose() -> None:
    counts = defaultdict(list, a=1)
    mapped = tree_map(lambda leaf: leaf + 1, counts)
    assert mapped == {"a": 2}
    assert mapped.default_factory is list
    assert tree_map(lambda leaf: leaf + 1, Frozen(1)).late == 8


def test_trees_of_other_structure_are_refused() -> None:
    with pytest.raises(ValueError, match=r"member 1 returned \{\['b'\]: int\}; member 0 returned"):
        transpose([{"a": 1}, {"b": 1}], lambda path, column: column[0])


# Other containers ---------------------------------------------------------------------------------


def add_one(leaf: Any) -> Any:
    return leaf + 1 if isinstance(leaf, Tensor) else leaf


def test_sets_deques_slices_and_torchs_own_tuples() -> None:
    x = torch.zeros(3)
    assert tree_map(add_one, deque([x], maxlen=2)).maxlen == 2
    assert torch.equal(next(iter(tree_map(add_one, {x}))), x + 1)
    assert torch.equal(next(iter(tree_map(add_one, frozenset([x])))), x + 1)
    assert torch.equal(tree_map(add_one, slice(x, None)).start, x + 1)
    assert tree_map(lambda n: n + 1 if isinstance(n, int) else n, torch.Size([1, 2])) == (2, 3)
    found = tree_map(add_one, x.max(0))
    assert type(found) is torch.return_types.max
    assert found.indices == 1
    packed = tree_map(add_one, pack_sequence([x, x[:2]]))
    assert torch.equal(packed.data, torch.ones(5))
    assert type(packed) is type(pack_sequence([x]))


class Layer:
    """As in the cache of a language model."""

    def __init__(self, keys: Tensor | None) -> None:
        self.keys = keys
        self.size = 4


class Cache:
    def __init__(self, *layers: Tensor | None) -> None:
        self.layers = [Layer(keys) for keys in layers]
        self.owner: Any = None

    @property
    def length(self) -> int:
        return len(self.layers)


def test_plain_objects_that_hold_tensors() -> None:
    x = torch.zeros(3)
    cache = Cache(x, None, x)
    assert [path for path, _ in leaves(cache)][:2] == [".layers[0].keys", ".layers[0].size"]
    mapped = tree_map(add_one, cache)
    assert type(mapped) is Cache
    assert mapped.layers[2].keys.tolist() == [1, 1, 1]
    assert mapped.layers[1] is cache.layers[1]  # nothing to change
    assert x.tolist() == [0, 0, 0]
    assert cache.layers[0].keys is x


def test_objects_without_tensors_modules_and_functions_are_leaves() -> None:
    for value in (Cache(None), nn.Linear(2, 2), Layer, add_one, torch.float32, D):
        assert [leaf for _, leaf in leaves(value)] == [value]
        assert tree_map(add_one, value) is value


def test_a_cycle_ends_and_stays_a_cycle() -> None:
    cache = Cache(torch.zeros(3))
    cache.owner = {"parent": cache}
    assert len(list(leaves(cache))) == 2
    mapped = tree_map(add_one, cache)
    assert mapped.owner["parent"] is mapped
    assert cache.owner["parent"] is cache


class Registered:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.fixture
def registered() -> Any:
    pytree.register_pytree_node(
        Registered, lambda r: ([r.value], None), lambda c, _: Registered(*c)
    )
    yield Registered
    pytree._deregister_pytree_node(Registered)


def test_types_registered_with_torch(registered: Any) -> None:
    tree = {"a": registered([torch.zeros(3)])}
    assert [path for path, _ in leaves(tree)] == ["['a'][0][0]"]
    mapped = tree_map(add_one, tree)
    assert type(mapped["a"]) is registered
    assert mapped["a"].value[0].tolist() == [1, 1, 1]
    assert tree_map(lambda leaf: leaf, tree) is tree


# Distributions ------------------------------------------------------------------------------------


def lower_triangular(y: Tensor) -> Tensor:
    return torch.eye(2, dtype=y.dtype) * y.exp().mean() + torch.ones(2, 2).tril(-1) * y.mean()


DISTRIBUTIONS: dict[str, Any] = {
    "normal": lambda y: D.Normal(y, y.exp()),
    "normal-shared-scale": lambda y: D.Normal(y, 2.0),
    "categorical": lambda y: D.Categorical(logits=y),
    "bernoulli-used": lambda y: (d := D.Bernoulli(logits=y), d.probs)[0],
    "beta": lambda y: D.Beta(y.exp(), y.exp() + 1),
    "independent": lambda y: D.Independent(D.Normal(y, y.exp().mean(0)), 1),
    "transformed": lambda y: D.TransformedDistribution(
        D.Normal(y, y.exp()), [D.AffineTransform(y[0], y[1].exp()), D.SigmoidTransform()]
    ),
    "multivariate": lambda y: D.MultivariateNormal(y, scale_tril=lower_triangular(y)),
    "low-rank": lambda y: D.LowRankMultivariateNormal(y, y[0, :, None], y[1].exp()),
    "mixture": lambda y: D.MixtureSameFamily(D.Categorical(logits=y), D.Normal(y, y.exp().mean(0))),
    "mixture-of-vectors": lambda y: D.MixtureSameFamily(
        D.Categorical(logits=y[0]), D.Independent(D.Normal(y[:2], y[:2].exp()), 1)
    ),
    "uniform": lambda y: D.Uniform(y, y + y.exp()),
    "dirichlet": lambda y: D.Dirichlet(y.exp()),
}


class Gives(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make
        self.linear = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Any:
        return self.make(self.linear(x))


@pytest.mark.parametrize("strategy", ["fused", "loop"])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_distribution_gets_the_member_axis(
    name: str, chunk_size: int | None, strategy: str, without_validation: None
) -> None:
    make = DISTRIBUTIONS[name]
    ens = Ensemble([Gives(make) for _ in range(3)], strategy=strategy, chunk_size=chunk_size)
    x = torch.randn(5, 4, dtype=torch.float64)
    found, expected = ens(x), [member(x) for member in ens]
    assert found.batch_shape == (3, *expected[0].batch_shape)
    assert found.event_shape == expected[0].event_shape
    values = found.sample()
    assert values.shape == (3, *expected[0].sample().shape)
    log_probs = found.log_prob(values)
    for i, member in enumerate(expected):
        torch.testing.assert_close(log_probs[i], member.log_prob(values[i]))
    log_probs.sum().backward()
    assert ens.members.linear.weight.grad.abs().sum() > 0


@pytest.fixture
def without_validation() -> Any:
    D.Distribution.set_default_validate_args(False)  # it looks at values: `if not valid.all()`
    yield
    D.Distribution.set_default_validate_args(__debug__)


def test_a_distribution_as_input_of_each_member(without_validation: None) -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2).double()

        def forward(self, prior: D.Distribution, x: Tensor) -> Tensor:
            assert prior.batch_shape == (2,)
            return prior.log_prob(self.linear(x))

    means, x = torch.randn(3, 2, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    for strategy in ("fused", "loop"):
        ens = Ensemble([Scores() for _ in range(3)], strategy=strategy)
        found = ens(per_member(D.Normal(means, means.exp())), x)
        for i, member in enumerate(ens):
            expected = D.Normal(means[i], means[i].exp()).log_prob(member.linear(x))
            torch.testing.assert_close(found[i], expected)


# What can't come out ------------------------------------------------------------------------------


def generator(y: Tensor) -> Any:
    yield y.sum()
    yield y.mean()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda y: lambda z: z * y, "function"),
        (generator, "generator"),
        (lambda y: Registered([y]), "Registered"),
        (lambda y: iter([y]), "list_iterator"),
    ],
)
def test_tensors_that_would_come_out_dead_are_refused(make: Any, kind: str) -> None:
    ens = Ensemble([Gives(make) for _ in range(3)], strategy="fused")
    with pytest.raises(UnsupportedModelError, match="forward") as info:
        ens(torch.randn(5, 4, dtype=torch.float64))
    assert str(info.value) == (
        f"ens(...): forward returns tensors inside a {kind}, where they can't be given a member"
        " axis; return them in a tuple, dict or dataclass, or as attributes of an object"
    )


def test_functions_and_objects_without_tensors_come_out_as_they_are() -> None:
    ens = Ensemble([Gives(lambda y: (y, add_one, range(3))) for _ in range(3)], strategy="fused")
    assert ens(torch.randn(5, 4, dtype=torch.float64))[1:] == (add_one, range(3))


def test_a_container_of_the_caller_must_not_be_filled() -> None:
    class Appends(Gives):
        def forward(self, x: Tensor, history: list[Tensor]) -> Tensor:
            history.append(self.linear(x))
            return history[-1]

    ens = Ensemble([Appends(None) for _ in range(3)], strategy="fused")
    with pytest.raises(UnsupportedModelError, match="forward") as info:
        ens(torch.randn(5, 4, dtype=torch.float64), [])
    assert str(info.value) == (
        "ens(...): forward puts a tensor of the members into args[1][0], in a list that all members"
        " share; make it inside of the call: ens.run(lambda member, x: member(x, list(...)), x)"
    )


def test_inputs_of_each_member_in_an_object() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4).double()

        def forward(self, cache: Cache, x: Tensor) -> tuple[Tensor, Cache]:
            cache.layers[0].keys = torch.cat([cache.layers[0].keys, self.linear(x)])
            return cache.layers[0].keys.sum(0), cache

    kept = torch.randn(3, 2, 4, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    for strategy in ("fused", "loop"):
        ens = Ensemble([Attends() for _ in range(3)], strategy=strategy)
        before = Cache(kept)
        found, cache = ens(per_member(before), x)
        assert before.layers[0].keys is kept
        assert cache.layers[0].keys.shape == (3, 7, 4)
        for i, member in enumerate(ens):
            expected = member(copy.deepcopy(Cache(kept[i])), x)
            torch.testing.assert_close(found[i], expected[0])
            torch.testing.assert_close(cache.layers[0].keys[i], expected[1].layers[0].keys)


@pytest.mark.parametrize("strategy", ["fused", "loop"])
def test_complex_and_sparse_outputs(strategy: str) -> None:
    table = torch.eye(3).to_sparse()
    give = {
        "complex": lambda y: torch.fft.fft(y),
        "sparse": lambda y: table,  # the same for all
    }
    x = torch.randn(5, 4, dtype=torch.float64)
    ens = Ensemble([Gives(give["complex"]) for _ in range(3)], strategy=strategy)
    torch.testing.assert_close(ens(x), torch.stack([member(x) for member in ens]))
    ens = Ensemble([Gives(give["sparse"]) for _ in range(3)], strategy=strategy)
    assert torch.equal(ens(x).to_dense(), torch.eye(3).expand(3, 3, 3))
