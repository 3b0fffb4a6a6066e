"""Keep the plans that ``strategy="auto"`` made, for the next process.

An ensemble times the ways in which a call can run on the first call of each kind, which costs
at most twelve calls. Saved plans spare that, and make a run repeat the choices of another one::

    unisono.plans.save("plans.json")  # at the end of one process
    unisono.plans.load("plans.json")  # at the start of the next
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any, Final, get_args

import torch

from unisono.engine.planning.plan import MemoryFormat, Plan, RunName
from unisono.engine.planning.remembered import everything, forget, remember
from unisono.engine.where import caller_level
from unisono.errors import CheckpointError, EnsembleWarning
from unisono.files import replacing

__all__ = ["clear", "from_dict", "load", "save", "to_dict"]

_FORMAT: Final = 1


def save(path: str | os.PathLike[str]) -> int:
    """Write all plans made or loaded in this process to a JSON file.

    The file is replaced as a whole or not at all.

    Args:
        path: The file.

    Returns:
        The number of plans.

    Raises:
        OSError: If the file can't be written; one that was there before is as it was.

    Example:
        >>> import tempfile, unisono
        >>> ens = unisono.Ensemble([torch.nn.Linear(3, 2) for _ in range(4)])
        >>> _ = ens(torch.zeros(8, 3))
        >>> file = Path(tempfile.mkdtemp()) / "plans.json"
        >>> unisono.plans.save(file) == unisono.plans.load(file)
        True
    """
    content = to_dict()
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return len(content["plans"])


def to_dict() -> dict[str, Any]:
    """All plans made or loaded in this process, and what they depend on, ready for JSON.

    Returns:
        ``{"format": ..., "machine": {...}, "plans": {...}}``.

    Example:
        >>> import unisono
        >>> sorted(unisono.plans.to_dict())
        ['format', 'machine', 'plans']
    """
    return {
        "format": _FORMAT,
        "machine": _machine(),
        "plans": {key: _to_json(plan) for key, plan in sorted(everything().items())},
    }


def load(path: str | os.PathLike[str]) -> int:
    """Take over the plans of a file that `save` wrote.

    Ensembles that have made a plan of their own keep it.

    Args:
        path: The file.

    Returns:
        The number of plans; 0, with an `EnsembleWarning`, if they were measured on another
        machine or with another torch, where another way may be the fastest.

    Raises:
        OSError: If the file can't be read.
        CheckpointError: If it isn't one that `save` wrote; nothing is taken over.

    Example:
        >>> import tempfile, unisono
        >>> file = Path(tempfile.mkdtemp()) / "plans.json"
        >>> unisono.plans.clear()
        >>> ens = unisono.Ensemble([torch.nn.Linear(3, 2) for _ in range(4)])
        >>> _ = ens(torch.zeros(8, 3))
        >>> _ = unisono.plans.save(file)
        >>> unisono.plans.load(file)
        1
    """
    name = os.fspath(path)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _no_plans(name, error) from error
    return from_dict(content, name)


def from_dict(content: Any, name: str) -> int:
    """Take over the plans that `to_dict` gave.

    Args:
        content: What it gave.
        name: Where it comes from, for messages.

    Returns:
        As for `load`.

    Raises:
        CheckpointError: As for `load`.

    Example:
        >>> import unisono
        >>> unisono.plans.clear()
        >>> unisono.plans.from_dict(unisono.plans.to_dict(), "those of this process")
        0
    """
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this version reads {_FORMAT}")
        machine = dict(content["machine"])
        plans = {str(key): _from_json(plan) for key, plan in content["plans"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _no_plans(name, error) from error
    here = _machine()
    if machine != here:
        names = sorted({*machine, *here})
        facts = ", ".join(
            f"{name} {machine.get(name)} instead of {here.get(name)}"
            for name in names
            if machine.get(name) != here.get(name)
        )
        warnings.warn(
            f"unisono.plans.load: {name} was measured elsewhere ({facts}), so nothing"
            f" is taken over; the first calls measure anew",
            EnsembleWarning,
            stacklevel=caller_level(),
        )
        return 0
    remember(plans)
    return len(plans)


def _no_plans(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"unisono.plans.load: {name} isn't a file of plans:"
        f" {type(error).__name__}: {error}; write a new one with unisono.plans.save(path)"
    )


def clear() -> None:
    """Forget the plans made or loaded in this process; ensembles keep those they use.

    Example:
        >>> import unisono
        >>> unisono.plans.clear()
        >>> unisono.plans.to_dict()["plans"]
        {}
    """
    forget()


def _machine() -> dict[str, str]:
    """What a plan depends on beside the ensemble and the call."""
    facts = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        facts["cuda"] = torch.cuda.get_device_name()
    return facts


def _to_json(plan: Plan) -> dict[str, Any]:
    fields = plan.to_dict()
    del fields["ops"]
    return fields


def _from_json(fields: dict[str, Any]) -> Plan:
    chunk_size = fields["chunk_size"]
    if fields["strategy"] not in get_args(RunName):
        raise ValueError(f"no strategy is called {fields['strategy']!r}")
    if fields["memory_format"] not in get_args(MemoryFormat):
        raise ValueError(f"no memory format is called {fields['memory_format']!r}")
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise ValueError(f"chunk_size is {chunk_size!r}")
    return Plan(
        fields["strategy"],
        chunk_size,
        str(fields["reason"]),
        {str(name): float(time) for name, time in fields["candidates"].items()},
        fields["memory_format"],
        bool(fields["op_by_op"]),
    )
