"""Writing results: a folder gets all its files, each whole, or stays as it was."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from unisono.commands.outcome import ArgumentError, CommandError


class OutputFolder:
    """A folder that is proven writable before the work and filled at its end.

    Use it as a context manager around the work. If the block ends without `write`,
    by an error or by ctrl-C, the folders that were made for it are removed again.

    Args:
        path: The folder; it and its parents are made where they are missing.
        writes: False for a process that only works along with the one that writes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as base, OutputFolder(Path(base) / "run") as out:
        ...     [path.name for path in out.write({"a.txt": b"whole"})]
        ['a.txt']
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.written = False
        self._made: list[Path] = []

    def __enter__(self) -> OutputFolder:
        """Make the folder and write one byte into it, as a test.

        Raises:
            ArgumentError: If the path is a file or can't be made or written to.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ArgumentError(f"--out {self.path} is a file; give a folder")
        try:
            self._make()
            if not self.writes:
                return self
            probe = _temporary(self.path, "probe")
            try:
                _write_synced(probe, b"x")
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            self._remove()
            raise ArgumentError(f"can't write to --out {self.path}: {error.strerror}") from error
        except BaseException:  # ctrl-C between making and leaving: __exit__ won't be called
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the folders made on entering, unless files were written."""
        if not self.written and self.writes:
            self._remove()

    def write(self, contents: Mapping[str, bytes]) -> list[Path]:
        """Put every file in place; until all are whole on disk, none is.

        Args:
            contents: File name in the folder -> what the file shall hold.

        Returns:
            The paths, in the given order; none if another process writes.

        Raises:
            CommandError: If the disk refuses; older files of these names are untouched.
        """
        if not self.writes:
            return []
        try:
            staged = {name: _temporary(self.path, name) for name in contents}
            try:
                for name, content in contents.items():
                    _write_synced(staged[name], content)
                self.written = True  # from here on there may be something new in the folder
                for name, temporary in staged.items():
                    os.replace(temporary, self.path / name)
            finally:
                for temporary in staged.values():
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            raise CommandError(f"can't write to {self.path}: {error.strerror}") from error
        return [self.path / name for name in contents]

    def _make(self) -> None:
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)

    def _remove(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # someone else put a file there: keep it
                folder.rmdir()
        self._made.clear()


def _temporary(folder: Path, name: str) -> Path:
    # In the same folder, because a rename is atomic only within one file system.
    return folder / f".{name}.{secrets.token_hex(4)}.tmp"


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a rename must not become durable before the content
