"""Say what a value is, and what sets two of them apart: the texts of all differences."""

from __future__ import annotations

import os
import types
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

# Types that `repr` tells and `==` compares completely, which makes 1000 members affordable.
ATOMS = frozenset(
    {bool, int, float, complex, str, bytes, slice, range, type(None), type(...)}
    | {torch.dtype, torch.device, torch.layout, torch.memory_format}
)
NOTHING = "nothing of that name"
_WIDTH = 80
_LISTED = 10


def describe(value: object) -> str:
    """Say in a few words what a value is; its `repr` where that is short and says it."""
    if isinstance(value, Tensor):
        kind = "parameter" if isinstance(value, nn.Parameter) else "tensor"
        lazy = nn.parameter.is_lazy(value)
        return f"uninitialised {kind}" if lazy else f"{kind} of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return f"module {class_name(type(value))}"
    if isinstance(value, type):
        return f"class {class_name(value)}"
    if isinstance(value, types.FunctionType):
        code = value.__code__
        where = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}"
        return f"function {value.__qualname__} ({where})"
    if isinstance(value, (types.BuiltinFunctionType, types.MethodType)):
        return f"method {value.__qualname__}"
    if isinstance(value, np.ndarray):
        return f"array of shape {value.shape}, dtype {value.dtype}"
    if isinstance(value, (list, tuple, dict, set, frozenset)) and any(
        type(v) not in ATOMS for v in (value.values() if isinstance(value, dict) else value)
    ):
        return f"{class_name(type(value))} of length {len(value)}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(repr, value)))}}}"
    if type(value).__repr__ is object.__repr__:
        return f"object of class {class_name(type(value))}"
    try:
        return " ".join(repr(value).split())
    except Exception:
        return f"object of class {class_name(type(value))}"


def class_name(kind: type) -> str:
    """Return a class' full name, the bare one for Python's own."""
    name = kind.__qualname__
    return name if kind.__module__ == "builtins" else f"{kind.__module__}.{name}"


def describe_place(value: object, at: str | None, path: str) -> str:
    """Say which module or tensor a value is by the path `at` where its member registers it.

    Args:
        value: The module or tensor.
        at: Its dotted path, None if the member registers it nowhere.
        path: Where it was met; at its own path it needs no name.
    """
    kind = "tensor" if isinstance(value, Tensor) else "module"
    if at is None:
        return f"a {kind} that the member doesn't register"
    if at == "":
        return "the model itself"
    return f"its own {kind}" if at == path else f"the {kind} `{at}`"


def contrast(a: object, b: object, *, note: str = "") -> tuple[str, str]:
    """Describe two values so that the texts differ, cut to where they do."""
    x, y = describe(a), describe(b)
    if x == y and type(a) is not type(b):
        x, y = (f"{x} of {describe(type(value))}" for value in (a, b))
    if max(len(x), len(y)) > _WIDTH:
        same = next((i for i, (u, v) in enumerate(zip(x, y, strict=False)) if u != v), 0)
        x, y = (_window(text, max(0, same - _WIDTH // 3)) for text in (x, y))
    if x == y:
        x += " (another of that name)" if isinstance(a, type) else " (with other contents)"
    return note + x, note + y


def _window(text: str, start: int) -> str:
    before, after = "…" * (start > 0), "…" * (len(text) > start + _WIDTH)
    return f"{before}{text[start : start + _WIDTH]}{after}"


def contrast_tensors(a: Tensor, b: Tensor, *, values: bool) -> tuple[str, str] | None:
    """Say in what two tensors differ.

    Args:
        a: One tensor.
        b: The other.
        values: Whether to look at the values, too, if all else agrees.

    Returns:
        The texts for `a` and for `b`; None if they are equal.

    Example:
        >>> contrast_tensors(torch.ones(2), torch.ones(3), values=False)
        ('shape (2,)', 'shape (3,)')
        >>> contrast_tensors(torch.ones(2), torch.zeros(2), values=True)
        ('values differ, first at (0,): 1.0', '0.0')
    """
    lazy = [nn.parameter.is_lazy(t) for t in (a, b)]
    if any(lazy):
        return None if all(lazy) else (describe(a), describe(b))
    if (
        type(a) is not type(b)
        or a.shape != b.shape
        or (a.dtype, a.device, a.layout) != (b.dtype, b.device, b.layout)
        or a.requires_grad != b.requires_grad
    ):
        pairs = [(x, y) for x, y in zip(_facts(a), _facts(b), strict=True) if x != y]
        if pairs:  # none if only the classes differ, and have one name
            return ", ".join(x for x, _ in pairs), ", ".join(y for _, y in pairs)
    return _first_unequal(a, b) if values and a is not b else None


def _facts(t: Tensor) -> tuple[str, ...]:
    texts = (f"shape {tuple(t.shape)}", f"dtype {t.dtype}", f"device {t.device}")
    return (*texts, f"layout {t.layout}", f"requires_grad={t.requires_grad}", describe(type(t)))


def _first_unequal(a: Tensor, b: Tensor) -> tuple[str, str] | None:
    """Say where two tensors of the same facts first differ bitwise, and both values there."""
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
    return f"values differ, first at {index}: {x[at].item()}", str(y[at].item())


def _flat(t: Tensor) -> Tensor:
    t = t.detach().dequantize() if t.is_quantized else t.detach()
    dense = t if t.layout is torch.strided else t.to_dense()
    return dense.resolve_conj().resolve_neg().reshape(-1).contiguous()


def list_facts(facts: Sequence[str]) -> str:
    """List facts, one to a line, the first few of many."""
    lines = [f"  {fact}" for fact in facts[:_LISTED]]
    if len(facts) > _LISTED:
        lines.append(f"  ... and {len(facts) - _LISTED} more")
    return "\n".join(lines)


def list_numbers(numbers: Sequence[int]) -> str:
    """List numbers in one line, the first few of many."""
    more = f", ... ({len(numbers)} in all)" if len(numbers) > _LISTED else ""
    return ", ".join(map(str, numbers[:_LISTED])) + more
