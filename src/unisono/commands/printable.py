"""Text of files on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Write what isn't shown, but done, by a terminal as an escape of Python.

    Names in a file come from anyone: a terminal would clear its screen, or hide a line.

    Example:
        >>> printable("weight\x1b[2J\n"), printable("größe 3")
        ('weight\\x1b[2J\\n', 'größe 3')
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
