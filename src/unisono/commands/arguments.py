"""Checks of the values given on the command line: each returns the value or says why not.

They are ours, and not typer's range types, so that the text of an error is the same under
every version of typer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import torch

from unisono.commands.outcome import ArgumentError

# Member i is seeded with `seed + i`; below this bound the sum stays inside what
# `torch.manual_seed` takes, whatever the number of members.
_SEED_LIMIT = 2**62
_MEMBERS = 10

SAMPLINGS: Final = ("shared", "shuffled", "bootstrap", "folds")


def at_least(option: str, value: int, minimum: int = 1) -> int:
    """Return `value` if it is `minimum` or more.

    Args:
        option: How the user spells the option, for the message.
        value: What was given.
        minimum: The smallest value that makes sense.

    Returns:
        `value`, unchanged.

    Raises:
        ArgumentError: If `value` is smaller.

    Example:
        >>> at_least("--members", 10)
        10
    """
    if value < minimum:
        raise ArgumentError(f"{option} must be at least {minimum}, got {value}")
    return value


def check_seed(value: int) -> int:
    """Return `value` if it can seed every member.

    Raises:
        ArgumentError: If it is negative or too large for a generator of torch.
    """
    if not 0 <= value < _SEED_LIMIT:
        raise ArgumentError(f"--seed must be from 0 to 2**62 - 1, got {value}")
    return value


def check_share(option: str, value: float) -> float:
    """Return `value` if it is a part that leaves something.

    Raises:
        ArgumentError: If it isn't between 0 and 1.
    """
    if not 0 < value < 1:
        raise ArgumentError(f"{option} must be between 0 and 1, got {value:g}")
    return value


def check_learning_rate(value: float) -> float:
    """Return `value` if it is a finite number above zero.

    Raises:
        ArgumentError: If it is zero, negative, infinite or not a number.
    """
    if not (math.isfinite(value) and value > 0):
        raise ArgumentError(f"--lr must be a finite number above 0, got {value:g}")
    return value


def parse_rates(values: Sequence[str], members: int | None) -> tuple[float, ...]:
    """The learning rate of each member.

    Args:
        values: What was given with ``--lr``: one number for all, one for each member, or
            ``log:FIRST:LAST`` for rates in equal ratios.
        members: What was given with ``--members``; None for as many as there are rates, or 10.

    Raises:
        ArgumentError: If that isn't one rate for each member.

    Example:
        >>> parse_rates(["log:1e-3:1e-1"], 3)
        (0.001, 0.01, 0.1)
        >>> parse_rates(["0.1", "0.2"], None)
        (0.1, 0.2)
    """
    if len(values) == 1:
        n = _MEMBERS if members is None else at_least("--members", members)
        if not values[0].startswith("log:"):
            return (_rate(values[0]),) * n
        ends = values[0].split(":")[1:]
        if len(ends) != 2:
            raise ArgumentError(f"--lr {values[0]}: write log:FIRST:LAST, as log:1e-4:1e-1")
        first, last = (math.log10(_rate(end)) for end in ends)
        step = (last - first) / max(n - 1, 1)
        return tuple(float(f"{10 ** (first + k * step):.6g}") for k in range(n))
    ranges = [value for value in values if value.startswith("log:")]
    if ranges:
        raise ArgumentError(f"--lr {ranges[0]} stands alone; it is a rate for every member")
    if members is not None and members != len(values):
        raise ArgumentError(f"--lr was given {len(values)} times for --members {members}")
    return tuple(_rate(value) for value in values)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ArgumentError(f"--lr must be a number or log:FIRST:LAST, got {text!r}") from None
    return check_learning_rate(value)


def check_choice(what: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`.

    Args:
        what: What is chosen, as a noun for the message.
        value: What was given.
        choices: Every accepted value.

    Raises:
        ArgumentError: If it is none of them; the message lists them all.

    Example:
        >>> check_choice("data", "digits", ["mnist5k", "digits"])
        'digits'
    """
    known = list(choices)
    if value not in known:
        raise ArgumentError(f"unknown {what} {value!r}; choose {' or '.join(known)}")
    return value


def choose_device(name: str) -> torch.device:
    """Turn ``auto`` or the name of a device into a device that works here.

    Args:
        name: ``auto`` (CUDA where there is one, else the CPU) or a name that
            `torch.device` takes, such as ``cuda:1``.

    Returns:
        The device, proven by placing one number on it and reading it back.

    Raises:
        ArgumentError: If torch doesn't know the name or the machine lacks the device.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ArgumentError(f"unknown device {name!r}; choose {_usable_devices()}") from None
    try:
        torch.zeros(1, device=device).item()  # `meta` and absent hardware fail here
    except (RuntimeError, AssertionError, NotImplementedError):
        message = f"device {name!r} isn't available on this machine; choose {_usable_devices()}"
        raise ArgumentError(message) from None
    return device


def _usable_devices() -> str:
    names = ["auto", "cpu"]
    names += ["cuda"] if torch.cuda.is_available() else []
    names += ["mps"] if torch.backends.mps.is_available() else []
    return " or ".join(names)
