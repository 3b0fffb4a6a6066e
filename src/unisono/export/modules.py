"""The modules that torch.export is given: the call of an ensemble, with the tensors it takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from unisono.engine.tree import leaves, tree_map
from unisono.ensemble import Ensemble
from unisono.export.combined import CombinationName, combined
from unisono.export.inputs import Example
from unisono.export.outputs import named, plain


def snapshot(ens: Ensemble) -> Ensemble:
    """A copy of an ensemble, whose tensors lie in memory as their shapes say.

    A call of the original may store its parameters in another order, and train them.
    """
    copied = ens[:]
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.data = tensor.detach().contiguous()
    return copied


class _Exported(nn.Module):
    """The call of an ensemble that is exported, with the ensemble's tensors under their names."""

    def __init__(
        self, ens: Ensemble, example: Example, combination: CombinationName | None
    ) -> None:
        super().__init__()
        self.members = ens.members
        if combination is not None:
            self.combination = ens.combination
        self._ens = [ens]  # in a list, so that its parameters have one name
        self._example = example
        self._how: CombinationName | None = combination
        self.training = ens.training

    def _run(self, tensors: Iterator[Tensor]) -> Any:
        (ens,) = self._ens
        args, kwargs = self._example.filled(tensors)
        outputs = ens(*args, **kwargs)
        if self._how is not None:
            outputs = combined(self._example.call, self._how, ens.combination, outputs)
        return plain(self._example.call, outputs)


class Callable(_Exported):
    """Takes what the member's ``forward`` takes."""

    def __init__(
        self,
        ens: Ensemble,
        example: Example,
        combination: CombinationName | None,
        tensors_only: bool,
    ) -> None:
        super().__init__(ens, example, combination)
        self.signature = inspect.signature(ens[0].forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            in_order = [args, {name: kwargs[name] for name in example.kwargs}]
            tensors = [leaf for _, leaf in leaves(in_order) if isinstance(leaf, Tensor)]
            outputs = self._run(iter(tensors))
            return tree_map(_tensor_or_none, outputs) if tensors_only else outputs

        forward.__signature__ = self.signature  # type: ignore[attr-defined]
        self.forward = forward  # names the inputs of the program


class Flat(_Exported):
    """Takes the tensors of the example."""

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors among the outputs, in order."""
        outputs = named(self._run(iter(tensors))).values()
        return [leaf for leaf in outputs if isinstance(leaf, Tensor)]


def _tensor_or_none(leaf: Any) -> Tensor | None:
    return leaf if isinstance(leaf, Tensor) else None
