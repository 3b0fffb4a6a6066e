"""What the zoo found, counted and as a page of the documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

HOW = {
    "fused": "fused",
    "fallbacks": "fused, some operations by member",
    "loop": "member by member",
    "not finished": "not finished",
    "error": "error",
}

HEAD = """# The zoo

Made by `make zoo`. Two members with random weights, minibatches of two, the smallest images that
the model takes, in float64 (float32 where the model's own code asks for it). Compared with the
plain loop: the outputs in eval mode, for one minibatch and for a minibatch per member; outputs,
gradients and buffers in train mode. Greatest difference allowed, relative to the greatest value of
the loop: 1e-6 in float64, 1e-3 in float32. Dropout and stochastic depth are set to zero.
"""


def counts(findings: Sequence[Mapping[str, Any]]) -> str:
    """One line for each library and one for all: how many are equal, and how they ran."""
    lines = ["| library | models | equal to the loop | no whole-call loop | fused entirely |"]
    lines.append("|---|---|---|---|---|")
    libraries = sorted({library_of(finding) for finding in findings})
    for library in [*libraries, "all"]:
        own = [f for f in findings if library in ("all", library_of(f))]
        equal = sum(f["equal"] for f in own)
        how = Counter(f["how"] for f in own)
        together = how["fused"] + how["fallbacks"]
        shares = [
            f"{k} ({100 * k / max(len(own), 1):.1f} %)" for k in (equal, together, how["fused"])
        ]
        lines.append(f"| {library} | {len(own)} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def page(findings: Sequence[Mapping[str, Any]], versions: str) -> str:
    """The page docs/zoo.md."""
    parts = [HEAD, f"{versions}.\n", counts(findings), ""]
    for library in sorted({library_of(finding) for finding in findings}):
        parts += [f"## {library}\n", "| model | equal | how it runs | greatest difference |"]
        parts.append("|---|---|---|---|")
        parts += [_row(f) for f in findings if library_of(f) == library]
        parts.append("")
    return "\n".join(parts)


def line(finding: Mapping[str, Any]) -> str:
    """One finding on a terminal."""
    verdict = "equal" if finding["equal"] else "NOT EQUAL"
    why = "; ".join(map(_in_short, finding["reasons"]))
    if finding["failure"]:
        why += " | " + finding["failure"].strip().splitlines()[-1]
    seconds = finding["seconds"]
    name, how, note = finding["name"], HOW[finding["how"]], finding["note"]
    return f"{name}: {verdict}, {how}, {seconds} s {note}{why}"


def library_of(finding: Mapping[str, Any]) -> str:
    """The first part of the name."""
    return str(finding["name"]).partition("/")[0]


def _row(finding: Mapping[str, Any]) -> str:
    how = HOW[finding["how"]]
    if finding["reasons"]:
        how += ": " + _in_short(finding["reasons"][0]).replace("|", "\\|")
    greatest = max(finding["errors"].values(), default=float("nan"))
    equal = "yes" if finding["equal"] else "**no**"
    if finding["note"]:
        equal += f" ({finding['note'].strip()})"
    name = finding["name"].partition("/")[2]
    return f"| {name} | {equal} | {how} | {greatest:.0e} ({finding['dtype']}) |"


def _in_short(reason: str) -> str:
    """The operations that a warning names, or else its first line."""
    lines = [line.strip() for line in reason.strip().splitlines()] or [""]
    named = [line.rpartition(": ")[2] for line in lines if line.startswith("`")]
    short = ", ".join(dict.fromkeys(named)) or lines[0]
    return short if len(short) <= 140 else short[:137] + "..."
