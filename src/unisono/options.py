"""The arguments of `Ensemble`, checked."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, get_args

from torch import Tensor, nn

from unisono.engine.axis import Randomness
from unisono.engine.plan import StrategyName

_STRATEGIES = frozenset(get_args(StrategyName))
_RANDOMNESS = frozenset(get_args(Randomness))


def check_options(strategy: Any, randomness: Any, chunk_size: Any) -> None:
    """Raise one error for all options that aren't what they should be."""
    is_size = chunk_size is None or (type(chunk_size) is int and chunk_size > 0)
    if strategy in _STRATEGIES and randomness in _RANDOMNESS and is_size:
        return
    problems = []
    if strategy not in _STRATEGIES:
        problems.append(f"strategy is one of {_listed(StrategyName)}; got {strategy!r}")
    if randomness not in _RANDOMNESS:
        problems.append(f"randomness is one of {_listed(Randomness)}; got {randomness!r}")
    if not is_size:
        problems.append(f"chunk_size is a positive integer or None; got {chunk_size!r}")
    raise ValueError("Ensemble: " + "; ".join(problems))


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
    tensors = _tensors(model)
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
        tensors = _tensors(model)
        for name, value in _tensors(models[0]).items():
            if name in names and name in tensors and tensors[name].shape == value.shape:
                tensors[name].detach().copy_(value.detach())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _listed(choices: Any) -> str:
    return ", ".join(map(repr, get_args(choices)))
