"""A captured call: equal to the call, live in its weights, guarded in everything else."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import CASES, N, members
from oracles import in_threads, stack_inputs
from unisono import Ensemble, EnsembleError, EnsembleWarning, UnsupportedModelError, per_member
from unisono.engine.capture import choice
from unisono.engine.planning import measuring
from unisono.engine.planning.planner import Planner
from unisono.engine.tree import leaves

CANDIDATES = ("fused", "turned", "loop")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def choose(monkeypatch):
    """Let the capture choose a candidate by its place, whatever the time says."""

    def to(which):
        def times(candidates):
            turned = [k for k, (recording, _) in enumerate(candidates) if recording.turned]
            places = {"fused": 0, "turned": turned[0] if turned else 0, "loop": -1}
            found = [1.0] * len(candidates)
            found[places[which]] = 0.0
            return found

        monkeypatch.setattr(choice, "_measure", times)
        # No plan either: it may store the weights in another order, or take members in chunks.
        monkeypatch.setattr(Planner, "prepare", lambda self, call, options: options.chunk_size)

    return to


def mlp():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def ensemble(make=mlp, n=N, strategy="fused", **options):
    # Not "auto": a call that is measured may store the weights in another order meanwhile.
    return Ensemble([make() for _ in range(n)], strategy=strategy, **options)


def assert_same(actual, expected):
    mine, theirs = list(leaves(actual)), list(leaves(expected))
    assert [path for path, _ in mine] == [path for path, _ in theirs]
    for (path, got), (_, want) in zip(mine, theirs, strict=True):
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(got, want, msg=lambda m, p=path: f"{p}: {m}")
            assert got.is_contiguous() or not want.is_contiguous()
            assert not got.requires_grad
        else:
            assert got == want


def plain_call(ens, *args, **kwargs):
    with torch.no_grad():
        return ens(*args, **kwargs)


def ops_of(code):
    return [
        line.strip()
        for line in code.splitlines()
        if line.startswith("    ") and not line.strip().startswith(("del ", "return "))
    ]


class TestEqualToTheCall:
    @pytest.mark.parametrize("candidate", CANDIDATES)
    @pytest.mark.parametrize("marked", [False, True], ids=["shared", "per-member"])
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("case", CASES)
    def test_for_every_case(self, case, training, marked, candidate, choose):
        choose(candidate)

        def inputs():
            return stack_inputs([case.inputs() for _ in range(N)]) if marked else case.inputs()

        ens = Ensemble(members(case)).train(training)
        twin = copy.deepcopy(ens)
        args, kwargs = inputs()
        state, random_state = copy.deepcopy(ens.state_dict()), torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EnsembleWarning)
            captured = ens.capture(*args, **kwargs)
        assert torch.equal(torch.get_rng_state(), random_state)
        for name, tensor in ens.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        twin.strategy = captured.strategy  # also the same order of random draws
        # An assigned attribute is frozen, so only the first call is the same.
        freezes = any("hidden" in vars(m) for m in members(case, 1)[0].modules())
        for seed in range(1 if freezes else 2):
            args, kwargs = inputs()
            given, given_kwargs = copy.deepcopy((args, kwargs))
            torch.manual_seed(seed)
            got = captured(*args, **kwargs)
            torch.manual_seed(seed)
            assert_same(got, plain_call(twin, *given, **given_kwargs))
            if not freezes:
                assert_same(ens.state_dict(), twin.state_dict())
        assert len(captured) == 1

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    @pytest.mark.parametrize("case", [c for c in CASES if c.id in ("mlp", "transformer")])
    def test_by_the_recipe(self, case, choose):
        choose("turned")
        ens = Ensemble(members(case), strategy="vmap")
        args, kwargs = case.inputs()
        captured = ens.capture(*args, **kwargs)
        assert captured.strategy == "vmap"
        assert_same(captured(*args, **kwargs), plain_call(ens, *args, **kwargs))

    @pytest.mark.parametrize("chunk_size", [1, 2])
    def test_in_chunks(self, chunk_size):
        ens = ensemble(strategy="fused", chunk_size=chunk_size)
        x = torch.randn(4, 3)
        torch.testing.assert_close(ens.capture(x)(x), plain_call(ens, x))

    def test_one_tensor_passed_twice_is_two_inputs(self):
        ens = ensemble(lambda: nn.Bilinear(3, 3, 2))
        x, y = torch.randn(2, 4, 3)
        captured = ens.capture(x, x)
        torch.testing.assert_close(captured(x, y), plain_call(ens, x, y))

    def test_a_weight_as_input_is_an_input(self):
        ens = ensemble(lambda: nn.Linear(3, 3), n=3)
        captured = ens.capture(per_member(ens.members.weight.detach()))
        x = torch.randn(3, 3, 3)
        torch.testing.assert_close(captured(per_member(x)), plain_call(ens, per_member(x)))

    def test_strided_inputs(self):
        ens = ensemble()
        x = torch.randn(3, 9)[:, ::2].T
        captured = ens.capture(x)
        torch.testing.assert_close(captured(x), plain_call(ens, x))
        y = torch.randn(3, 18)[:, 1:10:2].T
        torch.testing.assert_close(captured(y), plain_call(ens, y))

    def test_views_by_address_count_from_the_input(self):
        class Windows(nn.Module):
            def forward(self, x):
                return x.as_strided((3, 2), (1, 1), x.storage_offset() + 1).sum(-1)

        ens = ensemble(Windows, strategy="loop")
        data = torch.randn(20)
        captured = ens.capture(data[:5])
        torch.testing.assert_close(captured(data[7:12]), plain_call(ens, data[7:12]))
        assert len(captured) == 1

    def test_autocast(self):
        ens = ensemble()
        x = torch.randn(4, 3)
        captured = ens.capture(x)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                got, want = captured(x), plain_call(ens, x)
                assert got.dtype == want.dtype == torch.bfloat16
                torch.testing.assert_close(got, want)
        assert len(captured) == 2
        with torch.no_grad():
            ens.members["0"].weight.mul_(2)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(captured(x), plain_call(ens, x))
        assert captured(x).dtype == torch.float32

    def test_a_weight_that_autocast_has_cast_before(self):
        model = nn.Linear(3, 2)
        ens = Ensemble([model, copy.deepcopy(model)], shared="*", strategy="fused")
        x = torch.randn(4, 3)
        with torch.autocast("cpu", torch.bfloat16):
            ens(x)
            captured = ens.capture(x)
        with torch.no_grad():
            ens.members.weight.mul_(2)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(captured(x), plain_call(ens, x))

    def test_under_inference_mode(self):
        ens = ensemble(lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
        x = torch.randn(4, 3)
        with torch.inference_mode():
            captured = ens.capture(x)
            captured(x)
        captured(x)
        assert ens.members["1"].num_batches_tracked.tolist() == [2] * N


class TestWeightsAreLive:
    def setup_method(self):
        torch.manual_seed(0)
        self.ens = ensemble()
        self.x = torch.randn(4, 3)
        self.captured = self.ens.capture(self.x)
        self.captured(self.x)

    def assert_follows(self, programs=1):
        torch.testing.assert_close(self.captured(self.x), plain_call(self.ens, self.x))
        assert len(self.captured) == programs

    def test_step_of_an_optimizer(self):
        before = self.captured(self.x)
        optimizer = torch.optim.SGD(self.ens.parameters(), lr=0.1)
        self.ens(self.x).square().sum().backward()
        optimizer.step()
        assert not torch.allclose(self.captured(self.x), before)
        self.assert_follows()

    @pytest.mark.parametrize("assign", [False, True])
    def test_load_state_dict(self, assign):
        self.ens.load_state_dict(ensemble().state_dict(), assign=assign)
        self.assert_follows()

    def test_data(self):
        for parameter in self.ens.parameters():
            parameter.data = torch.randn_like(parameter)
        self.assert_follows()
        self.captured.on_change = "raise"  # other values in other memory are no change
        self.ens.members["0"].weight.data = torch.zeros_like(self.ens.members["0"].weight)
        self.assert_follows()

    def test_other_dtype(self):
        self.ens.double()
        self.x = self.x.double()
        self.assert_follows()

    def test_a_member_that_shares_storage(self):
        with torch.no_grad():
            self.ens[1][0].weight.zero_()
        self.assert_follows()

    def test_old_weights_are_let_go(self):
        old = weakref.ref(self.ens.members["0"].weight)
        self.ens.load_state_dict(ensemble().state_dict(), assign=True)
        self.captured(self.x)
        gc.collect()
        assert old() is None


class TestGuards:
    def test_another_batch_size_is_recorded(self):
        ens = ensemble()
        captured = ens.capture(torch.randn(4, 3))
        captured.max_programs = 3
        for size in (4, 5, 6, 4, 5):
            x = torch.randn(size, 3)
            torch.testing.assert_close(captured(x), plain_call(ens, x))
        assert len(captured) == 3
        with pytest.raises(EnsembleError, match=r"there are 3 programs already") as error:
            captured(torch.randn(7, 3))
        assert "args[0]: shape (7, 3), torch.float32, cpu; recorded with" in str(error.value)
        captured(torch.randn(6, 3))

    def test_the_text_of_the_error(self):
        captured = ensemble().capture(torch.randn(4, 3))
        captured.on_change = "raise"
        with pytest.raises(EnsembleError, match="unlike") as error:
            captured(torch.randn(5, 3))
        assert str(error.value) == (
            'ens.capture(...): this call is unlike the recorded ones, and on_change is "raise":\n\n'
            "  args[0]: shape (5, 3), torch.float32, cpu;"
            " recorded with shape (4, 3), torch.float32, cpu\n\n"
            'Pad the inputs to the recorded shapes, or set capture.on_change = "record".'
        )

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda ens, x: (x.double(),), r"args\[0\]: shape \(4, 3\), torch.float64"),
            (lambda ens, x: (x.to("meta"),), r"args\[0\]: shape \(4, 3\), torch.float32, meta"),
            (lambda ens, x: (per_member(x[None].expand(N, 4, 3)),), r"args\[0\]: per_member"),
            (lambda ens, x: (x.T.contiguous().T,), r"strides \(1, 4\)"),
            (lambda ens, x: (ens.eval(), x)[1:], "mode: eval; recorded with train"),
            (lambda ens, x: (x, None), r"args\[1\]: None; recorded with nothing"),
        ],
    )
    def test_what_differs_is_named(self, change, words):
        ens = ensemble()
        x = torch.randn(4, 3)
        captured = ens.capture(x)
        captured.on_change = "raise"
        with pytest.raises(EnsembleError, match=words):
            captured(*change(ens, x))

    def test_mode_of_a_submodule(self):
        ens = ensemble(lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
        x = torch.randn(4, 3)
        captured = ens.capture(x)
        ens.members["1"].eval()
        torch.testing.assert_close(captured(x), plain_call(ens, x))
        assert len(captured) == 2

    def test_numbers_and_keywords(self):
        class Scaled(nn.Linear):
            def forward(self, x, *, factor=1.0, options=None):
                return super().forward(x) * factor + (options or {}).get("shift", 0)

        ens = ensemble(lambda: Scaled(3, 2))
        x = torch.randn(4, 3)
        captured = ens.capture(x, factor=2.0)
        for kwargs in ({"factor": 2.0}, {"factor": 3.0}, {"options": {"shift": x[:, :2]}}, {}):
            torch.testing.assert_close(captured(x, **kwargs), plain_call(ens, x, **kwargs))
        assert len(captured) == 4

    def test_inputs_that_require_a_gradient(self):
        captured = ensemble().capture(torch.randn(4, 3))
        x = torch.randn(4, 3, requires_grad=True)
        with pytest.raises(EnsembleError, match=r"args\[0\] requires a gradient"):
            captured(x)
        with torch.no_grad():
            assert not captured(x).requires_grad
        assert not captured(x.detach()).requires_grad

    def test_a_wrong_member_axis(self):
        with pytest.raises(ValueError, match="axis 0 of what `per_member` marks"):
            ensemble().capture(per_member(torch.randn(N + 1, 4, 3)))

    def test_subclasses_are_refused(self):
        class Mine(torch.Tensor):
            pass

        with pytest.raises(UnsupportedModelError, match=r"args\[0\] is a .*Mine"):
            ensemble().capture(torch.randn(4, 3).as_subclass(Mine))


class TestRandomness:
    def test_dropout_draws_anew_and_for_each_member(self, choose):
        for candidate in ("fused", "loop"):
            choose(candidate)
            ens = ensemble(lambda: nn.Dropout(0.5), strategy="auto")
            assert ens.capture(torch.ones(2)).strategy == candidate
            x = torch.ones(1000)
            captured = ens.capture(x)
            first, second = captured(x), captured(x)
            masks = [*first, *second]
            assert all(0.4 < (mask == 0).float().mean() < 0.6 for mask in masks)
            assert len({tuple(mask.tolist()) for mask in masks}) == 2 * N

    def test_the_same_for_all_members(self):
        ens = ensemble(lambda: nn.Dropout(0.5), randomness="same", strategy="auto")
        x = torch.ones(1000)
        captured = ens.capture(x)
        assert captured.strategy == "fused"
        first, second = captured(x), captured(x)
        assert torch.equal(first[0], first[1])
        assert not torch.equal(first, second)

    def test_the_same_in_a_loop_is_refused(self):
        ens = ensemble(lambda: nn.Dropout(0.5), randomness="same", strategy="loop")
        with pytest.raises(UnsupportedModelError, match='"same" for members run in turn'):
            ens.capture(torch.ones(3))

    def test_a_generator_is_put_back(self):
        generator = torch.Generator()

        class Noise(nn.Module):
            def forward(self, x):
                return x + torch.empty(4).normal_(generator=generator)

        ens = ensemble(Noise, strategy="loop")
        state = generator.get_state()
        captured = ens.capture(torch.zeros(4))
        assert torch.equal(generator.get_state(), state)
        assert not torch.equal(captured(torch.zeros(4)), captured(torch.zeros(4)))


class Reads(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.read = read

    def forward(self, x):
        y = self.linear(x)
        self.read(y)
        return y


class TestRefusals:
    @pytest.mark.parametrize(
        ("read", "op"),
        [
            (lambda y: y.sum().item(), "aten._local_scalar_dense"),
            (lambda y: bool((y > 0).any()), "aten._local_scalar_dense"),
            (lambda y: y[y > 0], "aten.nonzero|aten.index"),
            (lambda y: y.nonzero(), "aten.nonzero"),
            (lambda y: y.tolist(), "Tensor.tolist"),
            (lambda y: y.detach().numpy(), "Tensor.numpy"),
            (lambda y: torch.equal(y, y + 1), "aten.equal"),
            (lambda y: y.clone().resize_(2), "aten.resize_"),
        ],
        ids=["item", "bool", "mask", "nonzero", "tolist", "numpy", "equal", "resize"],
    )
    def test_what_depends_on_the_data(self, read, op):
        ens = ensemble(lambda: nn.Sequential(Reads(read)), strategy="auto")
        with pytest.raises(
            UnsupportedModelError, match=rf"`0` \(Reads\) can't be recorded.*\n\n.*({op})"
        ):
            ens.capture(torch.randn(4, 3))
        plain_call(Ensemble(ens.unstack(), strategy="loop"), torch.randn(4, 3))

    def test_an_error_that_forward_swallows(self):
        def read(y):
            try:
                y.sum().item()
            except Exception:
                return

        with pytest.raises(UnsupportedModelError, match="_local_scalar_dense"):
            ensemble(lambda: Reads(read), strategy="loop").capture(torch.randn(4, 3))

    def test_constants_may_be_read(self):
        class Lengths(nn.Module):
            def forward(self, x):
                sizes = torch.tensor([1, 3])
                return x.split(sizes.tolist(), -1)[int(sizes.argmax())] * sizes.sum().item()

        ens = ensemble(Lengths, strategy="auto")
        x = torch.randn(2, 4)
        torch.testing.assert_close(ens.capture(x)(x), plain_call(ens, x))

    def test_errors_of_the_member_are_its_own(self):
        ens = ensemble(strategy="auto")
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            ens.capture(torch.randn(4, 5))
        captured = ens.capture(torch.randn(4, 3))
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            captured(torch.randn(4, 5))
        x = torch.randn(4, 3)
        torch.testing.assert_close(captured(x), plain_call(ens, x))

    def test_buffers_are_put_back_after_an_error(self):
        class Fails(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("count", torch.zeros(()))

            def forward(self, x):
                self.count.add_(1)
                raise ValueError("no")

        ens = ensemble(Fails)
        with pytest.raises(ValueError, match="no"):
            ens.capture(torch.ones(1))
        assert ens.members.count.tolist() == [0.0] * N

    def test_pickling_says_what_to_do(self):
        captured = ensemble().capture(torch.randn(4, 3))
        for copied in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="tied to the memory of its ensemble"):
                copied(captured)


class TestState:
    def test_assigned_attributes_are_frozen_and_named(self):
        class Counts(nn.Module):
            calls = 0

            def forward(self, x):
                self.calls += 1
                return x * self.calls

        ens = ensemble(Counts)
        with pytest.warns(EnsembleWarning, match="forward assigns `calls`, and a replay doesn't"):
            captured = ens.capture(torch.ones(2))
        assert torch.equal(captured(torch.ones(2)), captured(torch.ones(2)))
        assert torch.equal(plain_call(ens, torch.ones(2)), torch.ones(N, 2))

    def test_buffers_that_change_places(self):
        class Swap(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("a", torch.zeros(2))
                self.register_buffer("b", torch.ones(2))

            def forward(self, x):
                self.a, self.b = self.b, self.a
                return x + self.a

        ens = ensemble(Swap)
        captured = ens.capture(torch.zeros(2))
        for value in (1.0, 0.0, 1.0):
            assert captured(torch.zeros(2)).unique().tolist() == [value]
            assert ens.members.a.unique().tolist() == [value]
            assert ens.members.b.unique().tolist() == [1.0 - value]

    def test_a_buffer_of_another_shape_is_refused(self):
        class Grows(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("seen", torch.zeros(1))

            def forward(self, x):
                self.seen = torch.cat([self.seen, x])
                return x

        with pytest.raises(UnsupportedModelError, match="assigns the buffer `seen`"):
            ensemble(Grows).capture(torch.zeros(2))

    def test_inputs_written_by_forward(self):
        class Writes(nn.Module):
            def forward(self, x):
                return x.mul_(2) + 1

        ens = ensemble(Writes)
        x = torch.ones(N, 2)
        captured = ens.capture(per_member(x))
        assert x.unique().tolist() == [1.0]
        captured(per_member(x))
        assert x.unique().tolist() == [2.0]


class TestMemory:
    def test_outputs_are_fresh(self):
        class Returns(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(2))
                self.register_buffer("buffer", torch.zeros(2))

            def forward(self, x):
                return self.weight, self.buffer, torch.zeros(2), x + 1, x

        ens = ensemble(Returns)
        x = torch.zeros(N, 2)
        captured = ens.capture(per_member(x))
        first = captured(per_member(x))
        for output in first[:4]:
            output.fill_(7)
        for output, value in zip(captured(per_member(x)), (0.0, 0.0, 0.0, 1.0, 0.0), strict=True):
            assert output.unique().tolist() == [value]
        assert first[4].data_ptr() == x.data_ptr()  # as the plain call returns it

    def test_containers_are_fresh(self):
        class Nested(nn.Module):
            def forward(self, x):
                return {"x": [x, 1, "{}"], "none": None, "empty": (), "one": (x,)}

        ens = ensemble(Nested)
        x = torch.zeros(2)
        captured = ens.capture(x)
        captured(x)["x"].append(1)
        assert_same(captured(x), plain_call(ens, x))

    def test_example_inputs_are_let_go(self):
        x = torch.randn(4, 3)
        gone = weakref.ref(x)
        captured = ensemble().capture(x)
        captured(x)
        del x
        gc.collect()
        assert gone() is None

    def test_recorded_tensors_are_let_go(self):
        ens = ensemble(lambda: nn.Linear(3, 1000))
        captured = ens.capture(torch.randn(777, 3))
        gc.collect()
        found = [t for t in gc.get_objects() if type(t) is torch.Tensor and 777 in t.shape]
        assert all(t.device.type == "meta" for t in found)  # placeholders have no memory
        assert captured.code

    def test_allocations(self, choose):
        choose("fused")
        ens = ensemble(n=10)
        x = torch.randn(64, 3)
        captured = ens.capture(x)
        captured(x)
        with torch.profiler.profile(profile_memory=True) as profile:
            captured(x)
        allocated = [e.self_cpu_memory_usage for e in profile.events()]
        hidden = 10 * 64 * 8 * 4
        assert sum(size for size in allocated if size > 0) == 2 * hidden + 10 * 64 * 2 * 4


class TestCode:
    def test_of_a_small_network(self, choose):
        choose("fused")
        captured = ensemble(mlp, n=10).capture(torch.randn(4, 3))
        assert captured.code == (
            "# x0_bias: 0.bias (10, 8) as (10, 1, 8)\n"
            "# x0_weight: 0.weight (10, 8, 3) as (10, 3, 8)\n"
            "# x2_bias: 2.bias (10, 8) as (10, 1, 8)\n"
            "# x2_weight: 2.weight (10, 8, 8) with strides (64, 1, 8)\n"
            "# x4_bias: 4.bias (10, 2) as (10, 1, 2)\n"
            "# x4_weight: 4.weight (10, 2, 8) as (10, 8, 2)\n"
            "def replay(input):\n"
            "    h1 = input.expand((10, -1, -1))  # (10, 4, 3)\n"
            "    h2 = torch.baddbmm(x0_bias, h1, x0_weight)  # (10, 4, 8)\n"
            "    h2.relu_()\n"
            "    h3 = torch.baddbmm(x2_bias, h2, x2_weight)  # (10, 4, 8)\n"
            "    del h2\n"
            "    h3.relu_()\n"
            "    h4 = torch.baddbmm(x4_bias, h3, x4_weight)  # (10, 4, 2)\n"
            "    return h4\n"
        )

    def test_turned(self, choose):
        choose("turned")
        captured = ensemble(mlp, n=10).capture(per_member(torch.randn(10, 4, 3)))
        assert ops_of(captured.code) == [
            "h1 = torch.transpose(input, -2, -1)  # (10, 3, 4)",
            "h2 = torch.baddbmm(x0_bias, x0_weight, h1)  # (10, 8, 4)",
            "h2.relu_()",
            "h3 = torch.baddbmm(x2_bias, x2_weight, h2)  # (10, 8, 4)",
            "h3.relu_()",
            "h4 = torch.baddbmm(x4_bias, x4_weight, h3)  # (10, 2, 4)",
            "h5 = torch.transpose(h4, -2, -1)  # (10, 4, 2)",
            "h6 = torch.clone(h5, memory_format=torch.contiguous_format)  # (10, 4, 2)",
        ]

    def test_members_in_a_loop(self):
        captured = ensemble(lambda: nn.Linear(3, 2), n=2, strategy="loop").capture(torch.ones(4, 3))
        assert captured.code == (
            "# bias_0: bias[0] (2,)\n"
            "# weight_0: weight[0] (2, 3) as (3, 2)\n"
            "# bias_1: bias[1] (2,)\n"
            "# weight_1: weight[1] (2, 3) as (3, 2)\n"
            "def replay(input):\n"
            "    h1 = torch.addmm(bias_0, input, weight_0)  # (4, 2)\n"
            "    h2 = torch.addmm(bias_1, input, weight_1)  # (4, 2)\n"
            "    h3 = torch.stack((h1, h2))  # (2, 4, 2)\n"
            "    return h3\n"
        )

    def test_names(self):
        class Two(nn.Module):
            def forward(self, batch, *, mask):
                return batch["obs"][0] * mask

        captured = ensemble(Two).capture({"obs": [torch.ones(2)]}, mask=torch.ones(2))
        assert "def replay(batch_obs_0, mask):" in captured.code

    def test_a_function_of_torch_is_used_only_if_it_is_the_op(self):
        class Runs(nn.Module):
            def forward(self, x):
                return torch.ops.aten.mul.Scalar(torch.ops.aten.mul.Tensor(x, 2), 3.0)

        captured = Ensemble([Runs()], strategy="loop").capture(torch.ones(2))
        ops = ops_of(captured.code)
        assert ops[0].startswith("h1 = torch.mul(")
        assert ops[1].startswith(("torch.ops.aten.mul_.Scalar(", "h2 = torch.ops.aten.mul.Scalar("))

    def test_is_shown(self):
        captured = ensemble().capture(torch.randn(4, 3))
        assert repr(captured).startswith("Capture(1 of 8 programs, on_change='record', strategy=")
        assert captured.code in repr(captured)

    @pytest.mark.parametrize(
        ("forward", "ops"),
        [
            (lambda x: torch.relu(x + 1), 2),  # the second in place
            (lambda x: (x + 1).view(2, 2).view(4).detach(), 1),
            (lambda x: x + torch.arange(4.0).sin(), 1),  # constants are computed once
            (lambda x: (x.sin(), x + 1)[1], 1),  # nobody reads the sine
            (lambda x: (x + 1).clone() * 2, 2),  # the copy is of no use
            (lambda x: torch.zeros(4).add_(x), 2),  # zeros that are written stay
            (lambda x: x.clone().add_(1), 2),  # a copy that is written stays
        ],
        ids=["in-place", "views", "constants", "unused", "copy", "zeros", "written-copy"],
    )
    def test_what_is_left(self, forward, ops):
        class Runs(nn.Module):
            def forward(self, x):
                return forward(x)

        ens = Ensemble([Runs()], strategy="loop")
        x = torch.randn(4)
        captured = ens.capture(x)
        for other in (x, torch.randn(4)):
            torch.testing.assert_close(captured(other), plain_call(ens, other))
        # One op more joins the members.
        assert len(ops_of(captured.code)) == ops + 1, captured.code

    @pytest.mark.parametrize(
        "forward",
        [
            lambda x: (lambda h: torch.relu(h) + h)(x + 1),  # read again
            lambda x: (lambda h: (h, torch.relu(h)))(x + 1),  # returned
            lambda x: (lambda h: torch.relu(h[0]) + h.sum())(x + 1),  # a view of it is read again
            lambda x: torch.relu(x),  # an input
            lambda x: (lambda h: h + h.T)(x + 1),  # itself in another order
            lambda x: (lambda h: torch.mul(h, h))(x + 1),
            lambda x: (lambda h: (h.sigmoid_(), h + 1)[1])(x + 1),
            lambda x: (lambda h, g: (h.add_(1), g * 2)[1])(*[x + 1] * 2),
            lambda x: (lambda h: (h.T.mul_(x), h.T.relu(), h)[1:])(x + 1),
            lambda x: (lambda c: (x + c, c.fill_(1), x + c)[::2])(torch.zeros(3, 3)),
            lambda x: (lambda c: (c + 1, c.add_(x), x + c)[::2])(x.new_zeros(3, 3)),
            lambda x: (lambda c, d: (c.copy_(x), d.add_(1), c + d)[2])(*x.new_zeros(2, 3, 3)),
            lambda x: (x + 1).to(torch.float64).relu(),
            lambda x: torch.stack([(x + 1), x]).transpose_(0, 1).relu(),
            lambda x: (lambda h: (h.clone(), h.add_(1)))(x + 1),
            lambda x: F.pad(x, (1, 1)).unfold(0, 2, 1).relu(),
            lambda x: torch.where(x > 0, x, -x),
        ],
        ids=map(str, range(17)),
    )
    def test_in_place_only_where_nobody_notices(self, forward):
        class Runs(nn.Module):
            def forward(self, x):
                return forward(x)

        for strategy in ("fused", "loop"):
            ens = Ensemble([Runs(), Runs()], strategy=strategy)
            x = torch.randn(2, 3, 3)
            captured = ens.capture(per_member(x))
            for _ in range(2):
                x = torch.randn(2, 3, 3)
                before = x.clone()
                got = captured(per_member(x))
                assert torch.equal(x, before)
                want = plain_call(ens, per_member(x.clone()))
                for (_, a), (_, b) in zip(leaves(got), leaves(want), strict=True):
                    torch.testing.assert_close(a, b)


def test_threads():
    ens = ensemble(strategy="fused")
    captured = ens.capture(torch.randn(4, 3))
    inputs = [torch.randn(4 + k % 3, 3) for k in range(12)]
    expected = [plain_call(ens, x) for x in inputs]
    failures = []

    def work(k):
        for _ in range(20):
            try:
                torch.testing.assert_close(captured(inputs[k]), expected[k])
            except BaseException as error:
                failures.append(error)

    in_threads(work, 12)
    assert not failures
    assert len(captured) == 3


def test_the_choice_is_measured_and_leaves_no_trace():
    ens = ensemble(
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()), strategy="auto"
    )
    state, random_state = copy.deepcopy(ens.state_dict()), torch.get_rng_state()
    ens.capture(torch.randn(4, 3, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(v, state[k]) for k, v in ens.state_dict().items())


@pytest.mark.gpu
def test_on_a_gpu():
    ens = ensemble().cuda()
    x = torch.randn(4, 3, device="cuda")
    captured = ens.capture(x)
    first = captured(x)
    torch.testing.assert_close(first, plain_call(ens, x))
    y = torch.randn(4, 3, device="cuda")
    torch.testing.assert_close(captured(y), plain_call(ens, y))
    torch.testing.assert_close(first, plain_call(ens, x))  # not overwritten
    with torch.no_grad():
        ens.members["0"].weight.mul_(2)
    torch.testing.assert_close(captured(y), plain_call(ens, y))


def test_a_capture_makes_the_plan_first(monkeypatch):
    times = {"fused, transposed": 1.0, "fused": 2.0, "loop": 3.0}
    monkeypatch.setattr(measuring, "contest", lambda first, run, handicaps: times)
    ens = ensemble(strategy="auto")
    x = torch.randn(5, 3)
    predict = ens.capture(x)
    assert not ens.members.get_parameter("0.weight").is_contiguous()
    code = predict.code
    ens(x)
    torch.testing.assert_close(predict(x), plain_call(ens, x))
    assert predict.code == code  # nothing has to be recorded anew


def test_chunks_of_the_plan_are_recorded(monkeypatch):
    times = {"fused, 2 at a time, transposed": 1.0, "fused": 2.0, "loop": 3.0}
    monkeypatch.setattr(measuring, "contest", lambda first, run, handicaps: times)
    ens = ensemble(n=4, strategy="auto")
    x = torch.randn(5, 3)
    torch.testing.assert_close(ens.capture(x)(x), plain_call(ens, x))
