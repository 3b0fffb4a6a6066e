import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from members import (
    Holder,
    X,
    assert_equal_builds,
    assert_equals_its_copy,
    assert_told,
    buffer,
    edited,
    holder,
    layer,
    mlp,
    ran_once,
    scaled_by,
    tied,
    with_,
)


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.Flatten()
    )


def shared_module():
    block = nn.Linear(3, 3)
    return nn.Sequential(block, nn.ReLU(), block)


def with_parent():
    model = holder()
    object.__setattr__(model.fc, "parent", model)
    object.__setattr__(model, "itself", model)
    model.cycle = [model]
    model.cycle.append(model.cycle)
    return model


def with_hooks():
    def keep(module, args, output):
        return output

    def hook(model):
        model.handle = model.fc.register_forward_hook(keep)
        model.fc.register_forward_pre_hook(lambda m, args, kwargs: None, with_kwargs=True)
        model.register_full_backward_hook(functools.partial(print, "gradient"))
        model.register_forward_hook(model.fc.register_buffer and Holder.double, always_call=True)
        model.register_load_state_dict_post_hook(lambda m, keys: None)

    return holder(hook)


def old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(3, 3))


def pruned():
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)


def order(*names):
    return lambda: nn.ModuleDict({name: nn.ReLU() for name in names})


def retie(model):
    model["decoder"].weight = nn.Parameter(torch.zeros(3, 3))


def made(factor):
    return lambda: type("Made", (Holder,), {"__module__": "m", "f": scaled_by(factor)})()


def hooked(hook, **options):
    return edited(lambda m: m.fc.register_forward_hook(hook, **options))


def returns_none(module, args, output):
    return None


def returns_zero(module, args, output):
    return 0


MODELS = {
    "mlp": mlp,
    "cnn": cnn,
    "cnn after a call": lambda: ran_once(cnn(), 2, 3, 8, 8),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
    "gru after a call": lambda: nn.Sequential(ran_once(nn.GRU(3, 4), 5, 2, 3)),
    "transformer encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, activation=F.gelu, batch_first=True), 2
    ),
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
    "attention": lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True),
    "embedding": lambda: nn.Sequential(nn.Embedding(10, 4, padding_idx=0), nn.LayerNorm(4)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "spectral norm": lambda: ran_once(parametrizations.spectral_norm(nn.Linear(3, 3)), 2, 3),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.ReLU()),
    "old weight norm": old_weight_norm,
    "old spectral norm": lambda: ran_once(nn.utils.spectral_norm(nn.Linear(3, 3)), 2, 3),
    "pruned": pruned,
    "traced by fx": lambda: torch.fx.symbolic_trace(mlp()),
    "initialised lazily": lambda: ran_once(nn.LazyLinear(3), 2, 4),
    "no parameters": lambda: nn.Sequential(nn.Softplus(), nn.Upsample(scale_factor=2.0)),
    "hooks": with_hooks,
    "parameter list": lambda: nn.ParameterList([torch.randn(2), torch.randn(3)]),
    "parameter dict": lambda: nn.ParameterDict({"b": torch.randn(2), "a": torch.randn(3)}),
    "module list": lambda: nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]),
    "module dict": lambda: nn.ModuleDict({"relu": nn.ReLU(), "fc": nn.Linear(2, 2)}),
    "back reference": with_parent,
    "tied weights": tied,
    "shared module": shared_module,
    "class made per instance": lambda: type("Made", (Holder,), {"scale": 2, "f": scaled_by(2)})(),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_two_builds_are_equal(make):
    assert_equal_builds(make)


# These don't survive copy.deepcopy: tensors with a gradient history.
NOT_COPYABLE = {"old weight norm", "old spectral norm", "pruned"}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_COPYABLE])
def test_a_copy_is_equal(name):
    assert_equals_its_copy(MODELS[name]())


# member 0, member 1, and all that is said of member 1.
DIFFERENT = {
    "class": (
        nn.ReLU,
        nn.Tanh,
        (
            "`(the model)`: class torch.nn.modules.activation.Tanh; member 0 has "
            "class torch.nn.modules.activation.ReLU"
        ),
    ),
    "class of a submodule": (
        lambda: nn.Sequential(nn.Sequential(nn.ReLU())),
        lambda: nn.Sequential(nn.Sequential(nn.GELU())),
        (
            "`0.0`: class torch.nn.modules.activation.GELU; member 0 has "
            "class torch.nn.modules.activation.ReLU"
        ),
    ),
    "class of the same name": (
        made(2),
        made(3),
        "`(the model)`: class m.Made (another of that name); member 0 has class m.Made",
    ),
    "shape": (
        lambda: nn.Sequential(nn.Bilinear(2, 2, 32, bias=False)),
        lambda: nn.Sequential(nn.Bilinear(2, 2, 64, bias=False)),
        "`0.out_features`: 64; member 0 has 32",
        "`0.weight`: shape (64, 2, 2); member 0 has shape (32, 2, 2)",
    ),
    "dtype": (
        mlp,
        edited(lambda m: m.a.half(), mlp),
        "`a.bias`: dtype torch.float16; member 0 has dtype torch.float32",
        "`a.weight`: dtype torch.float16; member 0 has dtype torch.float32",
    ),
    "requires_grad": (
        mlp,
        edited(lambda m: m.b.weight.requires_grad_(False), mlp),
        "`b.weight`: requires_grad=False; member 0 has requires_grad=True",
    ),
    "parameter missing": (
        holder,
        edited(lambda m: delattr(m.fc, "bias")),
        "`fc.bias`: missing; member 0 has parameter of shape (2,)",
    ),
    "parameter extra": (
        holder,
        edited(lambda m: m.register_parameter("extra", nn.Parameter(X.clone()))),
        "`extra`: parameter of shape (2,); member 0 has nothing of that name",
    ),
    "parameter None": (
        layer(2, 2),
        layer(2, 2, bias=False),
        "`bias`: None; member 0 has parameter of shape (2,)",
    ),
    "buffer instead of parameter": (
        edited(lambda m: m.register_parameter("table", nn.Parameter(X.clone()))),
        buffer(X.clone()),
        "`table`: buffer of shape (2,); member 0 has parameter of shape (2,)",
    ),
    "buffer missing": (
        buffer(X.clone()),
        holder,
        "`table`: missing; member 0 has buffer of shape (2,)",
    ),
    "buffer instead of attribute": (
        with_(table=3),
        buffer(X.clone()),
        "`table`: buffer of shape (2,); member 0 has attribute 3",
    ),
    "persistent": (
        buffer(X.clone()),
        buffer(X.clone(), persistent=False),
        "`table`: persistent=False; member 0 has persistent=True",
    ),
    "submodule missing": (
        lambda: nn.Sequential(nn.ReLU(), nn.Tanh()),
        lambda: nn.Sequential(nn.ReLU()),
        "`1`: missing; member 0 has module torch.nn.modules.activation.Tanh",
    ),
    "submodule None": (
        edited(lambda m: m.register_module("norm", None)),
        edited(lambda m: m.register_module("norm", nn.ReLU())),
        "`norm`: module torch.nn.modules.activation.ReLU; member 0 has None",
    ),
    "order of submodules": (
        order("a", "b"),
        order("b", "a"),
        "`(the model)`: submodules in order b, a; member 0 has submodules in order a, b",
    ),
    "mode": (
        mlp,
        edited(lambda m: m.drop.eval(), mlp),
        "`drop`: eval mode; member 0 has train mode",
    ),
    "not tied": (
        tied,
        edited(retie, tied),
        "`decoder.weight`: its own tensor; member 0 has one tied to `encoder.weight`",
    ),
    "tied": (
        edited(retie, tied),
        tied,
        "`decoder.weight`: one tied to `encoder.weight`; member 0 has its own tensor",
    ),
    "tied, told once": (
        tied,
        edited(lambda m: m["encoder"].weight.requires_grad_(False), tied),
        "`encoder.weight`: requires_grad=False; member 0 has requires_grad=True",
    ),
    "submodule not shared": (
        shared_module,
        edited(lambda m: m.__setitem__(2, nn.Linear(3, 3)), shared_module),
        "`2`: its own module; member 0 has one tied to `0`",
    ),
    "number of hooks": (
        holder,
        hooked(returns_none),
        "`fc._forward_hooks`: 1 hook(s); member 0 has 0 hook(s)",
    ),
    "hook": (
        hooked(returns_none),
        hooked(returns_zero),
        "`fc._forward_hooks[0]`: function returns_zero",
    ),
    "flag of a hook": (
        hooked(returns_none),
        hooked(returns_none, always_call=True),
        "`fc._forward_hooks_always_called[0]`: True; member 0 has False",
    ),
    "parametrisation": (
        lambda: parametrizations.weight_norm(nn.Linear(3, 3), dim=0),
        lambda: parametrizations.weight_norm(nn.Linear(3, 3), dim=1),
        "`parametrizations.weight.0.dim`: 1; member 0 has 0",
        "`parametrizations.weight.original0`: shape (1, 3); member 0 has shape (3, 1)",
    ),
    "traced code": (
        lambda: torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())),
        lambda: torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.ReLU())),
        (
            "`(the model)`: class torch.fx.graph_module.GraphModule.__new__.<locals>."
            "GraphModuleImpl (another of that name)"
        ),
    ),
}


@pytest.mark.parametrize("case", DIFFERENT.values(), ids=DIFFERENT)
def test_a_difference_is_told_with_path_and_both_values(case):
    assert_told(*case)
