"""What is done to an ONNX model before and when it is written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisono.export.check import OPEN, Batch
from unisono.export.inputs import Example
from unisono.files import replacing

# protobuf holds no message of 2 GB; the graph beside the weights is far below the difference
LARGEST = 2_000_000_000
_DIGITS = 16


@dataclass
class Saved:
    """Where a model lies before it takes its place.

    Args:
        path: The file with the graph.
        num_bytes: The size of all that belongs to it.
    """

    path: Path
    num_bytes: int


def simplify(model: Any) -> None:
    """Compute what is constant, but keep each weight once.

    A weight that is read in two orders would otherwise be stored in both of them.

    Args:
        model: An ``onnx_ir.Model``, which is changed.
    """
    from onnxscript import optimizer

    def should_fold(node: Any) -> bool | None:
        several = [
            value
            for value in node.inputs
            if value is not None and value.is_initializer() and len(value.uses()) > 1
        ]
        return False if any(value.const_value.size > 1 for value in several) else None

    optimizer.optimize_ir(model, should_fold=should_fold)


def fit_for_others(model: Any, example: Example, batch: Batch) -> None:
    """Name the open axis, and leave out what tells of this machine.

    Args:
        model: An ``onnx_ir.Model``.
        example: The example of the export.
        batch: Its example batch.
    """
    for value, each in zip(model.graph.inputs, example.inputs, strict=True):
        if each.batch_axis is not None:
            model_name = str(value.shape[each.batch_axis])
            _rename_axis(model, model_name)
            break
    # Paths of source files are among what torch notes.
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    made = [value for node in model.graph for value in node.outputs]
    for part in (model, model.graph, *model.graph, *values, *made):
        part.metadata_props.clear()
    model.producer_name = "unisono"


@contextmanager
def save(model: Any, target: Path) -> Iterator[Saved]:
    """Write a model to a new file, which takes the place of ``target`` if the block ends well.

    Weights that are too large for one file go to ``NAME.HASH.data`` beside it. That name belongs
    to these very weights, so what was at ``target`` stays whole until it is replaced.
    """
    import onnx_ir

    weights = [value.const_value for value in model.graph.initializers.values()]
    large = sum(weight.nbytes for weight in weights if weight is not None) > LARGEST
    kept: Path | None = None
    with replacing(target) as new:
        if large:
            kept = _save_apart(model, new, target)
        else:
            onnx_ir.save(model, new)
        try:
            yield Saved(new, new.stat().st_size + (kept.stat().st_size if kept else 0))
        except BaseException:
            if kept:
                kept.unlink()
            raise
    for old in target.parent.glob(f"{target.name}.{'[0-9a-f]' * _DIGITS}.data"):
        if old != kept:  # of what was there before
            old.unlink()


def _save_apart(model: Any, new: Path, target: Path) -> Path:
    """Write the graph to ``new`` and the weights beside it; gives the file of the weights."""
    import onnx_ir

    data = new.with_name(f"{new.name}.data")
    try:
        onnx_ir.save(model, new, external_data=data.name)
        named = target.with_name(f"{target.name}.{_digest(data)}.data")
        os.replace(data, named)
    finally:
        data.unlink(missing_ok=True)
    onnx_ir.save(_with_data_in(onnx_ir.load(new), named.name), new)
    return named


def _with_data_in(model: Any, name: str) -> Any:
    import onnx_ir

    for value in model.graph.initializers.values():
        old = value.const_value
        if isinstance(old, onnx_ir.ExternalTensor):
            value.const_value = onnx_ir.ExternalTensor(
                name, old.offset, old.length, old.dtype, shape=old.shape, name=old.name,
                base_dir=old.base_dir,
            )  # fmt: skip
    return model


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]


def _rename_axis(model: Any, old: str) -> None:
    """Call the open size ``batch`` wherever it stands."""
    import onnx_ir

    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is None or value.shape.is_static():
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, onnx_ir.SymbolicDim) and size.value == old:
                value.shape[axis] = OPEN
