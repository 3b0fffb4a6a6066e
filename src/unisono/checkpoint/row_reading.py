"""Single rows of the tensors in a safetensors file, and nothing around them.

A file that is mapped into memory comes from the disk in pieces of megabytes around each row that
is looked at, as far as the system reads ahead. To read a row by itself takes its own bytes only.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from io import FileIO

import torch
from torch import Tensor

from unisono.checkpoint.writing import as_bytes


class RowReader:
    """A safetensors file whose rows are read one by one.

    Args:
        file: The file, at its beginning; the library has it open, too, so its header is in order.

    Raises:
        OSError: If it can't be read.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        file.seek(0)
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        data = file.tell()
        self._starts = {name: data + entry["data_offsets"][0] for name, entry in header.items()}
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    @staticmethod
    def is_possible() -> bool:
        """Whether the system reads at any place of a file, from several threads at a time."""
        return hasattr(os, "preadv")

    def read(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, rows: Sequence[int]
    ) -> Tensor:
        """These rows of a tensor, on the CPU.

        Args:
            name: The tensor.
            shape: Of the whole tensor.
            dtype: Of its elements.
            rows: Which rows, in this order.

        Raises:
            EOFError: If the file ends before.

        Shape:
            - returns: (len(rows), *shape[1:])
        """
        out = torch.empty((len(rows), *shape[1:]), dtype=dtype)
        memory, size = as_bytes(out), math.prod(shape[1:]) * dtype.itemsize
        for k, row in enumerate(rows if size else ()):
            piece, at = memory[k * size : (k + 1) * size], self._starts[name] + row * size
            while piece:
                count = os.preadv(self._file.fileno(), [piece], at)
                if not count:
                    raise EOFError(f"it ends within row {row} of `{name}`")
                piece, at = piece[count:], at + count
        return out
