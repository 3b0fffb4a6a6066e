"""N models to stacked tensors and back, bitwise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unisono.engine.axis import (
    buffers_of,
    children_of,
    non_persistent_buffers_of,
    parameters_of,
)
from unisono.engine.tree import tree_map
from unisono.errors import UnsupportedModelError
from unisono.module_tree import named_tensors


class MemberTree(nn.Module):
    """A bare module that owns the stacked tensors of the member's module of the same path.

    It has the names, the children and the train/eval mode of that module but not its class, so
    code that looks for ``nn.Linear`` doesn't mistake a stacked weight for an ordinary one.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the tree owns tensors, it doesn't compute."""
        raise TypeError(
            "ens.members owns the stacked tensors and can't be called; call ens(x) for all"
            " members, or ens[i](x) for one"
        )

    def __getitem__(self, name: int | str) -> Any:
        """The child or tensor ``name``, as in ``ens.members.layers[0].weight``."""
        return getattr(self, str(name))

    def extra_repr(self) -> str:
        """The shapes of the tensors that this module owns."""
        own = [*parameters_of(self).items(), *buffers_of(self).items()]
        return ", ".join(f"{name}={tuple(t.shape)}" for name, t in own if t is not None)


def stack(models: Sequence[nn.Module], *, shared: Collection[str] = ()) -> MemberTree:
    """Stack the parameters and buffers of N models along a new leading axis.

    ``members.get_parameter(name)[i] == models[i].get_parameter(name)``, bitwise. The tree holds
    copies: training it leaves ``models`` untouched. `unstack` is the exact inverse.

    Args:
        models: The members, at least one; they may differ only in the values of their tensors.
        shared: Dotted names of tensors to keep once, without a member axis.

    Returns:
        The tree of stacked tensors, with the names, ties, modes, memory formats, persistent
        flags and ``requires_grad`` of the models.

    Shape:
        - member tensor: (*) -> stacked tensor: (N, *)

    Example:
        >>> members = stack([nn.Linear(3, 2) for _ in range(5)])
        >>> members.weight.shape
        torch.Size([5, 2, 3])
    """
    columns = [named_tensors(model) for model in models]

    def join(name: str, first: Tensor) -> Tensor:
        if first.layout is not torch.strided:
            raise UnsupportedModelError(
                f"Ensemble: `{name}` is a {first.layout} tensor, and only dense tensors can be"
                f" stacked; convert it with `.to_dense()`"
            )
        if name in shared:
            return first.detach().clone()
        return _stack_tensors([column[name] for column in columns])

    return mirror(models[0], join)


def select(
    members: MemberTree,
    indices: Sequence[int],
    *,
    shared: Collection[str],
    attributes: Collection[tuple[str, str]],
) -> MemberTree:
    """A copy of the tree with only the members ``indices``, in that order."""

    def take(name: str, kept: Tensor) -> Tensor:
        source = kept.detach()
        return source.clone() if name in shared else _stack_tensors([source[i] for i in indices])

    def take_leaf(leaf: Any) -> Any:
        return take("", leaf) if isinstance(leaf, Tensor) else leaf

    chosen = mirror(members, take)
    for path, key in attributes:
        kept = vars(members.get_submodule(path))[key]
        vars(chosen.get_submodule(path))[key] = tree_map(take_leaf, kept)
    return chosen


def mirror(model: nn.Module, convert: Callable[[str, Tensor], Tensor]) -> MemberTree:
    """The bare tree of a model, its tensors ``convert(name, tensor)``; ties stay ties.

    Args:
        model: A member, or a tree.
        convert: Gives the tensor that stands for one of the model's; called once for tied ones.

    Returns:
        The tree, with the names, modes, persistent flags and ``requires_grad`` of the model.
    """
    trees: dict[int, MemberTree] = {}
    tensors: dict[int, Tensor] = {}

    def converted(name: str, tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            tensors[id(tensor)] = _like(tensor, convert(name, tensor))
        return tensors[id(tensor)]

    def visit(module: nn.Module, prefix: str) -> MemberTree:
        if id(module) in trees:
            return trees[id(module)]
        tree = trees[id(module)] = MemberTree()
        tree.training = module.training
        for key, parameter in parameters_of(module).items():
            tree.register_parameter(key, converted(prefix + key, parameter))
        transient = non_persistent_buffers_of(module)
        for key, buffer in buffers_of(module).items():
            persistent = key not in transient
            tree.register_buffer(key, converted(prefix + key, buffer), persistent=persistent)
        for key, child in children_of(module).items():
            tree.add_module(key, None if child is None else visit(child, f"{prefix}{key}."))
        return tree

    tree = visit(model, "")
    # `visit` refers to itself, and would keep the tensors alive until the next garbage collection.
    trees.clear()
    tensors.clear()
    return tree


def make_template(model: nn.Module) -> nn.Module:
    """The model's module tree without tensors of its own.

    Parameters and buffers become tensors on the ``meta`` device, which have a shape and no
    storage, wherever the model refers to them: ties stay ties, and the flat list of weights of
    an LSTM refers to the same placeholders.

    Args:
        model: A member; it is left untouched.

    Returns:
        A copy of everything else in the model.

    Raises:
        UnsupportedModelError: If the model can't be copied.
    """
    placeholders = {
        id(tensor): _like(tensor, torch.empty_like(tensor.detach(), device="meta"))
        for _, tensor in named_tensors(model).items()
    }
    return _copy_module(model, placeholders)


def unstack(
    template: nn.Module,
    members: MemberTree,
    index: int,
    *,
    shared: Collection[str],
    attributes: Collection[tuple[str, str]],
    copy: bool,
) -> nn.Module:
    """Member ``index`` as an ordinary module of the models' own class.

    Args:
        template: What `make_template` made.
        members: What `stack` made.
        index: The member, counted from 0.
        shared: Names of the tensors without a member axis.
        attributes: Plain attributes (path, key) that hold one value per member.
        copy: Whether the module gets tensors of its own, or views of the stacked ones.

    Returns:
        The module; its parameters are leaves, with a gradient where the stacked ones have one.
    """
    kept = named_tensors(members)
    own = {
        id(placeholder): _member_tensor(kept[name], None if name in shared else index, copy=copy)
        for name, placeholder in named_tensors(template).items()
    }
    member = _copy_module(template, own)
    modes = {path: tree.training for path, tree in members.named_modules()}
    for path, module in member.named_modules():
        module.training = modes[path]

    def take_leaf(leaf: Any) -> Any:
        return _member_tensor(leaf.detach(), index, copy=copy) if isinstance(leaf, Tensor) else leaf

    for path, key in attributes:
        kept_value = vars(members.get_submodule(path))[key]
        vars(member.get_submodule(path))[key] = tree_map(take_leaf, kept_value)
    return member


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """``value`` as a parameter if ``tensor`` is one, with its ``requires_grad``."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value.requires_grad_(tensor.requires_grad)


def empty_stack(tensor: Tensor, n: int, device: torch.device | None = None) -> Tensor:
    """(n, *) without values, each item in the memory format of the tensor."""
    like = torch.empty_like(tensor.detach(), device="meta")
    return torch.empty_strided(
        (n, *like.shape),
        (max(like.numel(), 1), *like.stride()),
        dtype=like.dtype,
        device=device or tensor.device,
    )


def _stack_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """(N, *) with a copy of the tensors, each item in the memory format of the first."""
    out = empty_stack(tensors[0], len(tensors))
    for item, tensor in zip(out.unbind(), tensors, strict=True):
        item.copy_(tensor.detach())
    return out


def _member_tensor(kept: Tensor, index: int | None, *, copy: bool) -> Tensor:
    def take(tensor: Tensor) -> Tensor:
        item = tensor.detach() if index is None else tensor.detach().select(0, index)
        return item.clone() if copy else item

    own = _like(kept, take(kept))
    if isinstance(kept, nn.Parameter) and kept.grad is not None:
        own.grad = take(kept.grad)
    return own


def _copy_module(module: nn.Module, tensors: dict[int, Tensor]) -> nn.Module:
    """A deep copy in which ``tensors[id(t)]`` stands wherever the module refers to tensor t."""
    memo: dict[int, Any] = dict(tensors)
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"Ensemble: a {type(module).__name__} can't be copied ({error}); a member must"
            f" survive copy.deepcopy, so keep open files, locks and tensors with a gradient"
            f" history out of its attributes"
        ) from error
