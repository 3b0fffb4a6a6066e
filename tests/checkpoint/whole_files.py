"""Small whole files of every format that is read, to be broken by `fuzz` and by the tests.

They are kept in the repository, so that files of today stay readable. To write new ones:
``python tests/checkpoint/whole_files.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unisono import Ensemble

FOLDER = Path(__file__).parent / "corpus"
MEMBERS = 3


@dataclass(frozen=True)
class Whole:
    """A file that can be read.

    Args:
        path: Below `FOLDER`; a file of an ensemble, or a file or folder of one member.
        make_model: Makes the model of its tensors.
        select: Picks the state dict out of it.
        key: Where that is.
    """

    path: str
    make_model: Callable[[], nn.Module]
    select: Callable[[Any], Mapping[str, Tensor]] | None = None
    key: str | None = None

    @property
    def is_ensemble(self) -> bool:
        return self.path.startswith("ensembles/")


class Dtypes(nn.Module):
    """Tensors of many dtypes and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.doubles = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
        self.halves = nn.Parameter(torch.randn(3).bfloat16())
        self.complexes = nn.Parameter(torch.randn(2, 2, dtype=torch.complex128))
        self.count = nn.Parameter(torch.arange(3), requires_grad=False)
        image = torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)
        self.image = nn.Parameter(image)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("eighths", torch.randn(3).to(torch.float8_e4m3fn))
        self.register_buffer("nothing", torch.zeros(0, 2))
        self.register_buffer("scalar", torch.tensor(2.5))


class Tied(nn.Module):
    """A tied weight, a trunk to be shared, a frozen bias, a buffer outside of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 3)
        self.encoder = nn.Linear(3, 2)
        self.decoder = nn.Linear(3, 2, bias=False)
        self.decoder.weight = self.encoder.weight
        self.encoder.bias.requires_grad_(False)
        self.register_buffer("transient", torch.ones(2), persistent=False)


def make_plain() -> nn.Module:
    """Layers as in most networks."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def pick_state(found: Any) -> Any:
    """The state dict of a training checkpoint; of anything else all of it."""
    return found.get("state_dict", found) if isinstance(found, dict) else found


WHOLE = [
    Whole("ensembles/plain.safetensors", make_plain),
    Whole("ensembles/dtypes.safetensors", Dtypes),
    Whole("ensembles/tied.safetensors", Tied),
    Whole("members/plain.safetensors", make_plain),
    Whole("members/plain.pt", make_plain),
    Whole("members/legacy.pth", make_plain),
    Whole("members/dtypes.pt", Dtypes),
    Whole("members/nested.ckpt", make_plain, pick_state, "state_dict"),
    Whole("sharded", make_plain),
    Whole("sharded_bin", make_plain),
]


def write(folder: Path) -> None:
    """Write all whole files into a folder."""
    torch.manual_seed(0)
    for name in ("ensembles", "members", "sharded", "sharded_bin"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    plain = Ensemble([make_plain() for _ in range(MEMBERS)])
    plain.combination.set(weights=[0.5, 0.25, 0.25], pooled_temperature=1.5)
    plain.save(folder / "ensembles/plain.safetensors")
    Ensemble([Dtypes() for _ in range(MEMBERS)]).save(folder / "ensembles/dtypes.safetensors")
    tied = Ensemble.build(Tied, MEMBERS, shared="trunk.*").eval()
    tied.save(folder / "ensembles/tied.safetensors")

    state = make_plain().state_dict()
    save_file(state, folder / "members/plain.safetensors", metadata={"format": "pt"})
    torch.save(state, folder / "members/plain.pt")
    torch.save(state, folder / "members/legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(Dtypes().state_dict(), folder / "members/dtypes.pt")
    nested = {"state_dict": state, "epoch": 3, "lr": [0.1, 0.01], "rng": torch.get_rng_state()[:9]}
    torch.save(nested, folder / "members/nested.ckpt")
    shards = [{n: t for n, t in state.items() if n.startswith("2.") == last} for last in (0, 1)]
    for at, prefix, suffix in (
        ("sharded", "model", "safetensors"),
        ("sharded_bin", "pytorch_model", "bin"),
    ):
        names = [f"{prefix}-0000{k}-of-00002.{suffix}" for k in (1, 2)]
        for name, shard in zip(names, shards, strict=True):
            save = save_file if suffix == "safetensors" else torch.save
            save(shard, folder / at / name)
        index = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
        kind = prefix + (".safetensors" if suffix == "safetensors" else ".bin")
        (folder / at / f"{kind}.index.json").write_text(text)


if __name__ == "__main__":
    write(FOLDER)
