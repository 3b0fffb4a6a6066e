"""The folder of a run: what ``unisono train`` leaves, and the only place that reads it.

``run.json`` describes the run and holds the SHA-256 of every other file that a later command
reads, so that a file that is cut off, changed or left from another run is found before use.
Tensors and the preprocessing are safetensors, the same as scikit-learn fitted it is skops with a
fixed list of types, a table is Parquet, the rest JSON: reading a run never executes code from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from unisono.commands.columns import Column
from unisono.commands.outcome import ArgumentError

if TYPE_CHECKING:
    from pyarrow import Table
    from sklearn.compose import ColumnTransformer

    from unisono.commands.plain_preprocessing import PlainPreprocessing

RUN: Final = "run.json"
METRICS: Final = "metrics.json"
MODEL: Final = "model.safetensors"
ENSEMBLE: Final = "ensemble.safetensors"
PIPELINE: Final = "preprocessing.skops"
PREPROCESSING: Final = "preprocessing.safetensors"
TEST_OUTPUTS: Final = "test_outputs.safetensors"
TEST_TABLE: Final = "test_table.parquet"
PLAN: Final = "plan.json"
CURVES: Final = "curves.png"

_FORMAT: Final = 1


@dataclass(frozen=True)
class Description:
    """What ``run.json`` says about a run.

    Args:
        kind: ``"table"`` or ``"images"``.
        task: ``"classification"`` or ``"regression"``.
        data: Name of the file or of the set of images, without its folder.
        classes: The labels, in the order of the outputs; empty for regression.
        target: Name of the target's column; empty for images.
        columns: The columns that are features, in the order of the preprocessing.
        dropped: Column that is no feature -> why.
        model: Which module the members are, as on the command line.
        image_shape: Channels, height and width; empty for tables.
        estimator: The plain values of the estimator, see `unisono.estimators.state`.
        versions: Package -> version that wrote the run.
    """

    kind: str
    task: str
    data: str
    classes: tuple[str | int | float | bool, ...] = ()
    target: str = ""
    columns: tuple[Column, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    image_shape: tuple[int, ...] = ()
    estimator: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TestOutputs:
    """What every member says about the test rows.

    Args:
        outputs: Logits; for regression mean and log-variance, or the mean alone, in the
            target's unit.
        targets: Index of the class (int64), or the value (float64).
        rows: For a table the row of its file, 1 for the first below the header; for images
            the index among the test images.
        inputs: Test images (uint8), if the run keeps them.

    Shape:
        - outputs: ``(N, B, C)``; ``(N, B, 2)`` for regression, ``(N, B, 1)`` for members that
          predict points
        - targets, rows: ``(B,)``
        - inputs: ``(B, 1, height, width)``
    """

    __test__ = False  # nothing for pytest, whatever the name looks like

    outputs: Tensor
    targets: Tensor
    rows: Tensor
    inputs: Tensor | None = None


def pack(description: Description, contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """Add ``run.json`` to the files of a run.

    Args:
        description: Of the run.
        contents: File name -> content of every other file.

    Returns:
        All files; ``run.json`` is the last, so the others stand when it is put in place.
    """
    values = {
        "format": _FORMAT,
        **vars(description),
        "columns": [column.to_json() for column in description.columns],
        "files": {name: _digest(content) for name, content in contents.items()},
    }
    return {**contents, RUN: to_json(values)}


def to_json(values: Any) -> bytes:
    """Return the content of a JSON file; a float that JSON has no word for is an error."""
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def pack_outputs(found: TestOutputs) -> bytes:
    """Return the content of ``test_outputs.safetensors``."""
    tensors = {"outputs": found.outputs, "targets": found.targets, "rows": found.rows}
    if found.inputs is not None:
        tensors["test_inputs"] = found.inputs
    return safetensors.torch.save({name: t.cpu().contiguous() for name, t in tensors.items()})


class RunFolder:
    """A run on disk.

    Args:
        path: The folder.

    Raises:
        ArgumentError: If it isn't the folder of a run, or ``run.json`` is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            what = "is a file" if path.exists() else "doesn't exist"
            raise ArgumentError(f"{path} {what}; give the folder that unisono train wrote")
        if not (path / RUN).exists():
            raise ArgumentError(
                f"{path} has no {RUN}, so it isn't a run that unisono train finished"
            )
        content = self._bytes(RUN)
        self.digest = _digest(content)  # of all files, because theirs are in it
        values = self._json(RUN, content)
        try:
            if values["format"] != _FORMAT:
                raise ValueError(f"format {values['format']!r}, this version reads {_FORMAT}")
            self._files = {str(name): str(digest) for name, digest in values["files"].items()}
            self.description = _description(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.damaged(RUN, f"{type(error).__name__}: {error}") from error

    def has(self, name: str) -> bool:
        """Say whether the run has a file of this name."""
        return name in self._files

    def metrics(self) -> dict[str, Any]:
        """Settings and scores, from ``metrics.json``."""
        return self._json(METRICS, self.content(METRICS))

    def plan(self) -> dict[str, Any] | None:
        """How the members run, from ``plan.json``; None if the run has none."""
        return self._json(PLAN, self.content(PLAN)) if self.has(PLAN) else None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read one of the safetensors files."""
        content = self.content(name)
        try:
            return safetensors.torch.load(content)
        except (SafetensorError, ValueError, KeyError) as error:
            raise self.damaged(name, f"not safetensors: {error}") from error

    def test_outputs(self) -> TestOutputs:
        """What every member says about the test rows."""
        tensors = self.tensors(TEST_OUTPUTS)
        try:
            found = TestOutputs(
                tensors["outputs"],
                tensors["targets"],
                tensors["rows"],
                tensors.get("test_inputs"),
            )
        except KeyError as error:
            raise self.damaged(TEST_OUTPUTS, f"it has no tensor {error}") from error
        sizes = {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
        rows = len(found.targets) if found.targets.ndim == 1 else -1
        if found.outputs.ndim != 3 or found.outputs.shape[1] != rows or len(found.rows) != rows:
            raise self.damaged(TEST_OUTPUTS, f"shapes that don't belong together: {sizes}")
        return found

    def test_table(self) -> Table | None:
        """Features and target of the test rows as they stood in the file; None for images."""
        if not self.has(TEST_TABLE):
            return None
        content = self.content(TEST_TABLE)
        from unisono.commands.table_files import from_parquet

        try:
            return from_parquet(content)
        except ValueError as error:
            raise self.damaged(TEST_TABLE, str(error)) from error

    def preprocessing(self) -> PlainPreprocessing:
        """The fitted preprocessing, columns to features."""
        from unisono.commands.plain_preprocessing import to_plain, unpack_plain

        columns = self.description.columns
        if not self.has(PREPROCESSING):  # a run from before there was this file
            pipeline = self.pipeline()
            try:
                return to_plain(pipeline, columns)
            except (ValueError, AttributeError, TypeError) as error:
                raise self.damaged(PIPELINE, str(error)) from error
        content = self.content(PREPROCESSING)
        try:
            return unpack_plain(content, columns)
        except ValueError as error:
            raise self.damaged(PREPROCESSING, str(error)) from error

    def pipeline(self) -> ColumnTransformer:
        """The same as scikit-learn fitted it."""
        content = self.content(PIPELINE)
        from unisono.commands.preprocessing import from_skops

        try:
            return from_skops(content, num_columns=len(self.description.columns))
        except ValueError as error:
            raise self.damaged(PIPELINE, str(error)) from error

    def content(self, name: str) -> bytes:
        """Read a file and compare it with what ``run.json`` says about it.

        Raises:
            ArgumentError: If it is missing or another one.
        """
        if name not in self._files:
            raise self.damaged(RUN, f"it names no {name}")
        content = self._bytes(name)
        if _digest(content) != self._files[name]:
            raise self._another(name, len(content))
        return content

    def file(self, name: str) -> Path:
        """Compare a file with what ``run.json`` says about it, and give its path.

        For what is too large to be held as `content`.

        Raises:
            ArgumentError: If it is missing or another one.
        """
        if name not in self._files:
            raise self.damaged(RUN, f"it names no {name}")
        path = self.path / name
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self._unreadable(name, error) from error
        if found != self._files[name]:
            raise self._another(name, path.stat().st_size)
        return path

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: OSError) -> ArgumentError:
        return ArgumentError(
            f"can't read {self.path / name}: {error.strerror}; train again, or take a whole "
            "copy of the folder"
        )

    def _another(self, name: str, size: int) -> ArgumentError:
        return self.damaged(
            name,
            f"it isn't the file that {RUN} describes: cut off, changed or of another run "
            f"({size:,} bytes)",
        )

    def _json(self, name: str, content: bytes) -> dict[str, Any]:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self.damaged(name, f"not JSON: {error}") from error
        if not isinstance(values, dict):
            raise self.damaged(name, f"a JSON object is expected, found {type(values).__name__}")
        return values

    def damaged(self, name: str, what: str) -> ArgumentError:
        """The error about a file of the run that can't be used."""
        return ArgumentError(
            f"{self.path / name} can't be used: {what}; train again, or take an undamaged copy"
        )


def _description(values: Mapping[str, Any]) -> Description:
    kind, task = values["kind"], values["task"]
    if kind not in ("table", "images") or task not in ("classification", "regression"):
        raise ValueError(f"kind {kind!r} and task {task!r} are unknown")
    return Description(
        kind=kind,
        task=task,
        data=str(values["data"]),
        classes=tuple(values["classes"]),
        target=str(values["target"]),
        columns=tuple(Column.from_json(column) for column in values["columns"]),
        dropped={str(name): str(why) for name, why in values["dropped"].items()},
        model=str(values["model"]),
        image_shape=tuple(map(int, values.get("image_shape", ()))),  # none before 0.1.0's release
        estimator=dict(values["estimator"]),
        versions={str(name): str(version) for name, version in values["versions"].items()},
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
