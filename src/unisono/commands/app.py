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
from unisono.commands.outcome import ArgumentError
from unisono.commands.predict import PredictRequest, run_predict
from unisono.commands.report import run_report
from unisono.commands.table_files import STANDARD, is_table
from unisono.commands.tables import bench_table
from unisono.commands.train import TrainReport, TrainRequest, run_train
from unisono.commands.train_table import TableRequest, run_train_table
from unisono.commands.weights import export, inspect, merge, split
from unisono.training.joining import is_first_of_all

app = typer.Typer(
    name="unisono",
    help="N PyTorch models as one module: train an ensemble, predict with it, look at it.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DEFAULT = TrainRequest()
_TABLE = TableRequest()

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
    data: Annotated[
        str, typer.Option(help="mnist5k, digits, or a table: file.csv or file.parquet.")
    ] = _DEFAULT.data,
    target: Annotated[
        str | None, typer.Option(help="Tables: the column to predict.", show_default=False)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Tables: classification or regression.", show_default=False),
    ] = None,
    test_share: Annotated[
        float | None,
        typer.Option(
            help="Tables: part of the rows to test on.", show_default=f"{_TABLE.test_share:g}"
        ),
    ] = None,
    categorical: Annotated[
        list[str] | None,
        typer.Option(
            help="Tables: a column of whole numbers that are categories; may be repeated.",
            show_default=False,
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Tables: a column to leave out; may be repeated.", show_default=False),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="mlp, cnn (images only) or package.module:factory. For images a function "
            "without argument that returns a module from images (B, 1, height, width) to logits "
            "(B, classes); for tables a function of the numbers of features and outputs."
        ),
    ] = _DEFAULT.model,
    members: Annotated[
        int | None,
        typer.Option(help="Number of models.", show_default="10, or one for each --lr"),
    ] = _DEFAULT.members,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over the data.",
            show_default=f"{_DEFAULT.epochs}; tables: {_TABLE.epochs}",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Images: member i starts from seed + i, the test images never change. "
            "Tables: all randomness, that of the test rows too, follows from it."
        ),
    ] = _DEFAULT.seed,
    lr: Annotated[
        list[str] | None,
        typer.Option(
            help="Learning rate of Adam; given several times, one for each member; "
            "log:1e-4:1e-1 spreads the members' rates over that range.",
            show_default=f"{_DEFAULT.lr[0]}; tables: {_TABLE.lr[0]}",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images or rows per step.",
            show_default=f"{_DEFAULT.batch_size}; tables: {_TABLE.batch_size}",
        ),
    ] = None,
    device: Device = _DEFAULT.device,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="runs/<data>")
    ] = None,
    sampling: Annotated[
        str,
        typer.Option(
            help="Which images or rows each member sees: shared, shuffled, bootstrap or folds."
        ),
    ] = _DEFAULT.sampling,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Keep an eighth of the images, a tenth of the rows, for validation, stop each "
            "member after so many epochs without improvement, and take its best weights.",
            show_default=f"all epochs; tables: {_TABLE.patience}, 0 for all epochs",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            help="Images: epochs between two checkpoints in the folder.", show_default="none"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Images: go on from the checkpoint in the folder.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train N models at once on images or on a table; score members and ensemble."""
    # With other processes, that torchrun has started: one speaks for all.
    is_first = is_first_of_all()
    progress = Console(stderr=True, quiet=not is_first)
    if is_table(data):
        _refuse({"--checkpoint-every": checkpoint_every, "--resume": resume}, f"{data} is a table")
        report = run_train_table(
            TableRequest(
                Path(data),
                target,
                task,
                test_share=_TABLE.test_share if test_share is None else test_share,
                categorical=tuple(categorical or ()),
                drop=tuple(drop or ()),
                model=model,
                members=members,
                epochs=_TABLE.epochs if epochs is None else epochs,
                seed=seed,
                lr=tuple(lr or _TABLE.lr),
                batch_size=_TABLE.batch_size if batch_size is None else batch_size,
                device=device,
                out=out,
                sampling=sampling,
                patience=_TABLE.patience if patience is None else patience,
            ),
            progress,
        )
    else:
        of_tables = {
            "--target": target,
            "--task": task,
            "--test-share": test_share,
            "--categorical": categorical,
            "--drop": drop,
        }
        _refuse(of_tables, f"{data} is no .csv or .parquet file")
        request = TrainRequest(
            data,
            model,
            members,
            _DEFAULT.epochs if epochs is None else epochs,
            seed,
            tuple(lr or _DEFAULT.lr),
            _DEFAULT.batch_size if batch_size is None else batch_size,
            device,
            out,
            sampling,
            patience,
            checkpoint_every,
            resume,
        )
        report = run_train(request, progress)
    if is_first:
        _print_training(report, as_json)


def _refuse(options: dict[str, Any], why: str) -> None:
    """Raise if an option was given that means nothing here."""
    given = [name for name, value in options.items() if value]
    if given:
        raise ArgumentError(f"{', '.join(given)}: not for this data, {why}")


def _print_training(report: TrainReport, as_json: bool) -> None:
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
def predict(
    run: Annotated[Path, typer.Argument(help="The folder that unisono train wrote.")],
    input_file: Annotated[
        str,
        typer.Option(
            "--input", help="The rows: file.csv, file.parquet, a folder of these, or - for CSV."
        ),
    ],
    output_file: Annotated[
        str,
        typer.Option(
            "--output",
            help="Where to: file.csv, file.parquet, or - for CSV; for a folder a folder, with a "
            "file for each of its files. What is finished in there is not done again.",
        ),
    ],
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="A column of the input to put before the results; may be repeated; "
            "all for all of them.",
            show_default="none",
        ),
    ] = None,
    unseen: Annotated[
        str,
        typer.Option(
            help="error or ignore: what to do with categories, and missing values in columns, "
            "that training never saw."
        ),
    ] = "error",
    model: Annotated[
        str | None,
        typer.Option(
            help="The package.module:factory of the training, if it had one.", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    launch: Annotated[
        int | None,
        typer.Option(help="Folders: processes to share out the work.", show_default="this one"),
    ] = None,
) -> None:
    """Predict every row of a table, or of many, with the uncertainty; in constant memory."""
    request = PredictRequest(
        run, input_file, output_file, tuple(keep or ()), unseen, model, device, launch
    )
    report = run_predict(request, Console(stderr=True))
    if report is None:  # the first of the processes tells it for all
        return
    console = Console(stderr=output_file == STANDARD)
    speed = report.rows / max(report.seconds, 1e-9)
    lines = [
        *report.notes,
        f"predicted {report.rows:,} rows in {report.seconds:.1f} s ({speed:,.0f} a second)",
    ]
    lines += [] if output_file == STANDARD else [f"wrote {output_file}"]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder that unisono train wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write.", show_default="report.html in the folder"),
    ] = None,
    browser: Annotated[bool, typer.Option("--open", help="Show it in the web browser.")] = False,
) -> None:
    """Write one HTML file about a run: data, scores, plots, uncertain examples."""
    path = run_report(run, out)
    Console().print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    if browser:
        typer.launch(str(path))


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
    # Here, because what torch measures with brings setuptools and more.
    from unisono.commands.bench import OPTIONS, BenchSettings, run_bench

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


for command in (inspect, merge, split, export):
    app.command()(command)


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
