"""The models of the zoo: which there are, how one is made, what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import hugging_face

BATCH = 2
SIDES = (64, 96, 128, 160, 192, 224, 256, 299, 384)
SKIPPED_MODULES = {"detection", "optical_flow", "quantization"}

# The smallest of these families has more parameters than needed to see each of their layers.
SHORTENED: dict[str, dict[str, Any]] = {
    "deepseek_vit": {"depth": 2},
    "gemma4_vit": {"depth": 2},
    "qwen3_vit": {"depth": 2},
    "naflexvit": {"depth": 2},
}


@dataclass(frozen=True)
class Recipe:
    """How to make one model and what to call it with.

    Args:
        make: Makes one model with random weights.
        arguments: Inputs to try, smallest first, as keyword arguments or a single tensor.
    """

    make: Callable[[], nn.Module]
    arguments: list[Callable[[], tuple[tuple[Tensor, ...], dict[str, Tensor]]]] = field(
        default_factory=list
    )


def recipe(name: str) -> Recipe:
    """The recipe of ``library/family/model``."""
    library, family, model = name.split("/")
    if library == "torchvision":
        return _torchvision(model)
    if library == "timm":
        return _timm(family, model)
    return Recipe(lambda: hugging_face.make(model), [lambda: hugging_face.arguments(model)])


def torchvision_names(largest: int) -> list[str]:
    """All classification, segmentation and video models with at most ``largest`` parameters.

    The smallest come first, so that most of the result is known early.
    """
    from torchvision import models

    found = []
    for name in models.list_models():
        weights = next(iter(models.get_model_weights(name)))
        module = models.get_model_builder(name).__module__.split(".")[2:]
        size = weights.meta["num_params"]
        if module[0] not in SKIPPED_MODULES and size <= largest:
            found.append((size, f"torchvision/{'.'.join(module)}/{name}"))
    return [name for _, name in sorted(found)]


def timm_names() -> list[str]:
    """Of each module of timm the model with the fewest parameters, likewise; takes minutes."""
    import timm

    found = []
    for module in timm.list_modules():
        names = [name for name in timm.list_models(module=module) if not name.startswith("test_")]
        if names:
            size, name = min(map(_timm_size, names))
            found.append((size, f"timm/{module}/{name}"))
    return [name for _, name in sorted(found)]


def transformers_names() -> list[str]:
    """One small model of each family in `hugging_face.FAMILIES`."""
    return [f"transformers/{name}/{name}" for name in hugging_face.FAMILIES]


def _timm_size(name: str) -> tuple[int, str]:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    return sum(p.numel() for p in model.parameters()), name


def _timm(family: str, name: str) -> Recipe:
    import timm

    options = SHORTENED.get(family, {})
    config = timm.get_pretrained_cfg(name) or timm.models.get_pretrained_cfg(name)
    channels, _, side = config.input_size
    sides = [side] if config.fixed_input_size else [s for s in SIDES if s < side] + [side]
    return Recipe(
        lambda: timm.create_model(name, **options), [_images(channels, s, s) for s in sides]
    )


def _torchvision(name: str) -> Recipe:
    from torchvision import models

    module = models.get_model_builder(name).__module__
    options: dict[str, Any] = {"weights": None}
    shapes: list[tuple[int, ...]] = [(3, side, side) for side in SIDES]
    if "segmentation" in module:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    if "video" in module:
        shapes = [(3, 8, 64, 64), (3, 16, 112, 112), (3, 16, 224, 224)]
    return Recipe(lambda: models.get_model(name, **options), [_images(*shape) for shape in shapes])


def _images(*shape: int) -> Callable[[], tuple[tuple[Tensor, ...], dict[str, Tensor]]]:
    return lambda: ((torch.randn(BATCH, *shape),), {})
