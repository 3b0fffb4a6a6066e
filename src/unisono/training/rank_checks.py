"""What ranks that train one ensemble have to have in common."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from unisono.describe import list_facts
from unisono.distributed.agreement import agree, checksum, digest, facts_of
from unisono.engine.tree import leaves
from unisono.ensemble import Ensemble
from unisono.errors import EnsembleError
from unisono.training.gradients import trained_parameters
from unisono.training.ranks import Ranks
from unisono.training.running import shared_tensors, states_of
from unisono.training.session import Session

_SAME: Final = 1e-2
_ALONE: Final = (
    "fit spreads the members over all ranks; to train an ensemble of its own on each rank, pass"
    " mesh=None"
)


def check_ranks(ranks: Ranks, ens: Ensemble, train: Any, *, patience: int | None) -> None:
    """Raise unless this training can be shared by ranks; see `fit` for what the arguments are."""
    if ranks.is_alone:
        return
    problems = []
    samplers = [getattr(train, "sampler", None), getattr(train, "batch_sampler", None)]
    if isinstance(train, DataLoader) and any(isinstance(s, DistributedSampler) for s in samplers):
        problems.append(
            "the DataLoader has a DistributedSampler, which gives each rank other rows, but members"
            " on all ranks see the same data; leave the sampler out"
        )
    shared = {id(p) for p in trained_parameters(ens)[1]}
    if shared and patience is not None and ranks.block.num_blocks > 1:
        names = [f"`{n}`" for n, p in ens.members.named_parameters() if id(p) in shared]
        problems.append(
            f"all members train {', '.join(names)} together, on all ranks, so none of them can"
            f" stop early; leave patience= out"
        )
    if problems:
        raise ValueError("fit: " + "; ".join(problems))


def prepared(
    ranks: Ranks,
    prepare: Callable[[Ranks], Session],
    *,
    train: Any,
    validation: Any,
) -> Session:
    """The training that ``prepare`` makes, on all ranks or on none.

    Args:
        ranks: The ranks.
        prepare: Checks what the user gave, and makes the training.
        train: The data, which have to be equal, too.
        validation: Likewise.

    Raises:
        EnsembleError: If ranks differ; it lists in what.
        Exception: What ``prepare`` raises.
    """
    if ranks.is_alone:
        return prepare(ranks)
    facts: dict[str, str] = {}
    error: Exception | None = None
    try:
        session = prepare(ranks)
        facts = _facts(session) | _data("train", train) | _data("validation", validation)
    except Exception as found:
        error = found
    try:
        agree("fit", facts, error)
    except EnsembleError as differences:
        differences.add_note(_ALONE)
        raise
    if ranks.have_all and (differing := _differing(session)):
        _check_values(session)
        _take_from_first(differing)
    return session


def _facts(session: Session) -> dict[str, str]:
    facts = facts_of(session.ens, session.num_members)
    facts |= {name: repr(value) for name, value in session.settings.items()}
    facts["epochs"] = str(session.schedule.epochs)
    facts["number of callbacks"] = str(len(session.schedule.callbacks))
    facts |= {
        f"values of the generator {k} of the data": f"checksum {checksum(generator.get_state())}"
        for k, generator in enumerate(session.batches.generators)
    }
    if session.ranks.have_all:
        values = [
            {k: v for k, v in group.items() if k not in ("params", "param_names")}
            for group in session.optimizer.param_groups
        ]
        facts["values of the param groups"] = f"checksum {zlib.crc32(repr(values).encode())}"
        kept = [(key, tuple(t.shape)) for (_, key), t in states_of(session.optimizer)]
        facts["state of the optimizer"] = f"{len(kept)} tensors, {zlib.crc32(repr(kept).encode())}"
    return facts


def _differing(session: Session) -> list[Tensor]:
    """The tensors that aren't on all ranks bit by bit those of the first; the same everywhere."""
    states = [state for _, state in states_of(session.optimizer)]
    tensors = [*_all_tensors(session.ens).values(), *states]
    # One by one, since an optimizer keeps the numbers of steps on the host.
    found = session.ranks.gather([int(digest(tensor)) for tensor in tensors])
    columns = zip(tensors, *found, strict=True)
    return [tensor for tensor, *digests in columns if len(set(digests)) > 1]


def _check_values(session: Session) -> None:
    """Raise, on all ranks alike, unless they have the same members, but for rounding.

    An ensemble that was trained before on each rank differs by that where ``strategy="auto"`` has
    chosen differently. Others than the first then go on with the values of the first.
    """
    own = {}
    for name, tensor in _all_tensors(session.ens).items():
        x = tensor.detach().flatten()
        x = (torch.view_as_real(x).flatten() if x.is_complex() else x).double()
        # Its length, and that of its shadow in some direction, in which other values differ by
        # about as much as they are long.
        direction = torch.cos(torch.arange(len(x), dtype=x.dtype, device=x.device))
        own[name] = float(x.norm()), float(x @ direction)
    first, *others = session.ranks.gather(own)
    differences = [
        f"rank {rank}: `{name}` has other values than on rank 0"
        for rank, found in enumerate(others, 1)
        for name, (length, shadow) in found.items()
        if abs(length - first[name][0]) + abs(shadow - first[name][1]) > _SAME * first[name][0]
    ]
    if differences:
        error = EnsembleError(
            f"fit: all ranks have the same ensemble, but:\n\n{list_facts(differences)}\n\n"
            f"Seed it: Ensemble.build(make_model, n, seed=0)"
        )
        error.add_note(_ALONE)
        raise error


@torch.no_grad()
def _take_from_first(tensors: Sequence[Tensor]) -> None:
    """Give all ranks the values of the first, bit by bit."""
    for tensor in tensors:
        value = tensor.detach().contiguous()
        dist.broadcast(value.reshape(-1).view(torch.uint8), src=0)
        tensor.copy_(value)


def _all_tensors(ens: Ensemble) -> dict[str, Tensor]:
    return {**ens.stacked_tensors(), **shared_tensors(ens)}


def _data(name: str, data: Any) -> dict[str, str]:
    """The values of tensors; of what loads rows no more than how many there are."""
    if isinstance(data, DataLoader):
        data = data.dataset
    if hasattr(data, "tensors"):
        data = data.tensors
    if not isinstance(data, Tensor | np.ndarray | tuple | list | dict):
        return {f"rows of {name}": str(len(data)) if hasattr(data, "__len__") else "unknown"}
    arrays = {
        path: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
        for path, leaf in leaves(data, name)
    }
    found = {}
    for path, leaf in arrays.items():
        if isinstance(leaf, Tensor):
            found[f"shape of {path}"] = f"{tuple(leaf.shape)}, {leaf.dtype}"
            found[f"values of {path}"] = f"checksum {int(checksum(leaf))}"
    return found
