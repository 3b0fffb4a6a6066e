"""Param groups: one for all members, or one per member as soon as a value differs.

Of the N groups of N members the first lists the parameters, so each parameter stands once; the key
``"member"`` says whose group it is, None for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from unisono.ensemble import Ensemble
from unisono.optim.hyperparameters import PerMember, parse_all, row_of
from unisono.optim.paths import Method

Group = dict[str, Any]


def default_parameters(ens: Ensemble, *, own_only: bool) -> list[Tensor]:
    """All parameters; without the shared ones that aren't trained if values are per member."""
    return [
        p
        for name, p in ens.members.named_parameters()
        if p.requires_grad or not (own_only and name in ens.shared)
    ]


def sections(groups: Sequence[Group], n: int) -> Iterator[tuple[int, Sequence[Group]]]:
    """The groups that belong to the same parameters, with their place: one of them, or N."""
    place = 0
    while place < len(groups):
        size = 1 if groups[place]["member"] is None else n
        yield place, groups[place : place + size]
        place += size


def pick(groups: Sequence[Group], n: int, members: Sequence[int]) -> list[Group]:
    """The groups of some members, and those for all; not copied."""
    return [group for _, section in sections(groups, n) for group in _of(section, members)]


def join(parts: Sequence[tuple[int, Sequence[Group]]]) -> list[Group]:
    """The groups of all members, from those of blocks one after another; the reverse of `pick`.

    Args:
        parts: For each block its number of members, and the groups of a state of its optimizer.
    """
    blocks = [[list(section) for _, section in sections(groups, n)] for n, groups in parts]
    joined: list[Group] = []
    for same in zip(*blocks, strict=True):
        if same[0][0]["member"] is None:
            joined += same[0]
            continue
        every = [group for section in same for group in section]
        joined += [
            {**group, "member": i, "params": every[0]["params"] if i == 0 else []}
            for i, group in enumerate(every)
        ]
    return joined


def _of(section: Sequence[Group], members: Sequence[int]) -> list[Group]:
    return list(section) if section[0]["member"] is None else [section[i] for i in members]


def select(
    groups: Sequence[Group], n: int, members: Sequence[int], theirs: Mapping[int, Tensor]
) -> list[Group]:
    """Copies of the groups of some members, for the parameters of their ensemble.

    Args:
        groups: The groups of all.
        n: The number of all members.
        members: The members, in their order there.
        theirs: The parameters there, by the ids of those here.
    """
    found = []
    for _, section in sections(groups, n):
        parameters = [theirs[id(p)] for p in section[0]["params"]]
        for k, group in enumerate(_of(section, members)):
            own = {**group, "params": parameters if k == 0 else []}
            if "param_names" in group:
                own["param_names"] = list(section[0]["param_names"]) if k == 0 else []
            if group["member"] is not None:
                own["member"] = k
            found.append(own)
    return found


def expand(name: str, ens: Ensemble, method: Method, group: Any, defaults: Group) -> list[Group]:
    """The group, checked and with all values; N of them if a value is per member.

    Args:
        name: The optimizer, for messages.
        ens: The ensemble.
        method: The kind of optimizer.
        group: ``"params"`` and values, as the user gave them.
        defaults: The optimizer's values.

    Raises:
        TypeError: If it is no dictionary with ``"params"``, or these aren't tensors.
        ValueError: If parameters or values don't fit the ensemble.
    """
    names, parameters = _listed(name, group)
    _check_parameters(name, ens, parameters)
    keys = {spec.name for spec in method.hyperparameters}
    values, problems = parse_all(
        method.hyperparameters, {k: group.get(k, defaults[k]) for k in keys}, len(ens)
    )
    per_member = [spec.name for spec in method.hyperparameters if _is_many(values.get(spec.name))]
    if not problems:
        problems = _row_problems(method, values, len(ens), is_per_member=bool(per_member))
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems))
    if per_member:
        _refuse_shared(name, ens, parameters, {key: values[key][0] for key in per_member})
    rest = {k: v for k, v in group.items() if k not in keys and k not in ("params", "member")}
    made = []
    for member in range(len(ens)) if per_member else (None,):
        is_first = member in (None, 0)
        own = {"params": parameters if is_first else [], "member": member, **rest}
        if names:
            own["param_names"] = names if is_first else []
        made.append(own | row_of(values, member or 0))
    return made


def _is_many(value: Any) -> bool:
    return isinstance(value, PerMember)


def _row_problems(
    method: Method, values: Mapping[str, Any], n: int, *, is_per_member: bool
) -> list[str]:
    if not is_per_member:
        return method.problems(values)
    return [
        f"member {i}: {problem}" for i in range(n) for problem in method.problems(row_of(values, i))
    ]


def _listed(name: str, group: Any) -> tuple[list[str], list[Tensor]]:
    """The names, if there are any, and the tensors of a group."""
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f'{name}: a param group is a dictionary with "params"; got {group!r}')
    given = group["params"]
    if isinstance(given, set):
        raise TypeError(f"{name}: params are in an order that stays, such as a list; got a set")
    items = [given] if isinstance(given, Tensor) else list(given)
    pairs: list[tuple[Any, Any]] = [
        item if isinstance(item, tuple) and len(item) == 2 else (None, item) for item in items
    ]
    wrong = [type(p).__name__ for _, p in pairs if not isinstance(p, Tensor)]
    if wrong:
        raise TypeError(f"{name}: params are tensors, or pairs of a name and a tensor; got {wrong}")
    names = [n for n, _ in pairs if n is not None]
    if names and len(names) != len(pairs):
        raise ValueError(f"{name}: either all params have names or none; got names for {names}")
    return names, [p for _, p in pairs]


def _check_parameters(name: str, ens: Ensemble, parameters: Sequence[Tensor]) -> None:
    own = {id(p) for p in ens.members.parameters()}
    strange = [
        f"params[{k}] of shape {tuple(p.shape)}"
        for k, p in enumerate(parameters)
        if id(p) not in own
    ]
    if strange:
        raise ValueError(
            f"{name}: not a parameter of this ensemble: {', '.join(strange)}; take them from"
            f" ens.parameters() or ens.members, and anything else to an optimizer of torch.optim"
        )


def _refuse_shared(
    name: str, ens: Ensemble, parameters: Sequence[Tensor], first: Mapping[str, Any]
) -> None:
    """Raise if values are per member for parameters that all members share."""
    names = {id(p): n for n, p in ens.members.named_parameters()}
    shared = [names[id(p)] for p in parameters if names[id(p)] in ens.shared]
    if not shared:
        return
    listed = ", ".join(f"`{n}`" for n in shared)
    values = ", ".join(f'"{key}": {value!r}' for key, value in first.items())
    given = ", ".join(f"{key}=[...]" for key in first)
    raise ValueError(
        f"{name}: {', '.join(first)} is given per member, but all {len(ens)} members share"
        f" {listed}, which takes one value; put it into a group of its own:\n"
        f"    own = [p for name, p in ens.members.named_parameters() if name not in ens.shared]\n"
        f"    shared = [{', '.join(map(_expression, shared))}]\n"
        f'    {name}(ens, {given}, params=[{{"params": own}}, {{"params": shared, {values}}}])'
    )


def _expression(dotted: str) -> str:
    """``"0.weight"`` as Python that can be pasted: ``ens.members[0].weight``."""
    parts = dotted.split(".")
    return "ens.members" + "".join(
        f".{part}" if part.isidentifier() else f"[{int(part) if part.isdigit() else part!r}]"
        for part in parts
    )
