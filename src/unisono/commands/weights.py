"""The options of the commands that read and write weights: inspect, merge, split, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from unisono.commands.printable import printable

AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")
]
Select = Annotated[
    str | None,
    typer.Option(
        help="Where a pickled file holds the state dict: its key, dotted if it lies deeper.",
        show_default=False,
    ),
]


def inspect(
    file: Annotated[
        Path,
        typer.Argument(help="A saved ensemble, the checkpoint of a model, a folder, or a run."),
    ],
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Tell what is in a file of weights: tensors, facts, members that are unlike the others."""
    from unisono.commands.inspect import run_inspect
    from unisono.commands.inspect_tables import member_table, norm_table, summary, tensor_table

    found = run_inspect(file, select)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
        return
    _print_lines(summary(found))
    for table in (tensor_table(found), norm_table(found), member_table(found)):
        if table is not None:
            Console().print()
            Console().print(table, markup=False)  # names come from the file


def merge(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="One for each member: .pt, .pth, .bin, .ckpt, .safetensors, or a "
            "folder as the Hugging Face Hub has it."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(help="package.module:factory, a function without argument that makes one."),
    ],
    out: Annotated[Path, typer.Option(help="The file to write, NAME.safetensors.")],
    shared: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or pattern, as backbone.*, of tensors that are equal in all files and are "
            "to be kept once; may be repeated.",
            show_default=False,
        ),
    ] = None,
    select: Select = None,
    strip: Annotated[
        str,
        typer.Option(help="Taken off the front of the names, as module.", show_default=False),
    ] = "",
) -> None:
    """Make one ensemble of N trained models."""
    from unisono.commands.merge import MergeRequest, run_merge

    request = MergeRequest(tuple(files), model, out, tuple(shared or ()), select, strip)
    report = run_merge(request)
    each = f"{report.members} members of {report.parameters:,} parameters each"
    _print_lines([*report.notes, f"wrote {out}: {each}"])


def split(
    file: Annotated[Path, typer.Argument(help="A saved ensemble, or a run on images.")],
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    kind: Annotated[str, typer.Option("--format", help="pt or safetensors.")] = "pt",
    members: Annotated[
        str | None, typer.Option(help="Which members, as 0,3.", show_default="all")
    ] = None,
) -> None:
    """Write the state dict of each member to a file that plain PyTorch loads."""
    from unisono.commands.split import run_split

    report = run_split(file, out, kind, members)
    _print_lines([*report.notes, *(f"wrote {path}" for path in report.files)])


def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_FILE", help="A run, or a saved ensemble."),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="onnx; pt2, compiled ahead of time for this kind of machine; or program, of "
            "torch.export."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write: .onnx or .pt2.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="package.module:factory that makes one member; of a run, if it had one.",
            show_default=False,
        ),
    ] = None,
    example: Annotated[
        list[str] | None,
        typer.Option(
            help="Shape of an input, as 64x784 or 8x20:int64, the minibatch first; repeated for "
            "several inputs.",
            show_default="that of the run",
        ),
    ] = None,
    combination: Annotated[
        str | None,
        typer.Option(
            help="mean, probabilities, vote or uncertainty, in place of the members' outputs.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write an ensemble to a file that runs without its class; compare the file with it."""
    from unisono.commands.export import ExportRequest, run_export

    request = ExportRequest(source, to, out, model, tuple(example or ()), combination)
    report = run_export(request)
    _print_lines([*report.notes, *f"wrote {report.export}".splitlines()])


def _print_lines(lines: list[str]) -> None:
    console = Console()
    for line in lines:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
