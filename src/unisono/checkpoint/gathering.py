"""N files of one model each to the stacked tensors of an ensemble, one file after another."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from unisono.checkpoint.alike import Layout, Rows, fill
from unisono.checkpoint.architecture import ties
from unisono.checkpoint.member_file import Select, layout_of, open_member
from unisono.describe import contrast_tensors, list_facts
from unisono.errors import CheckpointError
from unisono.module_tree import named_tensors
from unisono.stacking import MemberTree, empty_stack, mirror

_THREADS: Final = 2  # files at once: one is read while the other is copied
_PREFIXES: Final = ("module.", "model.", "_orig_mod.", "net.")


def gather(
    model: nn.Module,
    paths: Sequence[str | os.PathLike[str]],
    *,
    select: Select | None,
    shared: Collection[str],
    device: torch.device | None,
) -> MemberTree:
    """Stack the states of N files: row i of each tensor is that in ``paths[i]``.

    At no time is more in memory than the stacked tensors, the model, and two files.

    Args:
        model: Says what is expected; buffers that no file keeps are taken from it.
        paths: One for each member.
        select: Picks the state dict out of what a pickled file holds.
        shared: Names of tensors to be kept once; they are to be equal in all files.
        device: Where the tensors are to lie; None for where the model's lie.

    Raises:
        OSError: If a file can't be read.
        CheckpointError: For all that doesn't fit, in all files.
    """
    own = named_tensors(model)
    tree = mirror(model, lambda name, like: _room(like, len(paths), device, name in shared))
    gathering = _Gathering(model, own, dict(_once(tree)), frozenset(shared), select)
    problems = gathering.take(0, paths[0])
    if len(paths) > 1 and not problems:
        gathering.look_closer(Path(paths[0]))
    problems += gathering.take_others(paths)
    if problems:
        raise CheckpointError(
            f"Ensemble.from_checkpoints: what doesn't fit, in {len(paths)} files:\n\n"
            f"{list_facts(problems)}",
            problems,
        )
    return tree


class _Gathering:
    """Copies files to the rows of the stacked tensors, one at a time.

    Args:
        model: Says what is expected.
        own: Its tensors by all their names.
        rooms: The stacked tensors by their first names.
        shared: Names of those that are kept once.
        select: Picks the state dict out of what a file holds.
    """

    def __init__(
        self,
        model: nn.Module,
        own: Mapping[str, Tensor],
        rooms: Mapping[str, Tensor],
        shared: frozenset[str],
        select: Select | None,
    ) -> None:
        self._own = own
        self._rooms = rooms
        self._shared = shared
        self._select = select
        self._aliases = _aliases(model)
        self._not_saved = own.keys() - model.state_dict().keys()
        self._layout: Layout | None = None
        self._is_over = False
        self._rows: dict[str, Rows] = {}  # name in files of the layout -> where it goes

    def take_others(self, paths: Sequence[str | os.PathLike[str]]) -> list[str]:
        """Copy all files but the first to the rows of their members; say what doesn't fit."""
        # A share for each thread: to hand files over one by one takes as long as to read them.
        shares = [range(k, len(paths), _THREADS) for k in range(1, _THREADS + 1)]
        with ThreadPoolExecutor(_THREADS) as threads:
            try:
                found = list(threads.map(lambda share: self._take_share(share, paths), shares))
            finally:
                self._is_over = True  # by ctrl-C too: otherwise the threads read on
        by_member = {member: lines for share in found for member, lines in share.items()}
        return [line for member in sorted(by_member) for line in by_member[member]]

    def _take_share(
        self, share: range, paths: Sequence[str | os.PathLike[str]]
    ) -> dict[int, list[str]]:
        found = {}
        try:
            for member in share:
                if self._is_over:
                    break
                found[member] = self.take(member, paths[member])
        except BaseException:
            self._is_over = True
            raise
        return found

    def take(self, member: int, path: str | os.PathLike[str]) -> list[str]:
        """Copy a file to the member's rows; say what doesn't fit."""
        file = Path(path)
        if self._layout is not None and file.is_file():  # opening a pipe would wait
            if fill(self._layout, file, self._rows, member):
                return []
        try:
            with open_member(path, self._select) as state:
                lines = list(_mismatches(state, self._own, self._aliases, self._not_saved))
                if not lines:
                    lines = list(self._copy(state, member))
        except CheckpointError as error:
            return [str(error)]
        return [f"{os.fspath(path)}: {line}" for line in lines]

    @torch.no_grad()
    def look_closer(self, path: Path) -> None:
        """Learn from a file that fits how to read those like it faster."""
        if self._select is not None or self._shared:
            return  # what is shared has to be compared
        with open_member(path) as state:
            layout = layout_of(path, state)
            found = {
                first: [name for name in names if name in state]
                for first, names in self._aliases.items()
            }
        # Of tied tensors each file is to hold one, or they have to be compared.
        if layout is None or any(len(names) > 1 for names in found.values()):
            return
        self._layout = layout
        for first, names in found.items():
            if names:
                self._rows[names[0]] = Rows(self._rooms[first])
            else:
                self._rooms[first].detach().copy_(self._own[first].detach())

    @torch.no_grad()
    def _copy(self, state: Mapping[str, Tensor], member: int) -> Iterator[str]:
        """Copy a state to the member's rows; tell of tied or shared tensors that aren't equal."""
        for first, room in self._rooms.items():
            found = [name for name in self._aliases[first] if name in state]
            value = state[found[0]] if found else self._own[first].detach()
            for name in found[1:]:
                if contrast_tensors(state[name], value, values=True):
                    yield f"`{name}` differs from `{found[0]}`, the model has one tensor for both"
            if value.is_meta:
                yield f"`{first}` isn't in a state dict, and make_model() makes it without values"
            elif first not in self._shared:
                room.detach()[member].copy_(value)
            elif member == 0:
                room.detach().copy_(value)
            elif contrast_tensors(room.detach().cpu(), value, values=True):
                yield f"`{first}` differs from that of the first file, and shared= keeps one"


def _room(like: Tensor, n: int, device: torch.device | None, is_shared: bool) -> Tensor:
    place = device or (torch.device("cpu") if like.is_meta else like.device)
    if is_shared:
        return torch.empty_like(like.detach(), device=place)
    return empty_stack(like, n, place)


def _once(tree: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors by their first name, tied ones once."""
    yield from tree.named_parameters()
    yield from tree.named_buffers()


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """First name of each tensor -> all its names; a file may hold any of them."""
    tied = ties(model)
    found: dict[str, list[str]] = {}
    for name in named_tensors(model):
        found.setdefault(tied.get(name, name), []).append(name)
    return found


def _mismatches(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    aliases: Mapping[str, Sequence[str]],
    not_saved: Collection[str],
) -> Iterator[str]:
    """What keeps a state from being that of a member, one fact a line."""
    missing = [
        first
        for first, names in aliases.items()
        if not any(name in state for name in names) and not all(n in not_saved for n in names)
    ]
    unexpected = [name for name in state if name not in own]
    prefix = _common_prefix(state, own)
    if prefix is not None:
        yield (
            f"all names begin with {prefix!r} (unisono merge --strip {prefix}); take it off:"
            f" select=lambda found:"
            f" {{name.removeprefix({prefix!r}): tensor for name, tensor in found.items()}}"
        )
        return
    for absent, extra in zip_longest(missing, unexpected):
        if absent is not None:
            yield f"`{absent}` is missing"
        if extra is not None:
            yield f"`{extra}` is unexpected, the model has no tensor of that name"
    for name in (name for name in own if name in state):
        found, expected = state[name], own[name]
        if found.shape != expected.shape:
            shapes = tuple(found.shape), tuple(expected.shape)
            yield f"`{name}` has shape {shapes[0]}, the model's has {shapes[1]}"
        if found.dtype != expected.dtype:
            yield (
                f"`{name}` is {found.dtype}, the model's is {expected.dtype}; make_model=lambda:"
                f" Model().to({found.dtype}) makes it so"
            )
        if found.layout is not torch.strided:
            yield f"`{name}` is a {found.layout} tensor, only dense ones can be stacked"


def _common_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    return next(
        (
            prefix
            for prefix in _PREFIXES
            if state
            and all(name.startswith(prefix) for name in state)
            and any(name.removeprefix(prefix) in own for name in state)
            and not any(name in own for name in state)
        ),
        None,
    )
