"""What a training leaves: the history, its dictionary, its picture; the combined prediction."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unisono import plots
from unisono.training.combined import combination_for
from unisono.training.history import EpochRecord, Validation, make_history
from unisono.training.stopping import Stopping

NAN = math.nan


def history(validated=True, epochs=3):
    records = []
    for k in range(epochs):
        loss = np.array([1.0 / (k + 1), 2.0 / (k + 1), NAN if k else 3.0])
        validation = Validation(
            loss + 0.1, {"accuracy": loss / 10}, 0.5 / (k + 1), {"accuracy": 0.9}
        )
        lr = np.array([0.1, 0.2, 0.3])
        records.append(EpochRecord(loss, lr, 0.5, validation if validated else None))
    return make_history(
        records,
        best_epoch=np.array([2, 2, 0]),
        stopped=("", "", "not finite"),
        held_out=(np.array([1, 2]), np.array([], dtype=int), np.array([0])),
    )


def test_arrays_by_epoch_and_member():
    found = history()
    assert found.epochs == 3
    for values in (found.loss, found.lr, found.validation_loss, found.metrics["accuracy"]):
        assert values.shape == (3, 3)
    for values in (found.seconds, found.combined_loss, found.combined_metrics["accuracy"]):
        assert values.shape == (3,)


def test_without_validation():
    found = history(validated=False)
    assert found.validation_loss is None
    assert found.combined_loss is None
    assert found.metrics == found.combined_metrics == {}
    assert found.to_dict()["validation_loss"] is None


def test_without_an_epoch():
    found = history(epochs=0)
    assert found.loss.shape == (0, 3)
    json.dumps(found.to_dict(), allow_nan=False)
    assert repr(found) == "History(0 epochs, 3 members, 1 stopped: not finite)"


def test_a_dictionary_for_json():
    plain = history().to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["loss"] == [[1.0, 2.0, 3.0], [0.5, 1.0, None], [1 / 3, 2 / 3, None]]
    assert plain["held_out"] == [[1, 2], [], [0]]
    assert plain["stopped"] == ["", "", "not finite"]


def test_what_it_prints():
    assert repr(history()) == (
        "History(3 epochs, 3 members, loss 1.333 [0.3333 .. 3],"
        " validation_loss 1.433 [0.4333 .. 3.1], 1 stopped: not finite)"
    )


def test_the_picture_has_a_line_for_each_member_and_their_mean():
    axes = history().plot()
    assert len(axes.lines) == 2 * (3 + 1) + 1
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "training, mean of the members that train",
        "validation, mean of the members that train",
        "validation, combined prediction",
    ]
    assert plots.to_png(history().plot()) == plots.to_png(history().plot())


def test_many_members_are_a_band():
    axes = plots.learning_curves(np.ones((5, 200)))
    assert len(axes.lines) == 1
    assert len(axes.collections) == 1


def test_losses_that_are_not_finite_do_not_stop_a_picture():
    loss = np.array([[np.inf, 1.0], [NAN, 0.5], [NAN, NAN]])
    plots.to_png(plots.learning_curves(loss, validation_loss=loss * NAN))


def test_a_sweep_marks_the_best_and_leaves_out_what_is_not_finite():
    rates = np.array([1e-1, 1e-3, 1e-2])
    axes = plots.sweep(rates, np.array([NAN, 0.5, 0.9]), what="rate", score="accuracy")
    assert axes.get_legend().get_texts()[0].get_text() == "best: 0.9 at 0.01"
    assert axes.get_xscale() == "log"
    plots.to_png(plots.sweep(rates, rates * NAN, what="rate", score="accuracy"))


# The combined prediction --------------------------------------------------------------------------

LOGITS = torch.randn(5, 7, 3, dtype=torch.float64)
CLASSES = torch.randint(3, (7,))
EVENTS = torch.rand(7, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (F.cross_entropy, F.nll_loss(LOGITS.softmax(2).mean(0).log(), CLASSES)),
        (nn.CrossEntropyLoss(), F.nll_loss(LOGITS.softmax(2).mean(0).log(), CLASSES)),
        (F.nll_loss, F.nll_loss(LOGITS.exp().mean(0).log(), CLASSES)),
        (nn.NLLLoss(), F.nll_loss(LOGITS.exp().mean(0).log(), CLASSES)),
        (
            F.binary_cross_entropy_with_logits,
            F.binary_cross_entropy(LOGITS.sigmoid().mean(0), EVENTS),
        ),
        (nn.BCEWithLogitsLoss(), F.binary_cross_entropy(LOGITS.sigmoid().mean(0), EVENTS)),
        (F.mse_loss, F.mse_loss(LOGITS.mean(0), EVENTS)),
        (lambda y, t: F.l1_loss(y, t), F.l1_loss(LOGITS.mean(0), EVENTS)),
    ],
)
def test_the_loss_of_the_combined_prediction_is_that_of_the_mixture(loss, expected):
    if loss in (F.cross_entropy, F.nll_loss) or isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        target = CLASSES
    else:
        target = EVENTS
    torch.testing.assert_close(loss(combination_for(loss)(LOGITS), target), expected)


def test_scores_of_images_have_their_classes_on_the_second_axis():
    logits = torch.randn(4, 2, 3, 5, 5, dtype=torch.float64)  # (N, B, C, H, W)
    combined = combination_for(F.cross_entropy)(logits)
    torch.testing.assert_close(combined.exp(), logits.softmax(2).mean(0))


def test_certain_members_stay_finite():
    logits = torch.tensor([[[1e4, -1e4]], [[1e4, -1e4]]])
    assert combination_for(F.cross_entropy)(logits).isfinite().all()
    assert combination_for(F.binary_cross_entropy_with_logits)(logits).isfinite().all()


def test_trees_are_combined_leaf_by_leaf():
    outputs = {"mean": torch.tensor([[1.0], [3.0]]), "name": "x"}
    assert combination_for(F.mse_loss)(outputs) == {"mean": torch.tensor([2.0]), "name": "x"}


# Early stopping -----------------------------------------------------------------------------------


def test_a_member_stops_after_patience_epochs_without_improvement():
    stopping = Stopping(3, patience=2, min_delta=0.1)
    assert stopping.update(0, np.array([1.0, 1.0, NAN])) == ([0, 1], [])
    assert stopping.update(1, np.array([0.95, 0.5, NAN])) == ([1], [2])  # NaN is no improvement
    assert stopping.update(2, np.array([0.92, 0.6, 0.0])) == ([], [0])
    assert stopping.update(3, np.array([0.1, 0.3, 0.0])) == ([1], [])
    assert stopping.running == [1]
    assert stopping.best_epoch.tolist() == [0, 3, -1]
    assert stopping.reasons == ["patience", "", "patience"]
