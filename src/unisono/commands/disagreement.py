"""Which test images divide the members most (pure)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Entropies of the same shares in another order differ in the last bits; rounding makes them
# ties again, which the mutual information then decides.
_TIE_DECIMALS = 9


@dataclass(frozen=True)
class DividedImage:
    """One test image on which the members don't agree.

    Args:
        index: Its place among the test images.
        label: Its true class.
        votes: Number of members that name each class.
    """

    index: int
    label: int
    votes: tuple[int, ...]


def most_divided(logits: Tensor, labels: Tensor) -> list[DividedImage]:
    """Return the images on which members disagree, the most divided first.

    Ordered by the entropy of the votes; equal entropies by the mutual information between
    member and answer, which also sees how sure the members are; then by index.

    Args:
        logits: Of every member, for the test images.
        labels: The true classes.

    Returns:
        Every image that isn't answered alike by all members.

    Shape:
        - logits: ``(N, B, classes)``
        - labels: ``(B,)``

    Example:
        >>> logits = torch.tensor([[[5.0, 0.0], [0.0, 1.0]], [[5.0, 0.0], [1.0, 0.0]]])
        >>> most_divided(logits, torch.tensor([0, 1]))
        [DividedImage(index=1, label=1, votes=(1, 1))]
    """
    members, _, classes = logits.shape
    votes = F.one_hot(logits.argmax(-1), classes).sum(0)  # (B, classes)
    entropy = torch.special.entr(votes.double() / members).sum(-1)  # (B,)
    probabilities = logits.softmax(-1)
    total = torch.special.entr(probabilities.mean(0)).sum(-1)
    expected = torch.special.entr(probabilities).sum(-1).mean(0)
    ties = (total - expected).numpy(force=True)
    order = np.lexsort((-ties, -np.round(entropy.numpy(force=True), _TIE_DECIMALS)))
    return [
        DividedImage(int(i), int(labels[i]), tuple(votes[i].tolist()))
        for i in order
        if votes[i].max() < members
    ]
