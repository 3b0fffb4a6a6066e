"""What is finished in a folder of results, and what it was made from.

Beside the results, which lie as the files of the input do, there is the folder ``.unisono``:

- ``job.json``: the run, the options and the input that the folder belongs to;
- ``NAME.json``: the record of a finished file: of which input, how many rows;
- ``NAME.parts/START-STOP.parquet`` and ``….json``: results of row groups of a file that isn't
  finished, and their records.

Everything is put in place whole, and a record after what it tells of. So a process may be killed at
any moment: what has a record is finished, what has none is made again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from unisono.commands.features import Finding
from unisono.commands.outcome import ArgumentError, CommandError
from unisono.commands.pieces import InputFile, Piece
from unisono.commands.result_files import open_results
from unisono.files import replacing

try:
    import fcntl
except ImportError:  # Windows: two jobs in one folder aren't noticed
    fcntl = None  # type: ignore[assignment]

STATE: Final = ".unisono"
_JOB: Final = "job.json"


@dataclass(frozen=True)
class Record:
    """What is known of finished results.

    Args:
        rows: How many there are.
        findings: What in them training never saw.
    """

    rows: int
    findings: tuple[Finding, ...] = ()


class Finished:
    """The results in a folder.

    Args:
        output: The folder.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._state = output / STATE

    def begin(self, job: Mapping[str, Any]) -> None:
        """Make the folder if there is none, and check that it belongs to this job.

        Raises:
            ArgumentError: If it belongs to another one.
            CommandError: If the disk refuses.
        """
        path = self._state / _JOB
        try:
            if path.exists():
                _compare(self.output, path, job)
            else:
                self._state.mkdir(parents=True, exist_ok=True)
                _write_json(path, dict(job))
        except OSError as error:
            raise _refused(self.output, error) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other jobs out of the folder.

        Raises:
            ArgumentError: If there is one at work.
        """
        with contextlib.ExitStack() as stack:
            if fcntl is not None:
                handle = os.open(self._state / "lock", os.O_CREAT | os.O_RDWR, 0o666)
                stack.callback(os.close, handle)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ArgumentError(
                        f"another unisono predict is writing to {self.output}"
                    ) from None
                except OSError as error:
                    if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                        raise
            yield

    def target(self, file: InputFile, piece: Piece | None) -> Path:
        """Where the results of a file are put, or those of one of its pieces."""
        if piece is None or len(file.pieces) == 1:
            return self.output / file.name
        assert piece.groups is not None
        start, stop = piece.groups
        return self._parts(file) / f"{start}-{stop}.parquet"

    def recall(self, file: InputFile, piece: Piece | None = None) -> Record | None:
        """What is known of finished results; None if there are none of this very input."""
        try:
            known = json.loads(self._record(file, piece).read_text(encoding="utf-8"))
            if known["input"] != _plain(file) or known["output"] != _about(
                self.target(file, piece)
            ):
                return None
            return Record(known["rows"], tuple(_finding(own) for own in known["findings"]))
        except (OSError, ValueError, KeyError, TypeError):
            # There is none, or it isn't what `remember` wrote: made again, nothing is lost.
            return None

    def prepare(self, file: InputFile, piece: Piece | None = None) -> Path:
        """Make the folders for results, and return their path.

        Raises:
            CommandError: If the disk refuses.
        """
        target = self.target(file, piece)
        try:
            for path in (target, self._record(file, piece)):
                path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _refused(self.output, error) from error
        return target

    def remember(self, file: InputFile, piece: Piece | None, record: Record) -> None:
        """Note that the results at `target` are whole.

        Raises:
            CommandError: If the disk refuses.
        """
        try:
            about = {
                "input": _plain(file),
                "output": _about(self.target(file, piece)),
                "rows": record.rows,
                "findings": [asdict(own) for own in record.findings],
            }
            _write_json(self._record(file, piece), about)
        except OSError as error:
            raise _refused(self.output, error) from error

    def join(self, file: InputFile) -> None:
        """Put the parts of a Parquet file together, in order, and remember it as a whole.

        Raises:
            CommandError: If the disk refuses, or a part is gone.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        records = [self.recall(file, piece) for piece in file.pieces]
        known = [record for record in records if record is not None]
        if len(known) < len(records):
            raise CommandError(
                f"parts of {file.name} are gone from {self._parts(file)}; the same command makes "
                "them again"
            )
        target = self.prepare(file)
        parts = [self.target(file, piece) for piece in file.pieces]
        try:
            with open_results(str(target), pq.read_schema(parts[0])) as writer:
                for part in parts:
                    with pq.ParquetFile(part) as source:
                        for k in range(source.num_row_groups):
                            for batch in source.read_row_group(k).to_batches():
                                writer.write(batch)
        except pa.ArrowException as error:
            raise CommandError(f"can't read parts of {file.name}: {error}") from error
        findings = tuple(own for record in known for own in record.findings)
        self.remember(file, None, Record(sum(record.rows for record in known), findings))
        self.tidy(file)

    def tidy(self, file: InputFile) -> None:
        """Remove the parts of a file that is finished."""
        shutil.rmtree(self._parts(file), ignore_errors=True)

    def strangers(self, names: set[str]) -> list[str]:
        """Finished files that aren't among these names: their input is gone."""
        records = self._state.rglob("*.json")
        found = {path.relative_to(self._state).as_posix().removesuffix(".json") for path in records}
        found = {name for name in found if ".parts/" not in name} - {_JOB.removesuffix(".json")}
        return sorted(name for name in found - names if (self.output / name).exists())

    def _parts(self, file: InputFile) -> Path:
        return self._state / f"{file.name}.parts"

    def _record(self, file: InputFile, piece: Piece | None) -> Path:
        if piece is None or len(file.pieces) == 1:
            return self._state / f"{file.name}.json"
        return self.target(file, piece).with_suffix(".json")


def _compare(output: Path, path: Path, job: Mapping[str, Any]) -> None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in job if known.get(name) != job[name]]
    except (ValueError, AttributeError) as error:
        raise ArgumentError(
            f"{path} can't be used: {error}; remove {output / STATE}, and everything is predicted "
            "anew"
        ) from error
    if differing:
        facts = "; ".join(f"{name} {known.get(name)!r}, now {job[name]!r}" for name in differing)
        raise ArgumentError(
            f"--output {output} holds results of another job: {facts}; give another folder, or "
            "remove that one"
        )


def _plain(file: InputFile) -> dict[str, Any] | None:
    return None if file.identity is None else asdict(file.identity)


def _about(path: Path) -> list[int]:
    """Enough to see that a file isn't the one that was written."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def _finding(values: dict[str, Any]) -> Finding:
    return Finding(**{**values, "values": tuple(values["values"])})


def _write_json(path: Path, values: Any) -> None:
    with replacing(path) as new:
        new.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _refused(output: Path, error: OSError) -> CommandError:
    return CommandError(f"can't write to {error.filename or output}: {error.strerror}")
