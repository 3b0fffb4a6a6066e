"""The outputs of all members on every rank."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from unisono.collectives import gather_rows, member_group
from unisono.describe import list_facts
from unisono.engine.tree import leaves, tree_map


def gather(outputs: Any, mesh: DeviceMesh) -> Any:
    """Put the outputs of all members together: ``gather(part(x), mesh) == ens(x)``.

    Every rank gets all of them, N times as much as one member's. Where a mean, a vote or an
    uncertainty is asked, pass ``mesh=`` to the functions of `unisono.combine` and
    `unisono.uncertainty` instead: they send no more than the answer.

    Gradients flow: the gradient of a number that all ranks compute from the result in the same way
    reaches each rank's own members, and nothing is sent for it. A rank that computes a loss of its
    own from it has the gradient of that loss by its own members only.

    Args:
        outputs: What the ensemble of this rank returns: a tensor, or nested containers of tensors.
            Leaves that aren't tensors are passed through.
        mesh: The ranks that the members are spread over.

    Returns:
        The same with the members of all ranks, in order.

    Shape:
        - every tensor: (n, *) -> (N, *)

    Raises:
        ValueError: If the ranks' outputs differ in more than the number of members; on all ranks.
        TypeError: If ``mesh`` is none.

    Example:
        >>> gather(part(x), mesh).shape  # doctest: +SKIP
        torch.Size([8, 64, 10])
    """
    group = member_group("distributed.gather", mesh)
    if group is None:
        raise TypeError("distributed.gather: mesh is the mesh that the members are spread over")
    _check_equal(outputs, group)
    return tree_map(
        lambda leaf: gather_rows(leaf, group) if isinstance(leaf, Tensor) else leaf, outputs
    )


def _check_equal(outputs: Any, group: ProcessGroup) -> None:
    """Raise on all ranks unless they have the same tensors but for the number of members."""
    own = {
        path or "the output": f"shape (n, {', '.join(map(str, leaf.shape[1:]))}), {leaf.dtype}"
        if leaf.ndim
        else "no member axis"
        for path, leaf in leaves(outputs)
        if isinstance(leaf, Tensor)
    }
    found: list[dict[str, str]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group)
    facts = [
        f"rank {dist.get_global_rank(group, r)}, {path}: {other.get(path, 'none')}"
        f"; rank {dist.get_global_rank(group, 0)} has {found[0].get(path, 'none')}"
        for r, other in enumerate(found)
        for path in {**found[0], **other}
        if other.get(path) != found[0].get(path)
    ]
    bare = [f"{path}: no member axis" for path, text in found[0].items() if text[:2] == "no"]
    if facts or bare:
        raise ValueError(
            f"distributed.gather: axis 0 of every output is the member, and all else is equal on"
            f" all ranks, but:\n\n{list_facts(facts or bare)}\n\n"
            f"Give every rank the same inputs: part(x) with the same x"
        )
