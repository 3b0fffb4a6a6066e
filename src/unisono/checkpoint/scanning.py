"""All tensors of a file, piece by piece: looked at and checked, however large the file is."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor

from unisono.checkpoint.reading import TensorFile
from unisono.checkpoint.writing import Crcs, as_bytes

_ELEMENTS: Final = 2**17  # of a piece: what is computed of it fits a cache


def scan(file: TensorFile) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an open file in pieces, which lie in the memory of the file.

    What is damaged is told after the last piece, all of it at once.

    Args:
        file: The open file.

    Yields:
        Name and piece, the pieces of one tensor one after another.

    Shape:
        - piece: (N, *) of a tensor with a member axis, (1, *) of others; each with some of the
          elements of a row, on one axis

    Raises:
        CheckpointError: If values aren't those that were saved.
    """
    checks: dict[str, Crcs] = {}
    for key in file.in_order():
        is_stacked = key in file.stacked
        tensor = file.map(key)
        checks[key] = np.zeros(len(tensor) if is_stacked else 1, np.uint32)
        for piece in pieces(tensor, stacked=is_stacked):
            if file.has_checks:
                checks[key] = _gone_on(checks[key], piece)
            yield key, piece
    file.check(checks)


def pieces(tensor: Tensor, *, stacked: bool) -> Iterator[Tensor]:
    """Yield a tensor as rows, some elements of each row at a time.

    Args:
        tensor: In the order of its shape.
        stacked: Whether axis 0 is the member; otherwise there is one row.

    Shape:
        - tensor: (N, *) if stacked, else (*)
        - piece: (N, c), or (1, c)

    Example:
        >>> [tuple(piece.shape) for piece in pieces(torch.zeros(4, 2**15 + 1), stacked=True)]
        [(4, 32768), (4, 1)]
    """
    if tensor.numel() == 0:
        return
    rows = tensor.reshape(len(tensor) if stacked else 1, -1)
    yield from torch.split(rows, max(1, _ELEMENTS // len(rows)), dim=1)


def _gone_on(before: Crcs, piece: Tensor) -> Crcs:
    """The checksums of the rows after one more piece of each."""
    pairs = zip(piece, before.tolist(), strict=True)
    return np.array([zlib.crc32(as_bytes(row), crc) for row, crc in pairs], np.uint32)
