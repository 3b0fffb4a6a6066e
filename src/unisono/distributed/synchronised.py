"""Gradients of parameters that several ranks hold, by PyTorch's `DistributedDataParallel`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from unisono.block import DATA
from unisono.ensemble import Ensemble


class Synchronised(nn.Module):
    """An ensemble whose gradients are those of all ranks: call it in place of the ensemble.

    ``gradient = mean over replicas`` for what the block's members own, of losses over each
    replica's part of the batch; for what all members share, in addition the sum over the blocks.
    Two instances of `torch.nn.parallel.DistributedDataParallel` do it while the backward pass runs:
    one for each of these kinds of parameters, and none where no other rank holds the same. So with
    one replica and nothing shared not a byte is sent.

    As there, buffers such as those of batch norm are the first replica's in each forward pass, and
    statistics of batch norm are of a replica's own part of the batch.

    Args:
        part: What `shard` or `build` returned. It keeps the parameters; the optimizer is of it.
        find_unused_parameters: As for `torch.nn.parallel.DistributedDataParallel`: True if the loss
            may not depend on all parameters.

    Raises:
        TypeError: If the ensemble is no block.

    Example:
        >>> model = Synchronised(part)  # doctest: +SKIP
        >>> member_losses(F.cross_entropy, model(x), y).sum().backward()  # doctest: +SKIP
    """

    _outermost: nn.Module

    def __init__(self, part: Ensemble, *, find_unused_parameters: bool = False) -> None:
        super().__init__()
        block = part.block if isinstance(part, Ensemble) else None
        if block is None or block.mesh is None:
            what = "a whole ensemble" if isinstance(part, Ensemble) else type(part).__name__
            raise TypeError(
                f"distributed.Synchronised: part is the block of one rank, got {what}; make it by"
                f" part = distributed.shard(ens, mesh)"
            )
        # The parameters are registered once, as those of the ensemble.
        self.part = part
        self._wrappers: list[DistributedDataParallel] = []
        shared = _trained(part, shared=True)
        run: nn.Module = _Run(part)
        if shared and block.num_blocks > 1:
            run = _Multiplied(_Run(part), shared, block.num_blocks)
        if block.num_replicas > 1 and _trained(part, shared=False):
            # DistributedDataParallel leaves out what needs no gradient when it is made.
            with _without_gradient(shared):
                run = self._wrapped(run, block.mesh.get_group(DATA), find_unused_parameters)
        if shared and block.num_places > 1:
            run = self._wrapped(_Holder(run, shared), dist.group.WORLD, find_unused_parameters)
        self.__dict__["_outermost"] = run

    def forward(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call this rank's members: ``part(*args, **kwargs)``."""
        return self._outermost(None, *args, **kwargs)

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run ``fn(member, *args, **kwargs)`` for this rank's members, as `Ensemble.run`.

        Args:
            fn: Called with a member and the inputs.
            args: Inputs.
            kwargs: Inputs.
        """
        return self._outermost(fn, *args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients on this rank, until a backward pass outside: for accumulation."""
        with ExitStack() as stack:
            for wrapper in self._wrappers:
                stack.enter_context(wrapper.no_sync())
            yield

    def _wrapped(
        self, run: nn.Module, group: ProcessGroup | None, find_unused: bool
    ) -> DistributedDataParallel:
        wrapper = DistributedDataParallel(
            run, process_group=group, find_unused_parameters=find_unused
        )
        self._wrappers.append(wrapper)
        return wrapper


class _Run(nn.Module):
    """The ensemble, or a function of its members."""

    def __init__(self, part: Ensemble) -> None:
        super().__init__()
        self.part = part

    def forward(self, fn: Callable[..., Any] | None, /, *args: Any, **kwargs: Any) -> Any:
        return self.part(*args, **kwargs) if fn is None else self.part.run(fn, *args, **kwargs)


class _Multiplied(nn.Module):
    """Runs with the gradients of what members share multiplied by the number of blocks.

    They are averaged over all ranks, and are to be the sum over the blocks. It happens on the way
    to the parameter, before a gradient is added to what was averaged in an earlier backward pass.
    """

    def __init__(self, run: _Run, shared: list[nn.Parameter], num_blocks: int) -> None:
        super().__init__()
        self.run = run
        self._num_blocks = num_blocks
        ids = {id(parameter) for parameter in shared}
        self._names = [name for name, p in run.named_parameters() if id(p) in ids]

    def forward(self, /, *args: Any, **kwargs: Any) -> Any:
        shared = {
            name: _multiplied(self.run.get_parameter(name), self._num_blocks)
            for name in self._names
        }
        return torch.func.functional_call(self.run, shared, args, kwargs)


class _Holder(nn.Module):
    """What the outer wrapper calls: it registers what the members share, and nothing else."""

    _run: nn.Module

    def __init__(self, run: nn.Module, shared: list[nn.Parameter]) -> None:
        super().__init__()
        self.shared = nn.ParameterList(shared)
        self.__dict__["_run"] = run

    def forward(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


def _trained(part: Ensemble, *, shared: bool) -> list[nn.Parameter]:
    named = part.members.named_parameters()
    return [p for name, p in named if p.requires_grad and (name in part.shared) == shared]


@contextmanager
def _without_gradient(parameters: list[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _multiplied(parameter: nn.Parameter, factor: int) -> Tensor:
    found: Tensor = _MultipliedGradient.apply(parameter, factor)  # type: ignore[no-untyped-call]
    return found


class _MultipliedGradient(torch.autograd.Function):
    """The same tensor, through which a gradient comes multiplied."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
