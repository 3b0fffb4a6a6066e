"""Run an ONNX file in onnxruntime."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from unisono.errors import ExportError
from unisono.export.failures import first_words

_KERNEL: Final = re.compile(r"Could not find an implementation for (\w+)\((\d+)\)")


def session_of(
    call: str, path: Path, inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[[list[Tensor]], list[Tensor]]:
    """A function that runs the file on a CPU.

    Args:
        call: The public call, for messages.
        path: The file.
        inputs: Names of the inputs, in the order in which the function takes them.
        outputs: Names of the outputs, in the order in which it returns them.

    Raises:
        ExportError: If onnxruntime can't run the file; also by the function.
    """
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, NotImplemented

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters it raises
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except (Fail, InvalidGraph, NotImplemented, RuntimeError) as error:
        raise ExportError(f"{call}: {_reason(error)}") from error
    known = {value.name for value in session.get_inputs()}  # what nobody reads is left out

    def run(tensors: list[Tensor]) -> list[Tensor]:
        feed = {
            name: tensor.detach().contiguous().cpu().numpy()
            for name, tensor in zip(inputs, tensors, strict=True)
            if name in known
        }
        try:
            found = session.run(list(outputs), feed)
        except Exception as error:  # its errors have no base class but this
            raise ExportError(
                f"{call}: onnxruntime can't run what torch has made of the ensemble:"
                f" {first_words(error)}. export.package and export.program keep to torch"
            ) from error
        return [torch.as_tensor(each) for each in found]

    return run


def _reason(error: Exception) -> str:
    missing = _KERNEL.search(str(error))
    if missing is None:
        return f"onnxruntime can't load what torch has made of the ensemble: {first_words(error)}"
    return (
        f"onnxruntime has no kernel on CPUs for the operator {missing[1]} (version {missing[2]}) in"
        f" the dtypes of this ensemble; most kernels take float32 alone: ens.float().\n"
        f"export.package and export.program export any dtype"
    )
