"""``unisono export``: a run or a saved ensemble as ONNX, a compiled package, or a program."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from unisono import export
from unisono.commands.arguments import check_choice
from unisono.commands.exported import Exported, parse_example, read_exported
from unisono.commands.member_files import check_out_file
from unisono.commands.outcome import ArgumentError, CommandError, Interrupted
from unisono.ensemble import Ensemble
from unisono.errors import EnsembleWarning, ExportError, MissingExtraError
from unisono.export.check import batches, check, ports, tensors_of
from unisono.export.inputs import example_of
from unisono.export.outputs import named
from unisono.export.report import Export
from unisono.files import replacing

SUFFIXES: Final[Mapping[str, str]] = {"onnx": ".onnx", "pt2": ".pt2", "program": ".pt2"}


@dataclass(frozen=True)
class ExportRequest:
    """What the user asks ``unisono export`` for.

    Args:
        source: A run, a saved ensemble, or a folder with one.
        to: A key of `SUFFIXES`.
        out: The file to write.
        model: The factory of the members, where the source doesn't say it.
        example: Shapes of the inputs, where the source doesn't say them.
        combination: What to return in place of the members' outputs.
    """

    source: Path
    to: str
    out: Path
    model: str | None = None
    example: tuple[str, ...] = ()
    combination: str | None = None


@dataclass(frozen=True)
class ExportReport:
    """What ``unisono export`` did.

    Args:
        export: The file, and its difference to the ensemble.
        notes: What inputs and outputs are.
    """

    export: Export
    notes: Sequence[str]


def run_export(request: ExportRequest) -> ExportReport:
    """Do what ``unisono export`` promises.

    Args:
        request: What the user asked for.

    Raises:
        ArgumentError: If anything can't be used; then nothing is written.
        CommandError: If the model can't be exported, or the disk refuses; likewise.
        Interrupted: On ctrl-C; likewise.
        MissingExtraError: If ONNX is asked for and isn't installed.
    """
    check_choice("format", request.to, SUFFIXES)
    suffix = SUFFIXES[request.to]
    out = check_out_file(request.out, [request.source])
    if out.suffix != suffix:
        raise ArgumentError(f"--out {out}: {request.to} is written to NAME{suffix}")
    given = [parse_example(text) for text in request.example]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EnsembleWarning)
            found = read_exported(request.source, request.model)
            if not given and not found.example:
                raise ArgumentError("--example SHAPE is needed, as 64x784: what a call takes")
            done = _export(request, found, tuple(given or found.example))
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {out} is as it was") from None
    told = [str(w.message) for w in caught if issubclass(w.category, EnsembleWarning)]
    notes = found.notes if request.combination is None else found.notes[:1]
    return ExportReport(done, [*notes, *told])


def _export(request: ExportRequest, found: Exported, args: tuple[Tensor, ...]) -> Export:
    ens, combination = found.ensemble, _known(request.combination)
    try:
        # Of what torch can't follow it prints the graph, before it raises.
        with contextlib.redirect_stderr(io.StringIO()):
            match request.to:
                case "onnx":
                    return export.onnx(ens, args, request.out, combination=combination)
                case "pt2":
                    return export.package(ens, args, request.out, combination=combination)
                case _:
                    return _program(ens, args, request.out, combination)
    except ExportError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"can't write to {request.out}: {error.strerror or error}") from error
    except MissingExtraError:
        raise
    except Exception as error:  # the members may do anything with a wrong example
        first = str(error).strip().partition("\n")[0]
        raise ArgumentError(
            f"the members can't be called with {_shapes(args)}: {type(error).__name__}: {first}"
        ) from error


def _known(combination: str | None) -> Any:
    if combination is not None:
        check_choice("combination", combination, ("mean", "probabilities", "vote", "uncertainty"))
    return combination


def _program(ens: Ensemble, args: tuple[Tensor, ...], out: Path, combination: Any) -> Export:
    """Save a program, and compare what comes back from the file with the ensemble."""
    program = export.program(ens, args, combination=combination)
    example = example_of("export.program", ens[0], args, None, 0)
    given = batches(ens, example, combination)
    with replacing(out) as new:
        with new.open("wb") as file:
            torch.export.save(program, file)
        with new.open("rb") as written:
            loaded = torch.export.load(written).module()

        def run(tensors: list[Tensor]) -> list[Tensor]:
            own_args, own_kwargs = example.unmarked(iter(tensors))
            with torch.no_grad():
                return list(tensors_of(named(loaded(*own_args, **own_kwargs))).values())

        remedy = "run the members one after another: strategy='loop'"
        difference = check(example, given, run, tolerance=None, remedy=remedy)
        size = new.stat().st_size
    first, last = given[0], given[-1]
    return Export(
        path=out,
        kind="torch.export",
        num_bytes=size,
        inputs=ports(example.by_name(first.tensors), example.by_name(last.tensors)),
        outputs=ports(tensors_of(first.expected), tensors_of(last.expected)),
        difference=difference,
    )


def _shapes(args: Sequence[Tensor]) -> str:
    texts = (f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}" for x in args)
    return " and ".join(texts)
