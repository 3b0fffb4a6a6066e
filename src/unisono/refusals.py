"""Refuse what can't be a member at all, whatever the other members are like.

That is: other things than modules, one model given twice, modules whose code can't be run for all
members at once, tensors that two members own in common, and functions that hold on to a member.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from unisono.describe import class_name, describe, list_facts, list_numbers
from unisono.errors import IncompatibleMembersError, UnsupportedModelError
from unisono.module_tree import join, own_tensors, tensors_named


def refuse_models(models: Sequence[nn.Module], shared: Collection[str]) -> None:
    """Raise if any of the models can't be a member, or two can't be members at once.

    Args:
        models: The models; other things are refused, too.
        shared: Dotted names of the tensors that members may have in common.

    Raises:
        UnsupportedModelError: If a model isn't a module, or is of a kind that can't be a member.
        IncompatibleMembersError: If there is no model, or if two are or own the same object.
    """
    refuse_no_list(models)
    _refuse_other_than_models(models)
    _refuse_repeats(models)
    _refuse_kinds(models)
    _refuse_common_tensors(models, shared)


def refuse_no_list(models: Any) -> None:
    """Raise if the models don't come as a list or another iterable of several.

    Raises:
        UnsupportedModelError: If one model was given, or something that has no members.
    """
    is_one = isinstance(models, (nn.Module, Tensor)) and not isinstance(models, nn.ModuleList)
    if is_one or not isinstance(models, Iterable):
        raise UnsupportedModelError(
            f"Ensemble: the members come as a list, got one {describe(models)}. Build several:\n\n"
            "    models = [make_model() for _ in range(10)]"
        )


def refuse_captures(captures: Sequence[str]) -> None:
    """Raise if functions in attributes hold on to their member: copies would all use that one.

    Args:
        captures: One line for each: member, path and what is held.

    Raises:
        UnsupportedModelError: If there are any.
    """
    if captures:
        raise UnsupportedModelError(
            "Ensemble: functions kept in attributes hold on to modules or tensors of a member:\n\n"
            f"{list_facts(captures)}\n\n"
            "Copying a module copies no functions, so all members would use the modules and\n"
            "tensors of that one. Make each a method, which gets them from `self`:\n\n"
            "    def scaled(self, x):        # not self.scaled = lambda x: x * self.scale\n"
            "        return x * self.scale"
        )


def _refuse_other_than_models(models: Sequence[Any]) -> None:
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
    repeats = [f"members {list_numbers(where)}" for where in places.values() if len(where) > 1]
    if repeats:
        n = len(models)
        raise IncompatibleMembersError(
            "Ensemble: the members must be different objects, but these are one and the same:\n\n"
            f"{list_facts(repeats)}\n\n"
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
    if any(nn.parameter.is_lazy(t) for _, t in own_tensors(module)):
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
        told = {id(t) for t in tensors_named(model, shared)}
        for path, module in model.named_modules():
            owner, place = modules.setdefault(id(module), (i, path))
            if owner != i and (inside := _ids(module)) - told:
                facts.append(f"member {i}, `{path}`: the very module `{place}` of member {owner}")
                told |= inside
            for name, tensor in own_tensors(module):
                if id(tensor) in told:
                    continue
                owner, place = tensors.setdefault(_memory(tensor), (i, join(path, name)))
                if owner != i:
                    where = f"the memory of `{place}` of member {owner}"
                    facts.append(f"member {i}, `{join(path, name)}`: {where}")
    if facts:
        name = facts[0].split("`")[1] + (".*" if "the very module" in facts[0] else "")
        raise IncompatibleMembersError(
            "Ensemble: members own tensors in common, so training one would change another:\n\n"
            f"{list_facts(facts)}\n\n"
            "Keep one for all members by naming it, or give each member a copy:\n\n"
            f'    Ensemble(models, shared=["{name}"])\n'
            "    Ensemble([copy.deepcopy(model) for model in models])"
        )


def _ids(module: nn.Module) -> set[int]:
    return {id(t) for t in chain(module.parameters(), module.buffers())}


def _memory(t: Tensor) -> object:
    """Return what is equal for two tensors that start at the same place in memory.

    Only the start counts: the members of an unstacked ensemble are views that interleave.
    """
    if hasattr(t, "fake_mode") or t.layout is not torch.strided:  # no memory to point to
        return id(t)
    return (t.device, t.data_ptr()) if t.numel() and t.data_ptr() else id(t)
