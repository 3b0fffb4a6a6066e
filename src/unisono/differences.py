"""What keeps models from being one ensemble: found in one pass, told in one error.

One copy of the members' code runs for all of them, so members may differ in nothing but the values
of their parameters and buffers. `compare_members` returns every other difference as data;
`check_members` raises them, after refusing what can't be a member at all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import nn

from unisono.describe import list_facts
from unisono.errors import Difference, EnsembleError, IncompatibleMembersError
from unisono.module_tree import PLAIN, TreeComparison, named_tensors, registered, tensors_named
from unisono.refusals import refuse_captures, refuse_models


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
    refuse_models(models, shared)
    captures: list[str] = []
    differences: list[Difference] = []
    for run in _compare(models, range(len(models)), shared):  # member 0 too, for its functions
        differences += run.differences
        captures += (f"member {run.member}, `{p}`: {what}" for p, what in run.captures.items())
    refuse_captures(captures)
    if differences:
        raise IncompatibleMembersError(_explain(differences, len(models)), differences)


def check_in_place(before: nn.Module, after: nn.Module, index: int) -> None:
    """Raise if more has changed in a member than the elements of its tensors.

    Args:
        before: The member, put together before the change.
        after: The same member, put together beside it, on the same storage.
        index: Which member it is.

    Raises:
        EnsembleError: If anything else has changed.
    """
    facts = [
        f"`{d.path}`: {d.found}; it had {d.expected}" for d in compare_members([before, after])
    ]
    own = [named_tensors(module) for module in (before, after)]
    facts += [
        f"`{name}`: another tensor instead of the same one with other elements"
        for name, tensor in own[0].items()
        if name in own[1] and own[1][name].data_ptr() != tensor.data_ptr()
    ]
    if facts:
        raise EnsembleError(
            f"ens.apply: fn writes to tensors in place, but in member {index} it changed more than"
            f" that:\n\n{list_facts(facts)}\n\n"
            f"A member is put together anew whenever it is asked for, so this would be lost.\n"
            f"Apply fn to the models, and build the ensemble from them:\n\n"
            f"    ens = Ensemble([model.apply(fn) for model in ens.unstack()])"
        )


def _compare(
    models: Sequence[nn.Module], members: Iterable[int], shared: Collection[str]
) -> Iterator[TreeComparison]:
    if not models:
        return
    reference = registered(models[0])
    values = frozenset(reference[id(t)] for t in tensors_named(models[0], shared))
    for member in members:
        run = TreeComparison(member, registered(models[member]), reference, values)
        run.visit_modules(models[member], models[0], "", False)
        yield run


def _explain(differences: Sequence[Difference], num_members: int) -> str:
    differing = len({difference.member for difference in differences})
    hint = ""
    if any(difference.found.startswith(PLAIN) for difference in differences):
        hint = (
            "\n\nA plain tensor becomes each member's own with self.register_buffer(name, tensor),"
            "\nand modules in a plain list with nn.ModuleList(modules)."
        )
    return (
        f"Ensemble: members must share one architecture, but {differing} of {num_members} "
        f"differ from member 0:\n\n{list_facts([str(d) for d in differences])}\n\n"
        "One copy of the module's code runs for all members, so everything except tensor\n"
        "values has to agree. Build them from one constructor:\n\n"
        f"    models = [make_model() for _ in range({num_members})]{hint}"
    )
