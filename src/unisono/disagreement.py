"""How often members choose different classes, whatever probability they give them.

Pure functions, re-exported by `unisono.uncertainty`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unisono.member_axis import check_members, chosen, class_axis, counted_up


def variation_ratio(outputs: Tensor, *, dim: int = -1) -> Tensor:
    """Share of the members that don't choose the class which most members choose.

    ``1 - max_c (members that choose c) / (members that choose)``. Members choose as in
    `combine.vote`: one with NaN, or with a label below zero, abstains.

    Args:
        outputs: Logits or probabilities of all members, or their labels (integer dtype).
        dim: The class axis, any but the member axis 0. Labels have none.

    Returns:
        The shares, from 0 to 1 - 1/N, of the outputs' dtype, float32 for labels; NaN where all
        abstain.

    Shape:
        - outputs: (N, *, C), or labels (N, *)
        - returns: (*)

    Raises:
        ValueError: If there is no member axis, no member on it, or no class axis `dim`.
        TypeError: If the outputs are no tensor, or complex.

    Example:
        >>> variation_ratio(torch.tensor([2, 0, 2, 2]))
        tensor(0.2500)

    Reference: Freeman, "Elementary Applied Statistics", 1965.
    """
    choices = _choices("uncertainty.variation_ratio", outputs, dim)
    ordered, count = counted_up(choices)
    votes = count.masked_fill(ordered < 0, 0).amax(0)
    voting = (choices >= 0).sum(0)
    return (1 - votes.to(torch.float32) / voting).to(_share_dtype(outputs))


def pairwise_disagreement(outputs: Tensor, *, dim: int = -1) -> Tensor:
    """Share of the pairs of members that choose different classes.

    ``(pairs (i, j), i < j, with choice_i != choice_j) / (pairs)``, among the members that choose.
    Members choose as in `combine.vote`: one with NaN, or with a label below zero, abstains.

    Args:
        outputs: Logits or probabilities of all members, or their labels (integer dtype).
        dim: The class axis, any but the member axis 0. Labels have none.

    Returns:
        The shares, from 0 to 1, of the outputs' dtype, float32 for labels; 0 where fewer than two
        members choose, which leaves no pair.

    Shape:
        - outputs: (N, *, C), or labels (N, *)
        - returns: (*)

    Raises:
        ValueError: If there is no member axis, no member on it, or no class axis `dim`.
        TypeError: If the outputs are no tensor, or complex.

    Example:
        >>> pairwise_disagreement(torch.tensor([[5, 1], [5, 2], [5, 3]]))
        tensor([0., 1.])
    """
    choices = _choices("uncertainty.pairwise_disagreement", outputs, dim)
    ordered, count = counted_up(choices)
    # The k-th of its class is in agreement with the k - 1 before it.
    agreeing = (count - 1).masked_fill(ordered < 0, 0).sum(0)
    voting = (choices >= 0).sum(0)
    pairs = voting * (voting - 1) // 2
    share = (pairs - agreeing).to(torch.float32) / pairs.clamp(min=1)
    return share.to(_share_dtype(outputs))


def disagreement_matrix(outputs: Tensor, *, dim: int = -1) -> Tensor:
    """Share of the rows on which members i and j choose different classes, for every pair.

    ``D[i, j] = mean over rows of (choice_i != choice_j)``, over those on which neither abstains.
    `pairwise_disagreement` averaged over the rows is the mean of D off the diagonal.

    Args:
        outputs: Logits or probabilities of all members, or their labels (integer dtype).
        dim: The class axis, any but the member axis 0. Labels have none.

    Returns:
        A symmetric matrix with zeros on the diagonal, of the outputs' dtype, float32 for labels;
        NaN for pairs that share no row.

    Shape:
        - outputs: (N, *, C), or labels (N, *); all axes of * are rows
        - returns: (N, N)

    Raises:
        ValueError: If there is no member axis, no member on it, or no class axis `dim`.
        TypeError: If the outputs are no tensor, or complex.

    Example:
        >>> disagreement_matrix(torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]]))
        tensor([[0.0000, 0.2500],
                [0.2500, 0.0000]])
    """
    choices = _choices("uncertainty.disagreement_matrix", outputs, dim)
    choices = choices.reshape(len(choices), choices.shape[1:].numel())  # (N, rows)
    # float32 stops counting at 2 ** 24.
    wide = torch.float32 if choices.device.type == "mps" else torch.float64
    votes = (choices >= 0).to(wide)
    labels = choices.clamp(min=-1).to(wide)
    both = votes @ votes.mT
    only_one = votes.sum(1, keepdim=True) + votes.sum(1) - 2 * both
    differing = torch.cdist(labels, labels, p=0) - only_one  # p=0 counts unequal entries
    return (differing / both).to(_share_dtype(outputs))


def _choices(call: str, outputs: Tensor, dim: int) -> Tensor:
    check_members(call, outputs)
    if outputs.is_floating_point() or outputs.is_complex():
        dim = class_axis(call, outputs, dim)
    return chosen(outputs, dim)


def _share_dtype(outputs: Tensor) -> torch.dtype:
    return outputs.dtype if outputs.is_floating_point() else torch.float32
