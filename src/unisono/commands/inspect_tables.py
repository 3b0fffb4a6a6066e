"""What ``unisono inspect`` prints for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from rich.table import Table

from unisono.commands.inspect import Inspection, TensorFacts
from unisono.commands.norms import Norms
from unisono.commands.printable import printable

_SHOWN: Final = 32  # members
_KINDS: Final = {
    "ensemble": "an ensemble of unisono",
    "table run": "the members of a run on a table",
    "training": "a training checkpoint of unisono, not a saved ensemble",
    "model": "the checkpoint of one model",
}


def summary(found: Inspection) -> list[str]:
    """Return what there is to say beside the tables, one fact a line."""
    lines = [f"{found.path}: {_KINDS[found.kind]}, {size(found.nbytes)}"]
    if found.members is None:
        lines.append(f"{found.count(shared=False):,} values in {len(found.tensors)} tensors")
    else:
        shared = found.count(shared=True)
        also = f", {shared:,} more shared by all" if shared else ""
        lines.append(
            f"{found.members} members of {found.count(shared=False):,} parameters each{also}"
        )
    facts = found.facts
    if facts is not None:
        lines.append(f"of {_classes(facts.outline)}")
        options = (f"{name}={value!r}" for name, value in facts.options.items())
        lines.append(f"options: {', '.join(options)}")
        lines.append(f"mode: {_mode(facts.evaluating, facts.outline)}")
        lines += [f"tied: {second} is {first}" for second, first in facts.ties.items()]
        lines += [
            f"combination: {name} {_short(value)}" for name, value in found.combination.items()
        ]
        lines.append(f"written by {', '.join(f'{n} {v}' for n, v in facts.versions.items())}")
    if found.checked:
        lines.append("all values are those that were saved: their checksums agree")
    return lines


def tensor_table(found: Inspection) -> Table:
    """Lay out names, shapes, dtypes and sizes of the tensors."""
    title = "tensors" if found.members is None else "tensors, with the shapes of one member"
    table = _table(title)
    table.add_column("", overflow="fold")
    table.add_column("shape")
    table.add_column("dtype")
    if found.members is not None:
        table.add_column("what")
    table.add_column("bytes", justify="right")
    for tensor in found.tensors:
        row = [printable(tensor.name), str(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        if found.members is not None:
            row.append(f"shared {tensor.what}" if tensor.shared else tensor.what)
        table.add_row(*row, f"{tensor.nbytes:,}")
    return table


def norm_table(found: Inspection) -> Table | None:
    """Lay out the norms of the tensors; None if no tensor has one."""
    own = [tensor for tensor in found.tensors if tensor.norms is not None]
    if not own:
        return None
    table = _table("norms" if found.members is None else "norms over the members")
    table.add_column("", overflow="fold")
    if found.members is None:
        table.add_column("norm", justify="right")
        table.add_column("values not finite", justify="right")
    else:
        for name in ("least", "mean", "most"):
            table.add_column(name, justify="right")
        table.add_column("not finite in", justify="right")
        table.caption = "in brackets: the member"
    for tensor in own:
        table.add_row(*_norm_row(tensor, plain=found.members is None))
    return table


def member_table(found: Inspection) -> Table | None:
    """Lay out the norm of each member and what is unusual about it; None without members.

    Of many members those are shown of which there is something to say, and then the farthest.
    """
    norms = found.norms
    if norms is None or found.members is None:
        return None
    table = _table("norms of the parameters")
    table.add_column("member", justify="right")
    table.add_column("norm", justify="right")
    table.add_column("distance to the mean", justify="right")
    is_unusual = any(found.remarks)
    if is_unusual:
        table.add_column("unusual", overflow="fold")
    shown = _chosen(norms, found.remarks)
    for i in shown:
        remark = found.remarks[i]
        row = [str(i), _short(norms.norm[i]), _short(norms.distance[i])]
        table.add_row(*row, *([remark] if is_unusual else []), style="bold" if remark else "")
    left = found.members - len(shown)
    if left:
        table.caption = f"{left:,} more members are nearer to the mean; --json has all"
    return table


def size(nbytes: int) -> str:
    """Return a number of bytes with a fitting unit.

    Example:
        >>> size(512), size(4_730_000)
        ('512 bytes', '4.73 MB')
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes} bytes"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", caption_justify="left")


def _norm_row(tensor: TensorFacts, *, plain: bool) -> Iterator[str]:
    norms = tensor.norms
    assert norms is not None
    broken = np.flatnonzero(norms.not_finite)
    yield printable(tensor.name)
    if plain:
        yield _short(norms.norm[0])
        yield f"{int(norms.not_finite[0]):,}" if len(broken) else ""
        return
    known = np.flatnonzero(norms.not_finite == 0)
    if len(norms.norm) == 1:
        yield from ("", _short(norms.norm[0]), "")
    elif len(known) == 0:
        yield from ("nan", "nan", "nan")
    else:
        values = norms.norm[known]
        for k in (values.argmin(), None, values.argmax()):
            which = f" ({known[k]})" if k is not None and values.min() < values.max() else ""
            yield _short(values.mean() if k is None else values[k]) + which
    members = ", ".join(map(str, broken[:5])) + (" ..." if len(broken) > 5 else "")
    yield ("all" if tensor.shared else members) if len(broken) else ""


def _chosen(norms: Norms, texts: Sequence[str]) -> list[int]:
    distance = np.nan_to_num(norms.distance, nan=np.inf)
    order = sorted(range(len(texts)), key=lambda i: (not texts[i], -distance[i], i))
    return sorted(order[:_SHOWN])


def _classes(outline: Mapping[str, Mapping[str, str]]) -> str:
    """The class of the model, and how often it has which modules."""
    names = {path: own["class"].rpartition(".")[2] for path, own in outline.items()}
    inside = Counter(name for path, name in names.items() if path)
    listed = ", ".join(f"{count} {name}" for name, count in inside.most_common())
    return outline.get("", {}).get("class", "an unknown class") + (f": {listed}" if listed else "")


def _mode(evaluating: Sequence[str], outline: Mapping[str, object]) -> str:
    modules = len(evaluating)
    if modules == 0:
        return "train"
    return "eval" if modules >= len(outline) else f"eval in {modules} of {len(outline)} modules"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_short(x) for x in value[:10]) + (" ..." if len(value) > 10 else "")
    return "nan" if value is None else f"{value:.4g}"
