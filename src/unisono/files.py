"""Writing a file as a whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a new file to write to, which takes the place of ``path`` when the block ends well.

    If it ends with an error, by ctrl-C too, or if the process is killed, ``path`` is as before;
    only a killed process leaves the new file behind, ``.NAME.….tmp`` in the same folder.

    Args:
        path: The file to be replaced, or made.

    Yields:
        Path of the new file, which doesn't exist yet.

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
    target = Path(path)
    # In the same folder, because a rename is atomic only within one file system.
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield new
        _sync(new)  # a rename must not become durable before the content
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
