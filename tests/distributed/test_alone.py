"""What can be said of members over ranks without other ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from launch import ROOT
from unisono import Ensemble, combine, distributed
from unisono.block import split_members
from unisono.distributed.agreement import _AT_ONCE, digest, facts_of
from unisono.engine.rng import drawing_apart
from unisono.errors import EnsembleError
from unisono.training import exchange, rank_checks

NOT_STARTED = """\
{}: this process belongs to no group of processes (RANK, WORLD_SIZE, MASTER_ADDR are not in the \
environment); start the program by

    torchrun --nproc-per-node 2 train.py"""


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: distributed.make_mesh(), "distributed.make_mesh"),
        (lambda: distributed.shard(Ensemble([nn.Linear(2, 2)]), None), "distributed.shard"),
        (lambda: distributed.build(lambda: nn.Linear(2, 2), 3, None), "distributed.build"),
    ],
    ids=["make_mesh", "shard", "build"],
)
def test_a_program_that_was_started_alone_is_told_how_to_start(call, name, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(EnsembleError, match="belongs to no group") as error:
        call()
    assert str(error.value) == NOT_STARTED.format(name)


@pytest.mark.parametrize("n", [1, 5, 9, 16])
@pytest.mark.parametrize("blocks", [1, 3, 4, 5])
def test_blocks_are_consecutive_even_and_never_empty(n, blocks):
    if blocks > n:
        with pytest.raises(ValueError, match=f"{n} members make 1 to {n} blocks, not {blocks}"):
            split_members(n, blocks)
        return
    found = split_members(n, blocks)
    assert [i for members in found for i in members] == list(range(n))
    sizes = [len(members) for members in found]
    assert len(found) == blocks
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_generators_draw_apart_and_come_together_again():
    start = torch.get_rng_state()
    drawn, after = [], []
    for place in range(3):
        torch.set_rng_state(start)
        with drawing_apart(place, []):
            drawn.append(torch.rand(4))
        after.append(torch.rand(4))
    assert len({tuple(each.tolist()) for each in [*drawn, after[0]]}) == 4
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0], after[2])
    torch.set_rng_state(start)
    with drawing_apart(1, []):
        pass
    assert torch.equal(start, torch.get_rng_state())


def test_a_mesh_is_a_mesh():
    with pytest.raises(TypeError, match=r"combine\.mean: mesh is a torch\.distributed\.DeviceMesh"):
        combine.mean(torch.zeros(2, 3), mesh="member")


def test_the_import_brings_nothing_of_torch_that_torch_did_not():
    program = """
import json, sys, torch
before = set(sys.modules)
import unisono, unisono.distributed
new = [m for m in set(sys.modules) - before if m.startswith("torch.distributed")]
print(json.dumps(sorted(new)))
"""
    # What torch.optim and torch.utils.data import themselves is theirs.
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program.replace(
                "import json, sys, torch",
                "import json, sys, torch\nimport torch.utils.data, torch.nn.parallel",
            ),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == []


FAKE = """
import torch, torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from unisono import combine, uncertainty

torch.cuda.get_device_capability = lambda device=None: (8, 0)  # which `broadcast` asks for
dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("member", "data"))
with FakeTensorMode():
    logits = torch.empty(3, 8, 5, device="cuda", dtype=torch.float16)
    found = [
        combine.mean(logits, mesh=mesh),
        combine.probabilities(logits, mesh=mesh),
        combine.vote(logits, mesh=mesh),
        *uncertainty.classification(logits, mesh=mesh),
        *uncertainty.regression(logits, logits.exp(), mesh=mesh),
    ]
for each in found:
    print(each.device, tuple(each.shape), each.dtype)
"""


def test_sums_stay_on_the_device_and_wait_for_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FAKE],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"cuda:0 {shape} {dtype}"
        for shape, dtype in [
            ("(8, 5)", "torch.float16"),
            ("(8, 5)", "torch.float16"),
            ("(8,)", "torch.int64"),
            ("(8, 5)", "torch.float16"),
            *[("(8,)", "torch.float16")] * 3,
            *[("(8, 5)", "torch.float16")] * 4,
        ]
    ]


def test_the_code_of_a_class_is_its_methods_and_constants():
    def make(value=1.0, double=False):
        class Scaled(nn.Module):
            """Whatever is said here."""

            scale = value

            if double:

                def forward(self, x):
                    return 2 * self.scale * x

            else:

                def forward(self, x):
                    return self.scale * x

        return Scaled

    kinds = [make(), make(), make(2.0), make(double=True)]
    first, same, *others = [facts_of(Ensemble.build(kind, 2), 2) for kind in kinds]
    assert first == same
    for other in others:
        assert [name for name in first if first[name] != other[name]] == [
            next(name for name in first if name.startswith("code of ") and "Scaled" in name)
        ]


def test_the_code_of_a_class_that_was_typed_in():
    found = []
    for body in ("return x", "return x", "return -x"):
        names = {"nn": nn}
        exec(f"class Typed(nn.Module):\n    def forward(self, x):\n        {body}\n", names)
        found.append(facts_of(Ensemble.build(names["Typed"], 2), 2))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool],
)
def test_a_digest_tells_values_places_and_signs_apart(dtype):
    generator = torch.Generator().manual_seed(0)
    drawn = 3 * torch.randn(7, 5, dtype=torch.float64, generator=generator)
    tensor = drawn > 0 if dtype is torch.bool else drawn.to(dtype)
    assert int(digest(tensor)) == int(digest(tensor.clone()))
    others = [tensor.flatten()[torch.randperm(35, generator=generator)] for _ in range(300)]
    for k in range(34):
        for place in ([k], [k, k + 1]):
            other = tensor.flatten().clone()
            other[place] = ~other[place] if dtype is torch.bool else -other[place]
            others.append(other)
    different = [other for other in others if not torch.equal(other, tensor.flatten())]
    assert len(different) > 300
    assert int(digest(tensor)) not in {int(digest(other)) for other in different}


def test_a_digest_of_a_large_tensor_sees_all_of_it():
    tensor = torch.zeros(2 * _AT_ONCE + 3)
    digests = {int(digest(tensor))}
    for place in (0, _AT_ONCE - 1, _AT_ONCE, 2 * _AT_ONCE, -1):
        other = tensor.clone()
        other[place] = 1
        digests.add(int(digest(other)))
    assert len(digests) == 6


def test_a_message_holds_tensors_of_one_device():
    """An optimizer keeps the numbers of steps on the host, beside moments on the device."""
    tensors = [torch.empty(3, 2, device=device) for device in ("meta", "cpu", "meta", "cpu")]
    tensors.append(torch.empty(3, 0))
    messages = list(exchange._messages(tensors, 3))
    assert [[tensor.device.type for tensor in few] for few in messages] == [
        ["meta"] * 2,
        ["cpu"] * 2,
    ]
    assert {id(t) for few in messages for t in few} == {id(t) for t in tensors[:4]}


def test_digests_of_tensors_on_several_devices_are_never_joined_on_one(monkeypatch):
    """`torch.stack` takes tensors of one device; a number alone can be read from any."""

    class OnSomeDevice:
        def __int__(self):
            return 7

    monkeypatch.setattr(rank_checks, "digest", lambda tensor: OnSomeDevice())
    ens = Ensemble([nn.Linear(2, 2)])
    gathered = []
    session = SimpleNamespace(
        ens=ens,
        optimizer=torch.optim.Adam(ens.parameters()),
        ranks=SimpleNamespace(gather=lambda own: (gathered.append(own), [own, [7, 8]])[1]),
    )
    assert [tuple(tensor.shape) for tensor in rank_checks._differing(session)] == [(1, 2)]
    assert gathered == [[7, 7]]
