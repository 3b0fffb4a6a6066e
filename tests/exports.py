"""The table of models as it is exported: batch axes, and what can't be exported and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from cases import CASES, Case, members
from unisono import Ensemble
from unisono.engine.tree import leaves, tree_map

BY_NAME: Final[dict[str, Case]] = {param.id: param.values[0] for param in CASES}
SIZES: Final = (1, 4, 7)

# Where axis 0 of every input is not the batch, or can't stay open.
BATCH_AXES: Final[dict[str, Any]] = {
    # inputs without a batch
    "linear-without-batch": None,
    "conv-without-batch": None,
    "linear-empty-batch": None,
    "keywords": {"scale": None},
    "nested-outputs": {"batch.shift": None},
    # sequences first
    "recurrent-options": 1,
    # their own tensors have the length of the batch
    "embedding-bag": None,
    "pooling-rare": None,
    # torch's batching rules of im2col, and of attention with keys added, fix it
    "reordered": None,
    "attention-masked": None,
}

NOT_TRACED: Final = {
    "recurrent-packed": "Packed.forward.*must not depend on the elements",  # lengths, by tolist
    "losses": "_ctc_loss|must not depend on the elements",  # what it returns has no known shape
}
NOT_ONNX: Final = {
    **NOT_TRACED,
    "bfloat16": "no kernel on CPUs for the operator Gemm .* ens.float",
    "complex": "ONNX has no complex numbers",
    "pooling": r"has no `aten._adaptive_avg_pool3d` \(in `Pools.forward`, cases.py",
    "bilinear": r"has no `aten._trilinear` \(in `Bilinear.forward`",
    "pooling-rare": "fractional_max_pool2d|clamp",
    "embedding-bag": "computes something else than the ensemble.*outputs.9",  # where each lies
}
NOT_PACKAGED: Final = {**NOT_TRACED, "complex": "AOTInductor compiles no complex numbers"}


def exported_case(name: str, dtype: torch.dtype = torch.float64) -> tuple[Ensemble, Any, Any]:
    """The ensemble of a case in eval mode, and its inputs; float64 in another dtype."""
    case = BY_NAME[name]
    torch.manual_seed(0)

    def cast(leaf: Any) -> Any:
        wide = isinstance(leaf, Tensor) and leaf.dtype == torch.float64
        return leaf.to(dtype) if wide else leaf

    models = [model.eval() for model in members(case)]
    if case.dtype == torch.float64:
        models = [model.to(dtype) for model in models]
    args, kwargs = case.inputs()
    return Ensemble(models).eval(), tree_map(cast, args), tree_map(cast, kwargs)


def loop(ens: Ensemble, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that the members return one after another, stacked."""
    with torch.no_grad():
        outputs = [tensors_of(model(*args, **kwargs)) for model in ens.unstack()]
    return [torch.stack(column) for column in zip(*outputs, strict=True)]


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor)]


class SimpleMLP(nn.Module):
    """The network of PyTorch's tutorial on ensembles."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 128)
        self.fc2 = nn.Linear(128, 128)
        self.fc3 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


def batches_of(name: str, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """The inputs with batches of `SIZES`; as they are where no size is open."""
    axes = BATCH_AXES.get(name, 0)
    if axes is None:
        yield args, kwargs
        return
    fixed = {"scale", "shift"} if isinstance(axes, dict) else set()
    axis = 0 if isinstance(axes, dict) else axes

    def resized(tree: Any, size: int) -> Any:
        def rows(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.index_select(axis, torch.arange(size) % leaf.shape[axis])

        if isinstance(tree, dict):
            return {k: v if k in fixed else resized(v, size) for k, v in tree.items()}
        return type(tree)(resized(v, size) for v in tree) if isinstance(tree, tuple) else rows(tree)

    for size in SIZES:
        yield resized(args, size), resized(kwargs, size)
