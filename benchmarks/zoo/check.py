"""Compare an ensemble of two random models with the loop over them, and see how it ran."""

from __future__ import annotations

import copy
import re
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.zoo.catalogue import Recipe
from unisono import Ensemble, per_member
from unisono.errors import EnsembleWarning

MEMBERS = 2
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
WHOLE_CALL = "this call runs member by member"  # in the warning; others tell of single operations


@dataclass
class Finding:
    """What is known about one model.

    Args:
        equal: Whether outputs, gradients and buffers are those of the loop.
        how: ``"fused"``, ``"fallbacks"`` (some operations by member) or ``"loop"`` (the call).
        errors: Test -> greatest relative difference from the loop.
        reasons: Why calls or operations ran by member.
        failure: A traceback, or what differs.
        note: What was left out.
    """

    equal: bool = True
    how: str = "fused"
    dtype: str = "float64"
    shape: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    failure: str = ""
    note: str = ""


def check(recipe: Recipe) -> Finding:
    """Test one model in float64, or in float32 if its own code needs that."""
    models = [_make(recipe, seed) for seed in range(MEMBERS)]
    make_inputs = _smallest(models[0], recipe.arguments)
    finding = Finding(shape=str([tuple(t.shape) for t in tree_leaves(make_inputs())]))
    dtype = torch.float64
    try:
        model = copy.deepcopy(models[0]).to(dtype)
        with torch.no_grad():
            args, kwargs = _cast(make_inputs(), dtype)
            model(*args, **kwargs)
        del model
    except Exception:
        dtype = torch.float32
    finding.dtype = str(dtype).removeprefix("torch.")
    models = [model.to(dtype) for model in models]
    inputs = [_cast(make_inputs(), dtype) for _ in range(MEMBERS)]
    same = [inputs[0]] * MEMBERS
    ensemble = Ensemble(models, strategy="fused")
    for name, each, test in (
        ("eval, same input", same, _test_eval),
        ("eval, own inputs", inputs, _test_eval),
        ("train, own inputs", inputs, _test_train),
    ):
        try:
            finding.errors[name] = test(models, ensemble, each, finding)
        except Exception:
            finding.equal = False
            finding.failure += f"{name}: {traceback.format_exc()}\n"
            continue
        if not finding.errors[name] <= TOLERANCE[dtype]:
            if test is _test_train and _is_random(models, each):
                finding.note += f"{name}: the model itself is random. "
                continue
            finding.equal = False
            finding.failure += f"{name}: relative difference {finding.errors[name]:.1e}\n"
    return finding


def _test_eval(
    models: list[nn.Module], ensemble: Ensemble, inputs: list[Any], finding: Finding
) -> float:
    for model in (*models, ensemble):
        model.eval()
    with torch.no_grad():
        wanted = [_call(model, each) for model, each in zip(models, inputs, strict=True)]
        got = _call_ensemble(ensemble, inputs, finding)
    return difference(got, wanted)


def _test_train(
    models: list[nn.Module], ensemble: Ensemble, inputs: list[Any], finding: Finding
) -> float:
    for model in (*models, ensemble):
        model.train()
    got = _call_ensemble(ensemble, inputs, finding)
    loss(got, members=True).backward()
    wanted = []
    for model, each in zip(models, inputs, strict=True):
        outputs = _call(model, each)
        loss(outputs, members=False).backward()
        wanted.append(tree_map(_detached, outputs))
    errors = [difference(tree_map(_detached, got), wanted)]
    parameters = [dict(model.named_parameters()) for model in models]
    stacked = dict(ensemble.members.named_parameters())
    scale = max(_greatest(p.grad) for own in parameters for p in own.values() if p.grad is not None)
    for name, parameter in stacked.items():
        wants = [own[name].grad for own in parameters if name in own]
        if any(want is None for want in wants):
            assert all(want is None for want in wants), name
            assert parameter.grad is None or _greatest(parameter.grad) == 0, name
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        want = torch.stack(wants)
        floor = max(_greatest(want), 1e-3 * scale)
        errors.append(_greatest(parameter.grad - want) / floor if floor else 0.0)
    buffers = [dict(model.named_buffers()) for model in models]
    for name, buffer in ensemble.members.named_buffers():
        wants = [own[name] for own in buffers if name in own]
        if wants:
            errors.append(difference(buffer, wants))
    return worst(errors)


def _call(model: nn.Module, inputs: Any) -> Any:
    args, kwargs = tree_map(torch.clone, inputs)
    return model(*args, **kwargs)


def _call_ensemble(ensemble: Ensemble, inputs: list[Any], finding: Finding) -> Any:
    """Fused if possible, else as a user's ensemble does it, noting how it ran."""
    if all(each is inputs[0] for each in inputs):
        args, kwargs = tree_map(torch.clone, inputs[0])
    else:
        args, kwargs = tree_map(lambda *own: per_member(torch.stack(own)), *inputs)
    refusal = ""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ensemble.strategy = "fused"
        try:
            outputs = ensemble(*args, **kwargs)
        except Exception as error:
            refusal = f"{type(error).__name__}: {error}"
            ensemble.strategy = "auto"
            outputs = ensemble(*args, **kwargs)
    told = [str(w.message) for w in seen if issubclass(w.category, EnsembleWarning)]
    slow = re.findall(r"batching rule for (aten::[\w.]+)", " ".join(str(w.message) for w in seen))
    by_member = [f"torch's loop for {name}" for name in sorted(set(slow))]
    if any(WHOLE_CALL in text for text in told):
        finding.how = "loop"
    elif (told or by_member) and finding.how == "fused":
        finding.how = "fallbacks"
    for reason in [refusal, *told, *by_member]:
        if reason and reason not in finding.reasons:
            finding.reasons.append(reason)
    return outputs


def loss(outputs: Any, *, members: bool) -> Tensor:
    """The mean square of every differentiable output, summed; for each member if it is many."""
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    terms = [leaf.square().mean() for leaf in leaves if leaf.requires_grad and leaf.numel()]
    return torch.stack(terms).sum() * (MEMBERS if members else 1)


def difference(got: Any, wanted: list[Any]) -> float:
    """The greatest difference of the outputs from the members' own, relative to the greatest.

    Raises:
        AssertionError: If the two differ in anything but numbers.
    """
    errors = [0.0]
    leaves = tree_leaves(got)
    for i, want in enumerate(wanted):
        wants = tree_leaves(want)
        assert len(leaves) == len(wants), f"{len(leaves)} outputs, {len(wants)} in the loop"
        for mine, own in zip(leaves, wants, strict=True):
            if not isinstance(own, Tensor):
                assert type(mine) is type(own), f"{type(mine)}, {type(own)} in the loop"
                continue
            assert mine[i].shape == own.shape, f"{mine[i].shape}, {own.shape} in the loop"
            assert mine.dtype == own.dtype, f"{mine.dtype}, {own.dtype} in the loop"
            errors.append(_relative(mine[i].detach().double(), own.detach().double()))
    return worst(errors)


def _relative(got: Tensor, want: Tensor) -> float:
    """The greatest difference over the greatest finite value; equal infinities don't differ."""
    error = _greatest(torch.where(got == want, 0.0, got - want))
    scale = _greatest(want[want.isfinite()])
    return error / scale if scale else error


def worst(errors: Iterable[float]) -> float:
    """The greatest of some numbers; NaN if one is NaN."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


def _greatest(tensor: Tensor) -> float:
    return float(tensor.detach().double().abs().max()) if tensor.numel() else 0.0


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _make(recipe: Recipe, seed: int) -> nn.Module:
    """One model, with nothing random in training and no branch that is switched off by a zero."""
    torch.manual_seed(seed)
    model = recipe.make()
    for module in model.modules():
        is_drop = "drop" in type(module).__name__.lower() or "Stochastic" in type(module).__name__
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (is_drop and name == "p")):
                setattr(module, name, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                scale = 0.1 if parameter.ndim < 2 else 0.01
                parameter.add_(torch.randn_like(parameter), alpha=scale)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn_like(buffer), alpha=0.1)
            if name.endswith("running_var"):
                buffer.mul_(torch.rand_like(buffer) + 0.5)
    return model


def _smallest(model: nn.Module, arguments: list[Callable[[], Any]]) -> Callable[[], Any]:
    """The first arguments that the model takes, in eval and in training."""
    for make in arguments[:-1]:
        try:
            with torch.no_grad():
                for training in (False, True):
                    args, kwargs = make()
                    copy.deepcopy(model).train(training)(*args, **kwargs)
        except Exception:
            continue
        return make
    return arguments[-1]


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def _is_random(models: list[nn.Module], inputs: list[Any]) -> bool:
    """Whether a model in training computes two different things from one input."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            results.append(_call(copy.deepcopy(models[0]).train(), inputs[0]))
    first = tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, results[0])
    return difference(first, [results[1]]) > 0
