"""The optimizers that users make: `SGD`, `Adam`, `AdamW`, `RMSprop`."""

from __future__ import annotations

from unisono.ensemble import Ensemble
from unisono.optim.adam import AdamMethod
from unisono.optim.hyperparameters import Flags, Numbers, Pairs
from unisono.optim.optimizer import MemberOptimizer, Params
from unisono.optim.rmsprop import RMSpropMethod
from unisono.optim.sgd import SGDMethod


class SGD(MemberOptimizer):
    r"""`torch.optim.SGD` for every member, each with its own hyperparameters.

    .. math::
        b_i \leftarrow \mu_i b_i + (1 - \tau_i) g_i, \qquad
        \theta_i \leftarrow \theta_i - \gamma_i b_i

    Each argument is one value for all members, or N values: a list, tuple, array or tensor. What
    is said there of ``b`` and of the gradient's weight decay holds for each member.

    Args:
        ens: The ensemble.
        lr: The learning rate, :math:`\gamma`.
        momentum: The momentum factor, :math:`\mu`.
        dampening: The dampening of the momentum, :math:`\tau`.
        weight_decay: The factor of an L2 penalty.
        nesterov: Whether to look ahead along the momentum.
        maximize: Whether to go uphill.
        params: The parameters to train; None for all. Or what `torch.optim.SGD` takes: tensors, or
            dictionaries with ``"params"`` and values of their own.

    Raises:
        TypeError: If ``ens`` is no ensemble.
        ValueError: If a value isn't what it should be, or is given per member for a parameter that
            all members share, or a parameter isn't of the ensemble.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> ens = Ensemble([nn.Linear(3, 1) for _ in range(3)])
        >>> optimizer = SGD(ens, lr=[0.1, 0.03, 0.01], momentum=0.9)
        >>> ens(torch.ones(4, 3)).square().mean((1, 2)).sum().backward()
        >>> optimizer.step()
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.1, 0.03, 0.01]

    Reference: https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html
    """

    method = SGDMethod()

    def __init__(
        self,
        ens: Ensemble,
        lr: Numbers = 1e-3,
        momentum: Numbers = 0.0,
        dampening: Numbers = 0.0,
        weight_decay: Numbers = 0.0,
        nesterov: Flags = False,
        *,
        maximize: Flags = False,
        params: Params = None,
    ) -> None:
        values = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(ens, params, values)


class Adam(MemberOptimizer):
    r"""`torch.optim.Adam` for every member, each with its own hyperparameters.

    .. math::
        m_i \leftarrow \beta_{1,i} m_i + (1 - \beta_{1,i}) g_i, \qquad
        v_i \leftarrow \beta_{2,i} v_i + (1 - \beta_{2,i}) g_i^2, \qquad
        \theta_i \leftarrow \theta_i - \gamma_i \,
        \frac{m_i / (1 - \beta_{1,i}^t)}{\sqrt{v_i / (1 - \beta_{2,i}^t)} + \epsilon_i}

    Each argument is one value for all members, or N values: a list, tuple, array or tensor.

    Args:
        ens: The ensemble.
        lr: The learning rate, :math:`\gamma`.
        betas: The pair :math:`\beta_1, \beta_2`, or N pairs.
        eps: What keeps the denominator from zero, :math:`\epsilon`.
        weight_decay: The factor of an L2 penalty.
        amsgrad: Whether to divide by the largest :math:`v_i` so far.
        maximize: Whether to go uphill.
        decoupled_weight_decay: Whether the weight decay is that of `AdamW`.
        params: The parameters to train; None for all. Or what `torch.optim.Adam` takes: tensors,
            or dictionaries with ``"params"`` and values of their own.

    Raises:
        TypeError: If ``ens`` is no ensemble.
        ValueError: If a value isn't what it should be, or is given per member for a parameter that
            all members share, or a parameter isn't of the ensemble.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> ens = Ensemble([nn.Linear(3, 1) for _ in range(3)])
        >>> optimizer = Adam(ens, lr=[1e-2, 1e-3, 1e-4])
        >>> ens(torch.ones(4, 3)).square().mean((1, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[ens.members.weight]["step"]
        tensor([1., 1., 1.])

    References:
        https://arxiv.org/abs/1412.6980,
        https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html
    """

    method = AdamMethod("Adam")

    def __init__(
        self,
        ens: Ensemble,
        lr: Numbers = 1e-3,
        betas: Pairs = (0.9, 0.999),
        eps: Numbers = 1e-8,
        weight_decay: Numbers = 0.0,
        amsgrad: Flags = False,
        *,
        maximize: Flags = False,
        decoupled_weight_decay: Flags = False,
        params: Params = None,
    ) -> None:
        values = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(ens, params, values)


class AdamW(Adam):
    r"""`torch.optim.AdamW` for every member, each with its own hyperparameters.

    `Adam` after the weights have decayed by themselves:

    .. math:: \theta_i \leftarrow (1 - \gamma_i \lambda_i) \, \theta_i

    Each argument is one value for all members, or N values: a list, tuple, array or tensor.

    Args:
        ens: The ensemble.
        lr: The learning rate, :math:`\gamma`.
        betas: The pair :math:`\beta_1, \beta_2`, or N pairs.
        eps: What keeps the denominator from zero, :math:`\epsilon`.
        weight_decay: The weight decay, :math:`\lambda`.
        amsgrad: Whether to divide by the largest :math:`v_i` so far.
        maximize: Whether to go uphill.
        params: The parameters to train; None for all. Or what `torch.optim.AdamW` takes: tensors,
            or dictionaries with ``"params"`` and values of their own.

    Raises:
        TypeError: If ``ens`` is no ensemble.
        ValueError: If a value isn't what it should be, or is given per member for a parameter that
            all members share, or a parameter isn't of the ensemble.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> ens = Ensemble([nn.Linear(3, 1) for _ in range(3)])
        >>> optimizer = AdamW(ens, lr=1e-3, weight_decay=[0.0, 0.01, 0.1])
        >>> ens(torch.ones(4, 3)).square().mean((1, 2)).sum().backward()
        >>> optimizer.step()

    References:
        https://arxiv.org/abs/1711.05101,
        https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html
    """

    method = AdamMethod("AdamW")

    def __init__(
        self,
        ens: Ensemble,
        lr: Numbers = 1e-3,
        betas: Pairs = (0.9, 0.999),
        eps: Numbers = 1e-8,
        weight_decay: Numbers = 1e-2,
        amsgrad: Flags = False,
        *,
        maximize: Flags = False,
        params: Params = None,
    ) -> None:
        super().__init__(
            ens,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            decoupled_weight_decay=True,
            params=params,
        )


class RMSprop(MemberOptimizer):
    r"""`torch.optim.RMSprop` for every member, each with its own hyperparameters.

    .. math::
        v_i \leftarrow \alpha_i v_i + (1 - \alpha_i) g_i^2, \qquad
        \theta_i \leftarrow \theta_i - \gamma_i \, \frac{g_i}{\sqrt{v_i} + \epsilon_i}

    Each argument is one value for all members, or N values: a list, tuple, array or tensor.

    Args:
        ens: The ensemble.
        lr: The learning rate, :math:`\gamma`.
        alpha: The smoothing of the average, :math:`\alpha`.
        eps: What keeps the denominator from zero, :math:`\epsilon`.
        weight_decay: The factor of an L2 penalty.
        momentum: The momentum factor.
        centered: Whether to divide by the variance of the gradient.
        maximize: Whether to go uphill.
        params: The parameters to train; None for all. Or what `torch.optim.RMSprop` takes:
            tensors, or dictionaries with ``"params"`` and values of their own.

    Raises:
        TypeError: If ``ens`` is no ensemble.
        ValueError: If a value isn't what it should be, or is given per member for a parameter that
            all members share, or a parameter isn't of the ensemble.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> ens = Ensemble([nn.Linear(3, 1) for _ in range(3)])
        >>> optimizer = RMSprop(ens, lr=1e-2, alpha=[0.9, 0.99, 0.999])
        >>> ens(torch.ones(4, 3)).square().mean((1, 2)).sum().backward()
        >>> optimizer.step()

    Reference: https://docs.pytorch.org/docs/stable/generated/torch.optim.RMSprop.html
    """

    method = RMSpropMethod()

    def __init__(
        self,
        ens: Ensemble,
        lr: Numbers = 1e-2,
        alpha: Numbers = 0.99,
        eps: Numbers = 1e-8,
        weight_decay: Numbers = 0.0,
        momentum: Numbers = 0.0,
        centered: Flags = False,
        *,
        maximize: Flags = False,
        params: Params = None,
    ) -> None:
        values = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "maximize": maximize,
        }
        super().__init__(ens, params, values)
