"""Writing a file as a whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves behind stays there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a new file to write to, which takes the place of ``path`` when the block ends well.

    If it ends with an error, by ctrl-C too, or if the process is killed, ``path`` is as before.
    Only a killed process leaves the new file behind, ``.NAME.….tmp`` in the same folder; the next
    one that writes to ``path`` removes it. A link stays a link, to the new content.

    Args:
        path: The file to be replaced, or made.

    Yields:
        Path of the new file, which is empty.

    Raises:
        OSError: If the disk refuses.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "result.txt"
        >>> with replacing(target) as new:
        ...     _ = new.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    target = Path(os.path.realpath(path))
    _remove_left_behind(target)
    new, lock = _new_beside(target)
    try:
        yield new
        _sync(new)  # a rename must not become durable before the content
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)
    _sync(target.parent)


def _new_beside(target: Path) -> tuple[Path, int | None]:
    """A new file and the handle that holds its lock for as long as this process lives.

    In the same folder, because a rename is atomic only within one file system.
    """
    while True:
        new = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        handle = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if fcntl is None:
            os.close(handle)  # Windows renames no open file
            return new, None
        with suppress(OSError):  # there was no file before, or its rights can't be had
            os.fchmod(handle, target.stat().st_mode & 0o7777)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if new.exists():
            return new, handle
        os.close(handle)  # another process came between, and took it for one left behind


def _remove_left_behind(target: Path) -> None:
    """Remove the new files of processes that were killed: nobody holds their locks."""
    if fcntl is None:
        return
    for old in target.parent.glob(f".{_escaped(target.name)}.*.tmp"):
        with suppress(OSError):  # it is in use, or gone, or another user's
            handle = os.open(old, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                old.unlink()
            finally:
                os.close(handle)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
