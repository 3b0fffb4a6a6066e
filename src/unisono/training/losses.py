"""One loss per member, for any function that gives the loss of one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from unisono.engine.axis import is_end_of_recomputation
from unisono.engine.inputs import PerMember
from unisono.engine.tree import leaves
from unisono.training.any_loss import losses_by, one_number_each
from unisono.training.folded_losses import folded_losses


def member_losses(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any) -> Tensor:
    """Take the loss of every member: ``losses[i] == loss_fn(outputs[i], targets)``.

    To train, sum the losses: ``member_losses(...).sum().backward()`` gives every member the
    gradient that it has when it is trained alone. The mean over the members would divide each
    gradient, and so the learning rate, by N.

    ``loss_fn`` sees the outputs of one member as the model returns them. What `torch.nn` has runs
    for all members in a few operations, whatever N is; so does a function of your own, unless its
    Python code depends on the values of tensors. Such a function runs for one member after another,
    with one `EnsembleWarning`; inside of `torch.compile` it raises, as does
    `F.gaussian_nll_loss`, which looks at the signs of the variances.

    Args:
        loss_fn: A function ``loss_fn(output, target)`` that returns a tensor with one number: a
            function of `torch.nn.functional`, a loss module, a `functools.partial` of these, your
            own. Several outputs come as the model returns them:
            ``lambda out, y: F.gaussian_nll_loss(out[0], y, out[1])``.
        outputs: What ``ens(x)`` returns: a tensor, or nested containers of tensors.
        targets: A tensor or nested containers of tensors, the same for all members. Where each
            member has its own, ``per_member(targets)``: member i's loss is
            ``loss_fn(outputs[i], targets[i])``. The mark may stand anywhere inside of containers.

    Returns:
        The losses, with a gradient if the outputs have one.

    Shape:
        - outputs: (N, B, *)
        - targets: what ``loss_fn`` takes for one member, with N in front where marked
        - returns: (N)

    Raises:
        ValueError: If ``loss_fn`` returns more than one number, or outputs or marked targets have
            no member axis of length N.
        TypeError: If ``loss_fn`` isn't a function, returns no tensor, or the outputs hold none.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from unisono import Ensemble
        >>> ens = Ensemble([torch.nn.Linear(3, 4) for _ in range(5)])
        >>> x, y = torch.randn(8, 3), torch.randint(4, (8,))
        >>> losses = member_losses(F.cross_entropy, ens(x), y)
        >>> losses.shape
        torch.Size([5])
        >>> torch.testing.assert_close(losses[2], F.cross_entropy(ens[2](x), y))
        >>> losses.sum().backward()
    """
    if not callable(loss_fn):
        raise TypeError(
            f"member_losses: loss_fn is a function loss_fn(output, target), got {loss_fn!r}"
        )
    if isinstance(outputs, PerMember):  # they are of the members in any case
        outputs = outputs.tree
    n = _num_members(outputs)
    _check_targets(targets, n)
    losses = None
    try:
        losses = folded_losses(loss_fn, outputs, targets, n)
    except Exception as error:
        if is_end_of_recomputation(error):
            raise
        # Wrong inputs: below, where a member runs alone, torch speaks of the member's own shapes.
    if losses is None:
        losses = losses_by(loss_fn, outputs, targets, n)
    return one_number_each(loss_fn, losses, n)


def _num_members(outputs: Any) -> int:
    """The length of the member axis, which all tensors of the outputs must have."""
    if isinstance(outputs, Tensor) and outputs.dim() > 0 and len(outputs) > 0:
        return len(outputs)
    tensors = [(p, leaf) for p, leaf in leaves(outputs, "outputs") if isinstance(leaf, Tensor)]
    if not tensors:
        raise TypeError(
            f"member_losses: outputs is what ens(x) returns, but it holds no tensor:"
            f" {type(outputs).__name__}"
        )
    lengths = {leaf.shape[0] if leaf.dim() else 0 for _, leaf in tensors}
    if len(lengths) == 1 and 0 not in lengths:
        return lengths.pop()
    facts = "\n".join(f"  {path}: {tuple(leaf.shape)}" for path, leaf in tensors)
    raise ValueError(
        f"member_losses: axis 0 of every output is the member, and as long as there are members,"
        f" but the shapes are:\n\n{facts}\n\n"
        f"Pass what the ensemble returns: member_losses(loss_fn, ens(x), targets)"
    )


def _check_targets(targets: Any, n: int) -> None:
    if isinstance(targets, Tensor):
        return
    marked = [
        (f"{path}{sub}", part)
        for path, leaf in leaves(targets, "targets")
        if isinstance(leaf, PerMember)
        for sub, part in leaves(leaf.tree)
        if isinstance(part, Tensor | PerMember)
    ]
    wrong = [
        f"  {path} is marked twice"
        if isinstance(part, PerMember)
        else f"  {path} has shape {tuple(part.shape)}"
        for path, part in marked
        if isinstance(part, PerMember) or part.dim() == 0 or part.shape[0] != n
    ]
    if wrong:
        raise ValueError(
            f"member_losses: axis 0 of targets that `per_member` marks is the member, and the"
            f" outputs are those of {n} members, but:\n\n" + "\n".join(wrong) + "\n\n"
            "Pass targets that all members share without the mark:"
            " member_losses(loss_fn, outputs, targets)"
        )
