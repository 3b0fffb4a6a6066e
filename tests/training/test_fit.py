"""`fit` is N solo trainings: the same weights, losses and stops, whatever the others do."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import oracles
import unisono
from solo import train_alone
from unisono import Ensemble, EnsembleError, EnsembleWarning, fit, optim, per_member
from unisono.training import own_epochs

N = 4
ROWS = 50


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def relu():
    """What overflows when its weights do."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    ).double()


@pytest.fixture
def data():
    x = torch.randn(ROWS, 6, dtype=torch.float64)
    return x, (x[:, :3] + 0.3 * torch.randn(ROWS, 3, dtype=torch.float64)).argmax(1)


@pytest.fixture
def held():
    x = torch.randn(20, 6, dtype=torch.float64)
    return x, (x[:, :3] + 0.3 * torch.randn(20, 3, dtype=torch.float64)).argmax(1)


def build(make=mlp, n=N, strategy="fused", **options):
    models = [make() for _ in range(n)]
    return Ensemble(models, strategy=strategy, **options), models


def train(ens, data, optimizer, **options):
    values = {"loss": F.cross_entropy, "epochs": 3, "batch_size": 16, "progress": False} | options
    return fit(ens, data, optimizer=optimizer, **values)


RATES = [0.1, 0.03, 0.01, 0.003]


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("rates", [0.05, RATES], ids=["one-rate", "own-rates"])
@pytest.mark.parametrize(
    "sampling", ["shared", "shuffled", "bootstrap", "folds", unisono.sampling.subset(0.5)], ids=str
)
def test_every_member_learns_as_it_would_alone(data, make, rates, sampling):
    ens, models = build(make)
    history = train(ens, data, optim.Adam(ens, lr=rates), sampling=sampling, seed=3)

    def adam(parameters, i):
        return torch.optim.Adam(parameters, lr=rates if isinstance(rates, float) else rates[i])

    solos = train_alone(
        models, adam, data, F.cross_entropy, epochs=3, sampling=sampling, batch_size=16, seed=3
    )
    oracles.assert_state_equal(ens, [solo.model for solo in solos])
    np.testing.assert_allclose(history.loss, np.array([solo.losses for solo in solos]).T)
    assert history.epochs == 3
    assert history.stopped == ("",) * N


@pytest.mark.parametrize("options", [{"max_norm": 0.1}, {"max_norm": RATES}, {"accumulate": 2}])
def test_clipping_and_accumulation_are_the_members_own(data, options):
    ens, models = build()
    given = {"max_grad_norm" if k == "max_norm" else k: v for k, v in options.items()}
    train(ens, data, optim.SGD(ens, lr=0.5), sampling="shuffled", **given)
    solos = train_alone(
        models,
        lambda parameters, i: torch.optim.SGD(parameters, lr=0.5),
        data,
        F.cross_entropy,
        epochs=3,
        sampling="shuffled",
        batch_size=16,
        **options,
    )
    oracles.assert_state_equal(ens, [solo.model for solo in solos])


# Stopping -----------------------------------------------------------------------------------------


def sizes_of_epochs(monkeypatch):
    """How many members are computed in each epoch."""
    seen = []
    original = own_epochs.train_epoch

    def counted(running, *args, **kwargs):
        seen.append(len(running.ens))
        return original(running, *args, **kwargs)

    monkeypatch.setattr(own_epochs, "train_epoch", counted)
    return seen


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("min_delta", [0.0, 0.02])
def test_members_stop_and_get_their_best_weights_as_they_would_alone(
    data, held, make, min_delta, monkeypatch
):
    rates = [2.0, 0.3, 0.05, 0.5]
    seen = sizes_of_epochs(monkeypatch)
    ens, models = build(make)
    history = train(
        ens,
        data,
        optim.SGD(ens, lr=rates, momentum=0.9),
        sampling="shuffled",
        epochs=12,
        validation=held,
        patience=2,
        min_delta=min_delta,
    )
    solos = train_alone(
        models,
        lambda parameters, i: torch.optim.SGD(parameters, lr=rates[i], momentum=0.9),
        data,
        F.cross_entropy,
        epochs=12,
        sampling="shuffled",
        batch_size=16,
        validation=held,
        patience=2,
        min_delta=min_delta,
    )
    lengths = [len(solo.losses) for solo in solos]
    assert len(set(lengths)) > 1, "the case is meant to have members that stop at different times"
    oracles.assert_state_equal(ens, [solo.model for solo in solos])
    assert history.stopped == tuple(solo.stopped for solo in solos)
    assert history.best_epoch.tolist() == [solo.best_epoch for solo in solos]
    for i, solo in enumerate(solos):
        np.testing.assert_allclose(history.loss[: lengths[i], i], solo.losses)
        np.testing.assert_allclose(history.validation_loss[: lengths[i], i], solo.validation)
        assert np.isnan(history.loss[lengths[i] :, i]).all()
    # What has stopped costs nothing more.
    assert seen == [sum(length > epoch for length in lengths) for epoch in range(max(lengths))]


def test_the_combined_prediction_is_that_of_all_members_also_of_those_that_stopped(data, held):
    ens, _ = build()
    found = []

    def check(end):
        end.ensemble.eval()
        with torch.no_grad():
            probabilities = unisono.combine.probabilities(end.ensemble(held[0]))
        found.append(F.nll_loss(probabilities.log(), held[1]).item())

    history = train(
        ens,
        data,
        optim.SGD(ens, lr=[3.0, 0.3, 0.05, 1.0]),
        epochs=8,
        validation=held,
        patience=1,
        metrics={"accuracy": lambda y, t: (y.argmax(1) == t).double().mean()},
        callbacks=[check],
    )
    assert "patience" in history.stopped
    # In the epoch in which a member stops it is measured as it was, and then put to its best.
    ends = [
        e
        for e in range(len(found))
        if np.isnan(history.loss[e]).tolist()
        == np.isnan(history.loss[min(e + 1, len(found) - 1)]).tolist()
    ]
    np.testing.assert_allclose(history.combined_loss[ends[:-1]], np.array(found)[ends[:-1]])
    assert history.metrics["accuracy"].shape == history.loss.shape
    assert history.combined_metrics["accuracy"].shape == (history.epochs,)


def test_no_member_left_ends_the_training(data, held):
    ens, _ = build()
    history = train(ens, data, optim.SGD(ens, lr=0.0), epochs=50, validation=held, patience=2)
    assert history.epochs == 3
    assert history.stopped == ("patience",) * N


# Members that leave the numbers -------------------------------------------------------------------


@pytest.mark.parametrize("make", [relu, cnn])
@pytest.mark.parametrize("optimizer", [optim.SGD, optim.Adam])
def test_a_member_that_explodes_is_frozen_and_the_others_are_unharmed_bitwise(
    data, held, make, optimizer
):
    rates = [0.01, 0.02, 0.03, 0.04]
    calm, models = build(make)
    train(calm, data, optimizer(calm, lr=rates), sampling="shuffled", epochs=4)

    wild = Ensemble(models, strategy="fused")
    with pytest.warns(EnsembleWarning, match=r"in epoch 0 a loss or a parameter of member 2"):
        history = train(
            wild,
            data,
            optimizer(wild, lr=[0.01, 0.02, 1e300, 0.04]),
            sampling="shuffled",
            epochs=4,
        )
    assert history.stopped == ("", "", "not finite", "")
    assert np.isnan(history.loss[1:, 2]).all()
    for name, tensor in wild.stacked_tensors().items():
        for i in (0, 1, 3):
            assert torch.equal(tensor[i], calm.stacked_tensors()[name][i]), (name, i)
        # It never had a finite epoch: it is as it was built.
        assert torch.equal(tensor[2], Ensemble(models).stacked_tensors()[name][2]), name


@pytest.mark.parametrize("make", [relu, cnn])
def test_a_member_is_frozen_at_its_last_good_epoch_with_its_optimizer_state(data, make):
    ens, _ = build(make)
    optimizer = optim.Adam(ens, lr=RATES)
    states = []

    def rows():
        tensors = ens.stacked_tensors()
        moments = [v for state in optimizer.state.values() for v in state.values()]
        return [tensor[1].detach().clone() for tensor in [*tensors.values(), *moments]]

    def explode(end):
        states.append(rows())
        if end.epoch == 1:
            end.optimizer.param_groups[1]["lr"] = 1e300

    with pytest.warns(EnsembleWarning, match=r"in epoch 2 .* member 1 \(loss "):
        train(ens, data, optimizer, epochs=5, callbacks=[explode])
    for now, before in zip(rows(), states[1], strict=True):
        assert torch.equal(now, before)
    assert len(states[1]) == len(states[4])
    assert not torch.equal(states[0][0], states[1][0])


def test_a_frozen_member_has_no_validation_loss_any_more(data, held):
    ens, _ = build(relu)
    with pytest.warns(EnsembleWarning, match="member 2 "):
        history = train(
            ens,
            data,
            optim.SGD(ens, lr=[0.1, 0.1, 1e300, 0.1]),
            validation=held,
            metrics={"accuracy": lambda y, t: (y.argmax(1) == t).double().mean()},
        )
    for values in (history.validation_loss, history.metrics["accuracy"]):
        assert np.isnan(values[:, 2]).all()
        assert np.isfinite(values[:, [0, 1, 3]]).all()
    assert np.isfinite(history.combined_loss).all()


def test_frozen_members_leave_when_they_are_the_majority(data, monkeypatch):
    seen = sizes_of_epochs(monkeypatch)
    ens, _ = build(relu)
    with pytest.warns(EnsembleWarning, match="member 0 .*, member 1 .*, member 2 "):
        train(ens, data, optim.SGD(ens, lr=[1e300, 1e300, 1e300, 0.1]), epochs=3)
    assert seen == [4, 1, 1]
    seen.clear()
    ens, _ = build(relu)
    with pytest.warns(EnsembleWarning, match="member 2 "):
        train(ens, data, optim.SGD(ens, lr=[0.1, 0.1, 1e300, 0.1]), epochs=3)
    assert seen == [4, 4, 4]


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_when_few_train_on_an_error_leaves_the_end_of_the_last_epoch(data, raised, monkeypatch):
    calm, models = build(relu)
    wild = Ensemble(models, strategy="fused")
    epochs = []
    start = own_epochs.train_epoch

    def stops_in_the_third_epoch(*args, after_step, **options):
        epochs.append(0)

        def stop(*given):
            if len(epochs) == 3:
                raise raised("stop")
            after_step(*given)

        return start(*args, after_step=stop, **options)

    with pytest.warns(EnsembleWarning, match="member 0 "):
        train(calm, data, optim.Adam(calm, lr=[1e300, 1e300, 1e300, 0.1]), epochs=2)
    monkeypatch.setattr(own_epochs, "train_epoch", stops_in_the_third_epoch)
    with pytest.warns(EnsembleWarning, match="member 0 "), pytest.raises(raised, match="stop"):
        train(wild, data, optim.Adam(wild, lr=[1e300, 1e300, 1e300, 0.1]), epochs=4)
    pairs = zip(wild.stacked_tensors().items(), calm.stacked_tensors().values(), strict=True)
    for (name, now), expected in pairs:
        assert torch.equal(now, expected), name


def test_bad_rows_end_only_the_members_that_see_them(data):
    x, y = data
    x = x.clone()
    x[7] = torch.nan
    ens, _ = build()
    kind = unisono.sampling.subset(0.5)
    sees = [7 in kind.rows(ROWS, i, seed=0, num_members=N) for i in range(N)]
    assert len(set(sees)) == 2
    with pytest.warns(EnsembleWarning, match="not finite"):
        history = train(ens, (x, y), optim.Adam(ens, lr=0.01), sampling=kind)
    assert [why == "not finite" for why in history.stopped] == sees
    assert all(bool(torch.isfinite(t).all()) for t in ens.parameters())


def test_a_shared_parameter_that_explodes_is_an_error_and_the_epoch_is_undone(data):
    models = [relu() for _ in range(N)]
    for model in models[1:]:
        model[0].load_state_dict(models[0][0].state_dict())
    ens = Ensemble(models, shared="0.*", strategy="fused")
    before = copy.deepcopy(ens.state_dict())
    optimizer = optim.SGD(ens, lr=1e300)
    with pytest.raises(EnsembleError, match=r"all members train `0.weight`, `0.bias` together"):
        train(ens, data, optimizer)
    for name, tensor in ens.state_dict().items():
        assert torch.equal(tensor, before[name])


# Schedulers ---------------------------------------------------------------------------------------

SCHEDULERS = {
    "step": (lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5), "epoch"),
    "milestones": (lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]), "epoch"),
    "cosine": (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5), "epoch"),
    "one-cycle": (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=40), "step"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rates", [0.1, RATES], ids=["one-rate", "own-rates"])
def test_schedulers_of_torch_also_when_members_have_stopped(data, held, name, rates):
    make, every = SCHEDULERS[name]
    ens, models = build()
    optimizer = optim.SGD(ens, lr=rates)
    history = train(
        ens,
        data,
        optimizer,
        epochs=5,
        scheduler=make(optimizer),
        scheduler_every=every,
        validation=held,
        patience=2,
        min_delta=0.05,
    )
    own = [
        torch.optim.SGD(m.parameters(), lr=rates if rates == 0.1 else rates[i])
        for i, m in enumerate(models)
    ]
    expected = []
    schedulers = [make(o) for o in own]
    for _ in range(history.epochs):
        expected.append([o.param_groups[0]["lr"] for o in own])
        for o, scheduler in zip(own, schedulers, strict=True):
            for _ in range(4 if every == "step" else 1):
                o.step()
                scheduler.step()
    np.testing.assert_allclose(history.lr, expected)


def test_a_plateau_of_the_validation_loss(data, held):
    ens, _ = build()
    optimizer = optim.SGD(ens, lr=[0.0, 0.0, 0.0, 0.0])
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
    for group in optimizer.param_groups:
        group["lr"] = 1e-9
    history = train(
        ens,
        data,
        optimizer,
        epochs=5,
        scheduler=scheduler,
        validation=held,
        scheduler_every="epoch",
    )
    assert history.lr.shape == (5, N)


# Data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["shared", "shuffled"])
def test_a_dataset_is_the_same_as_its_tensors(data, sampling):
    first, models = build()
    second = Ensemble(models, strategy="fused")

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return ROWS

        def __getitem__(self, i):
            return data[0][i], data[1][i]

    train(first, data, optim.Adam(first, lr=0.01), sampling=sampling)
    train(second, Rows(), optim.Adam(second, lr=0.01), sampling=sampling)
    for name, tensor in first.stacked_tensors().items():
        assert torch.equal(tensor, second.stacked_tensors()[name])


def test_a_loader_is_taken_as_it_is(data):
    ens, models = build()
    loader = DataLoader(TensorDataset(*data), batch_size=20, shuffle=False)
    train(ens, loader, optim.SGD(ens, lr=0.1), epochs=2, batch_size=None)
    for i, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        oracles.assert_state_equal(ens[[i]], [model])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3).double()

    def forward(self, x, scale):
        return self.linear(x) * scale


@pytest.mark.parametrize("kind", [tuple, dict])
@pytest.mark.parametrize("sampling", ["shared", "shuffled"])
def test_several_inputs(data, kind, sampling):
    x, y = data
    scale = torch.rand(ROWS, 1, dtype=torch.float64)
    inputs = (x, scale) if kind is tuple else {"scale": scale, "x": x}
    ens, models = build(TwoInputs)
    train(ens, (inputs, y), optim.SGD(ens, lr=0.1), epochs=1, batch_size=ROWS, sampling=sampling)
    for model in models:
        F.cross_entropy(model(x, scale), y).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    oracles.assert_state_equal(ens, models)


def test_the_eight_lines_do_the_same(data):
    """The loop of the README beside `fit`."""
    ens, models = build()
    train(ens, data, optim.Adam(ens, lr=RATES), epochs=2, batch_size=25, sampling="shuffled")
    own = Ensemble(models, strategy="fused")
    optimizer = optim.Adam(own, lr=RATES)
    kind = unisono.sampling.shuffled()
    for epoch in range(2):
        order = torch.from_numpy(
            kind.order(ROWS, range(N), epoch=epoch, seed=0, num_members=N).copy()
        )
        for rows in order.tensor_split(2, dim=1):
            losses = unisono.member_losses(
                F.cross_entropy, own(per_member(data[0][rows])), per_member(data[1][rows])
            )
            losses.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, tensor in ens.stacked_tensors().items():
        assert torch.equal(tensor, own.stacked_tensors()[name])


# What surrounds it --------------------------------------------------------------------------------


def test_random_numbers_of_the_process_are_left_alone_and_dropout_follows_the_seed(data):
    def make():
        return nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).double()

    models = [make() for _ in range(N)]
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        np.random.seed(noise)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        ens = Ensemble(models, strategy="fused")
        train(ens, data, optim.SGD(ens, lr=0.1))
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1] == np.random.get_state()[1]).all()
        states.append(ens.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])


def test_every_epoch_draws_numbers_of_its_own(data):
    drawn = []

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3).double()

        def forward(self, x):
            drawn.append((torch.rand(()).item(), float(np.random.rand())))
            return self.linear(x)

    ens = Ensemble([Noisy()], strategy="loop")
    train(ens, data, optim.SGD(ens, lr=0.1), batch_size=ROWS, epochs=4)
    assert len(set(drawn)) == len(drawn) == 4
    first = list(drawn)
    drawn.clear()
    train(ens, data, optim.SGD(ens, lr=0.1), batch_size=ROWS, epochs=4)
    assert drawn == first


def test_a_member_learns_the_same_in_a_larger_ensemble(data):
    few, models = build(n=3)
    many = Ensemble([*models, mlp(), mlp()], strategy="fused")
    train(few, data, optim.Adam(few, lr=0.01), sampling="bootstrap")
    train(many, data, optim.Adam(many, lr=0.01), sampling="bootstrap")
    for name, tensor in few.stacked_tensors().items():
        torch.testing.assert_close(tensor, many.stacked_tensors()[name][:3])


def test_the_mode_is_as_before_also_after_an_error(data):
    ens, _ = build()
    ens.eval()
    train(ens, data, optim.SGD(ens, lr=0.1), epochs=1)
    assert not ens.training

    def fail(end):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        train(ens, data, optim.SGD(ens, lr=0.1), callbacks=[fail])
    assert not ens.training


def test_callbacks_see_the_whole_ensemble_and_can_end_the_training(data, held):
    ens, _ = build()
    ends = []

    def watch(end):
        ends.append((end.epoch, end.running, end.history.epochs, end.ensemble is ens))
        return end.epoch == 1

    history = train(ens, data, optim.SGD(ens, lr=0.1), epochs=9, callbacks=[watch])
    assert history.epochs == 2
    assert ends == [(0, (0, 1, 2, 3), 1, True), (1, (0, 1, 2, 3), 2, True)]


def test_a_population_in_a_callback(data, held):
    """Exploit and explore, also when members have stopped."""
    ens, _ = build()
    optimizer = optim.SGD(ens, lr=[1.0, 0.1, 1e-6, 0.3], momentum=0.9)

    def exploit(end):
        if end.epoch == 1:
            end.ensemble.copy_(1, 2)
            end.optimizer.param_groups[2]["lr"] = 0.1

    history = train(ens, data, optimizer, epochs=4, callbacks=[exploit])
    np.testing.assert_allclose(history.lr[2:, 2], 0.1)
    for tensor in ens.stacked_tensors().values():
        torch.testing.assert_close(tensor[1], tensor[2])
    for state in optimizer.state.values():
        torch.testing.assert_close(state["momentum_buffer"][1], state["momentum_buffer"][2])


def test_bfloat16_forward_follows_the_loop_under_autocast(data):
    def make():
        return nn.Linear(6, 3)

    x, y = data[0].float(), data[1]
    models = [make() for _ in range(N)]
    ens = Ensemble(models, strategy="fused")
    train(ens, (x, y), optim.SGD(ens, lr=0.1), epochs=2, batch_size=ROWS, autocast=torch.bfloat16)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        order = [
            unisono.sampling.shared().order(ROWS, [0], epoch=e, seed=0, num_members=N)[0]
            for e in range(2)
        ]
        for rows in order:
            rows = torch.from_numpy(rows.copy())
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
    oracles.assert_state_equal(ens, models, **oracles.TOLERANCES[torch.bfloat16])
    exact = Ensemble([make() for _ in range(N)])
    assert exact.members.weight.dtype == torch.float32


def test_the_bar_tells_losses_and_members(data, held, capsys):
    ens, _ = build()
    train(
        ens,
        data,
        optim.SGD(ens, lr=[0.1, 0.1, 0.0, 0.0]),
        epochs=3,
        progress=True,
        validation=held,
        patience=1,
    )
    err = capsys.readouterr().err
    assert "epoch 3/3" in err
    assert "validation" in err
    assert "2 of 4 members go on" in err
    assert " to " in err


def test_held_out_rows_are_kept(data):
    ens, _ = build()
    history = train(ens, data, optim.SGD(ens, lr=0.1), sampling="bootstrap", epochs=1)
    kind = unisono.sampling.bootstrap()
    for i in range(N):
        expected = kind.held_out(ROWS, i, seed=0, num_members=N)
        assert history.held_out[i].tolist() == expected.tolist()


def test_no_warning_of_a_scheduler_or_torch(data, held):
    ens, _ = build()
    optimizer = optim.Adam(ens, lr=RATES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(
            ens,
            data,
            optimizer,
            scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            validation=held,
            patience=1,
        )


# Refusals -----------------------------------------------------------------------------------------

REFUSED = [
    ({"epochs": 0}, ValueError, "epochs is a whole number, at least 1; got 0"),
    ({"epochs": 1.5}, ValueError, "epochs is a whole number, at least 1; got 1.5"),
    ({"accumulate": 0, "checkpoint_every": 0}, ValueError, "accumulate .*; checkpoint_every"),
    ({"patience": 3}, ValueError, r"there are no validation data; pass validation=\(x, y\)"),
    ({"metrics": {"a": F.mse_loss}}, ValueError, "metrics are taken on validation data"),
    ({"min_delta": -1}, ValueError, "min_delta is a number, at least 0; got -1"),
    ({"max_grad_norm": [1.0]}, ValueError, r"a positive number, or 4 of them; got \[1.0\]"),
    ({"autocast": torch.float16}, ValueError, "one member's overflow would cost the others"),
    ({"scheduler_every": "batch"}, ValueError, '"epoch" or "step"; got \'batch\''),
    ({"resume": True}, ValueError, "resume=True goes on from a file; pass checkpoint=path"),
    ({"loss": 3}, TypeError, r"loss is a function loss\(output, target\); got 3"),
    ({"scheduler": 3}, TypeError, "scheduler is one of torch.optim.lr_scheduler"),
    ({"metrics": {"a": 3}}, TypeError, r"metrics\['a'\] is a function"),
    ({"sampling": "boot"}, ValueError, "boot"),
]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED)
def test_arguments_that_cannot_be(data, options, kind, message):
    ens, _ = build()
    before = copy.deepcopy(ens.state_dict())
    with pytest.raises(kind, match=message):
        train(ens, data, optim.SGD(ens, lr=0.1), **options)
    for name, tensor in ens.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_optimizer_of_torch_is_refused_with_its_replacement(data):
    ens, _ = build()
    with pytest.raises(TypeError, match=r"got Adam. Write optimizer=unisono.optim.Adam\(ens"):
        train(ens, data, torch.optim.Adam(ens.parameters()))


def test_an_optimizer_of_another_ensemble(data):
    ens, _ = build()
    other, _ = build()
    with pytest.raises(TypeError, match="made for other parameters than those of this ensemble"):
        train(ens, data, optim.SGD(other, lr=0.1))


def test_a_plateau_needs_epochs_and_validation(data):
    ens, _ = build()
    optimizer = optim.SGD(ens, lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(ValueError, match=r"goes by epochs.*goes by the validation loss"):
        train(ens, data, optimizer, scheduler=plateau, scheduler_every="step")


@pytest.mark.parametrize(
    ("shape", "got"), [("tensor", "a Tensor;"), ("triple", "a tuple of 3;"), ("dict", "a dict;")]
)
def test_data_that_are_no_pairs(data, shape, got):
    x, y = data
    given = {"tensor": x, "triple": (x, x, y), "dict": {"x": x, "y": y}}[shape]
    ens, _ = build()
    with pytest.raises(TypeError, match=f"a minibatch is {got} several inputs go into one"):
        train(ens, given, optim.SGD(ens, lr=0.1))
    with pytest.raises(TypeError, match=f"a minibatch is {got}"):
        train(ens, data, optim.SGD(ens, lr=0.1), validation=given)


def test_ctrl_c_leaves_everything_usable(data):
    ens, _ = build()
    ens.eval()
    optimizer = optim.Adam(ens, lr=RATES)
    calls = []

    def interrupted(output, target):
        calls.append(output)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        train(ens, data, optimizer, loss=interrupted)
    assert not ens.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(bool(torch.isfinite(p).all()) for p in ens.parameters())
    train(ens, data, optimizer)


def test_targets_without_a_tensor_and_validation_without_rows(data):
    ens, _ = build()
    loader = DataLoader([(data[0][i], "a label") for i in range(4)], batch_size=2)
    loss = lambda output, target: output.square().mean()  # noqa: E731 - it ignores its targets
    with pytest.raises(TypeError, match="fit: the targets hold no tensor"):
        train(ens, loader, optim.SGD(ens, lr=0.1), loss=loss, batch_size=None)
    empty = DataLoader(torch.utils.data.Subset(TensorDataset(*data), []), batch_size=2)
    with pytest.raises(ValueError, match="fit: the validation data have no rows"):
        train(ens, data, optim.SGD(ens, lr=0.1), validation=empty)
