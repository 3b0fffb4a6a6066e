"""Whether all ranks run the same program: compared once, and told on every rank what differs."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unisono.describe import class_name, list_facts
from unisono.distributed.mesh import START
from unisono.ensemble import Ensemble
from unisono.errors import EnsembleError

_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD: Final = (0x5851F42D4C957F2D, 0x1B873593CC9E2D51)  # any, but odd and large
_AT_ONCE: Final = 1 << 18  # elements; what is made for each fits a cache
Facts = Mapping[str, str]


def agree(call: str, facts: Facts, error: Exception | None = None) -> None:
    """Raise on every rank unless none has an error and all state the same facts.

    Args:
        call: The function that the user called, for the message.
        facts: What has to be equal on all ranks, by name.
        error: What is wrong on this rank, which has no facts then.

    Raises:
        EnsembleError: If another rank has an error, or facts differ; it lists which.
        Exception: The error of this rank.
    """
    found: list[Any] = [None] * dist.get_world_size()
    # As a text: what others raise may not survive a pickle.
    dist.all_gather_object(found, (dict(facts), None if error is None else _told(error)))
    if error is not None:
        raise error
    broken = [f"rank {r}: {text}" for r, (_, text) in enumerate(found) if text is not None]
    if broken:
        raise EnsembleError(f"{call}: not all ranks could go on:\n\n{list_facts(broken)}")
    differences = _differences([facts for facts, _ in found])
    if differences:
        ranks = len({rank for rank, _ in differences})
        raise EnsembleError(
            f"{call}: all ranks run one program on one ensemble, but {ranks} of {len(found)} differ"
            f" from rank 0:\n\n{list_facts([text for _, text in differences])}\n\n"
            f"Start the same script with the same settings and seeds everywhere:\n\n    {START}"
        )


def facts_of(ens: Ensemble, num_members: int) -> dict[str, str]:
    """What has to be equal on all ranks that hold a part of one ensemble."""
    return {
        "number of members": str(num_members),
        "version of torch": torch.__version__,
        "shared": str(sorted(ens.shared)),
        "randomness": repr(ens.randomness),
        **_tensors(ens),
        **_code(ens),
    }


def values_of(ens: Ensemble) -> dict[str, str]:
    """A checksum of the values of each tensor, for ensembles that are whole on every rank."""
    named = {n: value for n, value in ens.state_dict().items() if isinstance(value, Tensor)}
    sums = [checksum(tensor) for tensor in named.values()]
    return {
        f"values of {name}": f"checksum {value}"
        for name, value in zip(named, torch.stack(sums).tolist() if sums else (), strict=True)
    }


def _differences(facts: Sequence[Facts]) -> list[tuple[int, str]]:
    """Of each rank against rank 0; values only where all else is equal."""
    found = [
        (rank, name, other.get(name, "nothing of that name"), first)
        for rank, other in enumerate(facts)
        for name, first in _both(facts[0], other)
        if other.get(name) != first
    ]
    form = [each for each in found if not each[1].startswith("values of ")]
    return [(rank, f"rank {rank}, {n}: {a}; rank 0 has {b}") for rank, n, a, b in form or found]


def _both(first: Facts, other: Facts) -> list[tuple[str, str]]:
    names = [*first, *(name for name in other if name not in first)]
    return [(name, first.get(name, "nothing of that name")) for name in names]


def _tensors(ens: Ensemble) -> dict[str, str]:
    """Shape and dtype of every tensor of a member."""
    shared: Collection[str] = ens.shared
    named = [*ens.members.named_parameters(), *ens.members.named_buffers()]
    return {
        f"`{name}`": f"shape {tuple(t.shape if name in shared else t.shape[1:])}, {t.dtype},"
        f" requires_grad={t.requires_grad}"
        for name, t in named
    }


def _code(ens: Ensemble) -> dict[str, str]:
    """A checksum of the source of every class in a member's tree, and how its modules are set."""
    classes = {type(module) for module in ens[0].modules()}
    return {
        f"code of {class_name(kind)}": f"checksum {_source(kind)}"
        for kind in sorted(classes, key=class_name)
    } | {"model": " ".join(repr(ens[0]).split())}


def _source(kind: type[nn.Module]) -> int:
    """A checksum of the source of a class: of its methods, and of its numbers and texts.

    To find the source of a class as a whole, Python parses the file that it is in, which takes a
    tenth of a second for `torch.nn`; a method knows its own line.
    """
    found = 0
    for name, value in sorted(vars(kind).items()):
        found = zlib.crc32(f"{name} {_text(name, value)}".encode(), found)
    return found


def _text(name: str, value: Any) -> str:
    """The source of a method, or the value of a constant; nothing of what Python adds."""
    value = value.fget if isinstance(value, property) else inspect.unwrap(value)
    value = getattr(value, "__func__", value)  # of a static or class method
    if inspect.isfunction(value):
        try:
            return inspect.getsource(value)
        except (OSError, TypeError):  # typed into a prompt
            return value.__code__.co_code.hex()
    is_constant = isinstance(value, (bool, int, float, str)) and not name.startswith("__")
    return repr(value) if is_constant else ""


def checksum(tensor: Tensor) -> Tensor:
    """The bits of all elements as integers, summed: equal for equal values in any order of work.

    Shape:
        - tensor: (*)
        - returns: ()
    """
    return _bits(tensor).sum(dtype=torch.int64)


def digest(tensor: Tensor) -> Tensor:
    """The same, but other values or the same ones in another order give another number.

    Shape:
        - tensor: (*)
        - returns: ()
    """
    bits = _bits(tensor).flatten()
    keys = torch.arange(min(len(bits), _AT_ONCE), device=bits.device) * _ODD[0]
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _AT_ONCE):
        part = bits[start : start + _AT_ONCE]
        mixed = (part ^ keys[: len(part)]).mul_(_ODD[1])
        # A sum of products alone wouldn't notice two signs that change.
        total = total * _ODD[0] + mixed.bitwise_xor_(mixed >> 29).sum()
    return total


def _bits(tensor: Tensor) -> Tensor:
    value = tensor.detach()
    value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return value.contiguous().view(_INTEGERS[value.element_size()])


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
