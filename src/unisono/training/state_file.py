"""One file that holds tensors and plain facts, written whole, read without running anything.

The format is safetensors (https://huggingface.co/docs/safetensors), with the facts as JSON among
its metadata. Tensors come back with the strides they had: whether a run can be repeated bit by
bit depends on the order of its weights in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unisono.errors import CheckpointError
from unisono.files import replacing

_KEY: Final = "unisono"


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Any) -> None:
    """Replace the file by one with these tensors and facts, as a whole or not at all.

    Args:
        path: The file.
        tensors: By name.
        facts: What JSON can hold.

    Raises:
        OSError: If the disk refuses; a file that was there before is as it was.
    """
    strides = {
        name: list(tensor.stride()) for name, tensor in tensors.items() if not _is_plain(tensor)
    }
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"facts": facts, "strides": strides})
    with replacing(path) as new:
        try:
            save_file(content, new, metadata={_KEY: text})
        except SafetensorError as error:
            raise OSError(f"can't write {new.parent}: {error}") from error


def read(path: str | os.PathLike[str], *, what: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors, on the CPU, and the facts of a file that `write` made.

    Args:
        path: The file.
        what: What it should be, for messages.

    Raises:
        OSError: If it can't be read.
        CheckpointError: If it is something else, or damaged.
    """
    name = os.fspath(path)
    with Path(path).open("rb"):
        pass  # tells of a missing file in Python's own words
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise ValueError("it holds no facts of unisono")
            found = json.loads(text)
            facts, strides = found["facts"], found["strides"]
            tensors = {key: _ordered(file.get_tensor(key), strides.get(key)) for key in file.keys()}
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{name} isn't {what}: {error}") from error
    return tensors, facts


def _is_plain(tensor: Tensor) -> bool:
    """Whether an empty tensor of this shape has these strides, also those of axes of length 1."""
    return tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


def _ordered(tensor: Tensor, strides: list[int] | None) -> Tensor:
    """The tensor with these strides, if they give each of its elements a place of its own."""
    if strides is None:
        return tensor
    axes = sorted(
        (step, size) for step, size in zip(strides, tensor.shape, strict=True) if size > 1
    )
    expected = 1
    for step, size in axes:
        if step != expected:
            raise ValueError(f"shape {tuple(tensor.shape)} can't have the strides {strides}")
        expected *= size
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
