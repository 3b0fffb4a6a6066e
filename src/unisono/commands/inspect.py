"""``unisono inspect``: what is in a file of weights, without running anything of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from unisono.checkpoint.ensemble_file import COMBINATION, MEMBERS, NAME, Facts, open_ensemble
from unisono.checkpoint.member_file import open_member
from unisono.checkpoint.reading import Entry, TensorFile, open_file
from unisono.checkpoint.scanning import pieces, scan
from unisono.commands.member_files import failures_told, picking
from unisono.commands.norms import Norms, norms_by_tensor, norms_of_members, remarks
from unisono.commands.outcome import ArgumentError
from unisono.commands.run_folder import ENSEMBLE, MODEL, RUN, RunFolder
from unisono.commands.table_estimator import DEFAULT

_PICKLED: Final = (".pt", ".pth", ".bin", ".ckpt", ".json")
# Of the default network of a table, whose files don't say so.
_SHARED_OF_TABLES: Final = frozenset({"standardise.mean", "standardise.scale"})


@dataclass(frozen=True, eq=False)
class TensorFacts:
    """One tensor of a file.

    Args:
        name: Its name in a member.
        shape: That of a member.
        dtype: Of its elements.
        what: ``"parameter"``, ``"frozen"``, ``"buffer"``, or ``"transient"`` for a buffer that no
            state dict has; empty if the file doesn't say.
        shared: Whether it is kept once for all members; None if there are no members.
        nbytes: Size in the file.
        norms: Of numbers with a fraction: one for each member, or one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    what: str
    shared: bool | None
    nbytes: int
    norms: Norms | None

    @property
    def numel(self) -> int:
        """How many elements a member has."""
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "what": self.what,
            "shared": self.shared,
            "bytes": self.nbytes,
            "norm": None if self.norms is None else _numbers(self.norms.norm),
            "not_finite": None
            if self.norms is None
            else self.norms.not_finite.astype(int).tolist(),
        }


@dataclass(frozen=True, eq=False)
class Inspection:
    """What is in a file.

    Args:
        path: The file or folder.
        kind: ``"ensemble"``, ``"table run"``, ``"training"`` or ``"model"``.
        tensors: All of them, in the order of their modules where the file has one.
        nbytes: Of all tensors.
        members: The number of members; None if the file has none.
        norms: Of all stacked parameters of each member; None without members.
        remarks: What is unusual about each member.
        facts: What the file of an ensemble says.
        combination: Its weights and temperatures.
        checked: Whether all values were compared with checksums.
    """

    path: Path
    kind: str
    tensors: Sequence[TensorFacts]
    nbytes: int
    members: int | None = None
    norms: Norms | None = None
    remarks: Sequence[str] = ()
    facts: Facts | None = None
    combination: Mapping[str, Any] = field(default_factory=dict)
    checked: bool = False

    def count(self, *, shared: bool) -> int:
        """How many parameters a member has of its own, or shares; of a plain model, all values."""
        return sum(
            t.numel
            for t in self.tensors
            if bool(t.shared) == shared and t.what in ("parameter", "frozen", "")
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; a number that isn't finite is None."""
        facts, norms = self.facts, self.norms
        return {
            "path": str(self.path),
            "kind": self.kind,
            "bytes": self.nbytes,
            "checked": self.checked,
            "members": self.members,
            "parameters": {
                "each": self.count(shared=False),
                "shared": self.count(shared=True),
            },
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "norms": norms
            and [
                {"member": i, "norm": norm, "distance": distance, "remark": remark}
                for i, (norm, distance, remark) in enumerate(
                    zip(_numbers(norms.norm), _numbers(norms.distance), self.remarks, strict=True)
                )
            ],
            "combination": dict(self.combination),
            "ties": facts and dict(facts.ties),
            "evaluating": facts and list(facts.evaluating),
            "options": facts and dict(facts.options),
            "modules": facts and facts.outline,
            "versions": facts and dict(facts.versions),
        }


def run_inspect(path: Path, select: str | None = None) -> Inspection:
    """Look at a file of weights.

    Args:
        path: A saved ensemble, the checkpoint of a model, a folder of either, or of a run.
        select: Dotted key of the state dict in what a pickled file holds.

    Raises:
        ArgumentError: If it is something else, or damaged.
    """
    with failures_told():
        if (path / RUN).is_file():
            return _inspect_run(path)
        inside = path / NAME if (path / NAME).is_file() else path
        if inside.is_dir() or inside.suffix in _PICKLED:
            return _inspect_model(path, select)
        if select is not None:
            raise ArgumentError(f"--select {select}: {inside} holds tensors by name, nothing else")
        with open_file(inside, what="an ensemble or the checkpoint of a model") as file:
            is_ensemble = isinstance(file.facts, dict) and file.facts.get("kind") == "ensemble"
            if not is_ensemble:
                kind = "model" if file.facts is None else "training"
                return _plain(path, kind, file.entries, scan(file), checked=file.has_checks)
        return _inspect_ensemble(path, inside)


def _inspect_ensemble(path: Path, inside: Path) -> Inspection:
    with open_ensemble(inside) as (file, facts), file.making_sense():
        norms = norms_by_tensor(scan(file))
        keys = [key for key in file.entries if key.startswith(MEMBERS)]
        places = {place: k for k, place in enumerate(facts.outline)}
        keys.sort(key=lambda key: _place(key.removeprefix(MEMBERS), places))
        tensors = [_of_member(key, file.entries[key], facts, norms) for key in keys]
        combination = {
            key.removeprefix(COMBINATION): _numbers(file.map(key).double().numpy())
            for key in file.entries
            if key.startswith(COMBINATION)
        }
        checksums = file.member_checks.tolist()
    return _with_norms(path, "ensemble", tensors, facts.members, checksums, facts, combination)


def _inspect_run(path: Path) -> Inspection:
    folder = RunFolder(path)
    run = folder.description
    if run.kind == "images":
        return _inspect_ensemble(path, folder.file(ENSEMBLE))
    with open_file(folder.file(MODEL), what="the members of a run on a table") as file:
        own = {key: entry for key, entry in file.entries.items() if key.startswith(MEMBERS)}
        if run.model != DEFAULT:  # which of its tensors all members share isn't in the file
            return _plain(path, "table run", own, _pieces(file, own, ()), checked=False)
        stacked = {key for key in own if key.removeprefix(MEMBERS) not in _SHARED_OF_TABLES}
        norms = norms_by_tensor(_pieces(file, own, stacked))
        tensors = [
            TensorFacts(
                key.removeprefix(MEMBERS),
                entry.shape[1:] if key in stacked else entry.shape,
                entry.dtype,
                "parameter" if key in stacked else "buffer",
                key not in stacked,
                entry.nbytes,
                norms.get(key),
            )
            for key, entry in own.items()
        ]
    members = int(run.estimator["n_members"])
    return _with_norms(path, "table run", tensors, members, (), None, {})


def _with_norms(
    path: Path,
    kind: str,
    tensors: Sequence[TensorFacts],
    members: int,
    checksums: Sequence[int],
    facts: Facts | None,
    combination: Mapping[str, Any],
) -> Inspection:
    own = [t.norms for t in tensors if t.what in ("parameter", "frozen") and not t.shared]
    norms = norms_of_members([each for each in own if each is not None], members)
    said = remarks(norms, checksums) if any(each is not None for each in own) else [""] * members
    nbytes = sum(tensor.nbytes for tensor in tensors)
    checked = bool(checksums)
    return Inspection(
        path, kind, tensors, nbytes, members, norms, said, facts, combination, checked
    )


def _inspect_model(path: Path, select: str | None) -> Inspection:
    with open_member(path, picking(select)) as state:
        entries = {name: Entry(t.dtype, tuple(t.shape)) for name, t in state.items()}
        found = ((n, piece) for n, t in state.items() for piece in pieces(t, stacked=False))
        return _plain(path, "model", entries, found, checked=False)


def _plain(
    path: Path,
    kind: str,
    entries: Mapping[str, Entry],
    found: Iterator[tuple[str, Tensor]],
    *,
    checked: bool,
) -> Inspection:
    norms = norms_by_tensor(found)
    tensors = [
        TensorFacts(name, entry.shape, entry.dtype, "", None, entry.nbytes, norms.get(name))
        for name, entry in entries.items()
    ]
    nbytes = sum(entry.nbytes for entry in entries.values())
    return Inspection(path, kind, tensors, nbytes, checked=checked)


def _of_member(key: str, entry: Entry, facts: Facts, norms: Mapping[str, Norms]) -> TensorFacts:
    name = key.removeprefix(MEMBERS)
    is_shared = name in facts.shared
    what = "frozen" if name in facts.frozen else "parameter"
    if name in facts.buffers:
        what = "transient" if name in facts.non_persistent else "buffer"
    shape = entry.shape if is_shared else entry.shape[1:]
    return TensorFacts(name, shape, entry.dtype, what, is_shared, entry.nbytes, norms.get(key))


def _place(name: str, places: Mapping[str, int]) -> tuple[int, str]:
    """Where a tensor stands in a model, in the order of its modules."""
    path, _, own = name.rpartition(".")
    return places.get(path, len(places)), own


def _pieces(
    file: TensorFile, keys: Mapping[str, Entry], stacked: Sequence[str] | set[str]
) -> Iterator[tuple[str, Tensor]]:
    for key in keys:
        for piece in pieces(file.map(key), stacked=key in stacked):
            yield key, piece


def _numbers(values: Any) -> Any:
    """Floats for JSON, None where one isn't finite."""
    found = values.tolist()
    each = found if isinstance(found, list) else [found]
    plain = [x if math.isfinite(x) else None for x in each]
    return plain if isinstance(found, list) else plain[0]
