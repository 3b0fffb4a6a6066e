"""Training at once is training one by one."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unisono.commands.data import Split, split_images
from unisono.commands.learning import (
    Settings,
    count_steps,
    order_generator,
    predict,
    train_classifier,
)
from unisono.commands.models import SimpleCNN, SimpleMLP


class Silent:
    """Counts what it is told."""

    def __init__(self):
        self.steps = 0
        self.losses = []

    def step(self):
        self.steps += 1

    def epoch(self, losses):
        self.losses.append(losses)


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


def settings(members, epochs=3, seed=7, batch_size=16):
    return Settings(members, epochs, seed, 1e-2, batch_size, torch.device("cpu"))


def make_mlp():
    return SimpleMLP(64, 16, 5).double()


def make_cnn():
    return SimpleCNN((1, 8, 8), 5).double()


def train_alone(make_model, split, how, i):
    """What member `i` would learn without the others, written out."""
    torch.manual_seed(how.seed + i)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=how.lr)
    generator = order_generator(how.seed, i)
    history = []
    for _ in range(how.epochs):
        order = torch.randperm(len(split.train_images), generator=generator)
        total = 0.0
        for chosen in order.tensor_split(count_steps(len(order), how.batch_size)):
            loss = F.cross_entropy(model(split.train_images[chosen]), split.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        history.append(total / len(order))
    return model.eval()(split.test_images).detach(), history


@pytest.mark.parametrize("make_model", [make_mlp, make_cnn])
def test_every_member_learns_as_it_would_alone(split, make_model):
    how, reporter = settings(members=3), Silent()
    trained = train_classifier(make_model, split, how, reporter)
    for i in range(how.members):
        logits, history = train_alone(make_model, split, how, i)
        torch.testing.assert_close(trained.logits[i], logits)
        # The running sum of the losses is float32.
        assert [losses[i] for losses in trained.losses] == pytest.approx(history, rel=1e-5)
    assert reporter.losses == trained.losses
    assert reporter.steps == 3 * 3  # 40 images in 3 minibatches of at most 16
    assert not trained.ensemble.training


def test_members_see_the_images_in_different_orders():
    orders = [torch.randperm(1000, generator=order_generator(0, i)).tolist() for i in range(3)]
    assert orders[0] != orders[1]
    assert orders[1] != orders[2]
    # Neither may member 1 of seed 0 be member 0 of seed 1.
    assert orders[1] != torch.randperm(1000, generator=order_generator(1, 0)).tolist()


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


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"), [(40, 16, [14, 13, 13]), (65, 64, [33, 32]), (5, 5, [5])]
)
def test_minibatches_differ_by_one_image_at_most(images, batch_size, sizes):
    parts = torch.arange(images).tensor_split(count_steps(images, batch_size))
    assert [len(part) for part in parts] == sizes


def test_prediction_in_parts_is_the_prediction_of_the_whole(split, monkeypatch):
    trained = train_classifier(make_cnn, split, settings(members=2, epochs=1), Silent())
    monkeypatch.setattr("unisono.commands.learning._TEST_BATCH", 3)
    logits = predict(trained.ensemble, split.test_images, torch.device("cpu"))
    torch.testing.assert_close(logits, trained.logits)
    assert not logits.requires_grad
