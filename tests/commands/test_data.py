"""The data: real images, split once and for all."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unisono.commands.data import LOADERS, split_images


@pytest.mark.parametrize(
    ("name", "side", "train", "test"), [("mnist5k", 28, 4000, 1000), ("digits", 8, 1438, 359)]
)
def test_sizes_and_values(name, side, train, test):
    split = LOADERS[name]()
    assert split.classes == 10
    assert split.image_shape == (1, side, side)
    assert (len(split.train_images), len(split.test_images)) == (train, test)
    assert (len(split.train_labels), len(split.test_labels)) == (train, test)
    for images in (split.train_images, split.test_images):
        assert images.dtype == torch.float32
        assert (images.min().item(), images.max().item()) == (0.0, 1.0)
    if name == "mnist5k":
        assert split.train_labels.bincount().tolist() == [400] * 10
        assert split.test_labels.bincount().tolist() == [100] * 10


@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=5))
def test_a_split_loses_nothing_and_mixes_nothing(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.arange(len(labels), dtype=float).reshape(-1, 1, 1)  # each image names itself
    split = split_images(images, labels)
    train, test = split.train_images.flatten().long(), split.test_images.flatten().long()
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    assert split.train_labels.tolist() == labels[train].tolist()
    assert split.test_labels.tolist() == labels[test].tolist()
    in_test = split.test_labels.bincount(minlength=len(counts)).tolist()
    assert in_test == [round(count * 0.2) for count in counts]


def test_a_split_does_not_depend_on_the_seed_of_the_process():
    images, labels = np.random.rand(40, 2, 2), np.arange(40) % 4
    first = split_images(images, labels)
    torch.manual_seed(1)
    np.random.seed(1)
    second = split_images(images, labels)
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_labels, second.test_labels)
