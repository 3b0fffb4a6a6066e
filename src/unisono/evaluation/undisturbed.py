"""Measuring leaves no trace: mode, gradients and random state are afterwards as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from unisono.ensemble import Ensemble
from unisono.training.seeding import random_state_kept


@contextmanager
def undisturbed(ens: Ensemble) -> Iterator[None]:
    """Run in eval mode without gradients; put back modes and random states, whatever happens.

    Args:
        ens: The ensemble; parts of it may be in another mode than the whole.
    """
    is_training = ens.training
    modes = [(module, module.training) for module in ens.modules()]
    with random_state_kept(device_of(ens)), torch.no_grad():
        ens.eval()
        try:
            yield
        finally:
            ens.train(is_training)
            for module, mode in modes:
                module.training = mode


def device_of(ens: Ensemble) -> torch.device:
    """Where the ensemble lies; the CPU for one without tensors."""
    return next((tensor.device for tensor in ens.state_dict().values()), torch.device("cpu"))
