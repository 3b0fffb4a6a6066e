"""Every value that `evaluate` gives, against scikit-learn or the formula on all rows at once."""

import math

import numpy as np
import pytest
import torch
import torchmetrics
from sklearn import metrics as sk
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from unisono import Ensemble, combine, evaluate, uncertainty
from unisono.evaluation.stacked_metrics import R2, CalibrationError, Separation


class Rows(Dataset):
    """A map-style data set that can't be taken for tensors."""

    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, i):
        return tuple(column[i] for column in self.columns)


FORMS = {
    "tensors": lambda x, y: (x, y),
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "tensor data set": TensorDataset,
    "data set": Rows,
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=10),  # the last has 3 rows
    "shuffled loader": lambda x, y: DataLoader(Rows(x, y), batch_size=16, shuffle=True),
}


def close(found, expected, **tolerance):
    found, expected = (np.asarray(each, dtype=np.float64) for each in (found, expected))
    np.testing.assert_allclose(found, expected, **({"rtol": 1e-7, "atol": 1e-12} | tolerance))


def score_classes(p, y):
    """The metrics of probabilities (B, C), by scikit-learn."""
    y = y.numpy()
    ece = torchmetrics.functional.calibration_error(
        p, torch.from_numpy(y), task="multiclass", num_classes=p.shape[1], n_bins=15, norm="l1"
    )
    labels = list(range(p.shape[1]))
    return {
        "accuracy": sk.accuracy_score(y, p.argmax(1)),
        "nll": sk.log_loss(y, p, labels=labels),
        "brier": sk.brier_score_loss(y, p, labels=labels, scale_by_half=False),
        "ece": float(ece),
    }


def score_numbers(p, y):
    p, y = p.numpy(), y.numpy()
    return {
        "rmse": sk.mean_squared_error(y, p) ** 0.5,
        "mae": sk.mean_absolute_error(y, p),
        "r2": sk.r2_score(y, p),
    }


def check(evaluation, score, members, combined):
    expected = [score(each) for each in members]
    assert set(evaluation.members) == set(evaluation.combined) == set(expected[0])
    for name, found in evaluation.members.items():
        # Predictions are float32 or float64; sums are float64.
        close(found, [each[name] for each in expected], rtol=1e-6, atol=1e-7)
        close(evaluation.combined[name], score(combined)[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_classification_equals_scikit_learn(classes, form):
    ens, x, y = classes
    size = None if "loader" in form else 8
    evaluation = evaluate(ens, FORMS[form](x, y), task="classification", batch_size=size)
    with torch.no_grad():
        p = ens(x).softmax(-1)
    check(evaluation, lambda p: score_classes(p, y), p, p.mean(0))
    assert (evaluation.task, evaluation.rows) == ("classification", len(y))
    expected = uncertainty.classification(p, given="probabilities")[1:]
    close(list(evaluation.uncertainty.values()), [part.mean() for part in expected])


@pytest.mark.parametrize("form", FORMS)
def test_regression_equals_scikit_learn(numbers, form):
    ens, x, y = numbers
    size = None if "loader" in form else 8
    evaluation = evaluate(ens, FORMS[form](x, y), task="regression", batch_size=size)
    with torch.no_grad():
        p = ens(x)
    check(evaluation, lambda p: score_numbers(p, y), p, p.mean(0))
    assert evaluation.uncertainty["aleatoric"] == 0
    close(evaluation.uncertainty["total"], p.var(0, correction=0).mean())


def test_gaussians_have_a_likelihood(gaussians):
    ens, x, y = gaussians
    evaluation = evaluate(ens, (x, y), task="regression", batch_size=8)
    with torch.no_grad():
        mean, variance = ens(x)
    normal = torch.distributions.Normal(mean, variance.sqrt())
    log_density = normal.log_prob(y).squeeze(-1)
    close(evaluation.members["nll"], -log_density.mean(1))
    close(evaluation.combined["nll"], -(log_density.exp().mean(0).log()).mean())
    assert set(evaluation.members) == {"nll", "rmse", "mae", "r2"}
    close(evaluation.uncertainty["aleatoric"], variance.mean())


@pytest.mark.parametrize("kind", ["classes", "gaussians"])
def test_weights(kind, request):
    ens, x, y = request.getfixturevalue(kind)
    task = "classification" if kind == "classes" else "regression"
    first = evaluate(ens, (x, y), task=task, weights=[0, 5, 0])
    for name, values in first.members.items():
        close(first.combined[name], values[1])
    assert first.uncertainty["epistemic"] < 1e-12
    weights = torch.tensor([0.5, 0.25, 0.25])
    found = evaluate(ens, (x, y), task=task, weights=weights)
    doubled = evaluate(ens[[0, 0, 1, 2]], (x, y), task=task)
    close(list(found.combined.values()), list(doubled.combined.values()))
    close(list(found.uncertainty.values()), list(doubled.uncertainty.values()))


def test_what_is_kept_with_the_ensemble_is_the_default(classes):
    ens, x, y = classes
    ens.combination.set(weights=[1, 2, 1], temperatures=[2.0, 0.5, 1.0], pooled_temperature=0.7)
    found = evaluate(ens, (x, y), task="classification")
    with torch.no_grad():
        p, own = ens.combination.probabilities(ens(x)), ens(x).softmax(-1)
    check(found, lambda p: score_classes(p, y), own, p)
    equal = evaluate(ens, (x, y), task="classification", weights=[1, 1, 1])
    check(equal, lambda p: score_classes(p, y), own, own.mean(0))


def test_a_combination_of_ones_own(classes, gaussians):
    ens, x, y = classes
    found = evaluate(ens, (x, y), task="classification", combine=lambda logits: logits.mean(0))
    with torch.no_grad():
        logits = ens(x)
    check(found, lambda p: score_classes(p, y), logits.softmax(-1), logits.mean(0).softmax(-1))
    ens, x, y = gaussians
    found = evaluate(ens, (x, y), task="regression", combine=lambda pair: (pair[0][2], pair[1][2]))
    for name, values in found.members.items():
        close(found.combined[name], values[2])


def test_a_model_that_returns_something_else(gaussians):
    ens, x, y = gaussians
    as_pair = evaluate(ens, (x, y), task="regression")
    names = Ensemble([Named(ens[i]) for i in range(3)], strategy="fused")
    found = evaluate(names, (x, y), task="regression", convert=lambda out: (out["mu"], out["var"]))
    assert found.to_dict() == as_pair.to_dict()


class Named(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        mu, var = self.inner(x)
        return {"mu": mu, "var": var}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3).double()

    def forward(self, a, b):
        return self.fc(a) + b


def test_inputs_are_given_as_fit_gives_them(classes):
    _, x, y = classes
    ens = Ensemble.build(Two, 3, strategy="fused")
    b = torch.ones(len(y), 3, dtype=torch.float64)
    as_tuple = evaluate(ens, ((x, b), y), task="classification", out_of_distribution=((x, b), y))
    as_dict = evaluate(
        ens, ({"b": b, "a": x}, y), task="classification", out_of_distribution={"b": b, "a": x}
    )
    assert as_tuple.to_dict() == as_dict.to_dict()


def test_a_class_for_every_pixel(classes):
    _, x, _ = classes
    ens = Ensemble.build(lambda: nn.Conv2d(1, 3, 1).double(), 3, strategy="fused")
    images, y = x.reshape(-1, 1, 2, 2), torch.randint(3, (len(x), 2, 2))
    evaluation = evaluate(ens, (images, y), task="classification", batch_size=8)
    with torch.no_grad():
        p = ens(images).softmax(2).movedim(2, -1).flatten(1, -2)
    check(evaluation, lambda p: score_classes(p, y.flatten()), p, p.mean(0))
    assert evaluation.rows == len(y)


def test_several_numbers_for_a_row():
    x, y = torch.randn(40, 4), torch.randn(40, 2)
    ens = Ensemble.build(lambda: nn.Linear(4, 2), 3, strategy="fused")
    evaluation = evaluate(ens, (x, y), task="regression", batch_size=8)
    with torch.no_grad():
        p = ens(x)
    check(evaluation, lambda p: score_numbers(p, y), p, p.mean(0))


def test_targets_may_lack_the_axis_of_one(numbers):
    ens, x, y = numbers
    both = [evaluate(ens, (x, each), task="regression").to_dict() for each in (y, y.squeeze(1))]
    assert both[0] == both[1]


@pytest.mark.parametrize("kind", ["classes", "gaussians"])
def test_out_of_distribution_equals_scikit_learn(kind, request):
    ens, x, y = request.getfixturevalue(kind)
    task = "classification" if kind == "classes" else "regression"
    far = 3 * torch.randn(71, 4, dtype=torch.float64)
    with torch.no_grad():
        scores = [own_and_shared(task, ens(data)) for data in (x, far)]
    is_outside = np.repeat([0, 1], [len(x), len(far)])
    expected = {
        name: sk.roc_auc_score(is_outside, torch.cat([inside[name], outside[name]]))
        for inside, outside in [scores]
        for name in inside
    }
    loader = DataLoader(TensorDataset(far), batch_size=9)
    for data in (far, (far, torch.zeros(len(far))), loader):
        size = None if data is loader else 8
        # The loader of `data` has a size of its own as well.
        inside = DataLoader(TensorDataset(x, y), batch_size=8)
        found = evaluate(ens, inside, task=task, batch_size=size, out_of_distribution=data)
        outside = found.out_of_distribution
        # Scores within 0.4 % of each other may count as equal.
        close(
            [outside.auroc[k] for k in ("total", "aleatoric", "epistemic")],
            [expected[k] for k in ("total", "aleatoric", "epistemic")],
            atol=2e-3,
            rtol=0,
        )
        close(outside.members, [expected[k] for k in range(3)], atol=2e-3, rtol=0)
        close(outside.uncertainty["total"], scores[1]["total"].mean())
        assert outside.rows == 71


def own_and_shared(task, outputs):
    if task == "classification":
        found = uncertainty.classification(outputs)
        own = torch.distributions.Categorical(logits=outputs).entropy()
    else:
        found, own = uncertainty.regression(*outputs), outputs[1]
    return {
        **{k: part.flatten() for k, part in found._asdict().items() if k != "prediction"},
        **{k: part.flatten() for k, part in enumerate(own)},
    }


def test_points_have_no_uncertainty_of_their_own(numbers):
    ens, x, y = numbers
    outside = evaluate(ens, (x, y), task="regression", out_of_distribution=x).out_of_distribution
    assert outside.members is None
    assert outside.auroc == {"total": 0.5, "aleatoric": 0.5, "epistemic": 0.5}


def test_metrics_of_the_caller(classes, numbers):
    ens, x, y = classes
    f1 = torchmetrics.classification.MulticlassF1Score(3, average="macro")
    f1.update(torch.tensor([0, 1]), torch.tensor([0, 0]))  # what it has seen stays its own
    before = f1.compute()
    evaluation = evaluate(
        ens,
        (x, y),
        task="classification",
        batch_size=8,
        metrics={"f1": f1, "auroc": lambda: torchmetrics.classification.MulticlassAUROC(3)},
    )
    with torch.no_grad():
        p = ens(x).softmax(-1)
    macro = [sk.f1_score(y, each.argmax(1), average="macro") for each in (*p, p.mean(0))]
    close([*evaluation.members["f1"], evaluation.combined["f1"]], macro, rtol=1e-6, atol=0)
    auc = [sk.roc_auc_score(y, each, multi_class="ovr") for each in (*p, p.mean(0))]
    close([*evaluation.members["auroc"], evaluation.combined["auroc"]], auc, rtol=1e-6, atol=0)
    assert f1.compute() == before
    ens, x, y = numbers
    pearson = evaluate(
        ens, (x, y), task="regression", metrics={"r": torchmetrics.PearsonCorrCoef}, batch_size=8
    )
    with torch.no_grad():
        r = [np.corrcoef(p[:, 0], y[:, 0])[0, 1] for p in ens(x)]
    close(pearson.members["r"], r, rtol=1e-6, atol=0)


# Numbers that are hard to get right ---------------------------------------------------------------


def test_likelihood_where_probabilities_round_to_zero():
    ens = Ensemble([nn.Identity() for _ in range(2)], strategy="fused")
    logits = torch.tensor([[0.0, 300.0], [0.0, -300.0]])  # exp(-300) is no float32
    found = evaluate(ens, (logits, torch.tensor([0, 0])), task="classification")
    assert found.combined["nll"] == found.members["nll"][0] == 150


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_r2_far_from_zero_and_of_any_scale(scale, offset):
    generator = np.random.default_rng(0)
    y = offset + scale * generator.normal(size=100)
    p = y + 0.3 * scale * generator.normal(size=(2, 100))
    metric = R2()
    for part in np.split(np.arange(100), [7, 50]):
        metric.update(torch.from_numpy(p[:, part]), torch.from_numpy(y[part]))
    # Of a spread of 1e-6 around 1e6, float64 itself keeps four digits.
    close(metric.compute(), [sk.r2_score(y, each) for each in p], rtol=1e-4, atol=0)


def test_r2_of_equal_targets_is_not_defined():
    metric = R2()
    metric.update(torch.rand(2, 5), torch.full((5,), 0.1))
    assert metric.compute().isnan().all()


def test_sure_predictions_are_calibrated_too():
    metric = CalibrationError(2)
    p = torch.tensor([[[1.0, 0.0]] * 4, [[0.0, 1.0]] * 4])
    metric.update(p, torch.tensor([0, 0, 0, 1]))
    close(metric.compute(), [0.25, 0.75])


def test_separation_of_many_magnitudes():
    generator = np.random.default_rng(0)
    inside = 10.0 ** generator.uniform(-12, 0, size=2000)
    outside = 10.0 ** generator.uniform(-10, 1, size=3000)
    inside[:50] = outside[:50] = 0
    metric = Separation(1, bits=8, octaves=128, lowest=-64)
    for part in np.split(inside, 7 + np.arange(3)):
        metric.update(torch.from_numpy(part)[None], False)
    metric.update(torch.from_numpy(outside)[None], True)
    expected = sk.roc_auc_score(np.repeat([0, 1], [2000, 3000]), np.r_[inside, outside])
    close(metric.compute(), expected, atol=1e-4, rtol=0)


def test_nan_shows_in_the_member_that_has_it_and_in_all_together(classes):
    ens, x, y = classes
    with torch.no_grad():
        ens.members.bias[1] = torch.nan
    found = evaluate(ens, (x, y), task="classification", out_of_distribution=x)
    for name, values in found.members.items():
        assert np.isnan(values).tolist() == [False, True, False], name
        assert math.isnan(found.combined[name])
    assert np.isnan(list(found.uncertainty.values())).all()
    assert np.isnan(found.out_of_distribution.members).tolist() == [False, True, False]
    assert "nan" in str(found)
    assert found.to_dict()["combined"]["nll"] is None


def test_one_member(classes):
    ens, x, y = classes
    found = evaluate(ens[[0]], (x, y), task="classification")
    for name, values in found.members.items():
        close(found.combined[name], values[0])
    assert found.uncertainty["epistemic"] < 1e-12


def test_half_precision(classes):
    ens, x, y = classes
    exact = evaluate(ens, (x, y), task="classification")
    found = evaluate(ens.bfloat16(), (x.bfloat16(), y), task="classification")
    close(found.members["nll"], exact.members["nll"], rtol=2e-2, atol=0)


def test_the_combined_prediction_is_that_of_combine(classes):
    ens, x, y = classes
    found = evaluate(ens, (x, y), task="classification")
    with torch.no_grad():
        right = combine.probabilities(ens(x)).argmax(1) == y
    assert found.combined["accuracy"] == pytest.approx(right.double().mean().item())
