"""What ``unisono export`` exports: the ensemble of a run or of a file, and an example input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from unisono.commands.member_files import choose_member_factory, ensemble_of, failures_told
from unisono.commands.models import MakeModel, built_in_factory
from unisono.commands.outcome import ArgumentError
from unisono.commands.run_folder import RUN, Description, RunFolder
from unisono.commands.table_estimator import load_members
from unisono.ensemble import Ensemble

_ROWS: Final = 8  # of an example that isn't given
_CPU: Final = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Exported:
    """An ensemble to be exported.

    Args:
        ensemble: In eval mode, on the CPU.
        example: The shapes and dtype of its inputs, if they are known.
        notes: What the inputs and outputs are.
    """

    ensemble: Ensemble
    example: Sequence[Tensor]
    notes: Sequence[str]


class InTargetUnit(nn.Module):
    """A member of a regression, with its outputs in the unit of the target.

    ``mean * scale + shift``, and ``variance * scale ** 2`` if it predicts one.

    Args:
        network: Predicts standardised targets.
        shift: Mean of the targets.
        scale: What they were divided by.

    Shape:
        - input: (B, F)
        - output: (B, T), or two of them
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Mean, or mean and variance."""
        found = self.network(x)
        if isinstance(found, Tensor):
            return found * self.scale + self.shift
        mean, variance = found
        return mean * self.scale + self.shift, variance * self.scale.square()


def read_exported(source: Path, model: str | None) -> Exported:
    """Read the ensemble of a run, or of a file.

    Args:
        source: A folder that ``unisono train`` wrote, a saved ensemble, or a folder with one.
        model: ``package.module:factory`` of the members; of a run only if it had one.

    Raises:
        ArgumentError: If it can't be read, or is of another architecture.
    """
    if not (source / RUN).is_file():
        if model is None:
            raise ArgumentError(
                f"{source} is no run of unisono train: say with --model package.module:factory "
                "what its members are"
            )
        return Exported(_load(source, choose_member_factory(model)), [], [])
    folder = RunFolder(source)
    if folder.description.kind == "images":
        return _of_images(folder, model)
    return _of_table(folder, model)


def parse_example(text: str) -> Tensor:
    """An input of random numbers.

    Args:
        text: Sizes, and a dtype if it isn't float32, as ``64x784`` or ``8x20:int64``. Integers
            are 0 or 1.

    Raises:
        ArgumentError: If it is none.

    Example:
        >>> parse_example("8x20:int64").shape, parse_example("64x784").dtype
        (torch.Size([8, 20]), torch.float32)
    """
    sizes, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        shape = [int(size) for size in sizes.split("x")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1 or not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"--example {text}: write sizes and a dtype, as 64x784 or 8x20:int64")
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(2, shape, generator=generator).to(dtype)


def _of_images(folder: RunFolder, model: str | None) -> Exported:
    run = folder.description
    ens = _load(ensemble_of(folder.path), _image_factory(folder, model))
    shape = "x".join(map(str, (_ROWS, *run.image_shape)))
    notes = [
        "input: images with grey values from 0 to 1",
        f"output: the logits of {len(run.classes)} classes",
    ]
    return Exported(ens, [parse_example(shape)], notes)


def _image_factory(folder: RunFolder, model: str | None) -> MakeModel:
    run = folder.description
    if model is not None and model != run.model:
        raise ArgumentError(
            f"--model {model}: the members of {folder.path} are made by {run.model}"
        )
    built_in = built_in_factory(run.model, run.image_shape, len(run.classes))
    if built_in is not None:
        return built_in
    if model is None:
        raise ArgumentError(
            f"the members of {folder.path} are made by {run.model}; if you trust that code, add "
            f"--model {run.model}"
        )
    return choose_member_factory(model)


def _of_table(folder: RunFolder, model: str | None) -> Exported:
    members = load_members(folder, model, _CPU)
    parameter = next(members.ensemble.parameters())
    name = str(parameter.dtype).removeprefix("torch.")
    example = parse_example(f"{_ROWS}x{members.n_features}:{name}")
    note = (
        f"input: the {members.n_features} features that preprocessing.safetensors makes of the "
        "columns, not the columns themselves"
    )
    if members.targets is None:
        return Exported(members.ensemble, [example], [note, _classes(folder.description)])
    unit = [
        torch.from_numpy(values).to(parameter.dtype)
        for values in (members.targets.mean, members.targets.scale())
    ]
    ens = members.ensemble
    wrapped = Ensemble(
        [InTargetUnit(member, *unit) for member in ens.unstack()],
        shared=["shift", "scale", *(f"network.{name}" for name in ens.shared)],
    ).eval()
    what = "mean and variance" if members.is_gaussian else "the prediction"
    return Exported(wrapped, [example], [note, f"output: {what}, in the unit of the target"])


def _classes(run: Description) -> str:
    listed = ", ".join(map(str, run.classes[:10])) + (" ..." if len(run.classes) > 10 else "")
    return f"output: the logits of {listed}"


def _load(path: Path, make_model: MakeModel) -> Ensemble:
    with failures_told():
        return Ensemble.load(path, make_model, device="cpu").eval()
