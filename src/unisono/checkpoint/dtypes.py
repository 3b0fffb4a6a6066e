"""How the elements of a tensor stand in a safetensors file.

Most dtypes have a code of their own there. The others are stored as their bytes, an axis of uint8
at the end, and the file says which dtype they were.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# https://huggingface.co/docs/safetensors: the codes that `safetensors` 0.8 reads as tensors.
CODES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: Final = {code: dtype for dtype, code in CODES.items()}
_AS_BYTES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.complex128, torch.complex32, torch.float8_e8m0fnu)
}


def name_if_bytes(dtype: torch.dtype) -> str | None:
    """The name that a file keeps of a dtype without a code; None for one with a code.

    Raises:
        TypeError: If tensors of this dtype can't be stored at all.
    """
    if dtype in CODES:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _AS_BYTES:
        raise TypeError(f"tensors of dtype {dtype} can't be stored")
    return name


def dtype_of_bytes(name: str) -> torch.dtype:
    """The dtype that `name_if_bytes` named.

    Raises:
        ValueError: If there is none.
    """
    if name not in _AS_BYTES:
        raise ValueError(f"{name!r} is no dtype that is stored as bytes")
    return _AS_BYTES[name]


def to_stored(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, in order, as it stands in the file."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if plain.dtype in CODES:
        return plain
    return plain.reshape(*plain.shape, 1).view(torch.uint8)


def from_stored(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `to_stored`, on the same memory.

    Raises:
        ValueError: If these aren't the bytes of such elements.
    """
    if stored.dtype == dtype:
        return aligned(stored)
    if stored.dtype != torch.uint8 or stored.shape[-1:] != (dtype.itemsize,):
        raise ValueError(
            f"{dtype} is stored as bytes, {dtype.itemsize} along the last axis; found"
            f" {stored.dtype} of shape {tuple(stored.shape)}"
        )
    return aligned(stored, dtype).view(dtype).squeeze(-1)


def aligned(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor where its elements may lie: kernels crash on complex numbers between addresses.

    Files of `unisono` are in order; another may begin a tensor at any byte.

    Args:
        tensor: On the CPU; its memory is used where that is possible.
        dtype: Of its elements, if it is to be seen as another one.
    """
    size = (dtype or tensor.dtype).itemsize
    if tensor.layout is not torch.strided or tensor.data_ptr() % size == 0:
        return tensor
    storage = tensor.untyped_storage()
    start = tensor.storage_offset() * tensor.element_size()
    copied = torch.empty(storage.nbytes() - start, dtype=torch.uint8)
    copied.untyped_storage().copy_(storage[start:])
    return copied.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), 0)
