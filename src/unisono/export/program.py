"""``export.program``: an ensemble as a ``torch.export.ExportedProgram``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from unisono.engine.traced.exported import fixed_sizes
from unisono.engine.tree import tree_map
from unisono.ensemble import Ensemble
from unisono.errors import EnsembleError, ExportError
from unisono.export.combined import CombinationName, check_name
from unisono.export.failures import failed_text, fixed_text
from unisono.export.inputs import BatchAxes, Example, example_of
from unisono.export.modules import Callable, Flat, snapshot
from unisono.export.quiet import quiet

_BATCH: Final = "batch"


def program(
    ens: Ensemble,
    args: tuple[Any, ...] | Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    combination: CombinationName | None = None,
    batch_axes: BatchAxes = 0,
) -> ExportedProgram:
    """Export an ensemble with ``torch.export``: ``program.module()(x) == ens(x)``.

    The program holds the ops on stacked tensors that the engine's rules make of ``forward``, for
    a minibatch of any size, and the ensemble's parameters and buffers under their own names. It
    is the call without gradients, in train or eval mode as the ensemble is.
    ``torch.export.save`` writes it to a file that needs no class of yours to be loaded. For a
    graph to train, call ``torch.export.export(ens, args)``.

    The program has copies of the tensors: what is trained later doesn't show in it.

    Args:
        ens: The ensemble.
        args: Example inputs: the tuple of positional arguments of a call ``ens(*args)``, with
            `per_member` marks as for a call; or a single tensor. The program takes what was
            marked without its mark, member axis first.
        kwargs: Keyword arguments, likewise.
        combination: What to return in place of the members' outputs. ``"mean"``: their mean, with
            the weights in ``ens.combination`` if they are set. ``"probabilities"``: of logits,
            `Combination.probabilities`. ``"vote"``: of logits or labels, `combine.vote`.
            ``"uncertainty"``: of logits, a dict with prediction, total, aleatoric and epistemic,
            see `uncertainty.classification`.
        batch_axes: The batch axis of every input, counted as a member sees it; None if all shapes
            are fixed. A mapping says so for some inputs by name and leaves 0 for the others:
            ``{"mask": None, "tokens": 1}``. All batch axes have one length.

    Returns:
        The program. Its outputs lie in dicts, lists and tuples; of dataclasses, named tuples and
        objects it returns dicts of their fields.

    Shape:
        - outputs: (N, *), or (*) with a combination

    Raises:
        ExportError: If something can't be exported, or fixes the size of the batch; the message
            says where.
        ValueError: If there is no such input, axis or combination.

    Example:
        >>> ens = Ensemble([nn.Linear(3, 2) for _ in range(5)]).eval()
        >>> exported = program(ens, torch.randn(8, 3))
        >>> exported.module()(torch.randn(20, 3)).shape
        torch.Size([5, 20, 2])
    """
    call = "export.program"
    check_name(call, combination)
    example = example_of(call, ens[0], args, kwargs, batch_axes)
    return structured_program(snapshot(ens), example, combination)


def structured_program(
    ens: Ensemble,
    example: Example,
    combination: CombinationName | None,
    *,
    tensors_only: bool = False,
) -> ExportedProgram:
    """The program that takes what the member's ``forward`` takes.

    Args:
        ens: The ensemble.
        example: The example of the call.
        combination: What to return in place of the members' outputs.
        tensors_only: Whether outputs that are no tensors become None.
    """
    module = Callable(ens, example, combination, tensors_only)
    args, kwargs = example.unmarked(iter(_traced_rows(example)))
    sizes = iter(_open_sizes(example))

    def own(tree: Any) -> Any:
        return tree_map(lambda leaf: next(sizes) if isinstance(leaf, Tensor) else None, tree)

    of_args, of_kwargs = [own(arg) for arg in args], {k: own(arg) for k, arg in kwargs.items()}
    spec = dict(module.signature.bind(*of_args, **of_kwargs).arguments)
    return _traced(module, example, args, kwargs, spec)


def flat_program(
    ens: Ensemble, example: Example, combination: CombinationName | None
) -> ExportedProgram:
    """The program that takes the tensors of the example in order, and no containers."""
    module = Flat(ens, example, combination)
    spec = {"tensors": tuple(_open_sizes(example))}
    return _traced(module, example, tuple(_traced_rows(example)), {}, spec)


def _traced(
    module: nn.Module,
    example: Example,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: dict[str, Any],
) -> ExportedProgram:
    """``torch.export.export`` with errors that say where."""
    with fixed_sizes() as fixed, quiet(), torch.no_grad():
        try:
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes)
        except EnsembleError:
            raise
        except Exception as error:
            text = fixed_text(example, fixed) if fixed else failed_text(example, error)
            raise ExportError(f"{example.call}: {text}") from error


def _open_sizes(example: Example) -> list[Any]:
    """For each tensor, which of its sizes stay open."""
    batch = Dim(_BATCH)
    return [None if i.batch_axis is None else {i.batch_axis: batch} for i in example.inputs]


def _traced_rows(example: Example) -> list[Tensor]:
    """The tensors to export with: of a batch of one row torch.export would fix the size."""
    size = example.batch_size
    return example.rows(2) if size == 1 else [i.tensor for i in example.inputs]
