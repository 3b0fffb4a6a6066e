"""The benchmark of combination scores what it says."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("mlxtend", reason="needs unisono[demo]")
pytest.importorskip("torchmetrics", reason="needs unisono[metrics]")
from benchmarks import combination


def test_scores_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.0, 1.0]])
    nll, accuracy, ece = combination.score(p, torch.tensor([0, 1, 1, 1]))
    assert nll == pytest.approx(-torch.tensor([0.9, 0.8, 0.4, 1.0]).log().mean().item())
    assert accuracy == 0.75
    assert ece == pytest.approx((0.1 + 0.2 + 0.6 + 0.0) / 4)
    assert combination.score(p, torch.tensor([0, 1, 1, 0]))[0] == pytest.approx(
        21.84 + 0.32, abs=0.02
    )


def test_every_prediction_is_scored_on_the_same_test_images():
    found = combination.scores_of(torch.tensor([1e-4, 1e-2]), seed=0, epochs=1)
    assert list(found)[2:] == list(combination.METHODS)
    accuracies = torch.tensor([accuracy for _, accuracy, _ in found.values()])
    halves = 2000 * accuracies  # of 1,000 images; two members in a mean
    torch.testing.assert_close(halves, halves.round(), atol=1e-2, rtol=0)
    assert (accuracies > 0.5).all()


def test_predictions_are_probabilities():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 4
    held_out, test = 2 * torch.randn(2, 3, 40, 4, generator=generator) + 2 * F.one_hot(y, 4)
    for method in combination.METHODS.values():
        p = method(held_out, y, test)
        assert p.shape == (40, 4)
        torch.testing.assert_close(p.sum(-1), torch.ones(40))
