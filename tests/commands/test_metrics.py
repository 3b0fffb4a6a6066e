"""Scores, against the slow and obvious way to count."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unisono.commands.metrics import accuracy, negative_log_likelihood


@st.composite
def answers(draw):
    members, images, classes = (draw(st.integers(1, 5)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shape = (members, images, classes)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (images,), generator=generator)


@given(answers())
def test_accuracy_counts(case):
    logits, labels = case
    right = [
        sum(int(m[b].argmax() == labels[b]) for b in range(len(labels))) / len(labels)
        for m in logits
    ]
    mean = sum(m.softmax(-1) for m in logits) / len(logits)
    scores = accuracy(logits, labels)
    assert scores.members == pytest.approx(right)
    assert scores.mean_member == pytest.approx(sum(right) / len(right))
    expected = (mean.argmax(-1) == labels).double().mean().item()
    assert scores.mean_probability == pytest.approx(expected)


@given(answers())
def test_negative_log_likelihood_sums_logarithms(case):
    logits, labels = case
    members, images, classes = logits.shape

    def mean_surprise(probability_of):
        return sum(-math.log(probability_of(b, int(labels[b]))) for b in range(images)) / images

    def share(b, label):
        votes = sum(int(m[b].argmax()) == label for m in logits)
        return (votes + 1 / classes) / (members + 1)

    p = logits.softmax(-1)
    scores = negative_log_likelihood(logits, labels)
    own = [mean_surprise(lambda b, c, m=m: p[m, b, c].item()) for m in range(members)]
    assert scores.members == pytest.approx(own, abs=1e-12)
    assert scores.mean_member == pytest.approx(sum(own) / members, abs=1e-12)
    assert scores.mean_probability == pytest.approx(
        mean_surprise(lambda b, c: p[:, b, c].mean().item()), abs=1e-12
    )
    assert scores.vote == pytest.approx(mean_surprise(share), abs=1e-12)


def test_vote_and_mean_probability_may_differ():
    # Two members lean to class 0, one is sure of class 1.
    logits = torch.tensor([[[0.1, 0.0]], [[0.1, 0.0]], [[0.0, 9.0]]])
    scores = accuracy(logits, torch.tensor([0]))
    assert (scores.vote, scores.mean_probability) == (1.0, 0.0)


def test_what_is_not_finite_is_null_in_json():
    logits = torch.full((2, 3, 4), math.nan, dtype=torch.float64)
    scores = negative_log_likelihood(logits, torch.tensor([0, 1, 2])).to_json()
    assert json.loads(json.dumps(scores, allow_nan=False))["members"] == [None, None]
