"""The state of one plain model, from the files that PyTorch and its neighbours write.

``.safetensors``; ``.pt``, ``.pth``, ``.bin`` and ``.ckpt`` by ``torch.load(weights_only=True)``,
which runs nothing; a folder in the layout of the Hugging Face Hub, in one piece or in shards.
"""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeAlias

import torch
from safetensors.torch import save
from torch import Tensor, nn

from unisono.checkpoint.alike import Layout, safetensors_layout
from unisono.checkpoint.architecture import ties
from unisono.checkpoint.archive import check_storages, is_archive, open_archive
from unisono.checkpoint.dtypes import CODES, aligned
from unisono.checkpoint.reading import TensorFile, check_is_file, open_file
from unisono.checkpoint.writing import MAX_HEADER
from unisono.checkpoint.zip_layout import zip_layout
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
    """Read the state dict of one model; its tensors are read when they are looked at.

    Args:
        path: The file or folder.
        select: Picks the state dict out of what a file holds.

    Yields:
        Tensors by name, on the CPU.

    Raises:
        OSError: If a file can't be read.
        CheckpointError: If it holds something else, or is damaged.
    """
    file = _file_of(Path(path))
    with ExitStack() as stack:
        is_index = file.name.endswith(".index.json")
        found = _read_shards(file, stack) if is_index else _read(file, stack)
        yield _state_dict(found, file, select)


def layout_of(path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> Layout | None:
    """Where the tensors lie in a file, to read others that are alike; None for what has no layout.

    Args:
        path: The file.
        state: What `open_member` gives of it, without ``select``.
    """
    file = Path(path)
    if file.suffix == ".safetensors":
        return safetensors_layout(file)
    if file.suffix in _PICKLED and is_archive(file):
        return zip_layout(file, state)
    return None


def _read_shards(index: Path, stack: ExitStack) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for shard, names in _shards(index).items():
        found = _state_dict(_read(shard, stack), shard, None)
        missing = [name for name in names if name not in found]
        if missing:
            raise CheckpointError(
                f"{shard} has no `{missing[0]}`, which {index.name} says is in it"
                + (f", and {len(missing) - 1} more" if missing[1:] else "")
            )
        state |= {name: found[name] for name in names}
    return state


def _read(file: Path, stack: ExitStack) -> Any:
    """What the file holds: a state dict, or anything that ``select`` may pick one from."""
    if file.suffix == ".safetensors":
        opened = stack.enter_context(open_file(file, what=WHAT))
        _refuse_ensemble(opened)
        return {key: opened.map(key) for key in opened.entries}
    if file.suffix not in _PICKLED:
        raise CheckpointError(
            f"{file} isn't {WHAT}: its name ends in {file.suffix!r}, known are .safetensors,"
            f" {', '.join(_PICKLED)}"
        )
    return _unpickle(file)


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in _IN_FOLDER:
        if (path / name).exists():
            return path / name
    raise CheckpointError(
        f"{path} is a folder without {', '.join(_IN_FOLDER)}; name the file in it"
    )


def _refuse_ensemble(file: TensorFile) -> None:
    if isinstance(file.facts, dict) and file.facts.get("kind") == "ensemble":
        raise file.broken(
            f"it is an ensemble of {file.facts.get('members')} members; read it with"
            f" Ensemble.load({file.name!r}, make_model)"
        )


def _unpickle(file: Path) -> Any:
    """What `torch.load` gives without running code of the file."""
    check_is_file(file, WHAT)
    try:
        mapped = is_archive(file)  # a file in the older format can't be mapped
        if mapped:
            with file.open("rb") as opened:
                open_archive(opened)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        tensors = _dense_tensors(found)
        if mapped:
            check_storages(file, tensors)
        return found
    except torch.OutOfMemoryError:
        raise
    # The content comes from anywhere, and unpickling it raises whatever its bytes lead to.
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # of the disk; the other is of an offset before the beginning
        raise CheckpointError(f"{file} isn't {WHAT}: {_reason(error)}") from error


def _dense_tensors(found: Any) -> list[Tensor]:
    """The dense tensors in containers in containers, which may hold themselves.

    Raises:
        ValueError: If the pickle put something in the place of a method.
    """
    waiting, seen, tensors = [found], set(), []
    while waiting:
        value = waiting.pop()
        if id(value) in seen or not isinstance(value, (Tensor, dict, list, tuple)):
            continue
        seen.add(id(value))
        hidden = [name for name in getattr(value, "__dict__", ()) if hasattr(type(value), name)]
        if hidden:
            kind = type(value).__name__
            raise ValueError(
                f"a {kind} in it has a {hidden[0]!r:.100} that isn't that of its class"
            )
        if isinstance(value, dict):
            waiting += value.values()
        elif not isinstance(value, Tensor):
            waiting += value
        elif _is_plain(value) and value.layout is torch.strided:
            tensors.append(value)
    return tensors


def _reason(error: Exception) -> str:
    """What is wrong with a pickled file, in one line, and what to do about code in it."""
    text = str(error)
    # Around it `torch.load` advises to run the code after all.
    if text.startswith("Weights only load failed"):
        mark = "WeightsUnpickler error: "
        text = text.partition(mark if mark in text else "\n\n")[2]
    first = text.strip().partition("\n")[0].rstrip(".")[:300] or repr(error)[:300]
    if "GLOBAL" in first or "TorchScript" in first:
        first += (
            "; if you trust it, save its state_dict() alone from where the model's class is known"
        )
    return first


def _shards(index: Path) -> dict[Path, list[str]]:
    """The files that an index names, and the tensors in each; all in the folder of the index."""
    check_is_file(index, "the index of a checkpoint")
    if index.stat().st_size > MAX_HEADER:
        raise CheckpointError(f"{index}: an index of {index.stat().st_size:,} bytes isn't read")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        pairs = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = f"{type(error).__name__}: {error}"[:300]
        raise CheckpointError(f"{index} isn't the index of a checkpoint: {told}") from error
    shards: dict[Path, list[str]] = {}
    for name, file in pairs:
        # Only the name is looked at: in a cache of the Hub the file itself may be a link.
        if not _is_file_name(file):
            raise CheckpointError(
                f"{index}: `{name:.100}` is said to be in {file!r:.100}, which is no file name;"
                f" shards lie in the folder of their index"
            )
        shards.setdefault(index.parent / file, []).append(name)
    return shards


def _is_file_name(text: Any) -> bool:
    if not isinstance(text, str) or "\\" in text or not text.isprintable():
        return False
    return text not in ("", "..") and PurePosixPath(text).name == text


def _state_dict(found: Any, file: Path, select: Select | None) -> dict[str, Tensor]:
    try:
        chosen = found if select is None else select(found)
    except CheckpointError as error:  # it says itself what is wrong, and doesn't know the file
        raise CheckpointError(f"{file}: {error}") from error
    except Exception as error:
        error.add_note(f"Ensemble.from_checkpoints: select= raised this for {file}")
        raise
    if not isinstance(chosen, Mapping):
        raise CheckpointError(
            f"{file} isn't {WHAT}: it holds a {type(chosen).__name__}, not a state dict"
        )
    # Modules may keep what is no tensor in a state dict, under a name that torch reserves.
    state = {name: value for name, value in chosen.items() if not _is_extra(name)}
    strange = [type(name).__name__ for name in state if not isinstance(name, str)]
    if strange:
        raise CheckpointError(f"{file} isn't {WHAT}: a {strange[0]} in it is no name of a tensor")
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        inside = [name for name in other if isinstance(state[name], Mapping)]
        example = (inside or other)[0]
        raise CheckpointError(
            f"{file} isn't {WHAT}: {example!r:.100} in it is no tensor"
            f" ({type(state[example]).__name__}); say where the state dict is: select=lambda"
            f" found: found[{example!r:.100}]"
        )
    for name, value in state.items():
        # Kinds such as nested or distributed tensors have no one shape, or can't be copied from.
        if not _is_plain(value):
            kind = "nested tensor" if value.is_nested else type(value).__name__
            kind = "tensor without values" if value.is_meta else kind
            raise CheckpointError(f"{file} isn't {WHAT}: `{name}` is a {kind}, no plain tensor")
    return {name: aligned(value.detach()) for name, value in state.items()}


def _is_plain(value: Tensor) -> bool:
    is_known = type(value) in (Tensor, nn.Parameter, nn.Buffer)
    return is_known and not value.is_nested and not value.is_meta


def _is_extra(name: Any) -> bool:
    return isinstance(name, str) and name.rpartition(".")[2] == "_extra_state"


def save_member(path: str | os.PathLike[str], member: nn.Module) -> None:
    """Write the state dict of one model, as a whole or not at all.

    Args:
        path: ``NAME.safetensors``, or ``.pt`` or ``.pth`` for `torch.save`.
        member: The model, with tensors of its own: of a row, the whole storage would be written.

    Raises:
        ValueError: If the name ends otherwise, or safetensors has no room for a value.
        OSError: If the disk refuses; a file that was there before is as it was.
    """
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(
            f"ens.save_member: a state dict is written to NAME.safetensors, .pt or .pth, got"
            f" {os.fspath(path)!r}"
        )
    # In memory first: so an error of the disk comes as it is, and who may read the file stays.
    if suffix == ".safetensors":
        data = _to_safetensors(path, member)
    else:
        buffer = io.BytesIO()
        torch.save(member.state_dict(), buffer)
        data = buffer.getvalue()
    with replacing(path) as new:
        new.write_bytes(data)


def _to_safetensors(path: str | os.PathLike[str], member: nn.Module) -> bytes:
    """As `safetensors.torch.save_model` writes it: tied tensors once."""
    state, tied = member.state_dict(), ties(member)
    _refuse_what_has_no_code(path, state)
    own = {name: value.contiguous() for name, value in state.items() if name not in tied}
    return save(own, metadata={"format": "pt", **tied})


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
