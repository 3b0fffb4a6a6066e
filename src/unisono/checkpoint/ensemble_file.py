"""One ensemble in one file: its stacked tensors under their own names, and what they belong to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors
import torch
from torch import Tensor, nn

from unisono.checkpoint.architecture import Outline, contradictions, outline, remarks, ties
from unisono.checkpoint.reading import Entry, TensorFile, open_file
from unisono.checkpoint.writing import MAX_HEADER, write
from unisono.combination import NAMES, problems_of
from unisono.describe import list_facts
from unisono.errors import CheckpointError
from unisono.module_tree import named_tensors
from unisono.options import check_options
from unisono.stacking import MemberTree, mirror

NAME: Final = "model.safetensors"  # in a folder
WHAT: Final = "an ensemble of unisono"
MEMBERS: Final = "members."
COMBINATION: Final = "combination."
OPTIONS: Final = frozenset(("strategy", "randomness", "chunk_size"))
_KIND: Final = "ensemble"
_VERSION: Final = 1
_MOST: Final = MAX_HEADER // 8  # members whose checksums a header has room for


@dataclass(frozen=True)
class Facts:
    """What the file of an ensemble says beside its tensors.

    Args:
        members: How many there are.
        shared: Names of tensors that are kept once for all members.
        ties: Second name of a tensor -> its first name, under which it is stored.
        frozen: Names of tensors that don't require a gradient, though they are parameters.
        buffers: Names of tensors that are no parameters, tied ones under each name.
        non_persistent: Those of them that are in the file, and not in a member's state dict.
        evaluating: Paths of modules in eval mode.
        options: The options of the ensemble.
        outline: Classes and attributes of the member's modules.
        versions: Package -> version that wrote the file.
    """

    members: int
    shared: tuple[str, ...]
    ties: Mapping[str, str]
    frozen: tuple[str, ...]
    buffers: tuple[str, ...]
    non_persistent: tuple[str, ...]
    evaluating: tuple[str, ...]
    options: Mapping[str, Any]
    outline: Outline
    versions: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Stored:
    """An ensemble as it comes from a file.

    Args:
        members: The tree of stacked tensors.
        shared: Names of tensors without a member axis.
        count: The number of members.
        combination: Weights and temperatures by name, those that are set.
        options: The options of the ensemble.
        remarks: In what the model differs from the saved one, without contradicting it.
    """

    members: MemberTree
    shared: frozenset[str]
    count: int
    combination: Mapping[str, Tensor]
    options: Mapping[str, Any]
    remarks: Sequence[str]


def save(
    path: str | os.PathLike[str],
    template: nn.Module,
    members: MemberTree,
    *,
    shared: frozenset[str],
    count: int,
    combination: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> None:
    """Write an ensemble to one file, as a whole or not at all.

    Args:
        path: The file.
        template: The member's module tree.
        members: The tree of stacked tensors.
        shared: Names of tensors without a member axis.
        count: The number of members.
        combination: Weights and temperatures by name.
        options: What JSON can hold.

    Raises:
        OSError: If the disk refuses; a file that was there before is as it was.
        TypeError: If a tensor can't be stored; likewise.
        ValueError: If the combination has values that `load` would refuse; likewise.
    """
    problems = [
        problem
        for name, tensor in combination.items()
        for problem in problems_of(name, tensor, tuple(tensor.shape))
    ]
    if problems:
        raise ValueError(f"ens.save: ens.combination can't be loaded again: {'; '.join(problems)}")
    own, tied = named_tensors(members), ties(members)
    stored = {name: tensor for name, tensor in own.items() if name not in tied}
    facts = Facts(
        members=count,
        shared=tuple(sorted(shared)),
        ties=tied,
        frozen=tuple(n for n, p in members.named_parameters() if not p.requires_grad),
        buffers=tuple(dict(members.named_buffers(remove_duplicate=False))),
        non_persistent=tuple(sorted(own.keys() - members.state_dict().keys())),
        evaluating=tuple(path for path, tree in members.named_modules() if not tree.training),
        options=options,
        outline=outline(template),
        versions=_versions(),
    )
    write(
        path,
        {
            **{MEMBERS + name: tensor for name, tensor in stored.items()},
            **{COMBINATION + name: tensor for name, tensor in combination.items()},
        },
        {"kind": _KIND, "version": _VERSION, **vars(facts)},
        stacked=[MEMBERS + name for name in stored if name not in shared],
    )


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    members: Sequence[int] | None,
    device: torch.device | None,
) -> Stored:
    """Read an ensemble, or some of its members, for a model of its architecture.

    Args:
        path: The file, or a folder with ``model.safetensors``.
        model: A member; it is left untouched.
        members: Which members to read; None for all. Only their bytes are read.
        device: Where the tensors are to lie; None for where the model's lie.

    Raises:
        OSError: If the file can't be read.
        CheckpointError: If it is something else, damaged, or of another architecture.
    """
    with open_ensemble(path) as (file, facts):
        with file.making_sense():
            _check_model(file, facts, model)
            _check_combination(file)
        for i in members or ():
            if not 0 <= i < facts.members:
                raise IndexError(
                    f"{file.name} has {facts.members} members, 0 to {facts.members - 1};"
                    f" there is no member {i}"
                )
        own = named_tensors(model)

        def place(name: str) -> torch.device:
            there = own[name].device
            return device or (torch.device("cpu") if there.type == "meta" else there)

        stacked = file.read_stacked(members, lambda key: place(key.removeprefix(MEMBERS)))
        tensors = {key.removeprefix(MEMBERS): tensor for key, tensor in stacked}
        for name in facts.shared:
            if name not in facts.ties:
                tensors[name] = file.read(MEMBERS + name, place(name))
        combination = {
            key.removeprefix(COMBINATION): _rows(file.read(key, _device(tensors)), members)
            for key in file.entries
            if key.startswith(COMBINATION)
        }
    tree = mirror(model, lambda name, _: tensors[facts.ties.get(name, name)])
    for name, parameter in tree.named_parameters():
        parameter.requires_grad_(name not in facts.frozen)
    evaluating = frozenset(facts.evaluating)
    for at, module in tree.named_modules():
        module.training = at not in evaluating
    count = facts.members if members is None else len(members)
    found = remarks(facts.outline, model)
    return Stored(tree, frozenset(facts.shared), count, combination, facts.options, found)


@contextmanager
def open_ensemble(path: str | os.PathLike[str]) -> Iterator[tuple[TensorFile, Facts]]:
    """Open the file of an ensemble, to look at its facts and tensors.

    Args:
        path: The file, or a folder with ``model.safetensors``.

    Yields:
        The open file, and what it says.

    Raises:
        OSError: If it can't be read.
        CheckpointError: If it is something else, or damaged.
    """
    folder = Path(path)
    inside = folder / NAME if folder.is_dir() and (folder / NAME).exists() else folder
    with open_file(inside, what=WHAT) as file:
        if file.facts is None:
            names = ", ".join(f"`{name}`" for name in list(file.entries)[:3])
            raise file.broken(
                f"it holds tensors ({names} ...), but nothing that says how many members they"
                f" are of; a single member's goes into Ensemble.from_checkpoints(make_model, [...])"
            )
        with file.making_sense():
            facts = _facts(file)
        yield file, facts


def _facts(file: TensorFile) -> Facts:
    found = file.facts
    if not isinstance(found, dict) or found.get("kind") != _KIND:
        kind = found.get("kind") if isinstance(found, dict) else None
        raise ValueError(f"it holds {kind[:100] if isinstance(kind, str) else 'something else'}")
    if found.get("version") != _VERSION:
        raise ValueError(
            f"it has version {found.get('version')!r:.100} of the format, this unisono reads"
            f" {_VERSION}; it was written by {found.get('versions')!r:.200}"
        )
    facts = Facts(
        members=_typed(found, "members", int),
        shared=_texts(found, "shared"),
        ties=_text_map(_typed(found, "ties", dict)),
        frozen=_texts(found, "frozen"),
        buffers=_texts(found, "buffers"),
        non_persistent=_texts(found, "non_persistent"),
        evaluating=_texts(found, "evaluating"),
        options=_options(_typed(found, "options", dict)),
        outline={
            str(path): {"class": "", **_text_map(texts)}
            for path, texts in _typed(found, "outline", dict).items()
        },
        versions=_text_map(_typed(found, "versions", dict)),
    )
    if not 1 <= facts.members <= _MOST:
        raise ValueError(f"an ensemble has 1 to {_MOST:,} members, found {facts.members:,}")
    stored = {key for key in file.entries if key.startswith(MEMBERS)}
    shared = {MEMBERS + name for name in facts.shared if name not in facts.ties}
    if stored - shared != file.stacked or not shared <= stored:
        raise ValueError("the tensors are not those that it says are stacked or shared")
    for key in sorted(file.entries.keys() - stored):
        is_one = key == COMBINATION + "pooled_temperature"
        shape: tuple[int, ...] = () if is_one else (facts.members,)
        entry, is_known = file.entries[key], key.removeprefix(COMBINATION) in NAMES
        if not is_known or entry.shape != shape or not entry.dtype.is_floating_point:
            raise ValueError(f"`{key}` of shape {entry.shape}, {entry.dtype} is unexpected")
    for key in sorted(file.stacked):
        if file.entries[key].shape[:1] != (facts.members,):
            shape = file.entries[key].shape
            raise ValueError(f"`{key}` has shape {shape}, there are {facts.members} members")
    return facts


def _options(found: dict[str, Any]) -> dict[str, Any]:
    if found.keys() != OPTIONS:
        raise ValueError(f"'options' is {found!r:.100}")
    check_options(**found)
    return found


def _check_model(file: TensorFile, facts: Facts, model: nn.Module) -> None:
    """Raise one error for everything in which a model isn't what was saved."""
    own, tied = named_tensors(model), ties(model)
    names = [key.removeprefix(MEMBERS) for key in file.entries if key.startswith(MEMBERS)]
    entries = {name: file.entries[MEMBERS + name] for name in names}
    entries |= {name: entries[first] for name, first in facts.ties.items()}
    lines = []
    for name in sorted({*own, *entries}):
        if name not in own:
            lines.append(f"`{name}` is in the file, and not in the model")
        elif name not in entries:
            lines.append(f"`{name}` is in the model, and not in the file")
        else:
            lines += _compare(name, entries[name], own[name], stacked=name not in facts.shared)
    for name in sorted({*tied, *facts.ties}):
        before, now = facts.ties.get(name, name), tied.get(name, name)
        if before != now and name in own and name in entries:
            lines.append(f"`{name}` was the tensor `{before}`, in the model it is `{now}`")
    for name, parameter in model.named_parameters():
        if name not in facts.frozen and not _is_differentiable(parameter):
            lines.append(f"`{name}` required a gradient, which a {parameter.dtype} can't have")
    lines += contradictions(facts.outline, model)
    if lines:
        raise CheckpointError(
            f"Ensemble.load: {file.name} was saved from another architecture than"
            f" make_model() makes:\n\n{list_facts(lines)}\n\n"
            f"Pass the make_model of the saved ensemble. To take tensors of equal names and shapes"
            f" all the same:\n"
            f"  ens = Ensemble.build(make_model, {facts.members})\n"
            f"  ens.load_state_dict(safetensors.torch.load_file({file.name!r}), strict=False)"
        )


def _check_combination(file: TensorFile) -> None:
    """Raise unless these are weights and temperatures that could have been set."""
    for key in sorted(file.entries):
        if key.startswith(COMBINATION):
            tensor = file.read(key)
            problems = problems_of(key, tensor, tuple(tensor.shape))
            if problems:
                raise ValueError("; ".join(problems))


def _compare(name: str, entry: Entry, tensor: Tensor, *, stacked: bool) -> Iterator[str]:
    shape = entry.shape[1:] if stacked else entry.shape
    if shape != tuple(tensor.shape):
        yield f"`{name}` has shape {shape} in the file, {tuple(tensor.shape)} in the model"
    if entry.dtype != tensor.dtype:
        yield (
            f"`{name}` is {entry.dtype} in the file, {tensor.dtype} in the model; make_model="
            f"lambda: Model().to({entry.dtype}) makes it so"
        )


def _is_differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _rows(tensor: Tensor, members: Sequence[int] | None) -> Tensor:
    """The rows of members in a tensor of the combination; one without axes is that of all."""
    return tensor if members is None or not tensor.ndim else tensor[list(members)]


def _device(tensors: Mapping[str, Tensor]) -> torch.device:
    return next((tensor.device for tensor in tensors.values()), torch.device("cpu"))


def _versions() -> dict[str, str]:
    from unisono import __version__  # not above: it imports this file

    return {
        "unisono": __version__,
        "torch": str(torch.__version__),
        "safetensors": safetensors.__version__,
    }


def _typed(facts: Mapping[str, Any], key: str, kind: Callable[..., Any]) -> Any:
    value = facts.get(key)
    if type(value) is not kind:
        raise ValueError(f"{key!r} is {value!r:.100}")
    return value


def _texts(facts: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = _typed(facts, key, list)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key!r} is {values!r:.100}")
    return tuple(values)


def _text_map(values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise ValueError(f"texts by name are expected, found {values!r:.100}")
    return dict(values)
