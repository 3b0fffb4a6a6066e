"""Hyperparameters: one number for all members, or one per member."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Kind = Literal["number", "flag", "pair"]
Array = NDArray[np.float64]
Steps = NDArray[np.float32] | Array  # numbers of steps, as they are kept or to compute with

# What users may give: one value, or N of them.
Numbers = float | Sequence[float] | Tensor | NDArray[Any]
Flags = bool | Sequence[bool] | Tensor | NDArray[Any]
Pairs = tuple[float, float] | Sequence[tuple[float, float]] | Tensor | NDArray[Any]

_WHAT: Final[dict[Kind, str]] = {
    "number": "a number, or {n} numbers, one per member",
    "flag": "True or False, or {n} of these, one per member",
    "pair": "a pair of numbers, or {n} pairs, one per member",
}


@dataclass(frozen=True)
class Hyperparameter:
    """What values a hyperparameter may have.

    Args:
        name: Its key in the param groups.
        kind: Whether a value is a number, a flag, or a pair of numbers.
        fits: Whether a value of this kind is allowed.
        bounds: The allowed values in words.
    """

    name: str
    kind: Kind = "number"
    fits: Callable[[Any], bool] = lambda value: True
    bounds: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of its numbers: ``betas`` are ``beta1`` and ``beta2``."""
        stem = self.name.removesuffix("s")
        return (f"{stem}1", f"{stem}2") if self.kind == "pair" else (self.name,)


class PerMember(tuple[Any, ...]):
    """The values of the members, in order."""


def at_least_zero(name: str) -> Hyperparameter:
    """A hyperparameter that is a number of at least 0."""
    return Hyperparameter(name, "number", lambda value: value >= 0, "at least 0")


def flag(name: str) -> Hyperparameter:
    """A hyperparameter that is True or False."""
    return Hyperparameter(name, "flag")


def parse(spec: Hyperparameter, value: Any, n: int) -> Any:
    """The value as a plain number, flag or pair; or as `PerMember`, if there are N of them.

    Args:
        spec: The hyperparameter.
        value: What the user gave: a value, or a list, tuple, array or tensor of N values.
        n: The number of members.

    Raises:
        ValueError: If it isn't one value or N of them, or out of bounds; without the name of the
            optimizer, which the caller knows.
    """
    plain = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
    one = _convert(spec.kind, plain)
    if one is not None:
        problems = [] if spec.fits(one) else [f"{spec.name} is {spec.bounds}; got {one}"]
        parsed = one
    else:
        items = list(plain) if isinstance(plain, Sequence) and not isinstance(plain, str) else []
        values = [_convert(spec.kind, item) for item in items]
        if len(values) != n or None in values:
            count = f" (these are {len(items)})" if items and None not in values else ""
            what = _WHAT[spec.kind].format(n=n)
            raise ValueError(f"{spec.name} is {what}; got {value!r}{count}")
        problems = [
            f"{spec.name} is {spec.bounds}, but {spec.name}[{i}] is {each}"
            for i, each in enumerate(values)
            if not spec.fits(each)
        ]
        parsed = PerMember(values)
    if problems:
        raise ValueError("; ".join(problems))
    return parsed


def parse_all(
    specs: Sequence[Hyperparameter], values: Mapping[str, Any], n: int
) -> tuple[dict[str, Any], list[str]]:
    """Parse a value for each hyperparameter; those with problems are left out.

    Returns:
        The values by name, and all problems in words.
    """
    parsed, problems = {}, []
    for spec in specs:
        try:
            parsed[spec.name] = parse(spec, values[spec.name], n)
        except ValueError as error:
            problems.append(str(error))
    return parsed, problems


def row_of(values: Mapping[str, Any], member: int) -> dict[str, Any]:
    """The values of one member."""
    return {k: v[member] if isinstance(v, PerMember) else v for k, v in values.items()}


def _convert(kind: Kind, value: Any) -> Any:
    """The value as a plain float, bool or pair of floats, or None if it isn't of this kind."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    is_bool = isinstance(value, bool)
    if kind == "flag":
        return value if is_bool else None
    if kind == "number":
        return float(value) if isinstance(value, int | float) and not is_bool else None
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return None
    pair = tuple(_convert("number", item) for item in value)
    return None if None in pair else pair


@dataclass(frozen=True)
class Values:
    """The hyperparameters of one set of parameters, as they stand in the param groups now.

    Args:
        rows: One tuple for all members, or one per member.
        columns: The same by name: float64 arrays of shape (1) or (N).
        equal: Whether all members have the same.
    """

    rows: list[tuple[Any, ...]]
    columns: dict[str, Array]
    equal: bool

    def of(self, members: Sequence[int]) -> Values:
        """The values of some members."""
        if len(self.rows) == 1:
            return self
        rows = [self.rows[i] for i in members]
        columns = {name: column[members] for name, column in self.columns.items()}
        return Values(rows, columns, rows.count(rows[0]) == len(rows))

    def number(self, name: str, member: int = 0) -> float:
        """A hyperparameter of one member; flags are 0 or 1."""
        column = self.columns[name]
        return float(column[member if len(column) > 1 else 0])


class Reader:
    """Reads the hyperparameters of param groups, quickly while they don't change.

    Args:
        specs: The hyperparameters.
    """

    def __init__(self, specs: Sequence[Hyperparameter]) -> None:
        self._specs = specs
        self._row = operator.itemgetter(*[spec.name for spec in specs])
        self._last: dict[int, Values] = {}

    def read(self, place: int, groups: Sequence[Mapping[str, Any]]) -> Values:
        """The values in these groups: schedulers and users may have written other ones.

        Args:
            place: Where the groups stand among all; the last values are remembered by it.
            groups: One group, or one per member.
        """
        rows = list(map(self._row, groups))
        last = self._last.get(place)
        if last is not None and rows == last.rows:
            return last
        columns: dict[str, Array] = {}
        for k, spec in enumerate(self._specs):
            numbers = np.array([_numbers(row[k]) for row in rows], dtype=np.float64)
            by_name = numbers.T if spec.kind == "pair" else [numbers]
            columns |= dict(zip(spec.columns, by_name, strict=True))
        values = Values(rows, columns, rows.count(rows[0]) == len(rows))
        if any(isinstance(value, Tensor | list) for row in rows for value in row):
            self._last.pop(place, None)  # its numbers may change while it stays the same object
        else:
            self._last[place] = values
        return values


def _numbers(value: Any) -> Any:
    return tuple(map(float, value)) if isinstance(value, tuple | list) else float(value)
