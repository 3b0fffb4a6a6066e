"""The Python text of a program: one line per op."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from unisono.engine.axis import TorchDispatchMode
from unisono.engine.capture.simplify import Program, own_storages
from unisono.engine.capture.trace import Op, Ref, map_args

_TAKEN: Final = frozenset({*keyword.kwlist, "float", "torch", "replay", "rebuild"})
_WRITTEN_OUT: Final = (
    bool, int, complex, str, type(None), torch.dtype, torch.layout, torch.memory_format,
)  # fmt: skip


@dataclass
class Text:
    """A program as Python text, and what its names stand for."""

    code: str
    weights: dict[str, tuple[Ref, Ref]] = field(default_factory=dict)  # name -> place, weight
    bindings: dict[str, Any] = field(default_factory=dict)  # constants


class _Names:
    """Names for values, each used once."""

    def __init__(self) -> None:
        self._used = set(_TAKEN)
        self.of: dict[Ref, str] = {}

    def new(self, wish: str) -> str:
        """``wish`` as an identifier, with a number if it is taken."""
        base = re.sub(r"\W+", "_", wish).strip("_") or "x"
        base = f"x{base}" if base[0].isdigit() else base
        name, k = base, 2
        while name in self._used:
            name, k = f"{base}_{k}", k + 1
        self._used.add(name)
        return name

    def give(self, ref: Ref, wish: str) -> str:
        self.of[ref] = self.new(wish)
        return self.of[ref]


def write(
    program: Program, input_names: Sequence[str], output: str | None, autocast: Sequence[str]
) -> Text:
    """The text of a program.

    Args:
        program: What to write.
        input_names: A name for each input tensor.
        output: The outputs as Python text with ``{0}``, ``{1}`` for tensors; None if they have to
            be put together by a function, ``rebuild``.
        autocast: Devices whose autocasting a replay has to switch off: the casts are in the ops.
    """
    names = _Names()
    trace = program.trace
    arguments = [names.give(ref, wish) for ref, wish in zip(trace.inputs, input_names, strict=True)]
    text = Text("")
    _bind_tensors(program, names, text)
    lines = _lines(program, names, text)
    found = [names.of[ref] for ref in program.outputs]
    result = output.format(*found) if output is not None else f"rebuild({', '.join(found)})"
    body = [*lines, f"return {result}"]
    for device in autocast:
        body = [f'with torch.autocast("{device}", enabled=False):', *(f"    {b}" for b in body)]
    head = [
        f"# {name}: {_origin(trace.weights[weight], trace.tensor(ref), trace.tensor(weight))}"
        for name, (ref, weight) in text.weights.items()
    ]
    head.append(f"def replay({', '.join(arguments)}):")
    text.code = "\n".join([*head, *(f"    {line}" for line in body)]) + "\n"
    return text


def _origin(name: str, view: Tensor, weight: Tensor) -> str:
    """What a view of a weight is, in words."""
    i = _member(view, weight)
    whole = weight if i is None else weight[i]
    text = (name if i is None else f"{name}[{i}]") + f" {tuple(whole.shape)}"
    if view.shape != whole.shape:
        return f"{text} as {tuple(view.shape)}"
    same = view.stride() == whole.stride()
    return text if same else f"{text} with strides {view.stride()}"


def _member(view: Tensor, weight: Tensor) -> int | None:
    """The member to which a view belongs, None if it is a view of several."""
    if weight.dim() == 0 or weight.numel() == 0 or view.numel() * len(weight) > weight.numel():
        return None
    offset = view.storage_offset() - weight.storage_offset()
    step = weight.stride(0)
    last = offset + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    is_in_one = len(weight) > 1 and step > 0 and offset // step == last // step < len(weight)
    return offset // step if is_in_one else None


def _bind_tensors(program: Program, names: _Names, text: Text) -> None:
    """Names for weights, views of them, and constants, in the order of their use."""
    trace = program.trace
    own = own_storages(trace, program.ops)
    defined = {*trace.inputs}
    for op in program.ops:
        for ref in op.reads:
            if ref in names.of or ref in defined:
                continue
            weight = program.views.get(ref, ref)
            if weight in trace.weights:
                i = _member(trace.tensor(ref), trace.tensor(weight))
                wish = trace.weights[weight] + ("" if i is None else f"_{i}")
                text.weights[names.give(ref, wish)] = (ref, weight)
            else:
                assert trace.values[ref].storage not in own, f"value {ref} is read, never made"
                text.bindings[names.give(ref, "constant")] = trace.tensor(ref)
        defined.update(op.results)


def _lines(program: Program, names: _Names, text: Text) -> list[str]:
    last_use = _last_uses(program)
    lines = []
    count = 0
    for k, op in enumerate(program.ops):
        spell = _Spelling(program, names, text)
        call = spell.call(op)
        new = [ref for ref in op.results if ref not in names.of]
        for ref in new:
            count += 1
            names.give(ref, f"h{count}")
        shapes = ", ".join(str(tuple(program.trace.tensor(ref).shape)) for ref in new)
        target = _targets(op.result, names.of)
        lines.append(f"{target} = {call}  # {shapes}" if new else call)
        dead = [names.of[ref] for ref in last_use.get(k, ()) if k + 1 < len(program.ops)]
        if dead:
            lines.append(f"del {', '.join(dead)}")
    return lines


def _targets(result: Any, names: dict[Ref, str]) -> str:
    if isinstance(result, list):
        inner = ", ".join(_targets(part, names) for part in result)
        return f"[{inner}]" if len(result) == 1 else inner
    return names[result] if isinstance(result, Ref) else "_"


def _last_uses(program: Program) -> dict[int, list[Ref]]:
    """After which op which values can be forgotten, so that their memory is used again."""
    values = program.trace.values
    mine = list(dict.fromkeys(ref for op in program.ops for ref in op.results))
    last: dict[Ref, int] = {}
    for k, op in enumerate(program.ops):
        last.update(dict.fromkeys((*op.reads, *op.results), k))
    kept = {values[ref].storage for ref in program.outputs}
    found: dict[int, list[Ref]] = {}
    for ref in mine:
        if ref not in program.outputs and program.trace.origin(ref) == "op":
            if values[ref].storage not in kept:
                found.setdefault(last[ref], []).append(ref)
    return found


class _Spelling:
    """Writes one op as a call.

    ``torch.relu`` and ``x.relu`` parse their arguments faster than the op object, and read
    better. Whether such a function is the very op with these arguments is seen by calling it in
    a mode that stops at the first op.
    """

    def __init__(self, program: Program, names: _Names, text: Text) -> None:
        self._program = program
        self._names = names
        self._text = text

    def call(self, op: Op) -> str:
        """The op with its arguments as Python text."""
        args = [self._argument(arg) for arg in op.args]
        if op.name == "as_strided" and len(args) > 3:
            args[3] = self._offset(op, args[0])
        named = [f"{name}={self._argument(arg)}" for name, arg in op.kwargs.items()]
        for kind in ("method", "function") if op.name.endswith("_") else ("function", "method"):
            if kind == "function" and self._agrees(op, getattr(torch, op.name, None)):
                return f"torch.{op.name}({', '.join(args + named)})"
            if kind == "method" and op.args and isinstance(op.args[0], Ref):
                if self._agrees(op, getattr(Tensor, op.name, None)):
                    return f"{args[0]}.{op.name}({', '.join(args[1:] + named)})"
        return f"torch.ops.{op.target}({', '.join(args + named)})"

    def _offset(self, op: Op, name: str) -> str:
        """The place in a storage; in that of an input it counts from the input."""
        trace = self._program.trace
        if trace.origin(op.args[0]) != "input":
            return str(op.args[3])
        return f"{name}.storage_offset() + {op.args[3] - trace.tensor(op.args[0]).storage_offset()}"

    def _agrees(self, op: Op, function: Callable[..., Any] | None) -> bool:
        if function is None:
            return False
        tensors = {ref: self._program.trace.tensor(ref) for ref in op.reads}

        def real(arg: Any) -> Any:
            return tensors[arg] if isinstance(arg, Ref) else arg

        args, kwargs = _tupled(map_args(real, op.args)), map_args(real, op.kwargs)
        stop = _FirstOp()  # type: ignore[no-untyped-call]
        try:
            with stop:
                function(*args, **kwargs)
        except _Stopped:
            pass
        except (TypeError, RuntimeError, ValueError):
            return False
        numbers = {id(tensor): ref for ref, tensor in tensors.items()}

        def number(arg: Any) -> Any:
            return numbers.get(id(arg), arg) if isinstance(arg, Tensor) else arg

        found = (map_args(number, stop.args), map_args(number, stop.kwargs))
        return stop.target is op.target and _same(found, (op.args, op.kwargs))

    def _argument(self, arg: Any) -> str:
        if isinstance(arg, Ref):
            return self._names.of[arg]
        if isinstance(arg, list | tuple):
            inner = ", ".join(map(self._argument, arg))
            return f"({inner},)" if len(arg) == 1 else f"({inner})"
        if type(arg) is float:
            return repr(arg) if arg - arg == 0 else f'float("{arg}")'
        if type(arg) in _WRITTEN_OUT:
            return repr(arg)
        known = [name for name, value in self._text.bindings.items() if _same(value, arg)]
        if known:
            return known[0]
        name = self._names.new(str(arg) if isinstance(arg, torch.device) else type(arg).__name__)
        self._text.bindings[name] = arg
        return name


class _Stopped(Exception):
    """An op was reached."""


class _FirstOp(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the first op that is reached, and doesn't run it."""

    target: Any = None
    args: Any = ()
    kwargs: Any = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.target, self.args, self.kwargs = func, args, kwargs or {}
        raise _Stopped


def _tupled(args: Any) -> Any:
    return tuple(map(_tupled, args)) if isinstance(args, list | tuple) else args


def _same(a: Any, b: Any) -> bool:
    """Equal, where a list is a tuple but 1 isn't True."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor) or type(a) is not type(b):
        return a is b
    return bool(a == b)
