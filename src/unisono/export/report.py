"""What an export wrote, and how far it is from the ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Size = int | str


@dataclass(frozen=True)
class Port:
    """An input or output of an exported file.

    Args:
        name: Its name.
        shape: Its sizes; a name for one that stays open.
        dtype: Its element type, as ``"float32"``.

    Example:
        >>> print(Port("x", ("batch", 3), "float32"))
        x: float32 (batch, 3)
    """

    name: str
    shape: tuple[Size, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Difference:
    """The largest difference between an exported file and the ensemble.

    Args:
        absolute: ``max |exported - ensemble|``.
        relative: The same over the largest magnitude of that output.
        output: The output with the largest relative difference.
        batch_sizes: The sizes of the batches that were compared; empty for a fixed shape.

    Example:
        >>> print(Difference(2e-7, 1e-7, "outputs", (4, 9)))
        2.0e-07 at most, 1.0e-07 relative in batches of 4, 9
    """

    absolute: float
    relative: float
    output: str
    batch_sizes: tuple[int, ...]

    def __str__(self) -> str:
        batches = ", ".join(map(str, self.batch_sizes))
        where = f" in batches of {batches}" if batches else ""
        return f"{self.absolute:.1e} at most, {self.relative:.1e} relative{where}"


@dataclass(frozen=True)
class Export:
    """What was written, and how far it is from the ensemble; prints as a few lines.

    Args:
        path: The file.
        kind: Its kind and version: ``"ONNX, opset 20"``.
        num_bytes: Its size, with the file of its weights if that is another one.
        inputs: What it takes, in order.
        outputs: What it returns, in order.
        difference: From the ensemble, on every output.
        left_out: Outputs of the ensemble that are no tensors, and aren't in the file.
        ops: How many ops of which kind are in the file, if it tells.

    Example:
        >>> x, y = Port("x", ("batch", 3), "float32"), Port("outputs", (4, "batch", 2), "float32")
        >>> difference = Difference(2e-7, 1e-7, "outputs", (4, 9))
        >>> print(Export(Path("ens.onnx"), "ONNX, opset 20", 1500, (x,), (y,), difference))
        ens.onnx  (ONNX, opset 20, 1.5 kB)
          inputs      x: float32 (batch, 3)
          outputs     outputs: float32 (4, batch, 2)
          difference  2.0e-07 at most, 1.0e-07 relative in batches of 4, 9
    """

    path: Path
    kind: str
    num_bytes: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    difference: Difference
    left_out: tuple[str, ...] = ()
    ops: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.path}  ({self.kind}, {_readable(self.num_bytes)})"]
        for name, ports in (("inputs", self.inputs), ("outputs", self.outputs)):
            lines += [f"  {name if k == 0 else '':<12}{port}" for k, port in enumerate(ports)]
        if self.ops:
            counted = sorted(self.ops.items(), key=lambda item: (-item[1], item[0]))
            lines.append(f"  {'ops':<12}{', '.join(f'{count} {op}' for op, count in counted)}")
        if self.left_out:
            lines.append(f"  {'left out':<12}{', '.join(self.left_out)} (no tensors)")
        lines.append(f"  {'difference':<12}{self.difference}")
        return "\n".join(lines)


def _readable(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
