"""`fit`: train all members of an ensemble, each exactly as it would train alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unisono.ensemble import Ensemble
from unisono.optim import MemberOptimizer
from unisono.training.batches import make_batches, make_validation_batches
from unisono.training.checks import check_fit
from unisono.training.combined import Combine, combination_for
from unisono.training.history import History
from unisono.training.joining import MeshChoice, joined
from unisono.training.rank_checks import check_ranks, prepared
from unisono.training.ranks import Ranks
from unisono.training.resume import Checkpoint
from unisono.training.sampling import Sampling, as_sampling
from unisono.training.schedule import Callback, Schedule, ScheduleEvery, Scheduler
from unisono.training.session import Session
from unisono.training.steps import Recipe
from unisono.training.stopping import Stopping
from unisono.training.validation import Metric, Validator

_BATCH_SIZE: Final = 64


def fit(
    ens: Ensemble,
    train: Any,
    *,
    loss: Callable[[Any, Any], Tensor],
    optimizer: MemberOptimizer,
    epochs: int,
    batch_size: int | None = None,
    sampling: str | Sampling = "shared",
    validation: Any = None,
    metrics: Mapping[str, Metric] | None = None,
    combine: Combine | None = None,
    patience: int | None = None,
    min_delta: float = 0.0,
    scheduler: Scheduler | Sequence[Scheduler] = (),
    scheduler_every: ScheduleEvery = "epoch",
    max_grad_norm: float | Sequence[float] | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
    progress: bool = True,
    mesh: MeshChoice = "auto",
) -> History:
    """Train all members at once, each exactly as it would train alone.

    ``theta_i <- step_i(theta_i, gradient of loss(ens[i](x), y))`` for every minibatch (x, y) that
    `sampling` gives member i. The ensemble is trained in place.

    A member whose validation loss has not improved for ``patience`` epochs gets its best weights
    back and leaves the computation, which then costs less. A member whose loss or parameters are
    no longer finite is put back to the end of the epoch before, and leaves with an
    `EnsembleWarning`; the others are unharmed. All random numbers follow from ``seed`` and the
    number of the epoch; the global generators are afterwards as before.

    Args:
        ens: The ensemble.
        train: A pair (inputs, targets) of tensors or of nested containers of tensors with one
            row per example, a map-style `Dataset` of such pairs, or a `DataLoader`. Inputs in a
            tuple or list are several arguments of the model, in a dict keyword arguments.
        loss: ``loss(output, target)``, a scalar for one member's output; see `member_losses`.
        optimizer: One of `unisono.optim`, made for this ensemble.
        epochs: How often each member goes through its rows.
        batch_size: Rows in a minibatch, at most; 64 if it isn't given. A `DataLoader` has its own.
        sampling: ``"shared"``, ``"shuffled"``, ``"bootstrap"``, ``"folds"``, or one of
            `unisono.sampling`: which rows each member sees, in which order.
        validation: Data as for ``train``, of which all members see everything in order.
        metrics: Name -> ``metric(output, target)``, a scalar tensor that is averaged over the
            rows of the validation data, as ``lambda y, t: (y.argmax(1) == t).double().mean()``.
        combine: Outputs of all members -> one prediction, for loss and metrics of the ensemble
            as a whole. By default mean probabilities (as logits) for the losses of
            classification, and the mean for others.
        patience: Epochs without a lower validation loss after which a member stops.
        min_delta: How much lower it has to be.
        scheduler: One or several of `torch.optim.lr_scheduler`, made for ``optimizer``.
            ``ReduceLROnPlateau`` gets the mean validation loss of the members that train.
        scheduler_every: ``"epoch"`` or ``"step"``.
        max_grad_norm: Clip each member's gradient to this norm; a number or one per member.
        accumulate: Minibatches for one step; their mean gradient is taken.
        autocast: ``torch.bfloat16`` to run forward and loss under `torch.autocast`.
        checkpoint: A file that holds where the training stands; it is replaced as a whole.
        checkpoint_every: Epochs from one writing of it to the next.
        resume: Go on from ``checkpoint`` if the file is there; with a named strategy, or as far
            as the plans of ``strategy="auto"`` are in the file, the rest of the run is bit by bit
            what it would have been. Without it a file that is there is an error.
        callbacks: Functions of an `EpochEnd`, called after each epoch; training ends after an
            epoch in which one returns True.
        seed: Of the order of the rows, and of all random numbers.
        progress: Show a bar with the losses of the last epoch; the first rank does.
        mesh: The processes that share the work. ``"auto"`` is all that `torchrun` has started with
            this one: each trains a block of the members, and all have the whole ensemble, trained,
            and the whole history at the end. None is this process alone, with all members. A mesh
            of `distributed.make_mesh` says how long ranks wait for each other, and how many
            replicas a block has. A block, as `distributed.build` makes it, stays on its rank, and
            is trained on its own mesh.

    Returns:
        Losses, metrics and learning rates of each epoch and member.

    Shape:
        - train, validation: rows (B, *) for all members
        - what ``loss`` gets: outputs and targets of one member, (b, *)

    Raises:
        ValueError: If an argument isn't possible; all problems at once.
        TypeError: If one is of the wrong kind.
        FileExistsError: If ``checkpoint`` is there and ``resume`` isn't set.
        CheckpointError: If it is the checkpoint of another training.
        EnsembleError: If a parameter that members share is no longer finite; if ranks differ in
            ensemble, data or settings, or one of them can't go on.

    Example:
        >>> import torch, unisono
        >>> from unisono import Ensemble, fit, optim
        >>> x = torch.randn(200, 3)
        >>> y = x.sum(1, keepdim=True)
        >>> ens = Ensemble.build(lambda: torch.nn.Linear(3, 1), 4)
        >>> history = fit(
        ...     ens,
        ...     (x, y),
        ...     loss=torch.nn.functional.mse_loss,
        ...     optimizer=optim.Adam(ens, lr=[0.3, 0.1, 0.03, 0.01]),
        ...     epochs=3,
        ...     sampling="bootstrap",
        ...     progress=False,
        ... )
        >>> history.loss.shape
        (3, 4)

    Reference: Lakshminarayanan, Pritzel and Blundell, "Simple and Scalable Predictive Uncertainty
    Estimation using Deep Ensembles", 2017, https://arxiv.org/abs/1612.01474
    """
    if not isinstance(ens, Ensemble):
        raise TypeError(f"fit: the first argument is an Ensemble; got {type(ens).__name__}")
    rows = batch_size if isinstance(train, DataLoader) else batch_size or _BATCH_SIZE
    schedulers = list(scheduler) if isinstance(scheduler, Sequence) else [scheduler]
    metrics = dict(metrics or {})

    def prepare(ranks: Ranks) -> Session:
        check_fit(
            ens,
            loss=loss,
            optimizer=optimizer,
            counts={
                "epochs": epochs,
                "accumulate": accumulate,
                "checkpoint_every": checkpoint_every,
            },
            patience=patience,
            min_delta=min_delta,
            max_grad_norm=max_grad_norm,
            autocast=autocast,
            has_validation=validation is not None,
            metrics=metrics,
            schedulers=schedulers,
            scheduler_every=scheduler_every,
            checkpoint=checkpoint,
            resume=resume,
        )
        check_ranks(ranks, ens, train, patience=patience)
        n, device = ranks.block.num_members, next(ens.parameters()).device
        batches = make_batches(
            train, batch_size=rows, sampling=sampling, seed=seed, num_members=n, device=device
        )
        recipe = Recipe(loss, accumulate, max_grad_norm, autocast)
        validator = None
        if validation is not None:
            # Without gradients four times the rows take no more memory, and fewer calls.
            own = None if isinstance(validation, DataLoader) else 4 * (batch_size or _BATCH_SIZE)
            passes = make_validation_batches(validation, batch_size=own, device=device)
            validator = Validator(passes, recipe, metrics, combine or combination_for(loss))
        # One for each of a block's own members is another on each rank.
        is_own = ranks.have_blocks and isinstance(max_grad_norm, Sequence)
        norm = "one for each member of a block" if is_own else max_grad_norm
        settings = {
            "members": n,
            "optimizer": type(optimizer).__name__,
            "batch_size": rows,
            "sampling": repr(as_sampling(sampling)),
            "patience": patience,
            "min_delta": min_delta,
            "accumulate": accumulate,
            "max_grad_norm": norm,
            "scheduler_every": scheduler_every,
            "autocast": str(autocast),
            "seed": seed,
            "metrics": sorted(metrics),
            "validation": validation is not None,
        }
        return Session(
            ens,
            optimizer,
            batches,
            validator,
            recipe,
            Schedule(epochs, seed, schedulers, scheduler_every, callbacks),
            Stopping(n, patience=patience, min_delta=min_delta),
            ranks,
            settings,
            held_out=batches.held_out(),
        )

    with joined(ens, mesh) as ranks:
        session = prepared(ranks, prepare, train=train, validation=validation)
        if checkpoint is not None:
            kept = Checkpoint(checkpoint, every=checkpoint_every)
            ranks.together(lambda: kept.load(session) if resume and kept.path.exists() else None)
            session.save = kept.save
        return session.run(progress=progress)
