"""The norms of members and of their tensors, from pieces: what shows that a member is broken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_FAR: Final = 2.0  # times the median distance


@dataclass(frozen=True, eq=False)
class Norms:
    """Of one tensor in every member, or of several together.

    Args:
        norm: Root of the sum of squares; NaN where a value isn't finite.
        distance: Norm of the difference to the mean over the members' finite values; likewise.
        not_finite: How many values are infinite or NaN.

    Shape:
        - each: (N)
    """

    norm: Array
    distance: Array
    not_finite: Array


class _Sums:
    """What is added up over the pieces of one tensor, a row for each member."""

    def __init__(self, members: int) -> None:
        self.squares, self.distances, self.not_finite = np.zeros((3, members))

    def add(self, piece: Tensor) -> None:
        x = piece.to(torch.complex128 if piece.is_complex() else torch.float64)  # (N, c)
        mean = x.mean(0)
        if not mean.sum().isfinite():
            finite = x.isfinite()
            self.not_finite += (~finite).sum(1).numpy()
            x = torch.where(finite, x, 0)
            mean = x.sum(0) / finite.sum(0).clamp(min=1)
            self.distances += _squares(torch.where(finite, x - mean, 0))
        else:  # the same, faster
            self.distances += _squares(x - mean)
        self.squares += _squares(x)

    def norms(self) -> Norms:
        is_broken = self.not_finite > 0
        norm, distance = (
            np.where(is_broken, np.nan, np.sqrt(sums)) for sums in (self.squares, self.distances)
        )
        return Norms(norm, distance, self.not_finite)


def norms_by_tensor(pieces: Iterable[tuple[str, Tensor]]) -> dict[str, Norms]:
    """Norms of each tensor of floating-point or complex numbers.

    Args:
        pieces: As of `unisono.checkpoint.scanning.scan`; all are taken, of other tensors too.

    Returns:
        Name -> norms; tensors without elements are left out.

    Example:
        >>> found = norms_by_tensor([("w", torch.tensor([[3.0, 4.0], [0.0, 0.0]]))])
        >>> found["w"].norm.tolist(), found["w"].distance.tolist()
        ([5.0, 0.0], [2.5, 2.5])
    """
    sums: dict[str, _Sums] = {}
    for name, piece in pieces:
        if piece.is_floating_point() or piece.is_complex():
            sums.setdefault(name, _Sums(len(piece))).add(piece)
    return {name: own.norms() for name, own in sums.items()}


def norms_of_members(by_tensor: Iterable[Norms], members: int) -> Norms:
    """Norms over several tensors together.

    Args:
        by_tensor: Of the tensors.
        members: How many members there are.

    Example:
        >>> three, four = (norms_by_tensor([("w", torch.full((1, 1), x))])["w"] for x in (3.0, 4.0))
        >>> norms_of_members([three, four], 1).norm.tolist()
        [5.0]
    """
    squares, distances, not_finite = np.zeros((3, members))
    for own in by_tensor:
        squares += own.norm**2
        distances += own.distance**2
        not_finite += own.not_finite
    return Norms(np.sqrt(squares), np.sqrt(distances), not_finite)


def remarks(found: Norms, checksums: Sequence[int] = ()) -> list[str]:
    """What is unusual about each member; an empty text where nothing is.

    Args:
        found: The members' norms, over all their parameters.
        checksums: Of the members' values, to find equal members; empty if they aren't known.

    Example:
        >>> w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [9.0, 9.0]])
        >>> remarks(norms_by_tensor([("w", w)])["w"])
        ['', '', '', 'all zeros', 'far: 3.8 times the median distance']
    """
    known = found.distance[np.isfinite(found.distance)]
    median = float(np.median(known)) if len(known) else 0.0
    first: dict[tuple[int, float], int] = {}
    texts = []
    for i, (norm, distance) in enumerate(zip(found.norm, found.distance, strict=True)):
        said = []
        if found.not_finite[i]:
            said.append(f"not finite: {int(found.not_finite[i]):,} of its values")
        if norm == 0:
            said.append("all zeros")
        if median > 0 and distance > _FAR * median:
            said.append(f"far: {distance / median:.1f} times the median distance")
        if len(checksums):
            same = first.setdefault((checksums[i], float(norm)), i)
            said += [f"equal to member {same}"] if same != i else []
        texts.append("; ".join(said))
    return texts


def _squares(x: Tensor) -> Array:
    """The sum of squares of each row."""
    parts = (torch.view_as_real(x).flatten(1) if x.is_complex() else x).numpy()
    found: Array = np.einsum("ij,ij->i", parts, parts)  # without a copy, unlike `square`
    return found
