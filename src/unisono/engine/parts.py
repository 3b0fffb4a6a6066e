"""A call cut into parts by member, and the parts' results joined again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType, GeneratorType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unisono.engine import rng
from unisono.engine.axis import Randomness
from unisono.engine.inputs import map_inputs
from unisono.engine.template import Template
from unisono.engine.tree import leaves, transpose, tree_map
from unisono.engine.watch import Kind
from unisono.errors import EnsembleError, UnsupportedModelError


def call_member(member: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """What ``ens(...)`` runs for each member."""
    return member(*args, **kwargs)


class Call(NamedTuple):
    """What to run: ``fn(member, *args, **kwargs)`` for each of n members."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    n: int
    randomness: Randomness


class Assigned(NamedTuple):
    """A buffer or plain attribute that ``forward`` assigned."""

    path: str
    key: str
    kind: Kind
    value: Any
    stacked: bool  # whether the tensors in value carry the member axis

    @property
    def name(self) -> str:
        """The dotted name of what was assigned."""
        return f"{self.path}.{self.key}" if self.path else self.key


class Result(NamedTuple):
    """Outputs with the member axis first, and what is to be stored."""

    outputs: Any
    assigned: list[Assigned]


class Parts:
    """A call cut along the member axis.

    Args:
        template: The template that runs the parts.
        values: A value for each of the template's slots.
        call: The call to cut.
        cut: Cuts one stacked tensor. Each tensor is cut once: the backward of one cut joins the
            gradients of all parts, where N selects would make N tensors of full size.
        cut_parameter: Cuts a parameter, whose dotted name it is told; None for as all else.
    """

    def __init__(
        self,
        template: Template,
        values: Sequence[Any],
        call: Call,
        cut: Callable[[Tensor], Sequence[Tensor]],
        cut_parameter: Callable[[Tensor, str], Sequence[Tensor]] | None = None,
    ) -> None:
        self._slots = template.slots
        self._is_training = template.is_training
        self._whole = values
        self._call = call
        self._cut = cut
        self._cuts: dict[int, Sequence[Tensor]] = {}
        if cut_parameter is not None:
            for slot, value in zip(self._slots, values, strict=True):
                if slot.kind == "parameter" and slot.stacked and id(value) not in self._cuts:
                    self._cuts[id(value)] = cut_parameter(value, slot.name)
        self._given: list[list[Any]] = []
        self._state: rng.RandomState | None = None
        # A buffer without member axis is written once, by part 0; the others write to copies.
        self._shared = {
            k: value.clone()
            for k, (slot, value) in enumerate(zip(self._slots, values, strict=True))
            if slot.kind == "buffer" and not slot.stacked
        }

    def values(self, part: int) -> list[Any]:
        """A value for each slot, as part ``part`` is to see it."""
        given = []
        for k, (slot, value) in enumerate(zip(self._slots, self._whole, strict=True)):
            if slot.stacked:
                given.append(self._part_of(value, part))
            elif part > 0 and k in self._shared:
                given.append(self._shared[k].clone())
            else:
                given.append(value)
        self._given.append(given)
        return given

    def inputs(
        self, part: int, mark: Callable[[Tensor], Any] = lambda tensor: tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with part ``part`` of what was marked as per-member."""
        call = self._call
        return map_inputs(call.args, call.kwargs, lambda t: mark(self._part_of(t, part)))

    @contextmanager
    def random_state(self, part: int) -> Iterator[None]:
        """Let every part draw what ``randomness`` says: its own numbers, the same, or none."""
        if self._call.randomness == "different":
            yield
            return
        devices = rng.devices_of(self._whole)
        if self._state is None:
            self._state = rng.get_state(devices)
        if self._call.randomness == "same" and part > 0:
            rng.set_state(self._state)
        yield
        if self._call.randomness == "error" and not rng.is_equal(
            self._state, rng.get_state(devices)
        ):
            raise EnsembleError(
                "ens(...): a member drew random numbers, and the ensemble was built with"
                ' randomness="error"; use "different" (own numbers for each member) or "same"'
            )

    def join(self, results: Sequence[Result], join: Callable[[list[Tensor]], Tensor]) -> Result:
        """One result from those of the parts, tensors joined along the member axis."""
        self._check_shared_buffers()
        outputs = join_trees("the output", [result.outputs for result in results], join)
        by_key: dict[tuple[str, str], dict[int, Assigned]] = {}
        for part, result in enumerate(results):
            for item in result.assigned:
                by_key.setdefault((item.path, item.key), {})[part] = item
        return Result(outputs, [self._join_assigned(found, join) for found in by_key.values()])

    def _part_of(self, value: Any, part: int) -> Any:
        if not isinstance(value, Tensor):
            return tree_map(
                lambda leaf: self._part_of(leaf, part) if isinstance(leaf, Tensor) else leaf, value
            )
        if id(value) not in self._cuts:
            self._cuts[id(value)] = self._cut(value)
        return self._cuts[id(value)][part]

    def _join_assigned(
        self, found: Mapping[int, Assigned], join: Callable[[list[Tensor]], Tensor]
    ) -> Assigned:
        item = next(iter(found.values()))
        values = []
        for part, given in enumerate(self._given):
            if part in found:
                values.append(found[part].value)
                continue
            # This part left it alone, so it keeps what it had.
            before = [
                v for slot, v in zip(self._slots, given, strict=True) if slot.name == item.name
            ]
            if not before:
                raise UnsupportedModelError(
                    f"ens(...): forward assigned `{item.name}` in some members only; assign it in"
                    f" __init__, too"
                )
            values.append(before[0])
        if not any(isinstance(leaf, Tensor) for value in values for _, leaf in leaves(value)):
            return item._replace(value=join_trees(f"`{item.name}`", values, join))
        return item._replace(value=join_trees(f"`{item.name}`", values, join), stacked=True)

    def _check_shared_buffers(self) -> None:
        if not self._is_training:
            return
        for k in self._shared:
            if not all(torch.equal(self._whole[k], given[k]) for given in self._given):
                raise EnsembleError(
                    f"ens(...): the buffer `{self._slots[k].name}` is kept once for all members"
                    f" (shared=), but forward writes another value for each; leave it out of"
                    f" shared=, or call .eval() on the module that owns it"
                )


def join_trees(what: str, trees: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """One tree from the members' trees, tensors joined; the other leaves have to agree."""

    def combine(path: str, column: list[Any]) -> Any:
        first = column[0]
        if all(isinstance(leaf, Tensor) for leaf in column):
            try:
                return join(column)
            except RuntimeError as error:
                shapes = dict.fromkeys(str(tuple(leaf.shape)) for leaf in column)
                raise EnsembleError(
                    f"ens(...): {what}{path} can't be stacked: the members return tensors of"
                    f" shapes {', '.join(shapes)}; pad them to one shape in forward, or"
                    f" call the members one by one: [member(x) for member in ens]"
                ) from error
        if (
            any(type(leaf) is not type(first) for leaf in column)
            or (isinstance(first, _COMPARABLE) and any(leaf != first for leaf in column))
            # A function of one member can't stand for those of all.
            or (isinstance(first, _RUNNABLE) and any(leaf is not first for leaf in column))
        ):
            found = ", ".join(dict.fromkeys(repr(leaf) for leaf in column[:10]))
            raise EnsembleError(
                f"ens(...): {what}{path} isn't a tensor and differs between the members ({found});"
                f" return it as a tensor, which is stacked"
            )
        return first

    try:
        return transpose(trees, combine)
    except ValueError as error:
        raise EnsembleError(f"ens(...): {what} can't be stacked: {error}") from None


_COMPARABLE = (bool, int, float, complex, str, bytes)
_RUNNABLE = (FunctionType, MethodType, GeneratorType, functools.partial)
