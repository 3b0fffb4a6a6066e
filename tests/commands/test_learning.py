"""Training at once is training one by one."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unisono.commands.data import Split, hold_out, split_images
from unisono.commands.learning import Settings, predict, train_classifier
from unisono.commands.models import SimpleCNN, SimpleMLP
from unisono.training.sampling import as_sampling


class Silent:
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def epoch(self, number, losses):
        self.told.append((number, losses))


@pytest.fixture
def split():
    """50 small images in float64, where rounding can't hide a mistake."""
    single = split_images(np.random.rand(50, 8, 8), np.arange(50) % 5)
    return Split(
        single.train_images.double(),
        single.train_labels,
        single.test_images.double(),
        single.test_labels,
        single.classes,
    )


def settings(members, epochs=3, seed=7, batch_size=16, rates=None, **options):
    rates = rates or (1e-2,) * members
    return Settings(members, epochs, seed, rates, batch_size, torch.device("cpu"), **options)


def make_mlp():
    return SimpleMLP(64, 16, 5).double()


def make_cnn():
    return SimpleCNN((1, 8, 8), 5).double()


def train_alone(make_model, split, how, i):
    """What member `i` would learn without the others, written out."""
    torch.manual_seed(how.seed + i)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=how.rates[i])
    kind = as_sampling(how.sampling)
    history = []
    for epoch in range(how.epochs):
        n = len(split.train_images)
        order = kind.order(n, [i], epoch, seed=how.seed, num_members=how.members)[0]
        total = 0.0
        for rows in np.array_split(order, math.ceil(len(order) / how.batch_size)):
            chosen = torch.from_numpy(rows)
            loss = F.cross_entropy(model(split.train_images[chosen]), split.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        history.append(total / len(order))
    return model.eval()(split.test_images).detach(), history


@pytest.mark.parametrize("make_model", [make_mlp, make_cnn])
@pytest.mark.parametrize("sampling", ["shuffled", "bootstrap"])
@pytest.mark.parametrize("rates", [None, (1e-1, 1e-2, 1e-3)])
def test_every_member_learns_as_it_would_alone(split, make_model, sampling, rates):
    how, reporter = settings(members=3, sampling=sampling, rates=rates), Silent()
    trained = train_classifier(make_model, split, how, reporter)
    for i in range(how.members):
        logits, history = train_alone(make_model, split, how, i)
        torch.testing.assert_close(trained.logits[i], logits)
        np.testing.assert_allclose(trained.history.loss[:, i], history)
    assert reporter.told == [(k + 1, own) for k, own in enumerate(trained.history.loss.tolist())]
    assert not trained.ensemble.training


def test_patience_keeps_images_back_and_the_best_weights(split):
    how = settings(members=3, epochs=30, rates=(1.0, 1e-2, 1e-3), patience=2)
    trained = train_classifier(make_mlp, split, how, Silent())
    assert "patience" in trained.history.stopped
    _, (images, labels) = hold_out(split)
    with torch.no_grad():
        for i, best in enumerate(trained.history.best_epoch):
            loss = F.cross_entropy(trained.ensemble[i](images), labels).item()
            assert loss == pytest.approx(trained.history.validation_loss[best, i])


def test_training_leaves_the_random_numbers_of_the_process_alone(split):
    before = torch.get_rng_state()
    train_classifier(make_mlp, split, settings(members=2, epochs=1), Silent())
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_reproducible_whatever_ran_before(split):
    def make():
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 5)).double()

    how = settings(members=2, epochs=2)
    first = train_classifier(make, split, how, Silent())
    torch.manual_seed(99)
    second = train_classifier(make, split, how, Silent())
    assert torch.equal(first.logits, second.logits)


def test_prediction_in_parts_is_the_prediction_of_the_whole(split, monkeypatch):
    trained = train_classifier(make_cnn, split, settings(members=2, epochs=1), Silent())
    monkeypatch.setattr("unisono.commands.learning._TEST_BATCH", 3)
    logits = predict(trained.ensemble, split.test_images, torch.device("cpu"))
    torch.testing.assert_close(logits, trained.logits)
    assert not logits.requires_grad
