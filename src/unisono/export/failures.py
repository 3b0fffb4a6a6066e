"""What the user is told when an ensemble can't be exported: where, why, and the alternative."""

from __future__ import annotations

from torch.export import ExportedProgram

from unisono.engine.traced.exported import FixedSize
from unisono.engine.where import first_sentence
from unisono.ensemble import Ensemble
from unisono.errors import ExportError
from unisono.export.inputs import Example


def check_eval(call: str, ens: Ensemble) -> None:
    """Raise unless every module of the members is in eval mode."""
    training = [path for path, module in ens.members.named_modules() if module.training]
    if training:
        which = "the ensemble is" if "" in training else f"`{training[0]}` is"
        raise ExportError(
            f"{call}: {which} in train mode, in which dropout draws and batch norm counts; for"
            f" predictions call\n\n    ens.eval()\n\nbefore the export. export.program exports"
            f" either mode"
        )


def place_of(program: ExportedProgram, op: str) -> str:
    """Where in the member an op of the program stands; empty if there is none."""
    for node in program.graph.nodes:
        if str(node.target).startswith(op or "?"):
            place = node.meta.get("custom", {})
            return ", ".join(place[key] for key in ("member", "line") if place.get(key))
    return ""


def fixed_text(example: Example, fixed: list[FixedSize]) -> str:
    """Of a batch whose size was fixed by an op."""
    op, path, line, size = fixed[0]
    where = f"{path}, {line}" if line else path
    names = ", ".join(f"`{name}`" for name in example.batch_sizes)
    return (
        f"the size of the batch ({names}) can't stay open: in {where}, it was fixed to {size} when"
        f" `{op}` ran. Either forward uses the size as a number there, or torch has no formulation"
        f" of an op there for all members at once that leaves it open. {_rows_text(example, names)}"
    )


def failed_text(example: Example, error: Exception) -> str:
    """Of a model that torch.export can't follow."""
    if "Constraints violated" in str(error) and example.batch_sizes:
        names = ", ".join(f"`{name}`" for name in example.batch_sizes)
        facts = [line for line in str(error).splitlines() if line.startswith("  - ")]
        return (
            f"the size of the batch ({names}) can't stay open; torch.export says:\n\n"
            + "\n".join(facts)
            + f"\n\n{_rows_text(example, names)}"
        )
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith("ens(...)")]
    where = notes[0].removeprefix("ens(...): ") if notes else "raised by torch.export"
    return (
        f"torch.export can't follow this model: {first_words(error)} ({where})"
        f". What forward does must not depend on the"
        f" elements of a tensor, as in .item(), .tolist() or x[mask];"
        f' strategy="loop" exports the members one after another, with ops that may not exist for'
        f" all members at once"
    )


def first_words(error: BaseException) -> str:
    """The kind of an error, and the first sentence of what it says."""
    text = first_sentence(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _rows_text(example: Example, names: str) -> str:
    """The two ways out of a batch whose size can't stay open."""
    one = next(iter(example.batch_sizes))
    return (
        f"To export for batches of {example.batch_size} rows alone, or to say that {names} has no"
        f" batch axis:\n\n"
        f"    batch_axes=None\n"
        f"    batch_axes={{{one!r}: None}}\n\n"
        f'strategy="loop" exports the members one after another, which may keep it open'
    )
