"""What keeps a data set, a loader or a collated minibatch from serving each member its own rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from unisono.engine.tree import leaves
from unisono.training.kinds import Sampling
from unisono.training.tensors import listed


def dataset_length(name: str, dataset: Any) -> int:
    """Return the number of rows of a map-style data set, at least one, or raise."""
    try:
        num_rows = len(dataset)
    except (TypeError, NotImplementedError) as error:  # what torch's own classes raise then
        raise TypeError(
            f"{name}: a map-style Dataset has a length and samples by index, but"
            f" {type(dataset).__name__} has no length"
        ) from error
    if num_rows < 1:
        raise ValueError(f"{name}: {type(dataset).__name__} has no rows")
    return num_rows


def check_loader(loader: DataLoader[Any], sampling: Sampling) -> int:
    """Return the number of rows of a loader whose order is to be replaced, or raise."""
    remedy = (
        "Let all members share its minibatches, or give a map-style Dataset:\n\n"
        '    sampling="shared"'
    )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            f"data: {sampling} chooses rows by index, but {type(loader.dataset).__name__} is an"
            f" IterableDataset, which gives them in its own order. {remedy}"
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise TypeError(
            f"data: {sampling} chooses the rows of a minibatch, but a DataLoader with"
            f" batch_size=None makes none. {remedy}"
        )
    num_rows = dataset_length("data", loader.dataset)
    chosen: list[Any] = []
    if loader.batch_size is None:
        chosen.append(loader.batch_sampler)
    if type(loader.sampler) not in (RandomSampler, SequentialSampler):
        chosen.append(loader.sampler)
    elif isinstance(loader.sampler, RandomSampler) and (
        loader.sampler.replacement or loader.sampler.num_samples != num_rows
    ):
        chosen.append(loader.sampler)
    if chosen:
        raise TypeError(
            f"data: {sampling} chooses the rows, and so does the DataLoader by its"
            f" {type(chosen[0]).__name__}. Let all members share its minibatches, or leave the"
            f' sampler out:\n\n    sampling="shared"\n    DataLoader(dataset, batch_size=...)'
        )
    return num_rows


def check_collated(batch: Any, n: int, size: int) -> None:
    """Raise one error that lists every leaf that can't be split into members."""
    others, shapes = [], []
    for path, leaf in leaves(batch, "batch"):
        if not isinstance(leaf, Tensor):
            if leaf is not None:
                others.append(f"{path} is of type {type(leaf).__name__}, not a tensor")
        elif leaf.dim() == 0 or leaf.shape[0] != n * size:
            shapes.append(f"{path} has shape {tuple(leaf.shape)}, not ({n * size}, ...)")
    if not others and not shapes:
        return
    kind = TypeError if others else ValueError
    raise kind(
        f"data: a minibatch of {size} rows for each of {n} members is collated from {n * size}"
        f" rows, and then split on axis 0, but:\n\n{listed(others + shapes)}\n\n"
        f"Let collate_fn give tensors with one row per sample, or let all members share the"
        f' minibatches, which are then passed on as they are:\n\n    sampling="shared"'
    )
