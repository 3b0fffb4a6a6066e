import io
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from sklearn.exceptions import NotFittedError
from torch import nn

from unisono import CheckpointError, sampling
from unisono.estimators import EnsembleClassifier, EnsembleRegressor, TabularMLP
from unisono.estimators.state import from_state, to_state
from unisono.estimators.stored import read_members

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3))
SMALL = {"n_members": 2, "max_epochs": 2, "hidden_layer_sizes": (8,), "random_state": 0}
LABELS = {
    "text": np.array(["é", "b", "c"])[np.arange(60) % 3],
    "objects": np.array(["é", "b", "c"], dtype=object)[np.arange(60) % 3],
    "integers": np.arange(60, dtype=np.int32) % 3,
    "booleans": np.arange(60) % 2 == 0,
    "columns": np.stack([np.arange(60) % 2, np.arange(60) % 3], 1),
}


def through_files(config, tensors):
    """What comes back from JSON and safetensors, in which nothing can be executed."""
    return json.loads(json.dumps(config, allow_nan=False)), load(save(tensors))


def assert_same(one, other):
    np.testing.assert_equal(one.predict(X), other.predict(X))
    np.testing.assert_equal(one.predict_members(X), other.predict_members(X))
    np.testing.assert_equal(one.predict_uncertainty(X), other.predict_uncertainty(X))


@pytest.mark.parametrize("labels", LABELS)
def test_a_classifier_comes_back_bitwise(labels, monkeypatch):
    model = EnsembleClassifier(**SMALL, dtype="float32").fit(X, LABELS[labels])
    monkeypatch.setattr(pickle, "loads", None)
    again = from_state(*through_files(*to_state(model)))
    assert_same(again, model)
    np.testing.assert_equal(again.classes_, model.classes_)
    assert again.predict(X).dtype == model.predict(X).dtype
    assert again.get_params() == model.get_params()
    assert repr(again.history_) == repr(model.history_)


@pytest.mark.parametrize("columns", [1, 2])
def test_a_regressor_comes_back_bitwise(columns):
    y = X[:, :columns].squeeze()
    options = {"sampling": sampling.folds(3), "learning_rate": np.array([0.1, 0.2])}
    model = EnsembleRegressor(**SMALL, **options).fit(X, y)
    again = from_state(*through_files(*to_state(model)))
    assert_same(again, model)
    assert again.sampling == sampling.folds(3)
    assert again.learning_rate == [0.1, 0.2]
    again.partial_fit(X, y)


@pytest.mark.parametrize(
    ("model", "y"),
    [
        (EnsembleClassifier(**SMALL), LABELS["text"]),
        (EnsembleRegressor(**SMALL), X[:, 0]),
        (EnsembleRegressor(**SMALL), X[:, :2]),
        (EnsembleRegressor(nn.Linear, **SMALL), X[:, 0]),
    ],
    ids=["classes", "one target", "two targets", "points"],
)
def test_members_predict_without_their_estimator(model, y):
    config, tensors = through_files(*to_state(model.fit(X, y)))
    members = read_members(config, tensors, module=model.module)
    expected = model.predict_uncertainty(X)
    np.testing.assert_equal(members.predict_uncertainty(X), expected)


def test_members_refuse_what_they_can_not_predict():
    members = read_members(*to_state(EnsembleClassifier(**SMALL).fit(X, LABELS["text"])))
    with pytest.raises(
        ValueError, match=r"^X has shape \(60, 2\), but the members take 3 features$"
    ):
        members.predict_uncertainty(X[:, :2])
    with pytest.raises(ValueError, match=r"^X holds numbers that are not finite in float64$"):
        members.predict_uncertainty(np.where(X > 1, np.inf, X))
    of_two = read_members(*to_state(EnsembleClassifier(**SMALL).fit(X, LABELS["columns"])))
    with pytest.raises(ValueError, match=r"^the members predict several label columns"):
        of_two.predict_uncertainty(X)


def test_names_of_columns_come_back():
    import pandas as pd

    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    again = from_state(*to_state(EnsembleRegressor(**SMALL).fit(frame, X[:, 0])))
    again.predict(frame)
    with pytest.raises(ValueError, match="Feature names must be in the same order"):
        again.predict(frame[["b", "a", "c"]])


def test_a_module_is_a_name_that_is_never_imported():
    model = EnsembleClassifier(TabularMLP, **SMALL).fit(X, LABELS["text"])
    config, tensors = to_state(model)
    assert config["params"]["module"] == "unisono.estimators.networks:TabularMLP"
    with pytest.raises(CheckpointError, match="the members are made by") as caught:
        from_state(config, tensors)
    assert str(caught.value) == (
        "from_state: the members are made by unisono.estimators.networks:TabularMLP, which is not"
        " imported on the word of a file; if you trust it, import it and pass it:"
        " from_state(config, tensors, module=TabularMLP)"
    )
    assert_same(from_state(config, tensors, module=TabularMLP), model)


def test_a_module_without_a_name_can_not_be_stored():
    model = EnsembleClassifier(lambda i, o: nn.Linear(i, o), **SMALL).fit(X, LABELS["text"])
    with pytest.raises(ValueError, match="has no import path, under which it could be found again"):
        to_state(model)


@pytest.mark.parametrize("kind", [EnsembleClassifier, EnsembleRegressor])
@pytest.mark.parametrize("method", ["predict", "predict_uncertainty", "predict_members"])
def test_what_is_not_fitted_predicts_nothing(kind, method):
    with pytest.raises(NotFittedError, match=f"^This {kind.__name__} instance is not fitted yet"):
        getattr(kind(), method)(X)


def test_what_is_not_fitted_has_no_state():
    with pytest.raises(NotFittedError):
        to_state(EnsembleClassifier())


@pytest.fixture(scope="module")
def state():
    return to_state(EnsembleClassifier(**SMALL).fit(X, LABELS["text"]))


def test_states_that_do_not_fit_are_refused(state):
    config, tensors = state
    params = config["params"]
    for change, text in [
        ({"format": 2}, "config is of format 2, this version of unisono reads 1"),
        ({"kind": "os.system"}, "kind is one of 'EnsembleClassifier', 'EnsembleRegressor'; got"),
        ({"dtype": "float16"}, "dtype is one of float32, float64; got 'float16'"),
        ({"classes": [{"dtype": "V8", "values": []}]}, "classes are one list of labels; got"),
        ({"classes": [{"dtype": "i8", "values": ["x"]}]}, "classes can't be read"),
        ({"params": {**params, "depth": 3}}, "params aren't those of EnsembleClassifier"),
        ({"n_members": 3}, "the state has 2 members, this ensemble has 3"),
        ({"n_features": 7}, "the tensors don't fit the config"),
        ({"is_gaussian": True}, "is_gaussian=True, but that is not what the members return"),
    ]:
        with pytest.raises(CheckpointError, match=text):
            from_state({**config, **change}, tensors)
    for name in config:
        with pytest.raises(CheckpointError, match=f"config has no '{name}'|config is of format"):
            from_state({key: value for key, value in config.items() if key != name}, tensors)
    without = {name: tensor for name, tensor in tensors.items() if name != "features.std"}
    with pytest.raises(CheckpointError, match=r"from_state: tensors hold no features\.std"):
        from_state(config, without)
    with pytest.raises(CheckpointError, match="Missing key"):
        from_state(
            config,
            {n: t for n, t in tensors.items() if not n.endswith("weight")}
            | {"features.weight": tensors["features.weight"]},
        )
    with pytest.raises(CheckpointError, match="but a module was given; leave it out"):
        from_state(config, tensors, module=TabularMLP)


def test_a_device_that_is_not_there_is_the_cpu(state):
    config, tensors = state
    if torch.cuda.is_available():
        pytest.skip("there is one")
    there = {**config, "params": {**config["params"], "device": "cuda"}}
    again = from_state(there, tensors)
    assert next(again.ensemble_.parameters()).device.type == "cpu"
    assert again.device == "cuda"


def test_the_tensors_are_copies(state):
    model = EnsembleClassifier(**SMALL).fit(X, LABELS["text"])
    _, tensors = to_state(model)
    tensors["members.output.bias"].fill_(9)
    assert not bool((model.ensemble_.members.output.bias == 9).any())
    assert torch.save(tensors, io.BytesIO()) is None
