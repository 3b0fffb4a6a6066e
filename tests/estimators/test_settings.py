import numpy as np
import pytest
import torch

from unisono import sampling
from unisono.estimators import EnsembleClassifier, EnsembleRegressor
from unisono.estimators.settings import check_settings

X, Y = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20) % 2

WRONG = {
    "n_members": (0, "n_members is a whole number, at least 1; got 0"),
    "batch_size": (2.5, "batch_size is a whole number, at least 1; got 2.5"),
    "max_epochs": (True, "max_epochs is a whole number, at least 1; got True"),
    "patience": (0, "patience is a whole number, at least 1, or None; got 0"),
    "min_delta": (-1, "min_delta is a number, at least 0; got -1"),
    "hidden_layer_sizes": (
        (32, 0),
        "hidden_layer_sizes is a list of whole numbers, at least 1 each; got (32, 0)",
    ),
    "dropout": (1, "dropout is a probability, at least 0 and below 1; got 1"),
    "learning_rate": (
        [0.1, 0.2],
        "learning_rate is one number, or one for each of the 10 members; got 2",
    ),
    "weight_decay": (
        -1.0,
        "weight_decay is a number of at least 0, or one per member; got -1.0",
    ),
    "validation_fraction": (
        0.9,
        (
            "validation_fraction is a part of the rows, above 0 and at most 0.5; got 0.9;"
            " patience=None holds out nothing"
        ),
    ),
    "dtype": ("half", 'dtype is "float32", "float64" or None; got \'half\''),
    "strategy": ("fast", 'strategy is one of "auto", "fused", "vmap", "loop"; got \'fast\''),
    "sampling": (
        "bagging",
        (
            'sampling is one of "shared", "shuffled", "bootstrap", "folds", or'
            " sampling.subset(fraction); got 'bagging'"
        ),
    ),
    "device": ("gpu0", 'device is what torch.device takes, as "cpu" or "cuda"; got \'gpu0\''),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("kind", [EnsembleClassifier, EnsembleRegressor])
def test_a_wrong_parameter_is_named(kind, name):
    value, text = WRONG[name]
    with pytest.raises(ValueError, match="fit: ") as caught:
        kind(**{name: value}).fit(X, Y)
    assert str(caught.value) == f"{kind.__name__}.fit: {text}"


def test_all_problems_at_once():
    model = EnsembleClassifier(**{name: value for name, (value, _) in WRONG.items()})
    with pytest.raises(ValueError, match="partial_fit: ") as caught:
        model.partial_fit(X, Y, classes=[0, 1])
    for name, (_, text) in WRONG.items():
        # Without a number of members nobody knows how long the list is to be.
        assert (text in str(caught.value)) == (name != "learning_rate")
    assert not hasattr(model, "ensemble_")


def test_settings_are_plain_python_values():
    params = EnsembleClassifier(
        n_members=np.int64(2),
        learning_rate=np.array([0.1, 0.2]),
        hidden_layer_sizes=7,
        sampling=sampling.folds(3),
    ).get_params()
    settings = check_settings("fit", params)
    assert type(settings.n_members) is int
    assert settings.learning_rate == [0.1, 0.2]
    assert settings.hidden_layer_sizes == (7,)
    assert settings.sampling == sampling.folds(3)


def test_the_network_has_the_precision_of_the_data_on_a_cpu_alone():
    double, single = np.zeros((1, 1)), np.zeros((1, 1), np.float32)
    for options, x, dtype in [
        ({}, double, torch.float64),
        ({}, single, torch.float32),
        ({"dtype": "float32"}, double, torch.float32),
        ({"dtype": "float64"}, single, torch.float64),
        ({"device": "cuda"}, double, torch.float32),
    ]:
        settings = check_settings("fit", EnsembleClassifier(**options).get_params())
        assert settings.dtype_for(x) == dtype


def test_each_member_has_its_own_rates():
    rates = [1e-1, 1e-3]
    model = EnsembleRegressor(n_members=2, learning_rate=rates, max_epochs=2).fit(X, Y)
    np.testing.assert_array_equal(model.history_.lr, [rates, rates])
