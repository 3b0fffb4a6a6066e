"""``export.package``: an ensemble compiled ahead of time, to one ``.pt2`` file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from unisono.ensemble import Ensemble
from unisono.errors import ExportError
from unisono.export.check import batches, check, check_real, ports, tensors_of
from unisono.export.combined import CombinationName, check_name
from unisono.export.failures import check_eval, first_words
from unisono.export.inputs import BatchAxes, example_of
from unisono.export.modules import snapshot
from unisono.export.outputs import named
from unisono.export.program import structured_program
from unisono.export.quiet import quiet
from unisono.export.report import Export
from unisono.files import replacing


def package(
    ens: Ensemble,
    args: tuple[Any, ...] | Any,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    combination: CombinationName | None = None,
    batch_axes: BatchAxes = 0,
    tolerance: float | None = None,
) -> Export:
    """Compile an ensemble ahead of time with AOTInductor, to one ``.pt2`` file.

    ``torch._inductor.aoti_load_package(path)(x)`` equals ``ens(x)``, on the kind of device on which
    the ensemble is, in Python without the members' class, or from C++. The file holds machine
    code: load only files that you trust. It is compared with the ensemble before it takes the
    place of what is at ``path``.

    Args:
        ens: The ensemble, in eval mode.
        args: Example inputs, as for `program`.
        path: The file to write, ``.pt2``.
        kwargs: Keyword arguments, as for `program`.
        combination: What to return in place of the members' outputs, as for `program`.
        batch_axes: The batch axis of the inputs, as for `program`.
        tolerance: The largest difference from the ensemble that is allowed, over the largest
            magnitude of an output if that is above one; by default 1e-4 in float32.

    Returns:
        What was written, and the difference, which was measured on the example and on a batch of
        another size.

    Raises:
        ExportError: If something can't be exported or compiled, or the result differs by more than
            the tolerance; what was at ``path`` stays.
        ValueError: If there is no such input, axis or combination.

    Example:
        >>> import unisono
        >>> from unisono import export
        >>> ens = unisono.Ensemble([torch.nn.Linear(3, 2) for _ in range(4)]).eval()
        >>> x = torch.randn(5, 3)
        >>> print(export.package(ens, (x,), "ens.pt2"))  # doctest: +SKIP
        ens.pt2  (AOTInductor, cpu, 1.5 MB)
          inputs      input: float32 (batch, 3)
          outputs     outputs: float32 (4, batch, 2)
          difference  0.0e+00 at most, 0.0e+00 relative in batches of 5, 11
        >>> run = torch._inductor.aoti_load_package("ens.pt2")  # doctest: +SKIP
        >>> torch.allclose(run(x), ens(x))  # doctest: +SKIP
        True
    """
    call = "export.package"
    check_name(call, combination)
    check_eval(call, ens)
    target = Path(path)
    if target.suffix != ".pt2":
        raise ValueError(f"{call}: the file is a .pt2 file; got {target.name!r}")
    ens = snapshot(ens)
    example = example_of(call, ens[0], args, kwargs, batch_axes)
    given = batches(ens, example, combination)
    first, last = given[0], given[-1]
    check_real(example, first, "AOTInductor compiles no complex numbers")
    program = structured_program(ens, example, combination, tensors_only=True)
    with tempfile.TemporaryDirectory() as folder:
        # Compiled elsewhere: the compiler asks for a name of its own, and loading unpacks it.
        compiled = Path(folder) / target.name
        _compile(call, program, compiled)
        loaded = _load(compiled)

        def run(tensors: list[Tensor]) -> list[Tensor]:
            own_args, own_kwargs = example.unmarked(iter(tensors))
            try:
                outputs = loaded(*own_args, **own_kwargs)
            except RuntimeError as error:
                raise ExportError(
                    f"{call}: AOTInductor has compiled this, but it can't be run:"
                    f" {first_words(error)}. export.onnx, and torch.export.save of export.program,"
                    f" do without it"
                ) from error
            return list(tensors_of(named(outputs)).values())

        difference = check(
            example,
            given,
            run,
            tolerance=tolerance,
            remedy="export.program has the same ops"
            " without the compiler: torch.export.save(export.program(ens, args), path)",
        )
        with replacing(target) as new:
            shutil.copyfile(compiled, new)
    return Export(
        path=target,
        kind=f"AOTInductor, {_device(ens).type}",
        num_bytes=target.stat().st_size,
        inputs=ports(example.by_name(first.tensors), example.by_name(last.tensors)),
        outputs=ports(tensors_of(first.expected), tensors_of(last.expected)),
        difference=difference,
        left_out=tuple(first.expected.keys() - tensors_of(first.expected).keys()),
    )


def _compile(call: str, program: ExportedProgram, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package  # the documented name

    try:
        with quiet(), torch.no_grad():
            aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:
        raise ExportError(
            f"{call}: AOTInductor can't compile this: {first_words(error)}. It needs a C++"
            f" compiler, as g++ on a CPU; export.onnx and"
            f" torch.export.save(export.program(ens, args), path) need none"
        ) from error


def _load(path: Path) -> Any:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


def _device(ens: Ensemble) -> torch.device:
    tensors = [*ens.parameters(), *ens.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
