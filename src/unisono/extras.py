"""Imports of optional packages; their absence is one error that names the extra."""

from __future__ import annotations

import importlib
from types import ModuleType

from unisono.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Called before the long work starts, so that nobody trains for an hour to learn that
    the picture can't be drawn.

    Args:
        module: Name of the module to import.
        extra: The extra of unisono that installs it.
        purpose: What needs it, as the start of a sentence.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: If the package isn't installed. A package that is there but
            broken raises its own error instead.

    Example:
        >>> require("json", extra="demo", purpose="this example").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f"{purpose} needs the package {package}, from the extra `{extra}`: "
            f'pip install "unisono[{extra}]"'
        ) from None
