"""How much memory a call takes, and chunks that keep it within a limit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cases
from unisono import Ensemble, EnsembleWarning, per_member
from unisono.engine.planning.memory import Footprint, fitting_chunk, footprint

KB = 1024


def make(n: int = 8, **options: object) -> Ensemble:
    models = [nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)) for _ in range(n)]
    return Ensemble(models, **options)  # type: ignore[arg-type]


def test_the_peak_is_that_of_what_lives_at_one_time() -> None:
    def run() -> Tensor:
        a = torch.zeros(KB)  # 4 KB
        b = a + 1  # 8 KB
        del a
        c = b.view(2, -1) * 2  # 8 KB: a is gone, the view is no memory of its own
        del b
        return c

    assert footprint(run) == Footprint(peak=8 * KB, kept=4 * KB, outputs=4 * KB)


def test_what_was_there_before_does_not_count() -> None:
    x = torch.zeros(KB)
    assert footprint(lambda: x.add_(1)).peak == 0
    assert footprint(lambda: x.view(2, -1)).peak == 0


@pytest.mark.parametrize("limit", [1, 50, 100, 10_000])
def test_the_largest_chunk_that_fits(limit: int) -> None:
    # fixed 10, each member keeps 2 and needs 5 more while it runs, outputs 1
    size, needed = fitting_chunk(10, limit, Footprint(17, 2, 1), Footprint(24, 4, 1))

    def bytes_of(size: int) -> int:
        return 10 + 5 * size + 2 * 10 + (10 if size < 10 else 0)

    assert needed == bytes_of(size)
    assert size == 1 or bytes_of(size) <= limit
    assert size == 10 or bytes_of(size + 1) > limit


@pytest.mark.parametrize("strategy", ["fused", "vmap", "auto"])
@pytest.mark.parametrize("limit", [30 * KB, 60 * KB, 400 * KB])
def test_a_call_stays_within_the_limit(strategy: str, limit: int) -> None:
    ens = make(strategy=strategy, chunk_size="auto", memory_limit=limit)
    xs = per_member(torch.randn(8, 32, 16))
    with torch.no_grad():
        expected = make_loop(ens)(xs)
        ens(xs)
        used = footprint(lambda: ens(xs))
        torch.testing.assert_close(ens(xs), expected)
        assert used.peak <= limit
        if strategy == "fused":
            assert ens.explain(xs).chunk_size == {30: 2, 60: 6, 400: None}[limit // KB]


def make_loop(ens: Ensemble) -> Ensemble:
    return Ensemble(ens.unstack(), strategy="loop")


def test_a_larger_batch_is_measured_anew() -> None:
    ens = make(strategy="fused", chunk_size="auto", memory_limit=200 * KB)
    with torch.no_grad():
        for batch in (16, 17, 32, 64, 100):
            x = torch.randn(batch, 16)
            ens(x)
            assert footprint(lambda x=x: ens(x)).peak <= 200 * KB  # type: ignore[misc]


def test_a_limit_that_cannot_be_met_is_said_once() -> None:
    ens = make(strategy="fused", chunk_size="auto", memory_limit=KB)
    x = torch.randn(32, 16)
    with torch.no_grad(), pytest.warns(EnsembleWarning) as caught:
        outputs = [ens(x), ens(x)][0]
    assert len(caught) == 1
    assert "with one member at a time, more than the memory_limit of 1,024;" in str(
        caught[0].message
    )
    torch.testing.assert_close(outputs, make_loop(ens)(x).detach())


# Where fused takes more: torch.vmap runs the native layer for one member after another, and what
# the layer allocates inside isn't seen here; a mask per member is unfolded over the batch. Layers
# that are small, as these are, run in one piece; for larger ones see the test behind.
MORE = {cases.NativeAttention: 2.3, cases.MaskedAttention: 1.25}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.vmap's own
@pytest.mark.parametrize("case", cases.CASES)
def test_fused_takes_hardly_more_memory_than_vmap(case: cases.Case) -> None:
    if case.refused_by_vmap:
        pytest.skip(case.refused_by_vmap)
    models = [model.eval() for model in cases.members(case, 3)]
    args, kwargs = case.inputs()
    peaks = []
    with torch.no_grad(), pytest.MonkeyPatch.context():
        for strategy in ("fused", "vmap"):
            ens = Ensemble(models, strategy=strategy)  # type: ignore[arg-type]
            ens(*args, **kwargs)
            peaks.append(footprint(lambda ens=ens: ens(*args, **kwargs)).peak)  # type: ignore[misc]
    # vmap's needs at least a kilobyte: these nets are tiny
    assert peaks[0] <= max(MORE.get(case.make, 1.1) * peaks[1], peaks[1] + KB)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.vmap's own
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_takes_hardly_more_memory_than_its_members_one_by_one(norm_first: bool) -> None:
    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            32, 2, 64, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double().eval()

    torch.manual_seed(0)
    models = [encoder() for _ in range(8)]
    xs = torch.randn(8, 8, 16, 32, dtype=torch.float64)
    before = xs.clone()
    peaks = []
    with torch.no_grad():
        wanted = torch.stack([model(x) for model, x in zip(models, xs, strict=True)])
        for strategy in ("fused", "vmap"):
            ens = Ensemble(models, strategy=strategy)  # type: ignore[arg-type]
            torch.testing.assert_close(ens(per_member(xs)), wanted)
            peaks.append(footprint(lambda ens=ens: ens(per_member(xs))).peak)  # type: ignore[misc]
    assert torch.equal(xs, before)  # the first layer has no memory to overwrite
    assert peaks[0] <= 1.1 * peaks[1]
