"""States of optimizers and schedulers as JSON, and back without loss.

JSON knows no tuples, no keys but strings and no counters; ``MultiStepLR`` counts its milestones
by integers, and would pass them over if they came back as text.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from torch import Tensor

_KIND = "kind"


def to_plain(value: Any, where: str) -> Any:
    """What JSON can hold of a value; `from_plain` undoes it.

    Args:
        value: Numbers, text, None, and containers of them.
        where: What it is, for the message.

    Raises:
        TypeError: If there is anything else in it.

    Example:
        >>> from_plain(to_plain({"betas": (0.9, 0.999), "milestones": {30: 1}}, "state"))
        {'betas': (0.9, 0.999), 'milestones': {30: 1}}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.dim() == 0):
        return value.item()
    if isinstance(value, list):
        return [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        items = [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return {_KIND: "tuple", "items": items}
    if isinstance(value, dict):
        items = [[to_plain(k, where), to_plain(v, f"{where}[{k!r}]")] for k, v in value.items()]
        return {_KIND: "counter" if isinstance(value, Counter) else "dict", "items": items}
    raise TypeError(
        f"fit: {where} is a {type(value).__name__}, which a checkpoint can't hold: it holds"
        f" numbers, text, and containers of them"
    )


def from_plain(value: Any) -> Any:
    """Undo `to_plain`."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind, items = value[_KIND], [from_plain(item) for item in value["items"]]
    if kind == "tuple":
        return tuple(items)
    pairs = dict(items)
    return Counter(pairs) if kind == "counter" else pairs
