"""The state of one plain model, from the files that PyTorch and its neighbours write.

``.safetensors``; ``.pt``, ``.pth``, ``.bin`` and ``.ckpt`` by ``torch.load(weights_only=True)``,
which runs nothing; a folder in the layout of the Hugging Face Hub, in one piece or in shards.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from unisono.checkpoint.dtypes import CODES
from unisono.checkpoint.reading import TensorFile, open_file
from unisono.checkpoint.writing import MAX_HEADER
from unisono.errors import CheckpointError
from unisono.files import replacing

Select: TypeAlias = Callable[[Any], Mapping[str, Tensor]]

WHAT: Final = "the checkpoint of a model"
_PICKLED: Final = (".pt", ".pth", ".bin", ".ckpt")
# In this order: a folder may hold the weights twice, and safetensors is read piece by piece.
_IN_FOLDER: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@contextmanager
def open_member(
    path: str | os.PathLike[str], select: Select | None = None
) -> Iterator[dict[str, Tensor]]:
    """Read the state dict of one model; safetensors are mapped, and read when looked at.

    Args:
        path: The file or folder.
        select: Picks the state dict out of what a pickled file holds.

    Yields:
        Tensors by name, on the CPU.

    Raises:
        OSError: If a file can't be read.
        CheckpointError: If it holds something else, or is damaged.
    """
    file = _file_of(Path(path))
    with ExitStack() as stack:
        if file.name.endswith(".index.json"):
            state: dict[str, Tensor] = {}
            for shard, names in _shards(file).items():
                found = _read(shard, stack, None)
                missing = [name for name in names if name not in found]
                if missing:
                    raise CheckpointError(
                        f"{shard} has no `{missing[0]}`, which {file.name} says is in it"
                        + (f", and {len(missing) - 1} more" if missing[1:] else "")
                    )
                state |= {name: found[name] for name in names}
            yield _state_dict(state, file, select)
        else:
            yield _state_dict(_read(file, stack, select), file, select)


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in _IN_FOLDER:
        if (path / name).exists():
            return path / name
    raise CheckpointError(
        f"{path} is a folder without {', '.join(_IN_FOLDER)}; name the file in it"
    )


def _read(file: Path, stack: ExitStack, select: Select | None) -> Any:
    """What the file holds: a state dict, or anything that ``select`` may pick one from."""
    if file.suffix == ".safetensors":
        opened = stack.enter_context(open_file(file, what=WHAT))
        _refuse_ensemble(opened)
        return {key: opened.map(key) for key in opened.entries}
    if file.suffix in _PICKLED:
        return _unpickle(file)
    raise CheckpointError(
        f"{file} isn't {WHAT}: its name ends in {file.suffix!r}, known are .safetensors,"
        f" {', '.join(_PICKLED)}"
    )


def _refuse_ensemble(file: TensorFile) -> None:
    if isinstance(file.facts, dict) and file.facts.get("kind") == "ensemble":
        raise file.broken(
            f"it is an ensemble of {file.facts.get('members')} members; read it with"
            f" Ensemble.load({file.name!r}, make_model)"
        )


def _unpickle(file: Path) -> Any:
    """What `torch.load` gives without running code of the file."""
    with file.open("rb"):
        pass  # tells of a missing file in Python's own words
    try:
        _refuse_compressed(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, torch.OutOfMemoryError):
        raise
    # The content comes from anywhere, and unpickling it raises whatever its bytes lead to.
    except Exception as error:
        first = str(error).partition("\n")[0] or repr(error)
        advice = (
            "; if you trust it, save its state_dict() alone from where the model's class is known"
            if "weights_only" in str(error) or "Unsupported" in str(error)
            else ""
        )
        raise CheckpointError(f"{file} isn't {WHAT}: {first}{advice}") from error


def _refuse_compressed(file: Path) -> None:
    """`torch.save` stores as it is; what is compressed may unpack to more than there is memory."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        size = file.stat().st_size
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
                raise ValueError(
                    f"{info.filename!r} in it is compressed, {info.file_size:,} bytes unpacked;"
                    f" torch.save stores plain bytes"
                )


def _shards(index: Path) -> dict[Path, list[str]]:
    """The files that an index names, and the tensors in each; all in the folder of the index."""
    if index.stat().st_size > MAX_HEADER:
        raise CheckpointError(f"{index}: an index of {index.stat().st_size:,} bytes isn't read")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} isn't the index of a checkpoint: {error!r}") from error
    shards: dict[Path, list[str]] = {}
    for name, file in pairs:
        # Only the name is looked at: in a cache of the Hub the file itself may be a link.
        if PurePosixPath(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{index}: `{name}` is said to be in {file!r}, which is no file name; shards lie in"
                f" the folder of their index"
            )
        shards.setdefault(index.parent / file, []).append(name)
    return shards


def _state_dict(found: Any, file: Path, select: Select | None) -> dict[str, Tensor]:
    chosen = found if select is None else select(found)
    if not isinstance(chosen, Mapping):
        raise CheckpointError(
            f"{file} isn't {WHAT}: it holds a {type(chosen).__name__}, not a state dict"
        )
    # Modules may keep what is no tensor in a state dict, under a name that torch reserves.
    state = {name: value for name, value in chosen.items() if not _is_extra(name)}
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        inside = [name for name in other if isinstance(state[name], Mapping)]
        example = (inside or other)[0]
        raise CheckpointError(
            f"{file} isn't {WHAT}: {example!r} in it is a {type(state[example]).__name__}, not a"
            f" tensor; say where the state dict is: select=lambda found: found[{example!r}]"
        )
    return {str(name): value.detach() for name, value in state.items()}


def _is_extra(name: Any) -> bool:
    return isinstance(name, str) and name.rpartition(".")[2] == "_extra_state"


def save_member(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write the state dict of one model, as a whole or not at all.

    Args:
        path: ``NAME.safetensors``, or ``.pt`` or ``.pth`` for `torch.save`.
        state: Tensors by name.

    Raises:
        ValueError: If the name ends otherwise.
        OSError: If the disk refuses; a file that was there before is as it was.
    """
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(
            f"ens.save_member: a state dict is written to NAME.safetensors, .pt or .pth, got"
            f" {os.fspath(path)!r}"
        )
    if suffix == ".safetensors":
        _refuse_what_has_no_code(path, state)
    # Copies, in order: the tensors of a member are rows of larger ones, and `torch.save` would
    # write all of these. Tied tensors are stored under each name, as any reader expects them.
    own = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        if isinstance(value, Tensor)
        else value
        for name, value in state.items()
    }
    with replacing(path) as new:
        if suffix != ".safetensors":
            torch.save(own, new)
            return
        try:
            save_file(own, new, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"can't write {os.fspath(path)}: {error}") from error


def _refuse_what_has_no_code(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    wrong = [
        f"`{name}` is {value.dtype if isinstance(value, Tensor) else type(value).__name__}"
        for name, value in state.items()
        if not isinstance(value, Tensor) or value.dtype not in CODES
    ]
    if wrong:
        raise ValueError(
            f"ens.save_member: {os.fspath(path)}: safetensors has no room for {'; '.join(wrong)};"
            f" save it as .pt"
        )
