"""What `evaluate` promises beside its values: no trace, constant memory, clear errors."""

import json
import random
import re

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import unisono
from unisono import Ensemble, evaluate, per_member
from unisono.errors import MissingExtraError
from unisono.evaluation.measures import READERS, Measures
from unisono.evaluation.undisturbed import device_of


def run(ens, x, y, task="classification", **options):
    return evaluate(ens, (x, y), task=task, **options)


# No trace -----------------------------------------------------------------------------------------


def modes(ens):
    return [module.training for module in ens.modules()]


@pytest.fixture
def mixed():
    """An ensemble with dropout, in training mode, but for its frozen batch norm."""
    ens = Ensemble.build(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)),
        3,
        strategy="fused",
    )
    ens.members.get_submodule("1").eval()
    return ens


def test_the_ensemble_is_afterwards_as_before(mixed, classes):
    _, x, y = classes
    x = x.float()
    before, state = modes(mixed), {k: v.clone() for k, v in mixed.state_dict().items()}
    first = run(mixed, x, y)
    assert modes(mixed) == before
    assert set(before) == {True, False}
    assert first.to_dict() == run(mixed, x, y).to_dict()  # in eval mode, without dropout
    assert all(torch.equal(v, state[k]) for k, v in mixed.state_dict().items())
    assert mixed(x).requires_grad
    assert first.to_dict() == run(mixed.eval(), x, y).to_dict()
    assert set(modes(mixed)) == {False}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_no_trace(mixed, classes, error):
    _, x, y = classes

    def broken(outputs):
        assert not torch.is_grad_enabled()
        assert not mixed.training
        random.random(), np.random.random(), torch.rand(1)
        raise error("in the middle")

    before, states = modes(mixed), random_states()
    with pytest.raises(error, match="in the middle"):
        run(mixed, x.float(), y, convert=broken)
    assert modes(mixed) == before
    assert torch.is_grad_enabled()
    assert random_states() == states


def random_states():
    return [str(torch.get_rng_state().tolist()), str(np.random.get_state()), str(random.getstate())]


def test_random_states_are_untouched(classes):
    ens, x, y = classes
    states = random_states()
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    evaluate(ens, loader, task="classification", out_of_distribution=loader)
    assert random_states() == states


# Memory and waiting -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "numbers", "gaussians"])
def test_the_state_does_not_grow(kind, request):
    ens, x, y = request.getfixturevalue(kind)
    task = "classification" if kind == "classes" else "regression"
    measures = Measures(task, 3, weights=None, combine=None, metrics={}, outside=True)
    sizes = []
    with torch.no_grad():
        for _ in range(5):
            measures.add(ens(x), y)
            measures.add_outside(ens(x))
            sizes.append(sum(state.numel() for state in measures.states()))
    assert sizes[0] > 0
    assert len(set(sizes)) == 1


class Reads(TorchDispatchMode):
    """Counts the ops that would wait for a GPU: those whose result Python sees, or has to size."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "bincount")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_no_minibatch_waits_for_the_device(kind, request):
    ens, x, y = request.getfixturevalue(kind)
    task = "classification" if kind == "classes" else "regression"
    counts = []
    for size in (27, 5):
        with Reads() as reads:
            run(ens, x, y, task, batch_size=size, out_of_distribution=x)
        counts.append(reads.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_readings_stay_on_the_device(task):
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        x = torch.empty(3, 5, 4, device="cuda")  # reading a value of a fake tensor raises
        y = torch.zeros(5, dtype=torch.int64, device="cuda")
        outputs, targets = (x, y) if task == "classification" else ((x, x), x.select(0, 0))
        weights = torch.full((3,), 1 / 3, device="cuda")
        read = READERS[task](3, weights=weights, combine=None).read(outputs, targets)
        assert {part.device.type for part in (*read.row_values.values(), *read[:2], *read[3:])} == {
            "cuda"
        }


def test_an_ensemble_without_tensors():
    assert device_of(Ensemble([nn.ReLU()])) == torch.device("cpu")


class Endless(IterableDataset):
    """Rows from a stream, in minibatches of their own."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_a_stream(classes):
    ens, x, y = classes
    stream = DataLoader(Endless((x[:20], y[:20]), (x[20:], y[20:])), batch_size=None)
    close = evaluate(ens, stream, task="classification").to_dict()
    assert close["rows"] == len(y)
    assert close["members"]["accuracy"] == run(ens, x, y).to_dict()["members"]["accuracy"]


# The result ---------------------------------------------------------------------------------------


def test_it_prints_as_a_table(classes):
    ens, x, y = classes
    lines = str(run(ens, x, y, out_of_distribution=x)).splitlines()
    assert lines[0] == "Evaluation of 3 members on 53 rows, classification"
    assert lines[2].split() == ["members:", "mean", "lowest", "highest", "combined"]
    assert [line.split()[0] for line in lines[3:7]] == ["accuracy", "nll", "brier", "ece"]
    assert lines[8].startswith("mean uncertainty: total ")
    assert lines[10] == "against 53 rows of another distribution"
    assert max(map(len, lines)) < 90
    found = run(ens, x, y)
    assert re.fullmatch(
        r"Evaluation\(classification, 3 members, 53 rows: accuracy=[\d.]+, nll=.*\)", repr(found)
    )
    with pytest.raises(AttributeError):
        found.rows = 3


def test_it_goes_through_json(gaussians):
    ens, x, y = gaussians
    found = run(ens, x, y, "regression", out_of_distribution=x)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain == found.to_dict()
    assert plain["members"]["rmse"] == found.members["rmse"].tolist()
    assert plain["out_of_distribution"]["auroc"]["total"] == 0.5


# Messages -----------------------------------------------------------------------------------------


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def begins(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}")


def test_all_wrong_arguments_in_one_message(classes):
    ens, x, y = classes
    with raises(
        ValueError,
        "evaluate: convert is a function of what the ensemble returns; got 3; task is "
        '"classification" or "regression"; got \'classes\'; weights belong to the default '
        "combination, and combine is another; leave one out",
    ):
        run(ens, x, y, "classes", convert=3, weights=[1, 1, 1], combine=lambda x: x)
    with raises(TypeError, "evaluate: the first argument is an Ensemble; got Linear"):
        run(nn.Linear(4, 3), x, y)
    with raises(
        ValueError,
        "evaluate: metrics['nll'] has the name of a metric that is there anyway; give it another",
    ):
        run(ens, x, y, metrics={"nll": torchmetrics.MeanMetric()})
    with begins(ValueError, "evaluate: 3 members need weights of shape (3,), got shape (2,)"):
        run(ens, x, y, weights=[1, 1])
    with begins(ValueError, "batch_size is a positive number of rows"):
        run(ens, x, y, batch_size=-1)


def test_errors_about_metrics(classes):
    ens, x, y = classes
    with raises(
        TypeError,
        "evaluate: metrics['a'] is a metric of torchmetrics or a function that makes one; got "
        "float; metrics['b'] is a metric of torchmetrics or a function that makes one; got "
        "MetricCollection",
    ):
        both = torchmetrics.MetricCollection([torchmetrics.MeanMetric()])
        run(ens, x, y, metrics={"a": 0.5, "b": both})
    with raises(
        TypeError,
        "evaluate: metrics has a name for each metric; got list. Write "
        'metrics={"f1": MulticlassF1Score(3)}',
    ):
        run(ens, x, y, metrics=[torchmetrics.MeanMetric()])
    per_class = torchmetrics.classification.MulticlassAccuracy(3, average=None)
    with raises(
        TypeError,
        "evaluate: metrics['recall'] is to give one number for a member, got shape (3,); average "
        'it, as by average="macro", or pass its parts as metrics of their own',
    ):
        run(ens, x, y, metrics={"recall": per_class})


def test_errors_about_data(classes):
    ens, x, y = classes
    with begins(TypeError, "evaluate: the data are pairs (inputs, targets), but a minibatch is a "):
        evaluate(ens, x, task="classification")
    with begins(ValueError, "data: axis 0 of all tensors is the row"):
        run(ens, x, y[:3])
    with begins(ValueError, "out_of_distribution: axis 0 of all tensors is the row"):
        run(ens, x, y, out_of_distribution=x[:0])
    empty = DataLoader(Endless(), batch_size=None)
    with raises(ValueError, "evaluate: data has no rows; is the loader's iterator used up?"):
        evaluate(ens, empty, task="classification")
    with begins(ValueError, "evaluate: out_of_distribution has no rows"):
        run(ens, x, y, out_of_distribution=empty)
    with begins(ValueError, "data: a DataLoader makes minibatches of its own batch_size=4; got "):
        loader = DataLoader(TensorDataset(x, y), batch_size=4)
        evaluate(ens, loader, task="classification", batch_size=5)


def test_errors_about_classes(classes):
    ens, x, y = classes
    with raises(
        ValueError,
        "evaluate: targets are classes from 0 to 2, as the logits have 3 of them, but they go from "
        "-100 to 7",
    ):
        y = y.clone()
        y[3], y[50] = 7, -100
        run(ens, x, y, batch_size=8)
    with begins(
        TypeError,
        "evaluate: targets are classes, of integer dtype, got torch.float32 of shape (53, 3); of "
        "one-hot targets make them by y.argmax(1)",
    ):
        run(ens, x, torch.zeros(len(x), 3))
    with begins(
        ValueError,
        "evaluate: logits (N, B, C, *) have targets (B, *), but:\n\n"
        "  the logits have shape (3, 53, 3)\n  the targets have shape (53, 1)\n\n"
        "Pass targets of shape (53,), or say how what a member returns becomes logits",
    ):
        run(ens, x, y[:, None])
    one = Ensemble.build(lambda: nn.Linear(4, 1).double(), 3, strategy="fused")
    with begins(
        ValueError,
        "evaluate: logits have the shape (N, B, C, *) with at least two classes on axis 2, got "
        "(3, 53, 1); of one logit z for two classes make two:\n\n"
        "    convert=lambda z: torch.stack([torch.zeros_like(z), z], 2)  # z: (N, B)",
    ):
        run(one, x, y % 2)

    def two(z):  # as the message says
        z = z.squeeze(2)
        return torch.stack([torch.zeros_like(z), z], 2)

    assert run(one, x, y.clamp(0, 1), convert=two).members["accuracy"].shape == (3,)


def test_errors_about_outputs(classes, gaussians):
    ens, x, y = classes
    with begins(
        TypeError,
        "evaluate: expected what the ensemble returns to be one tensor, got dict; say how what a "
        "member returns becomes logits (B, C, *):",
    ):
        run(ens, x, y, convert=lambda logits: {"logits": logits})
    with begins(
        ValueError,
        "evaluate: what the ensemble returns has the 3 members on axis 0 and the rows on axis 1, "
        "got shape (53, 3)",
    ):
        run(ens, x, y, convert=lambda logits: logits.mean(0))
    with begins(TypeError, "evaluate: logits are of floating dtype, got torch.int64"):
        run(ens, x, y, convert=lambda logits: logits.long())
    with begins(
        ValueError, "evaluate: combine makes logits (B, C, *) of logits (N, B, C, *), but:"
    ):
        run(ens, x, y, combine=lambda logits: logits)
    with begins(TypeError, "evaluate: expected what combine returns to be one tensor, got float"):
        run(ens, x, y, combine=lambda logits: 0.5)
    ens, x, y = gaussians
    with begins(
        ValueError, "evaluate: combine makes one prediction, in the form that a member has, but:"
    ):
        run(ens, x, y, "regression", combine=lambda pair: pair[0].mean(0))
    with begins(ValueError, "uncertainty.regression: variances are at least 0, but "):
        run(ens, x, y, "regression", convert=lambda pair: (pair[0], -pair[1]))


def test_errors_about_numbers(numbers):
    ens, x, y = numbers
    with begins(
        ValueError,
        "evaluate: predictions (N, B, *) have targets (B, *), but:\n\n"
        "  the predictions have shape (3, 53, 1)\n  the targets have shape (53, 2)\n\n"
        "Pass targets of shape (53, 1), or say how what a member returns becomes a prediction",
    ):
        run(ens, x, y.expand(-1, 2), "regression")
    with begins(
        ValueError,
        "evaluate: each predicted mean has one variance, but:\n\n  the mean has shape (3, 53, 1)\n"
        "  the variance (3, 53)",
    ):
        run(ens, x, y, "regression", convert=lambda mean: (mean, mean.squeeze(2).exp()))
    with begins(TypeError, "evaluate: targets are real numbers, got torch.complex128"):
        run(ens, x, y.to(torch.complex128), "regression")
    with begins(
        TypeError, "evaluate: what the ensemble returns is of floating dtype, got torch.in"
    ):
        run(ens, x, y, "regression", convert=lambda mean: mean.long())
    with begins(
        TypeError, "evaluate: expected what the ensemble returns, if no pair of mean and v"
    ):
        run(ens, x, y, "regression", convert=lambda mean: "a mean")


def test_targets_of_each_member_are_refused(classes):
    ens, x, y = classes
    marked = DataLoader(Endless((x, per_member(torch.stack([y] * 3)))), batch_size=None)
    with begins(
        TypeError,
        "evaluate: expected the targets of a minibatch to be one tensor, got PerMember; pass",
    ):
        evaluate(ens, marked, task="classification")


def test_without_torchmetrics(monkeypatch, classes):
    ens, x, y = classes

    def require(name, *, extra, purpose):
        raise MissingExtraError(f"{purpose} needs {name} from {extra}")

    monkeypatch.setattr("unisono.evaluation.evaluate.require", require)
    with begins(MissingExtraError, "evaluate needs torchmetrics from metrics"):
        run(ens, x, y)
    assert unisono.evaluate is evaluate
