"""What a folder with the shards of an ensemble holds, and whether all of it is there.

``unisono.json`` names a subfolder, in which ``shard-….safetensors`` hold rows of the tensors, as
`torch.distributed.checkpoint` writes and reads them, and ``template/model.safetensors`` holds
member 0 as an ensemble of its own. A new save writes another subfolder first, and then replaces
``unisono.json``, so at any time the folder is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from unisono.describe import list_facts
from unisono.errors import CheckpointError
from unisono.files import replacing

INDEX: Final = "unisono.json"
TEMPLATE: Final = "template"
_KIND: Final = "shards of an ensemble"
_VERSION: Final = 1
_SHARDS: Final = "*.safetensors"


@dataclass(frozen=True)
class Index:
    """What ``unisono.json`` says.

    Args:
        members: N.
        data: The subfolder.
        files: The shards in it, with their sizes in bytes.
        stacked: The names of tensors that have a row for each member.
        optimizer: The optimizer's class; empty without one.
        groups: Its param groups, as `unisono.training.plain` has them.
    """

    members: int
    data: str
    files: Mapping[str, int]
    stacked: Sequence[str]
    optimizer: str = ""
    groups: Any = None


def shards_in(data: Path) -> dict[str, int]:
    """The sizes of the shards of a subfolder."""
    return {path.name: path.stat().st_size for path in sorted(data.glob(_SHARDS))}


def write_index(folder: Path, index: Index) -> None:
    """Make the folder one of this index, and remove the subfolders of those before."""
    with replacing(folder / INDEX) as new:
        content = {"kind": _KIND, "version": _VERSION, **asdict(index)}
        new.write_text(json.dumps(content), encoding="utf-8")
    for other in folder.glob("data-*"):
        if other.name != index.data:
            shutil.rmtree(other, ignore_errors=True)


def read_index(call: str, folder: Path) -> Index:
    """What the folder holds, if all of it is there.

    Raises:
        OSError: If it can't be read.
        CheckpointError: If it is something else, or shards are missing or cut off.
    """
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if (content.pop("kind"), content.pop("version")) != (_KIND, _VERSION):
            raise ValueError("it has another kind or version")
        index = Index(**content)
        data, wanted = folder / index.data, dict(index.files)
        if data.parent != folder or type(index.members) is not int:
            raise ValueError("its entries are of another kind")
    except FileNotFoundError:
        raise CheckpointError(
            f"{call}: {folder} holds no ensemble: there is no {INDEX} in it"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{call}: {folder / INDEX} can't be understood: {error}") from error
    found = shards_in(data)
    problems = [
        f"{name}: {'missing' if name not in found else f'{found[name]:,} bytes'},"
        f" was {size:,} bytes"
        for name, size in wanted.items()
        if found.get(name) != size
    ]
    problems += [f"{name}: not one of those that were saved" for name in found.keys() - wanted]
    if problems:
        raise CheckpointError(
            f"{call}: not all shards of {data} are as they were saved:\n\n{list_facts(problems)}"
        )
    return index
