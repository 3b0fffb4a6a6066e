"""Minibatches: every one equals ``x[order]``, from tensors and through loaders with workers."""

import math
import os
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from unisono import Ensemble
from unisono.engine.inputs import PerMember
from unisono.engine.tree import leaves, tree_map
from unisono.training import sampling
from unisono.training.batches import make_batches, make_validation_batches

ROWS, MEMBERS = 23, 4
KINDS = {
    "shared": sampling.shared(),
    "shuffled": sampling.shuffled(),
    "bootstrap": sampling.bootstrap(),
    "folds": sampling.folds(),
    "subset": sampling.subset(0.6),
}
OWN = {name: kind for name, kind in KINDS.items() if name != "shared"}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_own = pytest.mark.parametrize("kind", OWN.values(), ids=OWN)
CUDA = torch.device("cuda", 0)
# Python 3.12 and newer warn whenever a process with threads is forked, as torch's loader does it.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def numbers(rows=ROWS):
    """Inputs and targets whose every row is another."""
    x = torch.arange(rows * 6, dtype=torch.float64).reshape(rows, 2, 3)
    return x, torch.arange(rows) + 100


class Squares(Dataset):
    """A map-style data set that can't be taken for tensors."""

    def __init__(self, rows=ROWS):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        assert type(index) is int
        return {"x": torch.full((2,), float(index)), "y": index**2}


class Named(Squares):
    """With a string in each sample."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"name": f"row {index}"}


class Unsized(Dataset):
    def __getitem__(self, index):
        return torch.tensor(float(index))


class Stream(IterableDataset):
    def __init__(self, rows=ROWS):
        self.rows = rows

    def __iter__(self):
        return (torch.tensor(float(i)) for i in range(self.rows))


class Noisy(Squares):
    """Draws from torch's generator, which is seeded in each worker."""

    def __getitem__(self, index):
        return torch.rand(3)


class Workers(Squares):
    """Tells which process loads it."""

    def __getitem__(self, index):
        return torch.tensor(os.getpid())


class Frame:
    """What a data set of another library looks like."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def make(data, kind="shuffled", *, batch_size=5, seed=3, num_members=MEMBERS, device=None):
    return make_batches(
        data,
        batch_size=batch_size,
        sampling=kind,
        seed=seed,
        num_members=num_members,
        device=device,
    )


def unmarked(tree):
    return tree_map(lambda leaf: leaf.tree if isinstance(leaf, PerMember) else leaf, tree)


def listed(batches, epoch=0, members=range(MEMBERS)):
    return [unmarked(batch) for batch in batches.epoch(epoch, members)]


def assert_same(found, expected):
    """Trees of the same containers with the same tensors, bit for bit."""
    mine, theirs = list(leaves(found)), list(leaves(expected))
    assert [path for path, _ in mine] == [path for path, _ in theirs]
    for (path, got), (_, want) in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda m, p=path: f"{p}: {m}")


def slow_steps(kind, sizes, epoch, members, *, rows=ROWS, seed=3, num_members=MEMBERS):
    """The rows of each step: (N, B), or (B) where the members share it."""
    orders = kind.order(rows, members, epoch, seed=seed, num_members=num_members).tolist()
    assert sum(sizes) <= len(orders[0])
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    own = [
        [order[start : start + size] for order in orders]
        for start, size in zip(starts, sizes, strict=True)
    ]
    return [torch.tensor(step[0] if kind.is_shared else step) for step in own]


# Tensors ------------------------------------------------------------------------------------------


@every_kind
@given(
    rows=st.integers(4, 30),
    batch_size=st.none() | st.integers(1, 40),
    epoch=st.integers(0, 3),
    members=st.lists(st.integers(0, 3), min_size=1, unique=True),
)
def test_minibatches_equal_indexing(kind, rows, batch_size, epoch, members):
    x, y = numbers(rows)
    batches = make((x, y), kind, batch_size=batch_size)
    per_epoch = kind.rows_per_epoch(rows, num_members=MEMBERS)
    count = 1 if batch_size is None else math.ceil(per_epoch / batch_size)
    assert batches.sizes == tuple(len(part) for part in np.array_split(range(per_epoch), count))
    assert batches.num_steps == count
    steps = slow_steps(kind, batches.sizes, epoch, members, rows=rows)
    found = list(batches.epoch(epoch, members))
    assert len(found) == len(steps)
    for batch, chosen in zip(found, steps, strict=True):
        assert [isinstance(leaf, PerMember) for leaf in batch] == [not kind.is_shared] * 2
        assert_same(unmarked(batch), (x[chosen], y[chosen]))


Pair = namedtuple("Pair", ["inputs", "targets"])


@dataclass
class Graph:
    nodes: Tensor
    name: str = "g"


X, Y = numbers()
TREES = {
    "tensor": X,
    "list": [X, Y],
    "dict": ({"image": X, "more": [Y]}, Y),
    "named tuple": Pair(X, Y),
    "transposed": X.transpose(1, 2),
    "integers": Y.to(torch.uint8),
    "complex": X.to(torch.complex128),
    "booleans": X > 3,
}


@pytest.mark.parametrize("data", TREES.values(), ids=TREES)
@pytest.mark.parametrize("kind", ["shared", "bootstrap"])
def test_minibatches_keep_the_structure_and_dtype(data, kind):
    batches = make(data, kind)
    steps = slow_steps(KINDS[kind], batches.sizes, 0, range(MEMBERS))
    for found, chosen in zip(listed(batches), steps, strict=True):
        assert type(found) is type(data)
        assert_same(found, tree_map(lambda leaf, chosen=chosen: leaf[chosen], data))


def read_only():
    array = X.numpy().copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "array",
    [X.numpy(), read_only(), X.numpy()[::-1], Y.numpy().astype(np.float32)],
    ids=["plain", "read-only", "reversed", "float32"],
)
def test_arrays_are_taken_as_tensors(array):
    tensor = torch.from_numpy(array.copy())
    for found, expected in zip(listed(make((array, Y))), listed(make((tensor, Y))), strict=True):
        assert_same(found, expected)


def test_tensor_datasets_are_taken_as_their_tensors():
    dataset = TensorDataset(X, Y)
    with CountOps() as ops:
        found = listed(make(dataset))
    assert ops.names.count("index_select") == 2 * len(found)  # not row by row
    assert_same(found, listed(make((X, Y))))
    part = Subset(dataset, [20, 3, 7, 8, 11])
    assert_same(listed(make(part)), listed(make((X[part.indices], Y[part.indices]))))


@pytest.mark.parametrize("kind", ["shared", "shuffled"])
@pytest.mark.parametrize("num_members", [1, 4, 64])
def test_a_step_is_one_gather_for_each_tensor(kind, num_members):
    batches = make((X, Y), kind, num_members=num_members)
    with CountOps() as ops:
        listed(batches, members=range(num_members))
    assert ops.names.count("index_select") == 2 * batches.num_steps
    views = {"view", "split_with_sizes", "unflatten", "_unsafe_view", "detach", "alias"}
    lifts = {"lift_fresh", "_to_copy"}
    assert set(ops.names) <= {"index_select"} | views | lifts
    assert ops.names.count("_to_copy") <= 1


def test_the_data_are_not_copied():
    (inputs, _), *_ = make_validation_batches((X, Y), batch_size=5)
    assert inputs.data_ptr() == X.data_ptr()
    array = X.numpy()
    (inputs, _), *_ = make_validation_batches((array, Y), batch_size=5)
    assert inputs.data_ptr() == X.data_ptr()


def fake(mode, tensor):
    """A tensor without data that says it is on a GPU."""
    return FakeTensor(mode, torch.empty_like(tensor, device="meta"), CUDA)


@pytest.mark.parametrize("kind", ["shared", "bootstrap"])
def test_minibatches_of_tensors_stay_on_the_device(kind):
    mode = FakeTensorMode()
    batches = make((fake(mode, X), fake(mode, Y)), kind)
    with mode:  # any read of a value raises
        for batch in batches.epoch(0, range(MEMBERS)):
            for _, leaf in leaves(unmarked(batch)):
                assert leaf.device == CUDA


@pytest.mark.parametrize("kind", ["shared", "bootstrap"])
def test_minibatches_of_tensors_go_to_the_device(kind):
    with FakeTensorMode(allow_non_fake_inputs=True):
        for batch in make((X, Y), kind, device="cuda:0").epoch(0, range(MEMBERS)):
            for _, leaf in leaves(unmarked(batch)):
                assert leaf.device == CUDA
        for batch in make_validation_batches((X, Y), batch_size=5, device="cuda:0"):
            assert {leaf.device for _, leaf in leaves(batch)} == {CUDA}


@pytest.mark.parametrize("data", ["dataset", "loader"])
@pytest.mark.parametrize("kind", ["shared", "bootstrap"])
def test_loaded_minibatches_go_to_the_device(kind, data):
    given = Squares() if data == "dataset" else DataLoader(Squares(), batch_size=5)
    moves = []

    def moved(tensor, device, non_blocking):
        moves.append((device, non_blocking))
        return tensor

    batches = make(given, kind, batch_size=None, device="cuda:0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", moved)
        steps = len(listed(batches))
    assert moves == [(CUDA, True)] * 2 * steps


@pytest.mark.gpu
@every_kind
def test_a_real_gpu_gives_the_same_minibatches(kind):
    for data in ((X, Y), Squares()):
        for found, expected in zip(
            listed(make(data, kind, device="cuda")), listed(make(data, kind)), strict=True
        ):
            assert {leaf.device.type for _, leaf in leaves(found)} == {"cuda"}
            assert_same(tree_map(lambda leaf: leaf.cpu(), found), expected)


# Data sets and loaders ----------------------------------------------------------------------------


def slow_squares(chosen):
    """What collating and splitting gives: (N, B, *), or (B, *)."""
    return {"x": chosen[..., None].float().expand(*chosen.shape, 2), "y": chosen**2}


@every_kind
@pytest.mark.parametrize("epoch", [0, 2])
def test_minibatches_of_a_dataset_equal_its_rows(kind, epoch):
    batches = make(Squares(), kind)
    members = [3, 1]
    steps = slow_steps(kind, batches.sizes, epoch, members)
    found = list(batches.epoch(epoch, members))
    for batch, chosen in zip(found, steps, strict=True):
        assert [isinstance(batch[key], PerMember) for key in "xy"] == [not kind.is_shared] * 2
        assert_same(unmarked(batch), slow_squares(chosen))


def test_data_sets_of_other_libraries_are_loaded():
    frame = Frame([torch.tensor([float(i)]) for i in range(ROWS)])
    tensors = torch.arange(float(ROWS))[:, None]
    assert_same(listed(make(frame)), listed(make(tensors)))


@every_own
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_loader_keeps_its_batch_size_and_rest(kind, drop_last, batch_size):
    loader = DataLoader(Squares(), batch_size=5, shuffle=True, drop_last=drop_last)
    batches = make(loader, kind, batch_size=batch_size)
    per_epoch = kind.rows_per_epoch(ROWS, num_members=MEMBERS)
    like = DataLoader(range(per_epoch), batch_size=5, drop_last=drop_last)
    assert batches.sizes == tuple(len(batch) for batch in like)
    assert batches.num_steps == len(like)
    steps = slow_steps(kind, batches.sizes, 1, range(MEMBERS))
    assert_same(listed(batches, 1), [slow_squares(chosen) for chosen in steps])


def double(samples):
    return {key: 2 * value for key, value in default_collate(samples).items()}


@forks
@every_own
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(kind, persistent):
    def loader(**options):
        return DataLoader(Squares(), batch_size=5, collate_fn=double, **options)

    with_workers = make(loader(num_workers=2, persistent_workers=persistent), kind)
    alone = make(loader(), kind)
    for epoch, members in ((0, [0, 1, 2, 3]), (1, [0, 2]), (2, [2])):
        assert_same(listed(with_workers, epoch, members), listed(alone, epoch, members))


@forks
@pytest.mark.parametrize("persistent", [False, True])
def test_persistent_workers_live_through_all_epochs(persistent):
    loader = DataLoader(Workers(), batch_size=5, num_workers=1, persistent_workers=persistent)
    batches = make(loader)
    processes = [
        {int(i) for batch in listed(batches, k, [k]) for i in batch.unique()} for k in (0, 1)
    ]
    assert [len(ids) for ids in processes] == [1, 1]
    assert (processes[0] == processes[1]) is persistent


def test_the_options_of_a_loader_are_taken_over():
    options = {
        "num_workers": 1,
        "collate_fn": double,
        "timeout": 7,
        "worker_init_fn": print,
        "multiprocessing_context": "spawn",
        "prefetch_factor": 3,
        "persistent_workers": True,
        "in_order": False,
        "generator": torch.Generator(),
    }
    batches = make(DataLoader(Squares(), batch_size=5, **options), "shuffled")
    for name, value in options.items():
        found = getattr(batches._loader, name)
        if name == "multiprocessing_context":
            found = found.get_start_method()
        assert found == value, name
    assert batches.generators == (options["generator"],)
    assert make(DataLoader(Squares(), pin_memory=True), batch_size=1)._loader.pin_memory


# The caller's own loader --------------------------------------------------------------------------


def test_a_shared_loader_is_iterated_as_it_is():
    own = DataLoader(Named(), batch_size=7, shuffle=True, generator=torch.Generator())
    batches = make(own, "shared", batch_size=None)
    own.generator.manual_seed(4)
    found = list(batches.epoch(0, range(MEMBERS)))
    own.generator.manual_seed(4)
    expected = list(own)
    assert [batch["name"] for batch in found] == [batch["name"] for batch in expected]
    assert [len(batch["y"]) for batch in found] == [7, 7, 7, 2]
    for batch, want in zip(found, expected, strict=True):
        torch.testing.assert_close(batch["x"], want["x"], rtol=0, atol=0)
    assert batches.num_steps == 4
    assert batches.sizes is None


def test_a_shared_loader_may_be_iterable():
    batches = make(DataLoader(Stream(), batch_size=4), "shared", batch_size=None)
    assert_same(torch.cat(listed(batches)), torch.arange(float(ROWS)))
    assert batches.num_steps is None


def test_generators_are_those_that_a_loader_draws_from():
    one, two = torch.Generator(), torch.Generator()
    plain = DataLoader(Squares(), batch_size=5, shuffle=True)
    assert make(plain, "shared").generators == ()
    loader = DataLoader(
        Squares(), batch_size=5, sampler=RandomSampler(Squares(), generator=one), generator=two
    )
    assert set(make(loader, "shared").generators) == {one, two}
    inside = BatchSampler(RandomSampler(Squares(), generator=one), 5, False)
    loader = DataLoader(Squares(), batch_sampler=inside)
    assert make(loader, "shared", batch_size=None).generators == (one,)
    assert make(Squares()).generators == make((X, Y)).generators == ()


def test_restoring_the_generators_resumes_a_shared_loader():
    loader = DataLoader(Squares(), batch_size=5, shuffle=True, generator=torch.Generator())
    batches = make(loader, "shared")
    listed(batches, 0)
    states = [generator.get_state() for generator in batches.generators]
    expected = listed(batches, 1)
    assert (listed(batches, 1)[0]["y"] != expected[0]["y"]).any()
    for generator, state in zip(batches.generators, states, strict=True):
        generator.set_state(state)
    assert_same(listed(batches, 1), expected)


def test_samplers_are_told_the_epoch():
    epochs = []
    sampler = RandomSampler(Squares())
    sampler.set_epoch = epochs.append
    batches = make(DataLoader(Squares(), batch_size=5, sampler=sampler), "shared")
    listed(batches, 6)
    assert epochs == [6]


# Epochs -------------------------------------------------------------------------------------------

SOURCES = {
    "tensors": lambda: (X, Y),
    "dataset": Squares,
    "loader": lambda: DataLoader(Squares(), batch_size=5, num_workers=0),
}


@every_own
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_an_epoch_does_not_need_those_before_it(kind, source):
    through = make(source(), kind)
    for epoch in range(3):
        listed(through, epoch)
    assert_same(listed(through, 3), listed(make(source(), kind), 3))


@every_own
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_members_that_have_stopped_change_nothing(kind, source):
    batches = make(source(), kind)
    everyone = listed(batches, 2)
    few = listed(batches, 2, [3, 0])
    assert_same(few, tree_map(lambda leaf: leaf[[3, 0]], everyone))


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_an_epoch_may_be_left_early_and_run_beside_another(source):
    batches = make(source(), "bootstrap")
    first, second = listed(batches, 0), listed(batches, 1, [2])
    next(batches.epoch(5, range(MEMBERS)))
    pairs = zip(batches.epoch(0, range(MEMBERS)), batches.epoch(1, [2]), strict=True)
    found = [(unmarked(one), unmarked(other)) for one, other in pairs]
    assert_same(found, list(zip(first, second, strict=True)))


@every_kind
@pytest.mark.parametrize("source", ["tensors", "dataset"])
def test_minibatches_leave_the_global_generator_alone(kind, source):
    before = torch.get_rng_state()
    listed(make(SOURCES[source](), kind))
    list(make_validation_batches(SOURCES[source](), batch_size=5))
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


@forks
def test_workers_are_seeded_by_seed_and_epoch():
    def noise(seed, epoch):
        loader = DataLoader(Noisy(), batch_size=12, num_workers=1)
        return listed(make(loader, batch_size=None, seed=seed), epoch, [0])

    assert_same(noise(0, 1), noise(0, 1))
    assert (noise(0, 1)[0] != noise(0, 2)[0]).any()
    assert (noise(0, 1)[0] != noise(1, 1)[0]).any()


def test_an_ensemble_takes_the_minibatches():
    ens = Ensemble([torch.nn.Linear(3, 2).double() for _ in range(MEMBERS)])
    batches = make((X, Y), "bootstrap")
    for inputs, _ in batches.epoch(0, range(MEMBERS)):
        for i, member in enumerate(ens):
            torch.testing.assert_close(ens(inputs)[i], member(inputs.tree[i]))


@every_kind
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_held_out_rows_are_those_that_no_epoch_shows(kind, source):
    batches = make(source(), kind)
    held_out = batches.held_out()
    if source is SOURCES["loader"] and kind.is_shared:
        assert held_out == ()
        return
    assert len(held_out) == MEMBERS
    for member, rows in enumerate(held_out):
        expected = kind.held_out(ROWS, member, seed=3, num_members=MEMBERS)
        np.testing.assert_array_equal(rows, expected)


def test_an_iteration_keeps_its_epoch():
    batches = make(Squares())
    batches._sampler.choose(0, [1, 2])
    begun = iter(batches._sampler)
    batches._sampler.choose(1, [0])
    steps = slow_steps(KINDS["shuffled"], batches.sizes, 0, [1, 2])
    assert list(begun) == [chosen.flatten().tolist() for chosen in steps]


# Validation ---------------------------------------------------------------------------------------


@given(rows=st.integers(1, 30), batch_size=st.none() | st.integers(1, 40))
def test_validation_runs_through_all_rows_in_order(rows, batch_size):
    x, y = numbers(rows)
    tensors = make_validation_batches((x, {"y": y}), batch_size=batch_size)
    for _ in range(2):
        assert_same(torch.cat([batch[0] for batch in tensors]), x)
        assert_same(torch.cat([batch[1]["y"] for batch in tensors]), y)
    sizes = [len(batch[0]) for batch in tensors]
    assert len(tensors) == len(sizes) == math.ceil(rows / (batch_size or rows))
    assert max(sizes) - min(sizes) <= 1
    dataset = make_validation_batches(Squares(rows), batch_size=batch_size)
    for _ in range(2):
        assert torch.cat([batch["y"] for batch in dataset]).tolist() == [i**2 for i in range(rows)]


def test_validation_takes_the_callers_loader_as_it_is():
    for dataset in (Stream(), TensorDataset(X, Y)):
        loader = DataLoader(dataset, batch_size=4)
        batches = make_validation_batches(loader, batch_size=None)
        for _ in range(2):
            assert_same(list(batches), list(loader))


# Messages -----------------------------------------------------------------------------------------

CANNOT_CHOOSE = {
    "iterable": (
        lambda: DataLoader(Stream(), batch_size=4),
        (
            r"^data: sampling\.bootstrap\(\) chooses rows by index, but Stream is an "
            r"IterableDataset, which gives them in its own order\. Let all members share its "
            r'minibatches, or give a map-style Dataset:\n\n    sampling="shared"$'
        ),
    ),
    "no batches": (
        lambda: DataLoader(Squares(), batch_size=None),
        r"chooses the rows of a minibatch, but a DataLoader with batch_size=None makes none\. ",
    ),
    "sampler": (
        lambda: DataLoader(Squares(), 4, sampler=WeightedRandomSampler([1.0] * ROWS, ROWS)),
        (
            r"^data: sampling\.bootstrap\(\) chooses the rows, and so does the DataLoader by its "
            r"WeightedRandomSampler\. Let all members share its minibatches, or leave the sampler "
            r'out:\n\n    sampling="shared"\n    DataLoader\(dataset, batch_size=\.\.\.\)$'
        ),
    ),
    "replacement": (
        lambda: DataLoader(Squares(), 4, sampler=RandomSampler(Squares(), replacement=True)),
        r"and so does the DataLoader by its RandomSampler\.",
    ),
    "batch sampler": (
        lambda: DataLoader(Squares(), batch_sampler=BatchSampler(range(ROWS), 4, False)),
        r"and so does the DataLoader by its BatchSampler\.",
    ),
    "no length": (
        lambda: DataLoader(Unsized(), batch_size=4),
        r"^data: a map-style Dataset has a length and samples by index, but Unsized has no length$",
    ),
}


@pytest.mark.parametrize(("loader", "message"), CANNOT_CHOOSE.values(), ids=CANNOT_CHOOSE)
def test_loaders_whose_rows_cannot_be_chosen(loader, message):
    with pytest.raises(TypeError, match=message):
        make(loader(), "bootstrap", batch_size=None)


def test_an_iterable_data_set_needs_a_loader():
    message = (
        r"^{}: Stream is an IterableDataset, which has no rows by index; give it in a loader, "
        r"whose minibatches all members share:\n\n    DataLoader\(dataset, batch_size=\.\.\.\)$"
    )
    for kind in KINDS.values():
        with pytest.raises(TypeError, match=message.format("data")):
            make(Stream(), kind)
    with pytest.raises(TypeError, match=message.format("validation")):
        make_validation_batches(Stream(), batch_size=4)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, "8", True])
def test_batch_size_is_a_number_of_rows(batch_size):
    message = r"^batch_size is a positive number of rows, or None for all of them; got "
    for call in (make, make_validation_batches):
        with pytest.raises(ValueError, match=rf"{message}{batch_size!r}$"):
            call((X, Y), batch_size=batch_size)


def test_a_loader_has_a_batch_size_of_its_own():
    loader = DataLoader(Squares(), batch_size=4)
    message = (
        r"^{}: a DataLoader makes minibatches of its own batch_size=4; got batch_size=5 besides\. "
        r"Leave one of them out: batch_size=None$"
    )
    for kind in ("shared", "shuffled"):
        with pytest.raises(ValueError, match=message.format("data")):
            make(loader, kind, batch_size=5)
    with pytest.raises(ValueError, match=message.format("validation")):
        make_validation_batches(loader, batch_size=5)


def test_a_loader_that_drops_all_rows():
    message = (
        r"^data: the loader has batch_size=50 and drop_last=True, so the 23 rows of an epoch make "
        r"no minibatch; give it a batch_size of at most 23$"
    )
    with pytest.raises(ValueError, match=message):
        make(DataLoader(Squares(), batch_size=50, drop_last=True), batch_size=None)


def test_a_loader_that_is_used_up():
    used_up = iter([])

    class Once(IterableDataset):
        def __iter__(self):
            return used_up

    message = (
        r"^data: the loader gave no minibatch in epoch 3; its dataset has to begin anew each time "
        r"that it is iterated$"
    )
    with pytest.raises(ValueError, match=message):
        listed(make(DataLoader(Once()), "shared", batch_size=None), 3)


@pytest.mark.parametrize("seed", [-1, 0.5, None, True])
def test_seed_is_an_integer(seed):
    message = rf"^sampling: seed is an integer, not negative; got {seed!r}$"
    with pytest.raises(ValueError, match=message):
        make((X, Y), seed=seed)


@pytest.mark.parametrize("data", [Squares(3), (X[:3], Y[:3])], ids=["dataset", "tensors"])
def test_too_few_rows_are_an_error_at_once(data):
    with pytest.raises(ValueError, match=r"3 rows were to be split into 4 folds"):
        make(data, "folds")
    with pytest.raises(ValueError, match=r'^sampling is one of "shared", .* got \'bagging\'$'):
        make(data, "bagging")


WRONG_LENGTHS = r"axis 0 of all tensors is the row, so it has the same length in all of them, "


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        ((X, Y[:5]), r"  data\[0\] has shape \(23, 2, 3\)\n  data\[1\] has shape \(5,\)$"),
        ({"x": X, "y": Y[0]}, r"  data\['y'\] has shape \(\)$"),
        (X[:0], r"  data has shape \(0, 2, 3\)$"),
        ([X[:2], *[Y] * 12], r"\n  data\[9\] has shape \(23,\)\n  \.\.\. and 3 more$"),
    ],
    ids=["unequal", "scalar", "none", "many"],
)
def test_tensors_of_unequal_length(data, facts):
    with pytest.raises(ValueError, match=rf"(?s)^data: {WRONG_LENGTHS}.*{facts}"):
        make(data)


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        ((X, "labels", 3), r"  data\[1\] is of type str\n  data\[2\] is of type int\n"),
        ("x.pt", r"  data is of type str\n"),
        (np.array(["a", "b"]), r"  data is of type ndarray\n"),
        (Graph(X), r"  data\.name is of type str\n"),
        ((), r"  data holds nothing\n"),
        (None, r"  data is of type NoneType\n"),
    ],
    ids=["others", "string", "array of strings", "dataclass", "empty", "none"],
)
def test_data_that_are_no_tensors(data, facts):
    message = (
        rf"^data: expected tensors or numpy arrays of numbers, with the rows on axis 0, but:\n\n"
        rf"{facts}\nGive tensors, or samples .*:\n\n    \(x, y\) .*\n    torch\.utils\.data\."
    )
    with pytest.raises(TypeError, match=message):
        make(data)
    with pytest.raises(TypeError, match=message.replace("data", "validation", 1)[:40]):
        make_validation_batches(data, batch_size=5)


def flattened(samples):
    return torch.stack([sample["x"] for sample in samples]).flatten()


def test_a_collation_to_another_number_of_rows():
    loader = DataLoader(Squares(), batch_size=5, collate_fn=flattened)
    message = (
        r"^data: a minibatch of 5 rows for each of 2 members is collated from 10 rows, and then "
        r"split on axis 0, but:\n\n  batch has shape \(20,\), not \(10, \.\.\.\)\n\nLet collate_fn "
        r"give tensors with one row per sample, or let all members share the minibatches, which "
        r'are then passed on as they are:\n\n    sampling="shared"$'
    )
    with pytest.raises(ValueError, match=message):
        listed(make(loader), members=[0, 1])
    assert len(listed(make(loader, "shared"))) == 5


def test_strings_cannot_be_split_into_members():
    message = (
        r"but:\n\n  batch\['name'\]\[0\] is of type str, not a tensor\n(.*\n){9}"
        r"  \.\.\. and 10 more\n\n"
    )
    with pytest.raises(TypeError, match=message):
        listed(make(Named()))
    shared = listed(make(Named(), "shared"))
    names = [name for batch in shared for name in batch["name"]]
    assert sorted(names) == sorted(f"row {i}" for i in range(ROWS))


def test_empty_data_sets():
    with pytest.raises(ValueError, match=r"^data: Squares has no rows$"):
        make(Squares(0))
    with pytest.raises(ValueError, match=r"^validation: Squares has no rows$"):
        make_validation_batches(Squares(0), batch_size=5)
