"""Writing a file as a whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
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
        OSError: If the disk refuses, or ``path`` is a folder, a device or a pipe. The error names
            ``path``, not the new file, which the caller doesn't know.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "result.txt"
        >>> with replacing(target) as new:
        ...     _ = new.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    target = Path(os.path.realpath(path))
    _refuse_what_is_no_file(target)
    _remove_left_behind(target)
    # In the same folder, because a rename is atomic only within one file system. 64 random bits:
    # nobody else has this name, so it may be removed even if ctrl-C comes while it is made.
    new = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    lock = None
    try:
        lock = _make(new, target)
        yield new
        _sync(new)  # a rename must not become durable before the content
        os.replace(new, target)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(new)):
            raise  # about another file
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        with suppress(OSError):  # renamed it is gone; else an error is on its way already
            new.unlink()
        if lock is not None:
            os.close(lock)
    _sync(target.parent)


def _refuse_what_is_no_file(target: Path) -> None:
    """Raise before a rename takes the place of a device, which a superuser may do."""
    try:
        mode = target.stat().st_mode
    except OSError:  # nothing is there, or making the new file will tell
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(target))


def _make(new: Path, target: Path) -> int | None:
    """Make a file, and give the handle that holds its lock for as long as this process lives."""
    while True:
        handle = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if fcntl is None:
            os.close(handle)  # Windows renames no open file
            return None
        with suppress(OSError):  # there was no file before, or its rights can't be had
            os.fchmod(handle, target.stat().st_mode & 0o7777)
        with suppress(OSError):  # a file system without locks
            # Waits for another process that came between, and takes it for one left behind.
            fcntl.flock(handle, fcntl.LOCK_EX)
        if new.exists():
            return handle
        os.close(handle)


def _remove_left_behind(target: Path) -> None:
    """Remove the new files of processes that were killed: nobody holds their locks."""
    if fcntl is None:
        return
    for old in target.parent.glob(f".{_escaped(target.name)}.*.tmp"):
        with suppress(OSError):  # it is in use, or gone, or another user's
            handle = os.open(old, os.O_RDONLY | os.O_NONBLOCK)
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
