"""The arguments of `Ensemble`, checked."""

from __future__ import annotations

import difflib
import operator
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, SupportsIndex, get_args

from torch import Tensor, nn

from unisono.engine.axis import Randomness
from unisono.engine.planning.plan import StrategyName
from unisono.errors import CheckpointError
from unisono.module_tree import named_tensors

_STRATEGIES = get_args(StrategyName)
_RANDOMNESS = get_args(Randomness)
_INDEX = "the index is an integer, a slice, a list of integers or a mask of booleans"


def check_options(
    strategy: Any, randomness: Any, chunk_size: Any, memory_limit: Any = None
) -> None:
    """Raise one error for all options that aren't what they should be."""
    is_size = chunk_size in (None, "auto") or (type(chunk_size) is int and chunk_size > 0)
    is_limit = memory_limit is None or (
        type(memory_limit) is int and memory_limit > 0 and chunk_size == "auto"
    )
    if strategy in _STRATEGIES and randomness in _RANDOMNESS and is_size and is_limit:
        return
    problems = []
    if strategy not in _STRATEGIES:
        problems.append(f"strategy is one of {_listed(StrategyName)}; got {strategy!r}")
    if randomness not in _RANDOMNESS:
        problems.append(f"randomness is one of {_listed(Randomness)}; got {randomness!r}")
    if not is_size:
        problems.append(f'chunk_size is a positive integer, "auto" or None; got {chunk_size!r}')
    if not is_limit:
        problems.append(
            f'memory_limit is a positive number of bytes, with chunk_size="auto"; got'
            f" memory_limit={memory_limit!r} with chunk_size={chunk_size!r}"
        )
    raise ValueError("Ensemble: " + "; ".join(problems))


def check_build(make_model: Any, n: Any, seed: Any) -> None:
    """Raise unless n models can be made by calling ``make_model`` under seeds."""
    check_make_model(make_model, "Ensemble.build")
    for name, value in (("n", n), ("seed", seed)):
        if not isinstance(value, SupportsIndex):
            raise TypeError(f"Ensemble.build: {name} is an integer, got {value!r}")
    if operator.index(n) < 1:
        raise ValueError(f"Ensemble.build: n is the number of members, at least 1; got {n}")


def check_make_model(make_model: Any, call: str) -> None:
    """Raise unless ``make_model`` is a function."""
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise TypeError(
            f"{call}: make_model is a function that returns a new model, got"
            f" {type(make_model).__name__}; pass the class, or lambda: Net(...)"
        )


def check_model(model: Any, call: str) -> nn.Module:
    """What ``make_model`` made, if it is a model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{call}: make_model() returned a {type(model).__name__}, not a module")
    return model


def check_members_to_load(members: Any) -> list[int] | None:
    """The members to load, as a list; whether they exist, the file will tell."""
    if members is None:
        return None
    if isinstance(members, (str, SupportsIndex)) or not hasattr(members, "__iter__"):
        raise TypeError(
            f"Ensemble.load: members= is a list of integers, got {members!r}; one: members=[0]"
        )
    values = list(members)
    if any(isinstance(v, bool) or not isinstance(v, SupportsIndex) for v in values):
        raise TypeError(f"Ensemble.load: members= is a list of integers, got {values!r:.100}")
    if not values:
        raise ValueError("Ensemble.load: an ensemble has at least one member; members= is empty")
    return [operator.index(v) for v in values]


def check_paths(paths: Any) -> None:
    """Raise unless these are the files of one model each."""
    if isinstance(paths, (str, bytes, os.PathLike)) or not isinstance(paths, Sequence):
        raise TypeError(
            f"Ensemble.from_checkpoints: paths is a list of files, one for each member, got"
            f" {paths!r:.100}; for a pattern: sorted(pathlib.Path('.').glob('*.pt'))"
        )
    if not paths:
        raise ValueError("Ensemble.from_checkpoints: an ensemble has at least one member; no paths")


def check_index(index: Any, n: int) -> int:
    """The index of one member, counted from 0."""
    if not isinstance(index, SupportsIndex):
        raise TypeError(f"ens[...]: {_INDEX}; got {index!r}")
    i = operator.index(index)
    if not -n <= i < n:
        raise IndexError(f"ens[{i}]: there are {n} members, 0 to {n - 1}")
    return i % n


def check_indices(indices: Any, n: int) -> list[int]:
    """The indices that a list or a one-dimensional tensor of integers or booleans means."""
    values = indices.tolist() if hasattr(indices, "tolist") else indices
    # Thousands of members, several times an epoch: the checks one by one would take longer.
    if isinstance(values, list | tuple | range) and set(map(type, values)) == {int}:
        if -n <= min(values) and max(values) < n:
            return [value % n for value in values]
    if isinstance(values, str) or any(not isinstance(v, SupportsIndex) for v in values):
        raise TypeError(f"ens[...]: {_INDEX}; got {indices!r}")
    if values and all(isinstance(v, bool) for v in values):
        if len(values) != n:
            raise IndexError(
                f"ens[mask]: a mask has one boolean per member, so {n}; got {len(values)}"
            )
        return [i for i, chosen in enumerate(values) if chosen]
    return [check_index(value, n) for value in values]


def check_copies(src: Any, dst: Any, n: int) -> tuple[list[int], list[int]]:
    """The members to copy and those to be written over, as lists of equal length."""
    of, to = (
        [check_index(index, n)] if isinstance(index, SupportsIndex) else check_indices(index, n)
        for index in (src, dst)
    )
    if len(of) != len(to):
        raise ValueError(f"ens.copy_: src and dst are as many members; got src={of} and dst={to}")
    twice = sorted({i for i in to if to.count(i) > 1})
    if twice:
        raise ValueError(f"ens.copy_: dst names each member once; got {twice} twice in dst={to}")
    return of, to


def check_member_count(own: Mapping[str, Any], given: Mapping[str, Any], n: int) -> None:
    """Raise if the tensors of a given state are those of another number of members.

    Args:
        own: The ensemble's state.
        given: The state to load.
        n: Number of members of the ensemble.

    Raises:
        CheckpointError: If a tensor fits but for its member axis.
    """
    pairs = [(tensor, given[name]) for name, tensor in own.items() if name in given]
    found = {
        theirs.shape[0]
        for ours, theirs in pairs
        if isinstance(ours, Tensor)
        and isinstance(theirs, Tensor)
        and ours.shape[:1] == (n,) != theirs.shape[:1] != ()
        and ours.shape[1:] == theirs.shape[1:]
    }
    if found:
        count = ", ".join(map(str, sorted(found)))
        raise CheckpointError(
            f"load_state_dict: the state has {count} members, this ensemble has {n}; build it with"
            f" as many, or take some of the larger one: big[:{n}]"
        )


def resolve_shared(model: nn.Module, shared: str | Sequence[str]) -> frozenset[str]:
    """The names of the tensors that ``shared`` means, each with the names it is tied to.

    Args:
        model: A member.
        shared: Dotted names or glob patterns.

    Returns:
        Dotted names of parameters and buffers.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    patterns = [shared] if isinstance(shared, str) else list(shared)
    if not patterns or not isinstance(model, nn.Module):
        return frozenset()
    tensors = named_tensors(model)
    found: set[int] = set()
    unknown = []
    for pattern in patterns:
        matches = [id(t) for name, t in tensors.items() if fnmatchcase(name, pattern)]
        found.update(matches)
        if not matches:
            close = difflib.get_close_matches(pattern, tensors, n=1, cutoff=0.5)
            unknown.append(f"{pattern!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    if unknown:
        raise ValueError(
            f"Ensemble: shared= names no parameter or buffer of {type(model).__name__}:"
            f" {', '.join(unknown)}; it has {', '.join(list(tensors)[:10])}"
            + (f" and {len(tensors) - 10} more" if len(tensors) > 10 else "")
        )
    return frozenset(name for name, t in tensors.items() if id(t) in found)


def share_values(models: Sequence[nn.Module], shared: str | Sequence[str]) -> None:
    """Copy the shared tensors of the first model into the others.

    Args:
        models: New models, which may be written to. What doesn't fit is left for
            `check_members` to tell.
        shared: Dotted names or glob patterns.
    """
    names = resolve_shared(models[0], shared)
    for model in models[1:] if names else ():
        tensors = named_tensors(model)
        for name, value in named_tensors(models[0]).items():
            if name in names and name in tensors and tensors[name].shape == value.shape:
                tensors[name].detach().copy_(value.detach())


def _listed(choices: Any) -> str:
    return ", ".join(map(repr, get_args(choices)))
