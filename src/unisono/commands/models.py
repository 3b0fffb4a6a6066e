"""The architectures of ``unisono train --model``: two of ours, or a factory of the user's."""

from __future__ import annotations

import functools
import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unisono.commands.data import Split
from unisono.commands.outcome import ArgumentError

MakeModel: TypeAlias = Callable[[], nn.Module]


class SimpleMLP(nn.Module):
    """The network of PyTorch's model ensembling tutorial, 784-128-128-10 by default.

    Args:
        inputs: Pixels of one image.
        hidden: Width of both hidden layers.
        classes: Number of logits.

    Shape:
        - input: ``(B, *)`` with `inputs` values per image
        - output: ``(B, classes)``

    Example:
        >>> SimpleMLP()(torch.zeros(64, 1, 28, 28)).shape
        torch.Size([64, 10])
    """

    def __init__(self, inputs: int = 784, hidden: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the images `x`."""
        x = x.flatten(1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)  # type: ignore[no-any-return]  # Module.__call__ is untyped


class SimpleCNN(nn.Module):
    """Two convolutions with batch norm, each halving the image, and a linear layer.

    Args:
        image_shape: Channels, height and width of one image; 4 pixels or more a side.
        classes: Number of logits.

    Shape:
        - input: ``(B, *image_shape)``
        - output: ``(B, classes)``

    Example:
        >>> SimpleCNN((1, 8, 8))(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 10])
    """

    def __init__(self, image_shape: tuple[int, ...] = (1, 28, 28), classes: int = 10) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32 * (height // 4) * (width // 4), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the images `x`."""
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]  # as above


BUILT_IN: Final = ("mlp", "cnn")


def choose_factory(spec: str, split: Split) -> MakeModel:
    """Turn the value of ``--model`` into a function that makes one member.

    Args:
        spec: ``mlp``, ``cnn`` or ``package.module:factory``. A factory takes no argument
            and returns a module that maps images to logits; it is found from the current
            folder or among the installed packages.
        split: The data the model has to fit.

    Returns:
        The factory, proven by making one model and showing it two images on the CPU.

    Shape:
        - what a model takes: ``(B, 1, height, width)``
        - what it returns: ``(B, classes)``

    Raises:
        ArgumentError: If there is no such factory or its models don't fit the data.
    """
    built_in = built_in_factory(spec, split.image_shape, split.classes)
    if built_in is not None:
        return built_in
    if ":" not in spec:
        raise ArgumentError(f"unknown model {spec!r}; choose mlp or cnn or package.module:factory")
    factory = load_factory(spec)
    check_factory(spec, factory, split)
    return factory


def built_in_factory(spec: str, image_shape: tuple[int, ...], classes: int) -> MakeModel | None:
    """A function that makes one member of ours; None for another name.

    Args:
        spec: One of `BUILT_IN`.
        image_shape: Channels, height and width of one image.
        classes: Number of logits.

    Example:
        >>> built_in_factory("mlp", (1, 8, 8), 10)()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if spec == "mlp":
        return functools.partial(SimpleMLP, inputs=math.prod(image_shape), classes=classes)
    if spec == "cnn":
        return functools.partial(SimpleCNN, image_shape, classes)
    return None


def load_factory(spec: str) -> Callable[[], Any]:
    """Import ``package.module:factory``, with the current folder importable.

    Args:
        spec: Module and attribute; the attribute may be dotted.

    Returns:
        The callable, not called yet.

    Raises:
        ArgumentError: If the import fails or there is no callable of that name.

    Example:
        >>> load_factory("torch.nn:Identity")
        <class 'torch.nn.modules.linear.Identity'>
    """
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise ArgumentError(f"--model {spec}: expected package.module:factory")
    # As `python -m` does. It stays, because a factory may import more when it is called.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's file may do anything
        raise ArgumentError(
            f"--model {spec}: can't import {module_name!r}: {describe(error)}"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise ArgumentError(f"--model {spec}: {module_name!r} has no {path!r}")
        found = getattr(found, name)
    if not callable(found):
        raise ArgumentError(
            f"--model {spec}: expected a function or class, found {type(found).__name__}"
        )
    return found  # type: ignore[no-any-return]  # callable, whatever it returns


def check_factory(spec: str, factory: Callable[[], Any], split: Split) -> None:
    """Make one model and let it answer two images, before anything is trained.

    Args:
        spec: How the user named the factory, for the message.
        factory: Called once, without arguments.
        split: Images of the right shape and the number of classes.

    Raises:
        ArgumentError: If the call fails, the result isn't a module, the module fails on
            the images, or its output isn't one logit per class.
    """
    try:
        model = factory()
    except Exception as error:
        raise ArgumentError(f"--model {spec}: {spec}() failed: {describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"--model {spec}: expected a torch.nn.Module from {spec}(), got {type(model).__name__}"
        )
    images = split.train_images[:2]
    try:
        with torch.no_grad():
            logits = model.cpu().eval()(images)
    except Exception as error:
        shape = tuple(images.shape)
        raise ArgumentError(
            f"--model {spec}: the model fails on images of shape {shape}: {describe(error)}"
        ) from error
    expected = (len(images), split.classes)
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if got != expected:
        raise ArgumentError(
            f"--model {spec}: expected logits of shape {expected} for {len(images)} images, "
            f"got {got}"
        )


def describe(error: BaseException) -> str:
    """Say what went wrong in one line: the type and the first line of the message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
