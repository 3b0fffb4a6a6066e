"""The rows of the stacked tensors that belong to single members: look them up, copy them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from unisono.engine.tree import leaves


def stacked_tensors(
    members: nn.Module,
    *,
    shared: Collection[str] = (),
    attributes: Collection[tuple[str, str]] = (),
) -> dict[str, Tensor]:
    """All tensors of an ensemble that carry the member axis, by dotted name, tied ones once.

    Args:
        members: The tree that owns them.
        shared: Names of the tensors without a member axis; they are left out.
        attributes: Plain attributes (path, key) that hold one value per member.

    Shape:
        - every tensor: (N, *)
    """
    named = [*members.named_parameters(), *members.named_buffers()]
    found = {name: tensor for name, tensor in named if name not in shared}
    for path, key in sorted(attributes):
        kept = vars(members.get_submodule(path))[key]
        name = f"{path}.{key}" if path else key
        found |= {f"{name}{at}": leaf for at, leaf in leaves(kept) if isinstance(leaf, Tensor)}
    return found


@torch.no_grad()
def copy_rows(
    target: Mapping[str, Tensor],
    to: Sequence[int],
    source: Mapping[str, Tensor],
    of: Sequence[int],
) -> None:
    """Copy rows between tensors of the same names: ``target[name][to] = source[name][of]``.

    All rows are read before any is written, so source and target may be the same.

    Args:
        target: Tensors to write to, in place.
        to: Their rows.
        source: Tensors to read from; they have at least the names of ``target``.
        of: Their rows, as many.
    """
    for name, tensor in target.items():
        rows = source[name]
        taken = rows.detach().index_select(0, _index(of, rows))
        tensor.detach().index_copy_(0, _index(to, tensor), taken)


def _index(members: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(members), dtype=torch.int64, device=like.device)
