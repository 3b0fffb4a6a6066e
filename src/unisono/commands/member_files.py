"""What the commands have in common that read and write weights: errors, keys, factories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unisono.commands.models import describe, load_factory
from unisono.commands.outcome import ArgumentError
from unisono.commands.run_folder import ENSEMBLE, RUN, RunFolder
from unisono.errors import CheckpointError


def ensemble_of(path: Path) -> Path:
    """The file of an ensemble: the path itself, or that in the folder of a run on images.

    Raises:
        ArgumentError: If it is the folder of another run, or of a damaged one.
    """
    if not (path / RUN).is_file():
        return path
    folder = RunFolder(path)
    if folder.description.kind == "images":
        return folder.file(ENSEMBLE)
    raise ArgumentError(
        f"{path} is a run on a table, whose members are a part of their estimator; this takes a "
        "saved ensemble or a run on images"
    )


@contextmanager
def failures_told() -> Iterator[None]:
    """Tell of files that can't be read, or aren't what they should be, as an argument's fault."""
    try:
        yield
    except CheckpointError as error:
        raise ArgumentError(str(error)) from error
    except OSError as error:
        raise ArgumentError(
            f"can't read {error.filename}: {error.strerror}" if error.strerror else str(error)
        ) from error


def picking(select: str | None, strip: str = "") -> Callable[[Any], Mapping[str, Tensor]]:
    """A function that picks the state dict out of what a file holds.

    Args:
        select: Its dotted key, as of ``{"best": {"model": state_dict}}`` ``best.model``; None if
            the file holds the state dict itself.
        strip: What is taken off the front of the names that begin with it.

    Returns:
        The function; it raises `CheckpointError` where there is no state dict.

    Example:
        >>> picking("best.model", "net.")({"best": {"model": {"net.w": 1}}})
        {'w': 1}
    """

    def pick(found: Any) -> Mapping[str, Tensor]:
        keys = select.split(".") if select else []
        for k, key in enumerate(keys):
            if not isinstance(found, Mapping) or key not in found:
                where = f"what is under {'.'.join(keys[:k])}" if k else "the file"
                raise CheckpointError(
                    f"--select {select}: {where} has no {key!r}, {_content(found)}"
                )
            found = found[key]
        where = f"--select {select}: there" if select else "there"
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{where} is no state dict, {_content(found)}")
        other = [str(key) for key, value in found.items() if not isinstance(value, Tensor)]
        inside = [key for key in other if isinstance(found.get(key), Mapping)]
        if inside:
            path = ".".join([*keys, inside[0]])
            raise CheckpointError(
                f"{where} are more than tensors, {_content(found)}; name the key of the state dict,"
                f" perhaps --select {path}"
            )
        return {str(name).removeprefix(strip): value for name, value in found.items()}

    return pick


def choose_member_factory(spec: str) -> Callable[[], nn.Module]:
    """Turn the value of ``--model`` into a function that makes one member, told of by one line.

    Args:
        spec: ``package.module:factory``, a function without argument.

    Raises:
        ArgumentError: If there is no such function; the one that is returned raises it, too, if
            calling it fails or makes no module.
    """
    if ":" not in spec:
        raise ArgumentError(f"--model {spec}: expected package.module:factory")
    factory = load_factory(spec)

    def make() -> nn.Module:
        try:
            model = factory()
        except Exception as error:  # the user's function may do anything
            raise ArgumentError(f"--model {spec}: {spec}() failed: {describe(error)}") from error
        if not isinstance(model, nn.Module):
            raise ArgumentError(
                f"--model {spec}: expected a torch.nn.Module from {spec}(), got "
                f"{type(model).__name__}"
            )
        return model

    return make


def check_out_file(out: Path, inputs: list[Path]) -> Path:
    """Return a file that can be written and is none of the inputs.

    Raises:
        ArgumentError: If it isn't.
    """
    if out.is_dir():
        raise ArgumentError(f"--out {out} is a folder; give a file")
    if not out.parent.is_dir():
        raise ArgumentError(f"--out {out}: there is no folder {out.parent}")
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise ArgumentError(f"--out {out} is one of the inputs; give another file")
    return out


def _content(found: Any) -> str:
    if not isinstance(found, Mapping):
        return f"but a {type(found).__name__}"
    names = [str(key) for key in found]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"but {', '.join(names[:6])}{more}"
