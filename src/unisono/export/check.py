"""An exported file against the ensemble, on the example and on a batch of another size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from unisono.engine.parts import call_member
from unisono.ensemble import Ensemble
from unisono.errors import ExportError
from unisono.export.combined import CombinationName, combined
from unisono.export.inputs import Example
from unisono.export.outputs import named, plain
from unisono.export.report import Difference, Port

# What rounding may come to in a network: a few hundred units in the last place.
TOLERANCES: Final = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
OPEN: Final = "batch"


class Batch(NamedTuple):
    """Inputs to compare on, and what the ensemble makes of them."""

    size: int | None  # None if all shapes are fixed
    tensors: list[Tensor]
    expected: dict[str, Any]  # by the names of `named`


def tensors_of(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The outputs that are tensors."""
    return {name: leaf for name, leaf in outputs.items() if isinstance(leaf, Tensor)}


def expected_outputs(
    ens: Ensemble, example: Example, combination: CombinationName | None, tensors: list[Tensor]
) -> Any:
    """What an export of the example's call is to return for these tensors."""
    args, kwargs = example.filled(iter(tensors))
    with torch.no_grad():
        call = ens._call(call_member, args, kwargs)
        outputs = ens._planner.run_once(call, ens._options())  # ens(x) might measure, or keep state
        if combination is not None:
            outputs = combined(example.call, combination, ens.combination, outputs)
    return plain(example.call, outputs)


def batches(ens: Ensemble, example: Example, combination: CombinationName | None) -> list[Batch]:
    """The example, and its rows in a batch of another size."""
    size = example.batch_size
    found = []
    for other in [None] if size is None else [size, 2 * size + 1]:
        tensors = [i.tensor for i in example.inputs] if other == size else example.rows(other or 0)
        outputs = named(expected_outputs(ens, example, combination, tensors))
        found.append(Batch(other, tensors, outputs))
    return found


def check_real(example: Example, batch: Batch, why: str) -> None:
    """Raise where inputs or outputs are complex numbers.

    Args:
        example: The example of the export.
        batch: Its example batch.
        why: What can't be done with complex numbers, and why.
    """
    tensors = {**example.by_name(batch.tensors), **tensors_of(batch.expected)}
    names = [f"`{name}`" for name, tensor in tensors.items() if tensor.is_complex()]
    if names:
        raise ExportError(
            f"{example.call}: {', '.join(names)}: {why}; torch.view_as_real in forward makes real"
            f" ones of them. export.program exports them as they are"
        )


def check(
    example: Example,
    given: Sequence[Batch],
    run: Callable[[list[Tensor]], Sequence[Any]],
    *,
    tolerance: float | None,
    remedy: str,
) -> Difference:
    """Compare a file with the ensemble.

    Args:
        example: The example of the export.
        given: The `batches`.
        run: Runs the file; gives the tensors among the outputs, in order.
        tolerance: The largest difference allowed, relative to the largest magnitude of an output
            if that is above one; by default one for each dtype.
        remedy: What to try if it differs.

    Raises:
        ExportError: If an output is of another shape or dtype, or differs by more.
    """
    absolute = relative = 0.0
    worst = ""
    problems = []
    for batch in given:
        wanted = tensors_of(batch.expected)
        at = "" if batch.size is None else f" in a batch of {batch.size}"
        for (name, want), got in zip(wanted.items(), run(batch.tensors), strict=True):
            if got.shape != want.shape or got.dtype != want.dtype:
                problems.append(
                    f"`{name}`{at}: {tuple(got.shape)} of {got.dtype}; the ensemble has"
                    f" {tuple(want.shape)} of {want.dtype}"
                )
                continue
            distance, scale = _distance(got, want)
            allowed = TOLERANCES.get(_real(want.dtype), 0.0) if tolerance is None else tolerance
            if distance > allowed * max(1.0, scale):
                problems.append(f"`{name}`{at}: {_first_far(got, want)}, allowed {allowed:.1e}")
            absolute = max(absolute, distance)
            ratio = distance / scale if scale else distance
            if ratio >= relative:
                relative, worst = ratio, name
    if problems:
        facts = "\n".join(f"  {problem}" for problem in problems)
        raise ExportError(
            f"{example.call}: what was exported computes something else than the ensemble, so the"
            f" file isn't kept:\n\n{facts}\n\n{remedy}"
        )
    sizes = tuple(batch.size for batch in given if batch.size is not None)
    return Difference(absolute, relative, worst, sizes)


def ports(tensors: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[Port, ...]:
    """Names, shapes and dtypes; a size that is another one in another batch is named.

    Args:
        tensors: Tensors of the one batch by name.
        other: Those of the other.
    """
    found = []
    for (name, a), b in zip(tensors.items(), other.values(), strict=True):
        shape = tuple(x if x == y else OPEN for x, y in zip(a.shape, b.shape, strict=True))
        found.append(Port(name, shape, str(a.dtype).removeprefix("torch.")))
    return tuple(found)


def _distance(got: Tensor, want: Tensor) -> tuple[float, float]:
    """The largest difference, and the largest magnitude; NaN equals NaN, infinity itself."""
    if want.numel() == 0:
        return 0.0, 0.0
    wide = torch.complex128 if want.is_complex() else torch.float64
    a, b = got.to(want.device, wide), want.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf)
    finite = b.abs()[b.isfinite()]
    return float(difference.max()), float(finite.max()) if finite.numel() else 0.0


def _first_far(got: Tensor, want: Tensor) -> str:
    """The element that differs most, with both values."""
    wide = torch.complex128 if want.is_complex() else torch.float64
    a, b = got.to(want.device, wide), want.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf)
    at = int(difference.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), want.shape))
    mine, theirs = got.flatten()[at].item(), want.flatten()[at].item()
    return f"{mine} at {index}; the ensemble has {theirs}"


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.empty((), dtype=dtype).real.dtype if dtype.is_complex else dtype
