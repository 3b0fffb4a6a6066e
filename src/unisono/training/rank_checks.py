"""What ranks that train one ensemble have to have in common."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from unisono.distributed.agreement import agree, checksum, facts_of, values_of
from unisono.engine.tree import leaves
from unisono.ensemble import Ensemble
from unisono.errors import EnsembleError
from unisono.training.gradients import trained_parameters
from unisono.training.ranks import Ranks
from unisono.training.session import Session


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
    settings: Mapping[str, Any],
    *,
    train: Any,
    validation: Any,
) -> Session:
    """The training that ``prepare`` makes, on all ranks or on none.

    Args:
        ranks: The ranks.
        prepare: Checks what the user gave, and makes the training.
        settings: What has to be equal on all ranks.
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
        facts = _facts(session, settings) | _data("train", train) | _data("validation", validation)
    except Exception as found:
        error = found
    try:
        agree("fit", facts, error)
    except EnsembleError as differences:
        differences.add_note(
            "fit spreads the members over all ranks; to train an ensemble of its own on each rank,"
            " pass mesh=None"
        )
        raise
    return session


def _facts(session: Session, settings: Mapping[str, Any]) -> dict[str, str]:
    own = {} if session.ranks.have_all else {"max_grad_norm"}
    facts = facts_of(session.ens, session.num_members)
    facts |= {name: repr(value) for name, value in settings.items() if name not in own}
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
        facts |= values_of(session.ens)
    return facts


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
