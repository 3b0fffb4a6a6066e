"""Memory that is free stays with the process, so that the next call need not ask for it again.

A C library gives what was freed back to the system, and whoever writes to new memory waits for each
page of it: for all members at once, whose results are N times as large as one member's, up to half
of a call. glibc adapts to a program: after a block of up to 32 MB was freed, blocks up to that size
stay, at most twice as much in all (https://man7.org/linux/man-pages/man3/mallopt.3.html,
``M_MMAP_THRESHOLD``). One block that nobody writes to teaches it so at once.
"""

from __future__ import annotations

import functools
from typing import Final

import torch

_LARGEST: Final = 32 << 20  # bytes; glibc adapts to nothing larger
_HEADER: Final = 64 << 10  # more than what the library adds to a block


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep blocks of up to 32 MB that are freed, once per process."""
    # No mode takes part in this, as it would in `torch.empty`.
    torch.UntypedStorage(_LARGEST - _HEADER)  # type: ignore[no-untyped-call]
