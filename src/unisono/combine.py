"""One answer from N: mean, median, vote ... over the leading member axis.

Pure functions of the tensor that an ensemble returns, whatever its trailing shape. None of them
waits for a device. NaN of one member shows in `mean`, `median`, `weighted` and `probabilities`; in
`vote` that member abstains.

With ``mesh=`` each rank passes the outputs of its own members, and all get the same answer of all
members. What is sent is a sum with the shape of the answer (for `vote`, of votes per class); only
`median`, and `vote` of labels, need the outputs of all members on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from unisono import collectives, member_axis, member_reduction


def mean(outputs: Tensor, *, mesh: DeviceMesh | None = None) -> Tensor:
    """Average the members: ``sum_i outputs[i] / N``.

    Args:
        outputs: Outputs of all members, of floating or complex dtype.
        mesh: The ranks that the members are spread over; then these are the outputs of this rank's
            members, and the result is that of all.

    Returns:
        The average, of the same dtype.

    Shape:
        - outputs: (N, *)
        - returns: (*)

    Raises:
        ValueError: If there is no member axis, or no member on it.
        TypeError: If the outputs are no tensor, or integers.

    Example:
        >>> mean(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        tensor([2., 4.])
    """
    _check("mean", outputs)
    group = collectives.member_group("combine.mean", mesh)
    if group is None:
        return outputs.mean(0)
    wide = torch.promote_types(outputs.dtype, torch.float32)
    return member_reduction.mean(outputs.to(wide), None, group).to(outputs.dtype)


def median(outputs: Tensor, *, mesh: DeviceMesh | None = None) -> Tensor:
    """Take the middle member of each element; for even N, the average of the middle two.

    `numpy.median` agrees; `torch.median` takes the lower of the two. One member gone astray moves
    the median little.

    Args:
        outputs: Outputs of all members, of floating dtype.
        mesh: As for `mean`; the outputs of all members come to every rank.

    Returns:
        The median, of the same dtype; NaN where a member is NaN.

    Shape:
        - outputs: (N, *)
        - returns: (*)

    Raises:
        ValueError: If there is no member axis, or no member on it.
        TypeError: If the outputs are no tensor, integers, or complex.

    Example:
        >>> median(torch.tensor([1.0, 2.0, 4.0, 99.0]))
        tensor(3.)
    """
    _check("median", outputs)
    if outputs.is_complex():
        raise TypeError(f"combine.median: complex numbers have no order, got {outputs.dtype}")
    if (group := collectives.member_group("combine.median", mesh)) is not None:
        outputs = collectives.gather_rows(outputs, group)
    n = outputs.shape[0]
    ordered = outputs.sort(0).values
    low, high = ordered.select(0, (n - 1) // 2), ordered.select(0, n // 2)
    # Halves first: the sum of two large float16 would overflow.
    middle = low if n % 2 else low / 2 + high / 2
    last = ordered.select(0, -1)
    return torch.where(last.isnan(), last, middle)  # NaN sorts last


def weighted(
    outputs: Tensor, weights: Tensor | Sequence[float], *, mesh: DeviceMesh | None = None
) -> Tensor:
    """Average the members by weight: ``sum_i w[i] outputs[i] / sum_i w[i]``.

    Weights are shares: none is negative. NaN of a member shows even at weight zero; leave a member
    out by indexing, ``outputs[keep]``. A tensor of weights may have a gradient.

    Args:
        outputs: Outputs of all members, of floating or complex dtype.
        weights: One number per member. Numbers and tensors on the CPU are checked; a tensor on
            another device isn't, as that would wait for the device: there, weights that sum to zero
            give NaN.
        mesh: As for `mean`; the weights are those of this rank's members, too.

    Returns:
        The weighted average, of the outputs' dtype and on their device.

    Shape:
        - outputs: (N, *)
        - weights: (N,)
        - returns: (*)

    Raises:
        ValueError: If there is no member axis, or the weights aren't N finite numbers, none below
            zero and one above.
        TypeError: If the outputs are no tensor, or integers.

    Example:
        >>> weighted(torch.tensor([[1.0, 2.0], [5.0, 6.0]]), [3, 1])
        tensor([2., 3.])
    """
    _check("weighted", outputs)
    group = collectives.member_group("combine.weighted", mesh)
    share = member_axis.shares("combine.weighted", weights, outputs, group)
    return member_reduction.mean(outputs, share, group).to(outputs.dtype)


def probabilities(logits: Tensor, dim: int = -1, *, mesh: DeviceMesh | None = None) -> Tensor:
    """Average the members' class probabilities: ``sum_i softmax(logits[i]) / N``.

    Half precision is computed in float32 and rounded at the end.

    Args:
        logits: Logits of all members, of floating dtype.
        dim: The class axis of `logits`, any but the member axis 0.
        mesh: As for `mean`.

    Returns:
        The probabilities, of the same dtype; they sum to one over the classes.

    Shape:
        - logits: (N, *, C)
        - returns: (*, C)

    Raises:
        ValueError: If there is no member axis, no member on it, or no class axis `dim`.
        TypeError: If the logits are no tensor, integers, or complex.

    Example:
        >>> probabilities(torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
        tensor([0.5000, 0.5000])
    """
    _check("probabilities", logits)
    dim = member_axis.class_axis("combine.probabilities", logits, dim)
    wide = torch.promote_types(logits.dtype, torch.float32)
    group = collectives.member_group("combine.probabilities", mesh)
    own = logits.softmax(dim, dtype=wide)
    return member_reduction.mean(own, None, group).to(logits.dtype)


def vote(outputs: Tensor, dim: int = -1, *, mesh: DeviceMesh | None = None) -> Tensor:
    """Return the class that most members choose; of equally many, the lowest.

    From logits (floating dtype), each member chooses its largest, of equals the lowest class; a
    member with NaN among its logits abstains. Labels (integer dtype) are the choices themselves,
    one below zero an abstention. Where all abstain, the result is -1.

    Args:
        outputs: Logits or labels of all members.
        dim: The class axis of the logits, any but the member axis 0. Labels have none.
        mesh: As for `mean`; the labels, if it is labels, of all members come to every rank.

    Returns:
        The winning class of each element, int64.

    Shape:
        - outputs: logits (N, *, C) or labels (N, *)
        - returns: (*)

    Raises:
        ValueError: If there is no member axis, no member on it, or no class axis `dim`.
        TypeError: If the outputs are no tensor, or complex.

    Example:
        >>> vote(torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]))
        tensor(1)
        >>> vote(torch.tensor([2, 0, 2, 0]))
        tensor(0)
    """
    _check("vote", outputs, integers=True)
    if outputs.is_floating_point() or outputs.is_complex():
        dim = member_axis.class_axis("combine.vote", outputs, dim)
    if (group := collectives.member_group("combine.vote", mesh)) is not None:
        if outputs.is_floating_point():
            return _most_votes(outputs, dim, group)
        outputs = collectives.gather_rows(outputs, group)
    ordered, votes = member_axis.counted_up(member_axis.chosen(outputs, dim))
    n = outputs.shape[0]
    place = torch.arange(n, device=outputs.device).reshape(n, *[1] * (ordered.ndim - 1))
    # Most votes first, then the earlier place: no two places score the same.
    score = (votes * n + (n - 1 - place)).masked_fill(ordered < 0, -1)
    winner = ordered.gather(0, score.max(0, keepdim=True).indices).squeeze(0)
    return winner.clamp(min=-1)


def _most_votes(logits: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The class with most votes of the members on all ranks; classes are known, so count them."""
    choices = member_axis.chosen(logits, dim).unsqueeze(dim)  # (n, *, 1)
    votes = logits.new_zeros(logits.shape, dtype=torch.int32)
    votes.scatter_(dim, choices.clamp(min=0), (choices >= 0).to(votes.dtype))
    count = collectives.all_sum(votes.sum(0, dtype=votes.dtype), group)  # (*, C)
    winner = count.argmax(dim - 1)  # of equal ones the first, as torch documents
    return winner.masked_fill(count.sum(dim - 1) == 0, -1)


def _check(name: str, outputs: Tensor, *, integers: bool = False) -> None:
    """Raise unless `outputs` is a tensor of members on axis 0, and can be averaged."""
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"combine.{name}: expected one tensor of outputs, got {type(outputs).__name__}; "
            f"combine each tensor in it by itself"
        )
    member_axis.check_shape(f"combine.{name}", outputs)
    if not (integers or outputs.is_floating_point() or outputs.is_complex()):
        raise TypeError(
            f"combine.{name}: outputs of dtype {outputs.dtype} can't be averaged; "
            f"use combine.vote for labels, or outputs.float()"
        )
