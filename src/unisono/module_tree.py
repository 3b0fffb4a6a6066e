"""Compare two members' module trees: parameters, buffers, submodules, ties, hooks, attributes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from unisono.attributes import Comparison
from unisono.copies import attributes_of
from unisono.describe import NOTHING, contrast, contrast_tensors, describe
from unisono.engine.axis import buffers_of, children_of, non_persistent_buffers_of, parameters_of

PLAIN = "plain tensor, "
# nn.Module's dictionaries of hooks, and those with the numbers of the hooks that are flagged.
_HOOKS = {
    name: sorted(flag for flag in vars(nn.Module()) if flag.startswith(f"{name}_"))
    for name in sorted(vars(nn.Module()))
    if name.endswith("_hooks")
}
_Registered = Callable[[nn.Module], Mapping[str, Any]]
_KINDS: dict[_Registered, str] = {
    parameters_of: "parameter",
    buffers_of: "buffer",
    children_of: "submodule",
}


def join(path: str, name: str) -> str:
    """Return the dotted path of `name` below `path`; the model itself has the empty path."""
    return f"{path}.{name}" if path else name


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a module, not those of its submodules, by name."""
    for name, tensor in chain(parameters_of(module).items(), buffers_of(module).items()):
        if tensor is not None:
            yield name, tensor


def tensors_named(model: nn.Module, names: Collection[str]) -> list[Tensor]:
    """Return the parameters and buffers with these dotted paths; a tied one has several."""
    if not names:
        return []
    found = named_tensors(model)
    return [found[name] for name in names if name in found]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by dotted path; a tied one stands under each of its paths."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def registered(model: nn.Module) -> dict[int, str]:
    """Map the id of each module and tensor that a model registers to its first dotted path."""
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        paths[id(module)] = path
        for name, tensor in own_tensors(module):
            paths.setdefault(id(tensor), join(path, name))
    return paths


class TreeComparison(Comparison):
    """One member's module tree beside member 0's; `visit_modules` compares them.

    Args:
        member: Index of the member.
        own: Where the member registers what it owns: id of a module or tensor -> dotted path.
        reference: The same of member 0.
        values: Paths where the tensors must have equal values, too.
    """

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
        """Record every difference between two modules and all that is below them."""
        if not self.same_class(type(a), type(b)):
            self.report(path, *contrast(type(a), type(b)))
            return
        if a.training != b.training:
            found, expected = (f"{'train' if m.training else 'eval'} mode" for m in (a, b))
            self.report(path, found, expected)
        for registered_in in (parameters_of, buffers_of):
            self._visit_children(a, b, path, within, registered_in)
        self._visit_persistence(a, b, path)
        self._visit_hooks(a, b, path, within)
        self._visit_attributes(a, b, path, within)
        self._visit_children(a, b, path, within, children_of)

    def visit_tensors(self, a: Tensor, b: Tensor, path: str) -> None:
        """Record a difference between two tensors that no member registers."""
        self._visit_contents(a, b, path, values=True, note=PLAIN)

    def _visit_children(
        self, a: nn.Module, b: nn.Module, path: str, within: bool, registered_in: _Registered
    ) -> None:
        """Compare what both modules have under a name; report what only one has."""
        x, y = registered_in(a), registered_in(b)
        if x.keys() != y.keys():
            for name in (*(n for n in y if n not in x), *(n for n in x if n not in y)):
                found, expected = _entry(a, name), _entry(b, name)
                self.report(join(path, name), found or "missing", expected or NOTHING)
        elif registered_in is children_of and list(x) != list(y):
            found, expected = (f"submodules in order {', '.join(m)}" for m in (x, y))
            self.report(path, found, expected)
        for name, expected_child in y.items():
            if name in x and not (x[name] is None and expected_child is None):
                self._visit_registered(x[name], expected_child, join(path, name), within)

    def _visit_registered(self, a: Any, b: Any, path: str, within: bool) -> None:
        """Compare what stands at one path of both trees, and what it is tied to."""
        if a is None or b is None:
            self.report(path, describe(a), describe(b))
            return
        at, expected = self.own.get(id(a)), self.reference.get(id(b))
        if at is None or expected is None:  # below a module that no member registers
            self.visit(a, b, path, within)
        elif at != expected:
            own = f"its own {'tensor' if isinstance(b, Tensor) else 'module'}"
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
        if texts := contrast_tensors(a, b, values=values):
            found, expected = texts
            self.report(path, note + found, expected)

    def _visit_persistence(self, a: nn.Module, b: nn.Module, path: str) -> None:
        x, y = non_persistent_buffers_of(a), non_persistent_buffers_of(b)
        for name in sorted(x ^ y):
            if name in buffers_of(a) and name in buffers_of(b):
                self.report(
                    join(path, name), *(f"persistent={name not in left}" for left in (x, y))
                )

    def _visit_hooks(self, a: nn.Module, b: nn.Module, path: str, within: bool) -> None:
        for name, flags in _HOOKS.items():
            x, y = getattr(a, name), getattr(b, name)
            if not x and not y:
                continue
            if len(x) != len(y):
                self.report(join(path, name), *(f"{len(hooks)} hook(s)" for hooks in (x, y)))
                continue
            self.visit(list(x.values()), list(y.values()), join(path, name), within)
            for flag in flags:
                found, expected = ([k in getattr(m, flag) for k in h] for m, h in ((a, x), (b, y)))
                self.visit(found, expected, join(path, flag), within)

    def _visit_attributes(self, a: nn.Module, b: nn.Module, path: str, within: bool) -> None:
        x, y = attributes_of(a), attributes_of(b)
        for name in x.keys() ^ y.keys():
            if any(name in registered_in(m) for m in (a, b) for registered_in in _KINDS):
                x.pop(name, None), y.pop(name, None)  # told as a parameter, buffer or submodule
        for name in _recomputed(b):
            u, v = x.get(name), y.get(name)
            if isinstance(u, Tensor) and isinstance(v, Tensor):
                self._visit_contents(x.pop(name), y.pop(name), join(path, name), values=False)
        self.visit_items(x, y, path, ".{}" if path else "{}", within)


def _entry(module: nn.Module, name: str) -> str | None:
    """Describe what a module has under a name, if anything."""
    for registered_in, word in _KINDS.items():
        if name in (entries := registered_in(module)):
            value = entries[name]
            if isinstance(value, nn.Module):
                return describe(value)
            return f"{word} None" if value is None else f"{word} of shape {tuple(value.shape)}"
    return f"attribute {describe(vars(module)[name])}" if name in vars(module) else None


def _recomputed(module: nn.Module) -> Iterator[str]:
    """Yield the plain tensors that torch's older hooks compute anew before every forward."""
    for hook in chain.from_iterable(getattr(module, name).values() for name in _HOOKS):
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            yield hook.name
        elif isinstance(hook, BasePruningMethod):
            yield hook._tensor_name
