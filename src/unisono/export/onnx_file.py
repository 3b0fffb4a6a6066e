"""``export.onnx``: an ensemble as an ONNX file."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch.export import ExportedProgram

from unisono.ensemble import Ensemble
from unisono.errors import ExportError
from unisono.export.check import Batch, batches, check, check_real, ports, tensors_of
from unisono.export.combined import CombinationName, check_name
from unisono.export.failures import check_eval, first_words, place_of
from unisono.export.inputs import BatchAxes, Example, example_of
from unisono.export.modules import snapshot
from unisono.export.onnx_model import fit_for_others, save, simplify
from unisono.export.onnx_runtime import session_of
from unisono.export.program import flat_program
from unisono.export.quiet import quiet
from unisono.export.report import Export
from unisono.extras import require

_NODE: Final = re.compile(r"translating node %(\w+) .*target=torch\.ops\.([\w.]+)\]")
_MISSING: Final = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")


def onnx(
    ens: Ensemble,
    args: tuple[Any, ...] | Any,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    combination: CombinationName | None = None,
    batch_axes: BatchAxes = 0,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    tolerance: float | None = None,
) -> Export:
    """Export an ensemble to an ONNX file: one model, all members, a batch of any size.

    The file is run in onnxruntime, and compared with the ensemble on the example and on a batch
    of another size, before it takes the place of what is at ``path``. Weights of more than 2 GB
    lie beside it in a file of their own, as the format demands.

    Args:
        ens: The ensemble, in eval mode.
        args: Example inputs, as for `program`: the tuple of positional arguments, or one tensor.
        path: The file to write.
        kwargs: Keyword arguments, as for `program`.
        combination: What to return in place of the members' outputs, as for `program`:
            ``"mean"``, ``"probabilities"``, ``"vote"`` or ``"uncertainty"``.
        batch_axes: The batch axis of the inputs, as for `program`.
        input_names: Names of the tensors among the inputs, in order; by default those of the
            parameters of ``forward``, with what is inside of them behind a dot.
        output_names: Names of the tensors among the outputs, in order; by default ``"outputs"``, or
            the keys and fields of what the members return.
        opset: The version of the operators; by default the one that torch recommends.
        tolerance: The largest difference from the ensemble that is allowed, over the largest
            magnitude of an output if that is above one; by default 1e-4 in float32.

    Returns:
        What was written, and the difference; print it.

    Shape:
        - outputs: (N, *), or (*) with a combination

    Raises:
        ExportError: If an op can't be exported or has no kernel in onnxruntime, or the result
            differs by more than the tolerance; what was at ``path`` stays.
        ValueError: If names, axes or the combination are wrong.
        MissingExtraError: If onnx, onnxscript or onnxruntime isn't installed.

    Example:
        >>> import tempfile
        >>> ens = Ensemble([torch.nn.Linear(3, 2) for _ in range(5)]).eval()
        >>> path = Path(tempfile.mkdtemp()) / "ens.onnx"
        >>> written = onnx(ens, torch.randn(8, 3), path, combination="mean")
        >>> [str(port) for port in (*written.inputs, *written.outputs)]
        ['input: float32 (batch, 3)', 'outputs: float32 (batch, 2)']
    """
    call = "export.onnx"
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, extra="export", purpose=call)
    check_name(call, combination)
    check_eval(call, ens)
    ens = snapshot(ens)
    example = example_of(call, ens[0], args, kwargs, batch_axes)
    example = _renamed(example, input_names)
    given = _renamed_outputs(call, batches(ens, example, combination), output_names)
    first, last = given[0], given[-1]
    check_real(example, first, "ONNX has no complex numbers")
    if not tensors_of(first.expected):
        raise ExportError(f"{call}: the ensemble returns no tensor")
    program = flat_program(ens, example, combination)
    names = list(tensors_of(first.expected))
    model = _converted(call, program, [i.name for i in example.inputs], names, opset)
    fit_for_others(model, example, first)
    target = Path(path)
    with save(model, target) as saved:
        run = session_of(call, saved.path, [i.name for i in example.inputs], names)
        remedy = (
            "A tolerance= that you find right may be given; export.package and export.program"
            " keep to the kernels of torch"
        )
        difference = check(example, given, run, tolerance=tolerance, remedy=remedy)
    return Export(
        path=target,
        kind=f"ONNX, opset {model.opset_imports['']}",
        num_bytes=saved.num_bytes,
        inputs=ports(example.by_name(first.tensors), example.by_name(last.tensors)),
        outputs=ports(tensors_of(first.expected), tensors_of(last.expected)),
        difference=difference,
        left_out=tuple(name for name in first.expected if name not in names),
        ops=Counter(node.op_type for node in model.graph),
    )


def _renamed(example: Example, names: Sequence[str] | None) -> Example:
    """The example with other names of the inputs."""
    if names is None:
        return example
    if len(names) != len(example.inputs):
        raise ValueError(
            f"{example.call}: input_names has {len(names)} names, but there are"
            f" {len(example.inputs)} tensors: {', '.join(i.name for i in example.inputs)}"
        )
    inputs = [replace(i, name=name) for i, name in zip(example.inputs, names, strict=True)]
    return replace(example, inputs=tuple(inputs))


def _renamed_outputs(call: str, given: list[Batch], names: Sequence[str] | None) -> list[Batch]:
    """The batches with other names of the tensors among the outputs."""
    if names is None:
        return given
    own = list(tensors_of(given[0].expected))
    if len(names) != len(own):
        raise ValueError(
            f"{call}: output_names has {len(names)} names, but there are {len(own)} tensors:"
            f" {', '.join(own)}"
        )
    other = dict(zip(own, names, strict=True))
    return [
        batch._replace(expected={other.get(k, k): v for k, v in batch.expected.items()})
        for batch in given
    ]


def _converted(
    call: str,
    program: ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int | None,
) -> Any:
    """The ONNX model, an ``onnx_ir.Model``."""
    try:
        with _quiet():
            converted = torch.onnx.export(
                program,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=opset,
                dynamo=True,
                verbose=False,
                optimize=False,
            )
            assert converted is not None
            simplify(converted.model)
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(_unconverted(call, program, error)) from error
    return converted.model


def _unconverted(call: str, program: ExportedProgram, error: BaseException) -> str:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    texts = "\n".join(map(str, chain))
    missing, node = _MISSING.search(texts), _NODE.search(texts)
    op = missing[1].replace("::", ".") if missing else node[2] if node else ""
    if missing:
        what = f"ONNX, or torch's exporter to it, has no `{op}`"
    elif node:
        what = f"torch can't translate `{op}` to ONNX: {first_words(chain[-1])}"
    else:
        what = f"torch can't translate this to ONNX: {first_words(chain[-1])}"
    where = place_of(program, op)
    return (
        f"{call}: {what}{f' (in {where})' if where else ''}. export.package and export.program"
        f" export it without ONNX"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch's ONNX exporter logs and warns of about its own parts."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)  # that torchvision isn't there, what isn't folded
    try:
        with quiet(), warnings.catch_warnings():
            # Names of axes are those of `report.Port`, and what can't be translated is an error.
            warnings.simplefilter("ignore", torch.onnx.errors.OnnxExporterWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
