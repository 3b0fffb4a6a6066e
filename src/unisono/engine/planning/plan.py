"""What was decided for one call signature, and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, Final, Literal, NamedTuple

StrategyName = Literal["auto", "fused", "vmap", "loop"]
RunName = Literal["fused", "vmap", "loop"]
MemoryFormat = Literal["contiguous", "channels_last", "transposed"]
How = Literal["rule", "torch", "member"]

_WAYS: Final[Mapping[How, str]] = {
    "rule": "rule of unisono",
    "torch": "rule of torch",
    "member": "member by member",
}


class Candidate(NamedTuple):
    """One way to run a call."""

    strategy: RunName
    chunk_size: int | None = None
    memory_format: MemoryFormat = "contiguous"

    def name(self, stored: MemoryFormat) -> str:
        """As it is shown beside others: ``fused, 5 at a time, channels_last``.

        Args:
            stored: The format in which parameters are stored, which goes without saying.
        """
        parts: list[str] = [self.strategy]
        if self.chunk_size is not None:
            parts.append(f"{self.chunk_size} at a time")
        if self.memory_format != stored:
            parts.append(self.memory_format)
        return ", ".join(parts)


@dataclass(frozen=True)
class OpRecord:
    """One op of the forward, and how it ran for all members.

    Args:
        path: Dotted path of the innermost module that ran it; empty for the member itself.
        op: Name of the op.
        how: ``"rule"`` of unisono, batching rule of ``"torch"``, or ``"member"`` by member.
        rule: The function of unisono that ran it, empty where none did.
        share: Share of the time of the forward, between 0 and 1.

    Example:
        >>> OpRecord("fc1", "linear", "rule", "linear", 0.6).path
        'fc1'
    """

    path: str
    op: str
    how: How
    rule: str
    share: float


@dataclass(frozen=True)
class Plan:
    """The way that was chosen for calls of one signature, and what was measured.

    Args:
        strategy: ``"fused"``, ``"vmap"`` or ``"loop"``.
        chunk_size: How many members run at once; None for all.
        reason: Why this way.
        candidates: Seconds of each way that was measured, fastest first; empty if none was.
        memory_format: How parameters are stored: ``"contiguous"``, convolutions in
            ``"channels_last"``, or the weights of linear layers ``"transposed"``.
        op_by_op: Whether some op can't run for all members at once and goes one by one.
        ops: The ops of the forward in order; filled by `Ensemble.explain` only.

    Example:
        >>> plan = Plan("fused", None, "the fastest", {"fused": 1e-4, "loop": 5e-4})
        >>> print(plan)
        Plan: fused
          the fastest
        <BLANKLINE>
          candidate    time
          ---------  ------
          fused      100 us
          loop       500 us
    """

    strategy: RunName
    chunk_size: int | None
    reason: str
    candidates: Mapping[str, float] = field(default_factory=dict)
    memory_format: MemoryFormat = "contiguous"
    op_by_op: bool = False
    ops: tuple[OpRecord, ...] = ()

    @property
    def title(self) -> str:
        """The way in words."""
        way = Candidate(self.strategy, self.chunk_size, self.memory_format).name("contiguous")
        return f"{way}, some ops one by one" if self.op_by_op else way

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain dicts, lists, strings and numbers, as JSON takes them."""
        fields = asdict(self)
        fields["candidates"] = dict(self.candidates)
        fields["ops"] = [asdict(op) for op in self.ops]
        return fields

    def __str__(self) -> str:
        lines = [f"Plan: {self.title}", f"  {self.reason}"]
        if self.candidates:
            rows = [(name, seconds(time)) for name, time in self.candidates.items()]
            lines += ["", *_table(("candidate", "time"), rows, right=1)]
        if self.ops:
            lines += ["", *_table(_OPS, _op_rows(self.ops), right=3)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        parts = [f"<p><b>Plan: {escape(self.title)}</b><br>{escape(self.reason)}</p>"]
        if self.candidates:
            rows = [(name, seconds(time)) for name, time in self.candidates.items()]
            parts.append(_html_table(("candidate", "time"), rows))
        if self.ops:
            parts.append(_html_table(_OPS, _op_rows(self.ops)))
        return "".join(parts)


_OPS: Final = ("module", "op", "how", "share")


def _op_rows(ops: Sequence[OpRecord]) -> list[tuple[str, ...]]:
    return [
        (
            op.path or "(member)",
            op.op,
            f"{_WAYS[op.how]}: {op.rule}" if op.rule else _WAYS[op.how],
            f"{op.share:.1%}",
        )
        for op in ops
    ]


def seconds(time: float) -> str:
    """A duration with its unit, three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if time >= size:
            return f"{time / size:.3g} {unit}"
    return f"{time * 1e6:.3g} us"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: int) -> list[str]:
    """Lines with columns aligned; column ``right`` to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [
            cell.rjust(width) if k == right else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
