import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import nn

from unisono import sampling, uncertainty
from unisono.estimators import EnsembleClassifier, Standardise
from unisono.estimators.predicting import rows_at_once
from unisono.estimators.rows import hold_out
from unisono.uncertainty import Uncertainty

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)) * [1, 10, 1000, 0] + [0, 0, 5000, 3]
Y = np.where(X[:, 0] + X[:, 1] / 10 > 0, "yes", "no")
SMALL = {"n_members": 3, "max_epochs": 4, "hidden_layer_sizes": (8,), "random_state": 0}


class Net(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.net = nn.Sequential(Standardise(n_features), nn.Linear(n_features, n_outputs))

    def forward(self, x):
        return self.net(x)


@pytest.fixture(scope="module")
def fitted():
    return EnsembleClassifier(**SMALL).fit(X, Y)


def test_probabilities_equal_the_loop_over_the_members(fitted):
    x = torch.from_numpy(X)
    with torch.no_grad():
        logits = torch.stack([member(x) for member in fitted.ensemble_])
    expected = torch.stack([own.softmax(-1) for own in logits]).mean(0).numpy()
    np.testing.assert_allclose(fitted.predict_proba(X), expected, rtol=1e-7)
    np.testing.assert_array_equal(fitted.predict(X), fitted.classes_[expected.argmax(1)])
    np.testing.assert_allclose(fitted.predict_members(X), logits.numpy(), rtol=1e-7)
    found = fitted.predict_uncertainty(X)
    assert isinstance(found, Uncertainty)
    for own, truth in zip(found, uncertainty.classification(logits), strict=True):
        np.testing.assert_allclose(own, truth.numpy(), rtol=1e-7, atol=1e-12)
    assert fitted.score(X, Y) == np.mean(fitted.predict(X) == Y)


def test_rows_in_chunks_are_what_they_are_at_once(fitted, monkeypatch):
    whole = fitted.predict_uncertainty(X)
    monkeypatch.setattr("unisono.estimators.predicting.rows_at_once", lambda *_: 7)
    for one, other in zip(whole, fitted.predict_uncertainty(X), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_the_number_of_rows_at_once_goes_by_the_widest_layer(fitted):
    assert rows_at_once(fitted.ensemble_, 4) == 2**21 // (8 * 3 * 8)
    assert rows_at_once(fitted.ensemble_, 1000) == 2**21 // (8 * 3 * 1000)
    assert rows_at_once(fitted.ensemble_, 10**9) == 64


def test_members_standardise_by_the_statistics_of_the_data(fitted):
    for member in fitted.ensemble_:
        np.testing.assert_allclose(member.standardise.mean, X.mean(0))
        np.testing.assert_allclose(member.standardise.scale, [*X.std(0)[:3], 1.0])
    assert fitted.ensemble_.shared == {"standardise.mean", "standardise.scale"}


def test_the_scale_of_the_features_does_not_matter(fitted):
    other = EnsembleClassifier(**SMALL).fit(X * [1, 1e-6, 1e6, 1] + [0, 1, 0, 0], Y)
    found = other.predict_proba(X * [1, 1e-6, 1e6, 1] + [0, 1, 0, 0])
    np.testing.assert_allclose(found, fitted.predict_proba(X), rtol=1e-6)


def test_the_same_seed_gives_the_same_numbers_and_touches_no_generator():
    before = torch.get_rng_state(), np.random.get_state()
    one, other = (EnsembleClassifier(**SMALL, dropout=0.3).fit(X, Y) for _ in range(2))
    np.testing.assert_array_equal(one.predict_proba(X), other.predict_proba(X))
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1][1], np.random.get_state()[1])
    different = EnsembleClassifier(**{**SMALL, "random_state": 1}).fit(X, Y)
    assert not np.allclose(one.predict_proba(X), different.predict_proba(X))
    # Neighbouring seeds have no member in common.
    weights = [model.ensemble_.members.output.weight for model in (one, different)]
    assert not any(torch.equal(a, b) for a in weights[0] for b in weights[1])


def test_without_a_seed_numpy_decides():
    options = {**SMALL, "random_state": None}
    found = []
    for _ in range(2):
        np.random.seed(3)
        found.append(EnsembleClassifier(**options).fit(X, Y).predict_proba(X))
    np.testing.assert_array_equal(*found)


def test_early_stopping_holds_out_rows_and_puts_the_best_weights_back():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 3)), rng.integers(2, size=200)  # nothing to learn
    model = EnsembleClassifier(n_members=3, random_state=0, patience=2, learning_rate=1e-2)
    history = model.fit(x, y).history_
    assert history.stopped == ("patience",) * 3
    assert history.epochs < 100
    assert EnsembleClassifier(**SMALL, patience=None).fit(x, y).history_.validation_loss is None
    assert EnsembleClassifier(**SMALL).fit(x[:90], y[:90]).history_.validation_loss is None


def test_held_out_rows_have_the_classes_in_their_shares(monkeypatch):
    seen = []

    def spy(num_rows, fraction, keys, seed):
        seen.append(keys)
        return hold_out(num_rows, fraction, keys, seed)

    monkeypatch.setattr("unisono.estimators.training.hold_out", spy)
    EnsembleClassifier(**SMALL).fit(X, Y)
    EnsembleClassifier(**SMALL).fit(X, np.stack([Y, X[:, 1] > 0], 1))
    assert seen[0].tolist() == (Y == "yes").tolist()
    assert sorted(set(seen[1])) == [0, 1, 2, 3]  # each pair of labels


def test_the_order_of_the_rows_is_new_in_each_call_of_partial_fit(monkeypatch):
    seeds = []

    def spy(ens, optimizer, data, task, settings, seed):
        seeds.append(seed)

    monkeypatch.setattr("unisono.estimators.base.train_on", spy)
    for random_state in (0, 0, 1):
        model = EnsembleClassifier(**{**SMALL, "random_state": random_state})
        for _ in range(3):
            model.partial_fit(X, Y, classes=["no", "yes"])
    assert seeds[:3] == seeds[3:6]
    assert len(set(seeds)) == 6


def in_full_batches():
    return EnsembleClassifier(**{**SMALL, "max_epochs": 30, "batch_size": 1000, "patience": None})


def test_a_row_of_weight_two_counts_like_two_and_one_of_weight_zero_is_none():
    weights = RNG.integers(0, 4, size=len(X))
    weighted = in_full_batches().fit(X, Y, sample_weight=weights)
    repeated = in_full_batches().fit(np.repeat(X, weights, axis=0), np.repeat(Y, weights))
    np.testing.assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), rtol=1e-6)
    plain = in_full_batches().fit(X, Y)
    assert not np.allclose(weighted.predict_proba(X), plain.predict_proba(X), rtol=1e-3)
    # In minibatches a row of weight zero is left out bit by bit.
    kept = weights > 0
    one = EnsembleClassifier(**SMALL, batch_size=16).fit(X, Y, sample_weight=kept)
    other = EnsembleClassifier(**SMALL, batch_size=16).fit(X[kept], Y[kept])
    np.testing.assert_array_equal(one.predict_proba(X), other.predict_proba(X))


def test_the_scale_of_the_weights_does_not_matter():
    weights = RNG.uniform(0.5, 2, size=len(X))
    one = in_full_batches().fit(X, Y, sample_weight=weights)
    other = in_full_batches().fit(X, Y, sample_weight=1000 * weights)
    np.testing.assert_allclose(one.predict_proba(X), other.predict_proba(X), rtol=1e-6)
    np.testing.assert_allclose(one.history_.loss, other.history_.loss, rtol=1e-6)  # Adam hides it
    equal = in_full_batches().fit(X, Y, sample_weight=np.full(len(X), 5))
    plain = in_full_batches().fit(X, Y)
    np.testing.assert_array_equal(equal.predict_proba(X), plain.predict_proba(X))


@pytest.mark.parametrize(
    "classes", [["b", "a", "c"], [7, -1, 3], [0.0, 2.0, 1.0]], ids=["text", "integers", "numbers"]
)
def test_labels_of_any_kind(classes):
    y = np.array(classes)[np.arange(60) % 3]
    model = EnsembleClassifier(**SMALL).fit(X, y)
    assert model.classes_.tolist() == sorted(classes)
    assert model.classes_.dtype == y.dtype
    assert set(model.predict(X)) <= set(classes)
    assert model.predict_proba(X).shape == (60, 3)


def test_several_label_columns_learn_each_its_own():
    x = RNG.normal(size=(400, 2))
    y = np.stack([np.where(x[:, 0] > 0, "up", "down"), np.where(x[:, 1] > 0, "in", "out")], 1)
    y[:50, 1] = "far"
    y[50:, 1][x[50:, 1] > 1] = "far"
    x[:50, 1] += 3
    model = EnsembleClassifier(n_members=3, random_state=0, learning_rate=1e-2).fit(x, y)
    assert [own.tolist() for own in model.classes_] == [["down", "up"], ["far", "in", "out"]]
    probabilities = model.predict_proba(x)
    assert [own.shape for own in probabilities] == [(400, 2), (400, 3)]
    assert model.predict(x).shape == (400, 2)
    assert model.score(x, y) > 0.9
    assert model.score(x, y) == np.mean((model.predict(x) == y).all(1))
    found = model.predict_uncertainty(x)
    np.testing.assert_allclose(found[1].prediction, probabilities[1], rtol=1e-10)
    assert [own.shape for own in model.predict_members(x)] == [(3, 400, 2), (3, 400, 3)]
    # The last layer is that of both columns: the loop over the members agrees.
    with torch.no_grad():
        logits = torch.stack([member(torch.from_numpy(x)) for member in model.ensemble_])
    np.testing.assert_allclose(
        probabilities[1], logits[..., 2:].softmax(-1).mean(0).numpy(), rtol=1e-6
    )


def test_partial_fit_learns_from_batches():
    x = RNG.normal(size=(600, 3)) * [1, 1000, 1]
    y = np.where(x[:, 0] + x[:, 1] / 1000 > 0, "b", "a")
    model = EnsembleClassifier(n_members=2, random_state=0, learning_rate=1e-2)
    for start in range(0, 600, 50):
        model.partial_fit(x[start : start + 50], y[start : start + 50], classes=["b", "a"])
    assert model.score(x, y) > 0.9
    np.testing.assert_allclose(model.ensemble_[0].standardise.scale, x.std(0))
    before = model.predict_proba(x)
    model.partial_fit(x[:20], y[:20], sample_weight=np.arange(20))
    assert not np.array_equal(before, model.predict_proba(x))
    again = model.fit(x[:100], y[:100])  # from the beginning
    fresh = EnsembleClassifier(n_members=2, random_state=0, learning_rate=1e-2)
    np.testing.assert_array_equal(
        again.predict_proba(x), fresh.fit(x[:100], y[:100]).predict_proba(x)
    )


def test_partial_fit_wants_to_know_the_classes():
    model = EnsembleClassifier(**SMALL)
    with pytest.raises(ValueError, match=r"partial_fit\(X, y, classes=np.unique\(y_all\)\)"):
        model.partial_fit(X, Y)
    with pytest.raises(ValueError, match=r"y holds labels that are no classes: \['yes'\]"):
        model.partial_fit(X, Y, classes=["no", "maybe"])
    assert not hasattr(model, "classes_")
    model.partial_fit(X, Y, classes=["no", "yes"])
    with pytest.raises(ValueError, match="classes are those of the first call; got"):
        model.partial_fit(X, Y, classes=["no", "maybe", "yes"])
    with pytest.raises(ValueError, match="X has 3 features, but EnsembleClassifier is expecting 4"):
        model.partial_fit(X[:, :3], Y)
    two = np.stack([Y, Y], 1)
    with pytest.raises(ValueError, match=r"the classes of each of the 2 label columns; got 1"):
        EnsembleClassifier(**SMALL).partial_fit(X, two, classes=[["no", "yes"]])


def test_a_module_of_the_user():
    model = EnsembleClassifier(Net, **SMALL, sampling=sampling.subset(0.5)).fit(X, Y)
    assert isinstance(model.ensemble_[0], Net)
    assert model.ensemble_.shared == {"net.0.mean", "net.0.scale"}
    np.testing.assert_allclose(model.ensemble_[0].net[0].mean, X.mean(0))


@pytest.mark.parametrize(
    ("module", "error", "text"),
    [
        (
            nn.Linear(4, 2),
            TypeError,
            (
                r"EnsembleClassifier.fit: module is a function that makes a member, got Linear;"
                r" pass module=lambda n_features, n_outputs: Net\(...\), or None for the default"
            ),
        ),
        (
            lambda i, o: "net",
            TypeError,
            (
                r"EnsembleClassifier.fit: module\(4, 2\) returns a str, but a member is a"
                r" torch.nn.Module"
            ),
        ),
        (
            lambda i, o: nn.Linear(i, 1),
            ValueError,
            (
                r"EnsembleClassifier.fit: a member returns \(rows, n_outputs\), here \(2, 2\); got"
                r" \(2, 1\). See the second argument of module\(n_features, n_outputs\)"
            ),
        ),
    ],
)
def test_a_module_that_does_not_fit(module, error, text):
    with pytest.raises(error, match=text):
        EnsembleClassifier(module, **SMALL).fit(X, Y)


def test_an_error_of_a_member_says_what_it_was_shown():
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        EnsembleClassifier(lambda i, o: nn.Linear(i + 1, o), **SMALL).fit(X, Y)
    assert caught.value.__notes__ == [
        "EnsembleClassifier.fit: raised by a member that was shown (2, 4) rows"
    ]


def test_wrong_data():
    model = EnsembleClassifier(**SMALL)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        model.fit(np.where(X > 0, np.nan, X), Y)
    with pytest.raises(ValueError, match="Input X contains infinity"):
        model.fit(np.where(X > 0, np.inf, X), Y)
    with pytest.raises(ValueError, match=r"Found array with 0 sample\(s\)"):
        model.fit(X[:0], Y[:0])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.fit(X, Y[:-1])
    with pytest.raises(ValueError, match="sample_weight is finite and not negative"):
        model.fit(X, Y, sample_weight=-np.ones(60))
    with pytest.raises(ValueError, match="there is one class only") as caught:
        model.fit(X, Y, sample_weight=Y == "no")
    assert str(caught.value) == (
        f"EnsembleClassifier.fit: there is one class only: all {(Y == 'no').sum()} rows of positive"
        f" weight have y = 'no'; a classifier needs at least two"
    )
    with pytest.raises(ValueError, match=r"y: labels of one column can be put in order") as caught:
        model.fit(X, np.array(["no", None] * 30, dtype=object))
    assert str(caught.value) == (
        "y: labels of one column can be put in order, so they are of one kind; got NoneType, str;"
        " y.astype(str) makes them strings"
    )
    assert not hasattr(model, "ensemble_")


def test_numbers_too_large_for_the_network_are_an_error():
    model = EnsembleClassifier(**SMALL, dtype="float32").fit(X, Y)
    text = 'the data hold 1e[+]200, which is too large for float32; pass dtype="float64"'
    large = X.copy()
    large[3, 1] = -1e200
    with pytest.raises(ValueError, match=text):
        model.predict(large)
    with pytest.raises(ValueError, match=text):
        model.fit(large, Y)
    assert np.isfinite(EnsembleClassifier(**SMALL).fit(large, Y).predict_proba(large)).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there():
    with pytest.raises(
        ValueError, match=r'EnsembleClassifier.fit: device="cuda" can\'t be used here'
    ):
        EnsembleClassifier(**SMALL, device="cuda").fit(X, Y)


def test_one_member_is_an_ensemble_without_disagreement():
    model = EnsembleClassifier(**{**SMALL, "n_members": 1}).fit(X, Y)
    assert (model.predict_uncertainty(X).epistemic == 0).all()


def test_a_fit_that_is_interrupted_leaves_no_half_fitted_estimator(monkeypatch):
    model = EnsembleClassifier(**SMALL).fit(X, Y)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        model.fit(np.full_like(X, np.nan), Y)
    model.predict(X)  # the wrong data did no harm

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("unisono.estimators.base.train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, np.where(Y == "no", "a", "b"))
    with pytest.raises(NotFittedError):
        model.predict(X)
