"""What is timed: networks, how many of them, on which inputs, and in which of four scenarios."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.models.attention import DLRM, GPT, ViT
from benchmarks.models.small import LSTMClassifier, cnn, mlp, transformer
from benchmarks.models.vision import UNet, mobilenet_v3_small, resnet18

Inputs = Callable[[int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """N models of one architecture and the minibatches that they see.

    Args:
        name: As it is shown.
        make: Makes one model.
        members: Number of models.
        batch: Size of a minibatch.
        inputs: Batch size -> one minibatch.
        sizes: Layer widths if it is an MLP, which can also be written by hand and in JAX.
    """

    name: str
    make: Callable[[], nn.Module]
    members: int
    batch: int
    inputs: Inputs
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """One row of the table.

    Args:
        case: The models.
        shared: Whether all members see one minibatch.
        backward: Forward and backward in train mode; else forward without gradients in eval mode.
    """

    case: Case
    shared: bool
    backward: bool

    @property
    def name(self) -> str:
        """Unique, and searched by ``--only``."""
        what = "training" if self.backward else "forward"
        return f"{self.case.name}, {what}, {'one minibatch' if self.shared else 'own minibatches'}"

    def models(self) -> list[nn.Module]:
        """New models in the mode of the scenario."""
        return [self.case.make().train(self.backward) for _ in range(self.case.members)]

    def minibatches(self) -> list[tuple[Tensor, ...]]:
        """What each member sees; the same object for all if it is shared."""
        if self.shared:
            return [self.case.inputs(self.case.batch)] * self.case.members
        return [self.case.inputs(self.case.batch) for _ in range(self.case.members)]


def scenarios(*, tiny: bool = False) -> Iterator[Scenario]:
    """All rows of the table.

    Args:
        tiny: Two members and minibatches of two, to test the benchmark itself.
    """
    for case in CASES:
        small = replace(case, members=2, batch=2) if tiny else case
        for backward, shared in itertools.product((False, True), (False, True)):
            yield Scenario(small, shared=shared, backward=backward)


def _normal(*shape: int) -> Inputs:
    return lambda batch: (torch.randn(batch, *shape),)


def _words(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(1000, (batch, 64)),)


def _clicks(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 13), torch.randint(1000, (batch, 26, 2))


def _mlp(members: int, batch: int, *sizes: int) -> Case:
    name = f"{members} x {'-'.join(map(str, sizes))}, B {batch}"
    return Case(name, lambda: mlp(*sizes), members, batch, _normal(sizes[0]), sizes)


CASES: tuple[Case, ...] = (
    replace(_mlp(10, 64, 784, 128, 128, 10), name="tutorial MLP, 10 x 784-128-128-10, B 64"),
    _mlp(100, 16, 8, 32, 32, 1),
    _mlp(1000, 1, 8, 32, 32, 1),
    _mlp(10, 256, 23, 256, 256, 1),
    _mlp(2, 256, 23, 256, 256, 1),
    _mlp(32, 1, 784, 128, 128, 10),
    _mlp(4, 64, 1024, 1024, 1024, 1024),
    Case("8 x CNN 8-16, B 16", functools.partial(cnn, 8, 16), 8, 16, _normal(1, 28, 28)),
    Case("8 x CNN 32-64, B 32", functools.partial(cnn, 32, 64), 8, 32, _normal(1, 28, 28)),
    Case("8 x Transformer d 64, T 16, B 8", transformer, 8, 8, _normal(16, 64)),
    Case("8 x Transformer d 64, T 16, B 64", transformer, 8, 64, _normal(16, 64)),
    Case("8 x ResNet-18 32x32, B 16", functools.partial(resnet18, 10), 8, 16, _normal(3, 32, 32)),
    Case("4 x ResNet-18 224x224, B 4", resnet18, 4, 4, _normal(3, 224, 224)),
    Case("4 x MobileNetV3-small 64x64, B 8", mobilenet_v3_small, 4, 8, _normal(3, 64, 64)),
    Case("4 x ViT-tiny 224x224, B 2", ViT, 4, 2, _normal(3, 224, 224)),
    Case("8 x LSTM 32-64-64, T 20, B 16", LSTMClassifier, 8, 16, _normal(20, 32)),
    Case("8 x GPT d 128, 4 layers, T 64, B 4", GPT, 8, 4, _words),
    Case("4 x DLRM, B 128", DLRM, 4, 128, _clicks),
    Case("4 x U-Net 32x32, B 2", UNet, 4, 2, _normal(3, 32, 32)),
)
