"""What keeps models from being one ensemble: found in one pass, told in one error.

One copy of the members' code runs for all of them, so members may differ in nothing but the values
of their parameters and buffers. `compare_members` returns every other difference as data;
`check_members` raises them, after refusing what can't be a member at all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from unisono.attributes import NOTHING, Comparison, class_name, contrast, describe, join
from unisono.errors import Difference, IncompatibleMembersError, UnsupportedModelError

_BOOKKEEPING = frozenset(vars(nn.Module()))
_HOOKS = sorted(name for name in _BOOKKEEPING if name.endswith("_hooks"))
_HOOK_FLAGS = sorted(name for name in _BOOKKEEPING if "_hooks_" in name)
# Everything else of nn.Module's own is compared apart, or is not carried over by a copy.
_NOT_ATTRIBUTES = (_BOOKKEEPING | {"_compiled_call_impl"}) - {"_is_full_backward_hook"}
_KINDS = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "submodule"}
_PLAIN = "plain tensor, "
_LISTED = 10


def compare_members(
    models: Sequence[nn.Module], *, shared: Collection[str] = ()
) -> list[Difference]:
    """List all that keeps members 1, 2, ... from being copies of member 0.

    Compared is everything but the values of parameters and buffers: classes, names, shapes, dtypes,
    devices, `requires_grad`, train or eval mode, ties, hooks, and every attribute of every
    submodule. The models are only read; nothing is called or drawn.

    Args:
        models: The members.
        shared: Dotted names of parameters and buffers that are the same for all members; their
            values must be equal, too.

    Returns:
        The differences, by member and then in the order of the module tree; none for equal members.

    Example:
        >>> compare_members([nn.Linear(3, 2), nn.Linear(3, 2)])
        []
        >>> [difference] = compare_members([nn.Dropout(0.1), nn.Dropout(0.2)])
        >>> str(difference)
        'member 1, `p`: 0.2; member 0 has 0.1'
    """
    runs = _compare(models, range(1, len(models)), shared)
    return [difference for run in runs for difference in run.differences]


def check_members(models: Sequence[nn.Module], *, shared: Collection[str] = ()) -> None:
    """Raise unless the models can be the members of one ensemble.

    Args:
        models: The members.
        shared: Dotted names of parameters and buffers that are the same for all members. The
            members may hold the same tensor there, and must hold equal values.

    Raises:
        UnsupportedModelError: If a model isn't a module, or is of a kind that can't be a member.
        IncompatibleMembersError: If there is no model, if members are or own the same object, or if
            members differ in anything but tensor values; the message and `.differences` list all.

    Example:
        >>> check_members([nn.Linear(3, 2) for _ in range(4)])
    """
    _refuse_other_than_models(models)
    _refuse_repeats(models)
    _refuse_kinds(models)
    _refuse_common_tensors(models, shared)
    captures: list[str] = []
    differences: list[Difference] = []
    for run in _compare(models, range(len(models)), shared):  # member 0 too, for its functions
        differences += run.differences
        captures += (f"member {run.member}, `{p}`: {what}" for p, what in run.captures.items())
    if captures:
        raise UnsupportedModelError(
            "Ensemble: functions kept in attributes hold on to modules or tensors of a member:\n\n"
            f"{_listing(captures)}\n\n"
            "Copying a module copies no functions, so all members would use the modules and\n"
            "tensors of that one. Make each a method, which gets them from `self`:\n\n"
            "    def scaled(self, x):        # not self.scaled = lambda x: x * self.scale\n"
            "        return x * self.scale"
        )
    if differences:
        raise IncompatibleMembersError(_explain(differences, len(models)), differences)


def alias_groups(module: nn.Module) -> dict[str, str]:
    """Map the path of every parameter and buffer to the first path of the same tensor.

    Tied tensors have one first path; for all others ``alias_groups(module)[path] == path``.

    Args:
        module: Any module.

    Returns:
        One entry per path, in the order of `named_parameters`, then `named_buffers`.

    Example:
        >>> tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> tied[1].weight = tied[0].weight
        >>> alias_groups(tied)
        {'0.weight': '0.weight', '1.weight': '0.weight'}
    """
    first: dict[int, str] = {}
    named = chain(
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    )
    return {path: first.setdefault(id(tensor), path) for path, tensor in named}


def _compare(
    models: Sequence[nn.Module], members: Iterable[int], shared: Collection[str]
) -> Iterator[_TreeComparison]:
    if not models:
        return
    reference = _registered(models[0])
    values = frozenset(reference[id(t)] for t in _tensors(models[0], shared))
    for member in members:
        run = _TreeComparison(member, _registered(models[member]), reference, values)
        run.visit_modules(models[member], models[0], "", False)
        yield run


def _registered(root: nn.Module) -> dict[int, str]:
    """Map the id of each module and tensor that a model registers to its first dotted path."""
    paths: dict[int, str] = {}

    def add(module: nn.Module, path: str) -> None:
        if id(module) in paths:
            return
        paths[id(module)] = path
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                paths.setdefault(id(tensor), join(path, name))
        for name, child in module._modules.items():
            if child is not None:
                add(child, join(path, name))

    add(root, "")
    return paths


class _TreeComparison(Comparison):
    """Compares two module trees; `values` are the paths where tensors must have equal values."""

    def __init__(
        self,
        member: int,
        own: Mapping[int, str],
        reference: Mapping[int, str],
        values: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(member, own, reference)
        self.values = values

    def visit_modules(self, a: nn.Module, b: nn.Module, path: str, within: bool) -> None:
        if not self.same_class(type(a), type(b)):
            self.report(path, *contrast(type(a), type(b)))
            return
        if a.training != b.training:
            found, expected = (f"{'train' if m.training else 'eval'} mode" for m in (a, b))
            self.report(path, found, expected)
        for kind in ("_parameters", "_buffers"):
            for name, x, y in self._children(a, b, path, kind):
                self._visit_registered(x, y, join(path, name), within)
        for name in sorted(a._non_persistent_buffers_set ^ b._non_persistent_buffers_set):
            if name in a._buffers and name in b._buffers:
                flags = (name not in m._non_persistent_buffers_set for m in (a, b))
                self.report(join(path, name), *(f"persistent={flag}" for flag in flags))
        self._visit_hooks(a, b, path, within)
        self._visit_attributes(a, b, path, within)
        for name, x, y in self._children(a, b, path, "_modules"):
            self._visit_registered(x, y, join(path, name), within)

    def visit_tensors(self, a: Tensor, b: Tensor, path: str) -> None:
        self._visit_contents(a, b, path, values=True, note=_PLAIN)

    def _children(
        self, a: nn.Module, b: nn.Module, path: str, kind: str
    ) -> Iterator[tuple[str, Any, Any]]:
        """Yield what both modules have under a name; report what only one has."""
        x, y = getattr(a, kind), getattr(b, kind)
        if x.keys() != y.keys():
            for name in (*(n for n in y if n not in x), *(n for n in x if n not in y)):
                found, expected = _entry(a, name), _entry(b, name)
                self.report(join(path, name), found or "missing", expected or NOTHING)
        elif kind == "_modules" and list(x) != list(y):
            found, expected = (f"submodules in order {', '.join(m)}" for m in (x, y))
            self.report(path, found, expected)
        for name, expected_child in y.items():
            if name in x and not (x[name] is None and expected_child is None):
                yield name, x[name], expected_child

    def _visit_registered(self, a: Any, b: Any, path: str, within: bool) -> None:
        """Compare what stands at one path of both trees, and what it is tied to."""
        if a is None or b is None:
            self.report(path, describe(a), describe(b))
            return
        at, expected = self.own.get(id(a)), self.reference.get(id(b))
        if at is None or expected is None:  # below a module that no member registers
            self.visit(a, b, path, within)
        elif at != expected:
            kind = "tensor" if isinstance(b, Tensor) else "module"
            own = f"its own {kind}"
            texts = (own if place == path else f"one tied to `{place}`" for place in (at, expected))
            self.report(path, *texts)
        elif at != path:
            pass  # tied in both members, and compared at the first path
        elif isinstance(b, Tensor):
            self._visit_contents(a, b, path, values=path in self.values)
        else:
            self.visit_modules(a, b, path, within)

    def _visit_contents(
        self, a: Tensor, b: Tensor, path: str, *, values: bool, note: str = ""
    ) -> None:
        found, expected = _tensor_facts(a, b)
        if found:
            self.report(path, note + found, expected)
        elif values and a is not b and (unequal := _first_unequal(a, b)):
            index, x, y = unequal
            self.report(path, f"{note}values differ, first at {index}: {x}", y)

    def _visit_hooks(self, a: nn.Module, b: nn.Module, path: str, within: bool) -> None:
        for name in _HOOKS:
            x, y = getattr(a, name), getattr(b, name)
            if not x and not y:
                continue
            place = join(path, name)
            if len(x) != len(y):
                self.report(place, *(f"{len(hooks)} hook(s)" for hooks in (x, y)))
                continue
            self.visit(list(x.values()), list(y.values()), place, within)
            for flag in _HOOK_FLAGS:  # dictionaries with the numbers of the hooks that are flagged
                if flag.startswith(name):
                    own, expected = (
                        [k in getattr(m, flag) for k in h] for m, h in ((a, x), (b, y))
                    )
                    self.visit(own, expected, join(path, flag), within)

    def _visit_attributes(self, a: nn.Module, b: nn.Module, path: str, within: bool) -> None:
        x, y = _attributes(a), _attributes(b)
        for name in x.keys() ^ y.keys():
            if any(name in getattr(m, kind) for m in (a, b) for kind in _KINDS):
                x.pop(name, None), y.pop(name, None)  # told as a parameter, buffer or submodule
        for name in _recomputed(b):
            u, v = x.get(name), y.get(name)
            if isinstance(u, Tensor) and isinstance(v, Tensor):
                self._visit_contents(x.pop(name), y.pop(name), join(path, name), values=False)
        self.visit_items(x, y, path, ".{}" if path else "{}", within)


def _entry(module: nn.Module, name: str) -> str | None:
    """Describe what a module has under a name, if anything."""
    for kind, word in _KINDS.items():
        entries: dict[str, Any] = getattr(module, kind)
        if name in entries:
            value = entries[name]
            if isinstance(value, nn.Module):
                return describe(value)
            return f"{word} None" if value is None else f"{word} of shape {tuple(value.shape)}"
    return f"attribute {describe(vars(module)[name])}" if name in vars(module) else None


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that a copy of the module would have, without nn.Module's own."""
    state = vars(module)
    reduce: Any = type(module).__getstate__
    if reduce is not nn.Module.__getstate__:
        # nn.LSTM and Lightning leave out what belongs to this one object. Parametrised modules
        # refuse to be pickled, but not to be copied.
        with suppress(Exception):
            carried = reduce(module)
            state = carried if isinstance(carried, dict) else state
    return {name: value for name, value in state.items() if name not in _NOT_ATTRIBUTES}


def _recomputed(module: nn.Module) -> Iterator[str]:
    """Yield the plain tensors that torch's older hooks compute anew before every forward."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            yield hook.name
        elif isinstance(hook, BasePruningMethod):
            yield hook._tensor_name


def _tensor_facts(a: Tensor, b: Tensor) -> tuple[str, str]:
    """Return in which facts two tensors differ, or two empty texts."""
    lazy = [nn.parameter.is_lazy(t) for t in (a, b)]
    if any(lazy):
        return ("", "") if all(lazy) else (describe(a), describe(b))
    if (
        type(a) is type(b)
        and a.shape == b.shape
        and (a.dtype, a.device, a.layout) == (b.dtype, b.device, b.layout)
        and a.requires_grad == b.requires_grad
    ):
        return "", ""
    pairs = [(x, y) for x, y in zip(_facts(a), _facts(b), strict=True) if x != y]
    return ", ".join(x for x, _ in pairs), ", ".join(y for _, y in pairs)


def _facts(t: Tensor) -> tuple[str, ...]:
    texts = (f"shape {tuple(t.shape)}", f"dtype {t.dtype}", f"device {t.device}")
    return (*texts, f"layout {t.layout}", f"requires_grad={t.requires_grad}", describe(type(t)))


def _first_unequal(a: Tensor, b: Tensor) -> tuple[tuple[int, ...], str, str] | None:
    """Return where two tensors of the same facts first differ bitwise, and both values there."""
    if a.numel() == 0 or a.is_meta or hasattr(a, "fake_mode"):
        return None  # no values to differ
    x, y = _flat(a), _flat(b)
    unequal = (x.view(torch.uint8) != y.view(torch.uint8)).view(x.numel(), -1).any(1)
    if x.is_floating_point() or x.is_complex():
        wide = torch.complex128 if x.is_complex() else torch.float64
        unequal &= ~(x.to(wide).isnan() & y.to(wide).isnan())  # NaN equals NaN, of any bits
    if not unequal.any():
        return None
    at = int(unequal.nonzero()[0])
    index = tuple(int(i) for i in np.unravel_index(at, a.shape))
    return index, str(x[at].item()), str(y[at].item())


def _flat(t: Tensor) -> Tensor:
    t = t.detach().dequantize() if t.is_quantized else t.detach()
    dense = t if t.layout is torch.strided else t.to_dense()
    return dense.resolve_conj().resolve_neg().reshape(-1).contiguous()


def _refuse_other_than_models(models: Any) -> None:
    if isinstance(models, (nn.Module, Tensor)) and not isinstance(models, nn.ModuleList):
        raise UnsupportedModelError(
            f"Ensemble: the members come as a list, got one {describe(models)}. Build several:\n\n"
            "    models = [make_model() for _ in range(10)]"
        )
    if len(models) == 0:
        raise IncompatibleMembersError(
            "Ensemble: an ensemble has at least one member, got an empty list."
        )
    for i, model in enumerate(models):
        if isinstance(model, nn.Module):
            continue
        found = f"Ensemble: every member is an nn.Module, but member {i} is {_article(model)}."
        if isinstance(model, type) and issubclass(model, nn.Module):
            name = model.__name__
            found += (
                f"\nCall the class to build a model:\n\n    models = [{name}() for _ in range(10)]"
            )
        raise UnsupportedModelError(found)


def _article(value: object) -> str:
    return (
        f"the {describe(value)}"
        if callable(value)
        else f"an object of type {class_name(type(value))}"
    )


def _refuse_repeats(models: Sequence[nn.Module]) -> None:
    places: dict[int, list[int]] = {}
    for i, model in enumerate(models):
        places.setdefault(id(model), []).append(i)
    repeats = [f"members {_numbers(where)}" for where in places.values() if len(where) > 1]
    if repeats:
        n = len(models)
        raise IncompatibleMembersError(
            "Ensemble: the members must be different objects, but these are one and the same:\n\n"
            f"{_listing(repeats)}\n\n"
            f"`[model] * {n}` names one model {n} times. Build {n}, or copy one {n} times:\n\n"
            f"    models = [make_model() for _ in range({n})]\n"
            f"    models = [copy.deepcopy(model) for _ in range({n})]"
        )


def _refuse_kinds(models: Sequence[nn.Module]) -> None:
    for i, model in enumerate(models):
        for path, module in model.named_modules():
            if refusal := _refusal(module):
                what, remedy = refusal
                place = f"`{path}` of member {i}" if path else f"member {i}"
                raise UnsupportedModelError(f"Ensemble: {place} is {what}. {remedy}")


def _refusal(module: nn.Module) -> tuple[str, str] | None:
    """Say what kind of module can't be in a member, and what to do instead."""
    kind = class_name(type(module))
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "a ScriptModule, whose code can't be read",
            "Pass the Python module that was given to torch.jit.script or torch.jit.trace.",
        )
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return (
            f"wrapped in {kind}",
            "Pass the module inside, `model.module`, and wrap the ensemble instead.",
        )
    if kind.endswith("eval_frame.OptimizedModule"):
        return (
            "wrapped by torch.compile",
            "Pass the module before torch.compile, then torch.compile(Ensemble(models)).",
        )
    if any(nn.parameter.is_lazy(t) for t in _own_tensors(module)):
        return (
            f"{kind}, which has no shape yet",
            "Run each model once, `model(example_input)`: lazy parameters get their shape then.",
        )
    return None


def _refuse_common_tensors(models: Sequence[nn.Module], shared: Collection[str]) -> None:
    """Refuse members that own one tensor in common: training one would change the other."""
    modules: dict[int, tuple[int, str]] = {}
    tensors: dict[object, tuple[int, str]] = {}
    facts: list[str] = []
    for i, model in enumerate(models):
        told = {id(t) for t in _tensors(model, shared)}
        for path, module in model.named_modules():
            owner, place = modules.setdefault(id(module), (i, path))
            inside = {id(t) for t in chain(module.parameters(), module.buffers())}
            if owner != i and not inside <= told:
                facts.append(f"member {i}, `{path}`: the very module `{place}` of member {owner}")
                told |= inside
            for name, tensor in chain(module._parameters.items(), module._buffers.items()):
                if tensor is None or id(tensor) in told:
                    continue
                owner, place = tensors.setdefault(_memory(tensor), (i, join(path, name)))
                if owner != i:
                    where = f"the memory of `{place}` of member {owner}"
                    facts.append(f"member {i}, `{join(path, name)}`: {where}")
    if facts:
        name = facts[0].split("`")[1]
        raise IncompatibleMembersError(
            "Ensemble: members own tensors in common, so training one would change another:\n\n"
            f"{_listing(facts)}\n\n"
            "Keep one for all members by naming it, or give each member a copy:\n\n"
            f'    Ensemble(models, shared=["{name}"])\n'
            "    Ensemble([copy.deepcopy(model) for model in models])"
        )


def _memory(t: Tensor) -> object:
    """Return what is equal for two tensors that start at the same place in memory.

    Only the start counts: the members of an unstacked ensemble are views that interleave.
    """
    if hasattr(t, "fake_mode") or t.layout is not torch.strided:  # no memory to point to
        return id(t)
    return (t.device, t.data_ptr()) if t.numel() and t.data_ptr() else id(t)


def _tensors(model: nn.Module, names: Collection[str]) -> list[Tensor]:
    if not names:
        return []
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return [found[name] for name in names if name in found]


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    return (
        t for t in chain(module._parameters.values(), module._buffers.values()) if t is not None
    )


def _explain(differences: Sequence[Difference], num_members: int) -> str:
    differing = len({difference.member for difference in differences})
    hint = ""
    if any(difference.found.startswith(_PLAIN) for difference in differences):
        hint = (
            "\n\nA plain tensor becomes each member's own with self.register_buffer(name, tensor),"
            "\nand modules in a plain list with nn.ModuleList(modules)."
        )
    return (
        f"Ensemble: members must share one architecture, but {differing} of {num_members} "
        f"differ from member 0:\n\n{_listing([str(d) for d in differences])}\n\n"
        "One copy of the module's code runs for all members, so everything except tensor\n"
        "values has to agree. Build them from one constructor:\n\n"
        f"    models = [make_model() for _ in range({num_members})]{hint}"
    )


def _listing(facts: Sequence[str]) -> str:
    lines = [f"  {fact}" for fact in facts[:_LISTED]]
    if len(facts) > _LISTED:
        lines.append(f"  ... and {len(facts) - _LISTED} more")
    return "\n".join(lines)


def _numbers(members: Sequence[int]) -> str:
    more = f", ... ({len(members)} in all)" if len(members) > _LISTED else ""
    return ", ".join(map(str, members[:_LISTED])) + more
