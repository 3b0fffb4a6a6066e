"""The options of the terminal program, in typer; what they start lives in the other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from unisono.commands.arguments import at_least, choose_device
from unisono.commands.bench import OPTIONS, BenchSettings, run_bench
from unisono.commands.tables import bench_table
from unisono.commands.train import TrainRequest, run_train

app = typer.Typer(
    name="unisono",
    help="N PyTorch models as one module: train an ensemble, measure its speed.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DEFAULT = TrainRequest()

Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...; auto: cuda where there is one.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")
]


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    data: Annotated[str, typer.Option(help="mnist5k or digits.")] = _DEFAULT.data,
    model: Annotated[
        str,
        typer.Option(
            help="mlp, cnn or package.module:factory, a function that takes no argument "
            "and returns a module from images (B, 1, height, width) to logits (B, classes)."
        ),
    ] = _DEFAULT.model,
    members: Annotated[
        int | None,
        typer.Option(help="Number of models.", show_default="10, or one for each --lr"),
    ] = _DEFAULT.members,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = _DEFAULT.epochs,
    seed: Annotated[
        int, typer.Option(help="Member i starts from seed + i; the test images never change.")
    ] = _DEFAULT.seed,
    lr: Annotated[
        list[str],
        typer.Option(
            help="Learning rate of Adam; given several times, one for each member; "
            "log:1e-4:1e-1 spreads the members' rates over that range."
        ),
    ] = list(_DEFAULT.lr),  # noqa: B006 - typer copies it; it takes no tuple here
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = _DEFAULT.batch_size,
    device: Device = _DEFAULT.device,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="runs/<data>")
    ] = None,
    sampling: Annotated[
        str,
        typer.Option(help="Which images each member sees: shared, shuffled, bootstrap or folds."),
    ] = _DEFAULT.sampling,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Keep an eighth of the images for validation, stop each member after so many "
            "epochs without improvement, and take its best weights.",
            show_default="all epochs",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Epochs between two checkpoints in the folder.", show_default="none"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train N models at once on real images; score members and ensemble."""
    request = TrainRequest(
        data,
        model,
        members,
        epochs,
        seed,
        tuple(lr),
        batch_size,
        device,
        out,
        sampling,
        patience,
        checkpoint_every,
        resume,
    )
    report = run_train(request, Console(stderr=True))
    if as_json:
        _print_json(report.metrics)
        return
    console = Console()
    console.print(report.table)
    lines = [
        *report.notes,
        f"trained in {report.seconds:.1f} s",
        *(f"wrote {path}" for path in report.files),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def bench(
    members: Annotated[int, typer.Option(help="Number of models.")] = 10,
    batch: Annotated[int, typer.Option(help="Images per minibatch.")] = 64,
    hidden: Annotated[int, typer.Option(help="Width of the hidden layers.")] = 128,
    rounds: Annotated[int, typer.Option(help="Turns of each way to run.")] = 30,
    threads: Annotated[
        int | None, typer.Option(help="Threads on the CPU.", show_default="as torch has it")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Time the loop, torch.vmap and unisono, as PyTorch's ensembling tutorial does."""
    settings = BenchSettings(
        members=at_least("--members", members),
        batch=at_least("--batch", batch),
        hidden=at_least("--hidden", hidden),
        device=choose_device(device),
        threads=torch.get_num_threads() if threads is None else at_least("--threads", threads),
        rounds=at_least("--rounds", rounds),
    )
    bar = Progress(console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task("measuring", total=len(OPTIONS) * settings.rounds)
        report = run_bench(settings, on_round=lambda: bar.advance(task))
    if as_json:
        _print_json(report)
    else:
        _print_bench(report)


def _print_json(report: dict[str, Any]) -> None:
    typer.echo(json.dumps(report, indent=2, allow_nan=False))


def _print_bench(report: dict[str, Any]) -> None:
    console = Console()
    machine = report["machine"]
    lines = [
        f"{report['members']} members, minibatch {report['batch']}, hidden {report['hidden']}",
        f"{machine['cpu']}, {report['threads']} threads",
        f"device {machine['device']}, torch {machine['torch']}",
        f"predictions equal the loop's; medians of {report['rounds']} rounds, taken in turns",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    for name, option in report["options"].items():
        console.print()
        console.print(bench_table(name, option))
