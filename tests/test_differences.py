import copy
import dataclasses
import datetime
import decimal
import enum
import functools
import logging
import math
import pathlib
import random
import threading
import time
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from unisono.differences import alias_groups, check_members, compare_members
from unisono.errors import Difference, IncompatibleMembersError, UnsupportedModelError


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Config:
    width: int = 4
    rates: tuple = (0.1, 0.2)
    color: Color = Color.RED
    cache: dict = dataclasses.field(default_factory=dict, compare=False)


class Slots:
    __slots__ = ("x", "y")

    def __init__(self, x):
        self.x = x


class Plain:
    def __init__(self, **values):
        vars(self).update(values)


class ListWithName(list):
    name = None


Point = namedtuple("Point", "x y")


class Holder(nn.Module):
    """A layer, and attributes as given."""

    def __init__(self, **attributes):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def double(self, x):
        return 2 * x

    def triple(self, x):
        return 3 * x

    def forward(self, x):
        return self.fc(x)


def holder(change=None, **attributes):
    """A Holder after `change(model)`."""
    model = Holder(**attributes)
    if change is not None:
        change(model)
    return model


def scaled_by(factor):
    return lambda x: factor * x


def scaled_by_default(factor):
    def scaled(x, f=factor, *, g=factor):
        return x * f * g

    return scaled


def mlp(hidden=8, p=0.1):
    return nn.Sequential(
        OrderedDict(
            a=nn.Linear(4, hidden), act=nn.ReLU(), drop=nn.Dropout(p), b=nn.Linear(hidden, 2)
        )
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.Flatten()
    )


def tied():
    model = nn.ModuleDict({"encoder": nn.Linear(3, 3), "decoder": nn.Linear(3, 3)})
    model["decoder"].weight = model["encoder"].weight
    return model


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


def with_bound_methods():
    def bind(model):
        model.f = model.double
        model.g = functools.partial(model.double, 3)
        model.fc.register_forward_hook(model.triple)

    return holder(bind)


def with_references():
    def refer(model):
        model.weights = [model.fc.weight, model.fc.bias]
        model.layers = {"first": model.fc}
        model.chosen = {model.fc}
        model.by_layer = {model.fc: "first"}

    return holder(refer)


def hidden_modules():
    layers = [nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2))]
    nn.init.ones_(layers[0].weight)
    nn.init.zeros_(layers[0].bias)
    return holder(layers=layers, acts={nn.ReLU(), nn.Tanh()})


def old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(3, 3))


def pruned():
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)


def ran_once(model, *shape):
    model(torch.randn(*shape))
    return model


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
    "lambda": lambda: holder(act=lambda x: x),
    "closure": lambda: holder(act=scaled_by(0.5), nested=scaled_by(scaled_by(2))),
    "defaults": lambda: holder(act=scaled_by_default(0.5)),
    "decorated": lambda: holder(act=functools.wraps(print)(scaled_by(1))),
    "cached": lambda: holder(act=functools.lru_cache(scaled_by(1))),
    "partial": lambda: holder(act=functools.partial(F.leaky_relu, negative_slope=0.3)),
    "functions": lambda: holder(a=torch.relu, b=F.max_pool2d, c=torch.tensor([1.0]).add, d=math),
    "methods": with_bound_methods,
    "hooks": with_hooks,
    "parameter list": lambda: nn.ParameterList([torch.randn(2), torch.randn(3)]),
    "parameter dict": lambda: nn.ParameterDict({"b": torch.randn(2), "a": torch.randn(3)}),
    "module list": lambda: nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]),
    "module dict": lambda: nn.ModuleDict({"relu": nn.ReLU(), "fc": nn.Linear(2, 2)}),
    "numpy": lambda: holder(a=np.array([1.0, np.nan]), b=np.float32(2), c=np.array([{"a": 1}])),
    "plain tensors": lambda: holder(
        a=torch.tensor([1.0, float("nan")]), b=torch.empty(0), c=torch.tensor(True), d=1j
    ),
    "unusual tensors": lambda: holder(
        a=torch.eye(3).to_sparse(),
        b=torch.ones(3, dtype=torch.float8_e4m3fn),
        c=torch.tensor([1 + 2j]).conj(),
        d=torch.ones(1).expand(4),
        e=torch.ones(2, 3).T,
        f=torch.empty(3, device="meta"),
    ),
    "back reference": with_parent,
    "references": with_references,
    "hidden modules": hidden_modules,
    "dataclass": lambda: holder(config=Config(cache={"a": [1, Config(3)]})),
    "objects": lambda: holder(a=Plain(x=Plain(y=1)), b=Slots(1), c=Color.RED, d=ListWithName([1])),
    "standard library": lambda: holder(
        a=pathlib.Path("data"),
        b=datetime.timedelta(1),
        c=decimal.Decimal("0.1"),
        d=deque([1, Plain(x=2)]),
        e=defaultdict(list, a=[1]),
        f=Point(1, Plain(x=1)),
        g=frozenset({"a", "b"}),
        h=float("nan"),
        i=threading.Lock(),
        j=logging.getLogger("some.name"),
        k=math,
        m=object(),
        n=OrderedDict(a=1),
        o=slice(1, None),
    ),
    "random numbers": lambda: holder(
        a=torch.Generator().manual_seed(random.getrandbits(32)),
        b=np.random.default_rng(),
        c=random.Random(),
    ),
    "dtypes": lambda: holder(a=torch.float16, b=torch.device("cpu"), c=torch.Size([1, 2])),
    "tied weights": tied,
    "shared module": shared_module,
    "class made per instance": lambda: type("Made", (Holder,), {"scale": 2, "f": scaled_by(2)})(),
    "compiled in place": lambda: holder(lambda m: vars(m).update(_compiled_call_impl=object())),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_two_builds_are_equal(make):
    models = [make() for _ in range(3)]
    assert [str(difference) for difference in compare_members(models)] == []
    check_members(models)


# These don't survive copy.deepcopy: locks, methods of tensors, tensors with a gradient history.
NOT_COPYABLE = {"standard library", "functions", "old weight norm", "old spectral norm", "pruned"}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_COPYABLE])
def test_a_copy_is_equal(name):
    model = MODELS[name]()
    assert [str(difference) for difference in compare_members([model, copy.deepcopy(model)])] == []


def with_(**attributes):
    return lambda: holder(**attributes)


def edited(change, make=holder):
    """A constructor whose model goes through `change`."""

    def build():
        model = make()
        change(model)
        return model

    return build


def order(*names):
    return lambda: nn.ModuleDict({name: nn.ReLU() for name in names})


def buffer(value, **options):
    return edited(lambda m: m.register_buffer("table", value, **options))


def plain(tensor):
    return with_(table=tensor)


def layer(*args, **kwargs):
    return lambda: nn.Linear(*args, **kwargs)


def retie(model):
    model["decoder"].weight = nn.Parameter(torch.zeros(3, 3))


def cyclic(value):
    table = [value]
    table.append(table)
    return with_(table=table)


def made(factor):
    return lambda: type("Made", (Holder,), {"__module__": "m", "f": scaled_by(factor)})()


def refer(name):
    return edited(lambda m: setattr(m, "chosen", [getattr(m.fc, name)]))


def hooked(hook, **options):
    return edited(lambda m: m.fc.register_forward_hook(hook, **options))


def returns_none(module, args, output):
    return None


def returns_zero(module, args, output):
    return 0


X, Y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
NAN = float("nan")

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
    "device": (
        layer(2, 2, bias=False),
        layer(2, 2, bias=False, device="meta"),
        "`weight`: device meta; member 0 has device cpu",
    ),
    "several facts": (
        buffer(torch.zeros(2)),
        buffer(torch.zeros(3, dtype=torch.int64)),
        "`table`: shape (3,), dtype torch.int64; member 0 has shape (2,), dtype torch.float32",
    ),
    "layout": (
        buffer(torch.eye(2)),
        buffer(torch.eye(2).to_sparse()),
        "`table`: layout torch.sparse_coo; member 0 has layout torch.strided",
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
    "dropout": (lambda: mlp(p=0.1), lambda: mlp(p=0.2), "`drop.p`: 0.2; member 0 has 0.1"),
    "stride": (
        lambda: nn.Conv2d(1, 1, 1, stride=(1, 1)),
        lambda: nn.Conv2d(1, 1, 1, stride=(1, 2)),
        "`stride[1]`: 2; member 0 has 1",
    ),
    "activation": (
        with_(act=torch.relu),
        with_(act=torch.tanh),
        "`act.__name__`: 'tanh'; member 0 has 'relu'",
    ),
    "type of a number": (
        with_(a=True, b=1.0, c=(1,)),
        with_(a=1, b=1, c=[1]),
        "`a`: 1; member 0 has True",
        "`b`: 1; member 0 has 1.0",
        "`c`: [1]; member 0 has (1,)",
    ),
    "NaN and None": (
        with_(a=NAN, b=None),
        with_(a=1.0, b="x"),
        "`a`: 1.0; member 0 has nan",
        "`b`: 'x'; member 0 has None",
    ),
    "strings": (
        with_(mode="bilinear"),
        with_(mode="nearest"),
        "`mode`: 'nearest'; member 0 has 'bilinear'",
    ),
    "long strings": (
        with_(text="a" * 500 + "0" + "c" * 500),
        with_(text="a" * 500 + "1" + "c" * 500),
        f"`text`: …{'a' * 26}1{'c' * 53}…; member 0 has …{'a' * 26}0{'c' * 53}…",
    ),
    "attribute missing": (with_(a=1), holder, "`a`: missing; member 0 has 1"),
    "attribute extra": (holder, with_(a=1), "`a`: 1; member 0 has nothing of that name"),
    "list": (
        with_(sizes=[1, [2, 3]]),
        with_(sizes=[1, [2, 4]]),
        "`sizes[1][1]`: 4; member 0 has 3",
    ),
    "length": (
        with_(sizes=[1], layers=[len]),
        with_(sizes=[1, 2], layers=[len, len]),
        "`layers`: list of length 2; member 0 has list of length 1",
        "`sizes`: [1, 2]; member 0 has [1]",
    ),
    "list with an attribute": (
        edited(lambda m: setattr(m.sizes, "name", "a"), with_(sizes=ListWithName([1]))),
        edited(lambda m: setattr(m.sizes, "name", "b"), with_(sizes=ListWithName([1]))),
        "`sizes.name`: 'b'; member 0 has 'a'",
    ),
    "dict": (
        with_(table={"a": 1, "b": 2}),
        with_(table={"a": 3, "c": 2}),
        "`table['a']`: 3; member 0 has 1",
        "`table['b']`: missing; member 0 has 2",
        "`table['c']`: 2; member 0 has nothing of that name",
    ),
    "order of a dict": (
        with_(table={"a": 1, "b": 2}),
        with_(table={"b": 2, "a": 1}),
        "`table`: keys in order ('b', 'a'); member 0 has keys in order ('a', 'b')",
    ),
    "default of a dict": (
        with_(table=defaultdict(list)),
        with_(table=defaultdict(set)),
        "`table.default_factory`: class set; member 0 has class list",
    ),
    "keys of other kinds": (
        lambda: holder(table={nn.ReLU(): 1}),
        lambda: holder(table={nn.ReLU(): 2}),
        "`table[0][1]`: 2; member 0 has 1",
    ),
    "set": (
        with_(names={"b", "a"}, acts={1, 2}),
        with_(names={"c", "a"}, acts={1}),
        "`acts`: {1}; member 0 has {1, 2}",
        "`names`: {'a', 'c'}; member 0 has {'a', 'b'}",
    ),
    "set of modules": (
        lambda: holder(acts={nn.ReLU(), nn.Dropout(0.1)}),
        lambda: holder(acts={nn.ReLU(), nn.Dropout(0.2)}),
        "`acts`: set of length 2 (with other contents); member 0 has set of length 2",
    ),
    "cycle": (cyclic(1), cyclic(2), "`table[0]`: 2; member 0 has 1"),
    "enum": (
        with_(color=Color.RED),
        with_(color=Color.BLUE),
        "`color`: <Color.BLUE: 2>; member 0 has <Color.RED: 1>",
    ),
    "dataclass": (
        with_(config=Config(cache={"a": 1})),
        with_(config=Config(width=5, cache={"a": 2})),
        "`config.cache['a']`: 2; member 0 has 1",
        "`config.width`: 5; member 0 has 4",
    ),
    "objects": (
        lambda: holder(a=Plain(x=Plain(y=1)), b=Slots(1)),
        lambda: holder(a=Plain(x=Plain(y=2)), b=Slots(2)),
        "`a.x.y`: 2; member 0 has 1",
        "`b.x`: 2; member 0 has 1",
    ),
    "objects of other classes": (
        with_(a=Plain(x=1)),
        with_(a=Slots(1)),
        f"`a`: object of class {__name__}.Slots; member 0 has object of class {__name__}.Plain",
    ),
    "standard library": (
        with_(a=pathlib.PurePosixPath("a"), b=decimal.Decimal(1), c=deque([1]), d=math),
        with_(a=pathlib.PurePosixPath("b"), b=decimal.Decimal(2), c=deque([2]), d=random),
        "`a`: PurePosixPath('b'); member 0 has PurePosixPath('a')",
        "`b`: Decimal('2'); member 0 has Decimal('1')",
        "`c`: deque([2]); member 0 has deque([1])",
        "`d.__name__`: 'random'; member 0 has 'math'",
    ),
    "named tuple": (
        with_(point=Point(1, 2)),
        with_(point=Point(1, 3)),
        "`point[1]`: 3; member 0 has 2",
    ),
    "class as attribute": (
        with_(norm=nn.BatchNorm1d),
        with_(norm=nn.LayerNorm),
        (
            "`norm`: class torch.nn.modules.normalization.LayerNorm; member 0 has "
            "class torch.nn.modules.batchnorm.BatchNorm1d"
        ),
    ),
    "closure": (
        lambda: holder(act=scaled_by(2)),
        lambda: holder(act=scaled_by(3)),
        "`act (closure factor)`: 3; member 0 has 2",
    ),
    "default of a function": (
        lambda: holder(act=scaled_by_default(2)),
        lambda: holder(act=scaled_by_default(3)),
        "`act.__defaults__[0]`: 3; member 0 has 2",
        "`act.__kwdefaults__['g']`: 3; member 0 has 2",
    ),
    "partial": (
        with_(act=functools.partial(F.leaky_relu, 1, negative_slope=0.1)),
        with_(act=functools.partial(F.leaky_relu, 2, negative_slope=0.2)),
        "`act.args[0]`: 2; member 0 has 1",
        "`act.keywords['negative_slope']`: 0.2; member 0 has 0.1",
    ),
    "method of another submodule": (
        edited(lambda m: setattr(m, "act", m.forward)),
        edited(lambda m: setattr(m, "act", m.fc.forward)),
        "`act.__func__`: function Linear.forward",
        "`act.__self__`: the module `fc`; member 0 has the model itself",
    ),
    "array": (
        with_(a=np.array([[NAN, 1.0]]), b=np.zeros(2), c=np.array(["a"], dtype=object)),
        with_(a=np.array([[NAN, 2.0]]), b=np.zeros(3), c=np.array(["b"], dtype=object)),
        "`a`: array, values differ, first at (0, 1): 2.0; member 0 has 1.0",
        "`b`: array of shape (3,), dtype float64; member 0 has array of shape (2,), dtype float64",
        "`c[0]`: 'b'; member 0 has 'a'",
    ),
    "plain tensor": (
        plain(X),
        plain(Y),
        "`table`: plain tensor, values differ, first at (1,): 3.0; member 0 has 2.0",
    ),
    "facts of a plain tensor": (
        plain(X),
        plain(X.double()),
        "`table`: plain tensor, dtype torch.float64; member 0 has dtype torch.float32",
    ),
    "plain complex tensor": (
        plain(torch.tensor([[NAN, 1j]])),
        plain(torch.tensor([[NAN, 2j]])),
        "`table`: plain tensor, values differ, first at (0, 1): 2j; member 0 has 1j",
    ),
    "negative zero": (
        plain(torch.tensor(0.0)),
        plain(torch.tensor(-0.0)),
        "`table`: plain tensor, values differ, first at (): -0.0; member 0 has 0.0",
    ),
    "tensor and parameter": (
        with_(table=torch.ones(1)),
        with_(table=nn.Parameter(torch.ones(1), requires_grad=False)),
        (
            "`table`: plain tensor, class torch.nn.parameter.Parameter; member 0 has class "
            "torch.Tensor"
        ),
    ),
    "reference to another tensor": (
        refer("weight"),
        refer("bias"),
        "`chosen[0]`: the tensor `fc.bias`; member 0 has the tensor `fc.weight`",
    ),
    "reference to no registered tensor": (
        refer("weight"),
        with_(chosen=[torch.ones(1)]),
        (
            "`chosen[0]`: a tensor that the member doesn't register; member 0 has the tensor "
            "`fc.weight`"
        ),
    ),
    "hidden module": (
        lambda: holder(layers=[nn.Sequential(nn.Dropout(0.1))]),
        lambda: holder(layers=[nn.Sequential(nn.Dropout(0.2))]),
        "`layers[0].0.p`: 0.2; member 0 has 0.1",
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


@pytest.mark.parametrize(("first", "second", "expected"), [
    (first, second, expected) for first, second, *expected in DIFFERENT.values()
], ids=DIFFERENT)  # fmt: skip
def test_a_difference_is_told_with_path_and_both_values(first, second, expected):
    found = sorted(str(difference) for difference in compare_members([first(), second()]))
    assert len(found) == len(expected), found
    for line, text in zip(found, sorted(expected), strict=True):
        assert line.startswith(f"member 1, {text}")


def test_differences_are_data():
    [difference] = compare_members([mlp(p=0.1), mlp(p=0.1), mlp(p=0.2)])
    assert difference == Difference(member=2, path="drop.p", found="0.2", expected="0.1")


def test_all_differences_come_in_one_pass_by_member_then_by_the_module_tree():
    models = [mlp(), mlp(hidden=9, p=0.2), mlp(), mlp(p=0.3)]
    models[3].b.eval()
    found = [(d.member, d.path) for d in compare_members(models)]
    first = ["a.weight", "a.bias", "a.out_features", "drop.p", "b.weight", "b.in_features"]
    assert found == [*((1, path) for path in first), (3, "drop.p"), (3, "b")]


def test_no_or_one_model_has_no_differences():
    assert compare_members([]) == []
    assert compare_members([mlp()]) == []


def test_models_and_random_numbers_stay_untouched():
    models = [ran_once(nn.LSTM(3, 4), 5, 2, 3), nn.LSTM(3, 5)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    names, numbers = [list(vars(model)) for model in models], torch.get_rng_state()
    compare_members(models)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [list(vars(model)) for model in models] == names
    for model, state in zip(models, before, strict=True):
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])


def test_the_message_in_full():
    models = [mlp(), mlp(), mlp(p=0.2), mlp(hidden=9)]
    with pytest.raises(IncompatibleMembersError, match="2 of 4 differ") as caught:
        check_members(models)
    assert (
        str(caught.value)
        == """\
Ensemble: members must share one architecture, but 2 of 4 differ from member 0:

  member 2, `drop.p`: 0.2; member 0 has 0.1
  member 3, `a.weight`: shape (9, 4); member 0 has shape (8, 4)
  member 3, `a.bias`: shape (9,); member 0 has shape (8,)
  member 3, `a.out_features`: 9; member 0 has 8
  member 3, `b.weight`: shape (2, 9); member 0 has shape (2, 8)
  member 3, `b.in_features`: 9; member 0 has 8

One copy of the module's code runs for all members, so everything except tensor
values has to agree. Build them from one constructor:

    models = [make_model() for _ in range(4)]"""
    )
    assert list(caught.value.differences) == compare_members(models)


def test_a_long_list_is_cut_and_kept_whole_as_data():
    models = [mlp(p=0.1), *(mlp(p=i / 20) for i in range(3, 16))]
    with pytest.raises(IncompatibleMembersError, match="13 of 14 differ") as caught:
        check_members(models)
    assert "  member 10, `drop.p`: 0.6; member 0 has 0.1\n  ... and 3 more\n" in str(caught.value)
    assert "member 11" not in str(caught.value)
    assert len(caught.value.differences) == 13


def test_plain_tensors_and_hidden_modules_come_with_the_remedy():
    models = [holder(layers=[nn.Linear(2, 2)]) for _ in range(2)]
    with pytest.raises(IncompatibleMembersError, match=r"nn\.ModuleList\(modules\)") as caught:
        check_members(models)
    assert "`layers[0].weight`: plain tensor, values differ, first at (0, 0)" in str(caught.value)
    assert "register_buffer(name, tensor)" in str(caught.value)


def test_values_of_shared_tensors_must_agree():
    first, second = mlp(), mlp()
    second.load_state_dict(first.state_dict())
    assert compare_members([first, second], shared=["a.weight", "a.bias"]) == []
    first.a.weight.data[2, 1] = 0.5
    second.a.weight.data[2, 1] = 0.25
    [difference] = compare_members([first, second], shared=["a.weight", "a.bias"])
    assert str(difference) == (
        "member 1, `a.weight`: values differ, first at (2, 1): 0.25; member 0 has 0.5"
    )
    assert compare_members([first, second]) == []


@pytest.mark.parametrize("name", ["encoder.weight", "decoder.weight"])
def test_a_shared_tensor_may_be_named_by_any_of_its_ties(name):
    first, second = tied(), tied()
    [difference] = compare_members([first, second], shared=[name])
    assert difference.path == "encoder.weight"


def test_a_thousand_members_take_about_a_second():
    models = [mlp() for _ in range(1000)]
    start = time.perf_counter()
    compare_members(models)
    assert time.perf_counter() - start < 2


def test_the_values_of_fake_tensors_are_not_asked_for():
    with torch._subclasses.FakeTensorMode():
        models = [holder(table=torch.ones(2, device="cuda")) for _ in range(2)]
        check_members(models)
        assert compare_members(models, shared=["fc.weight"]) == []


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantized:UserWarning")
def test_plain_quantized_tensors_are_compared():
    def quantized(value):
        return torch.quantize_per_tensor(torch.tensor([value]), 0.5, 0, torch.qint8)

    assert compare_members([holder(t=quantized(1.0)), holder(t=quantized(1.0))]) == []
    [difference] = compare_members([holder(t=quantized(1.0)), holder(t=quantized(2.0))])
    assert (difference.found, difference.expected) == (
        "plain tensor, values differ, first at (0,): 2.0",
        "1.0",
    )


def test_nan_equals_nan_of_other_bits():
    models = [holder(t=torch.tensor([bits, bits]).view(torch.float64)) for bits in (-1, -2)]
    assert compare_members(models) == []
    models[1].t[1] = 3.0
    [difference] = compare_members(models)
    assert difference.found == "plain tensor, values differ, first at (1,): 3.0"


def test_what_a_class_leaves_out_of_copies_is_not_compared():
    class Attached(Holder):  # as a LightningModule leaves out its trainer
        def __getstate__(self):
            return {**vars(self), "trainer": None}

    models = [Attached(trainer=1), Attached(trainer=2)]
    assert compare_members(models) == []


def test_alias_groups_lead_each_path_to_the_first_of_its_tensor():
    model = tied()
    model.register_buffer("table", torch.zeros(1))
    model["encoder"].register_buffer("table", model.table)
    assert alias_groups(model) == {
        "encoder.weight": "encoder.weight",
        "encoder.bias": "encoder.bias",
        "decoder.weight": "encoder.weight",
        "decoder.bias": "decoder.bias",
        "table": "table",
        "encoder.table": "table",
    }


# What can't be a member at all.


def refuse(error, models, *texts, **options):
    with pytest.raises(error, match=r"^Ensemble: ") as caught:
        check_members(models, **options)
    for text in texts:
        assert text in str(caught.value)
    return str(caught.value)


def test_no_model():
    refuse(IncompatibleMembersError, [], "at least one member, got an empty list")


def test_one_model_instead_of_a_list():
    for model in (mlp(), torch.ones(3)):
        refuse(UnsupportedModelError, model, "come as a list", "make_model() for _ in range(10)")
    check_members(nn.ModuleList([mlp(), mlp()]))


def test_other_things_than_modules():
    message = refuse(UnsupportedModelError, [mlp(), Holder], f"member 1 is the class {__name__}.H")
    assert "models = [Holder() for _ in range(10)]" in message
    refuse(UnsupportedModelError, [torch.ones(2)], "member 0 is an object of type torch.Tensor.")
    refuse(UnsupportedModelError, [mlp(), mlp], "member 1 is the function mlp (")
    refuse(UnsupportedModelError, [None], "member 0 is an object of type NoneType.")


def test_one_model_many_times():
    model, other = mlp(), mlp()
    message = refuse(
        IncompatibleMembersError,
        [model, other, model, other, model],
        "\n  members 0, 2, 4\n  members 1, 3\n",
        "models = [make_model() for _ in range(5)]",
        "models = [copy.deepcopy(model) for _ in range(5)]",
    )
    assert "`[model] * 5` names one model 5 times" in message
    refuse(IncompatibleMembersError, [model] * 40, "members 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (40")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_script_modules():
    model = nn.Sequential(nn.ReLU(), torch.jit.script(nn.Linear(2, 2)))
    refuse(UnsupportedModelError, [mlp(), model], "`1` of member 1 is a ScriptModule", "jit.script")
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    refuse(UnsupportedModelError, [traced], "member 0 is a ScriptModule")


def test_lazy_modules():
    model = nn.Sequential(nn.LazyLinear(3))
    text = "`0` of member 1 is torch.nn.modules.linear.LazyLinear, which has no shape yet"
    refuse(UnsupportedModelError, [nn.Sequential(nn.Linear(2, 3)), model], text, "Run each model")
    [lazy, *_] = compare_members([nn.Linear(2, 3), nn.LazyLinear(3)])
    assert "LazyLinear" in lazy.found
    refuse(UnsupportedModelError, [nn.LazyBatchNorm1d(affine=False)], "has no shape yet")


def test_data_parallel():
    model = nn.Sequential(nn.DataParallel(nn.Linear(2, 2)))
    refuse(UnsupportedModelError, [model], "`0` of member 0 is wrapped in torch.nn.parallel.data_")
    refuse(UnsupportedModelError, [model], "Pass the module inside, `model.module`")


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models():
    refuse(
        UnsupportedModelError,
        [torch.compile(mlp()), mlp()],
        "member 0 is wrapped by torch.compile",
        "torch.compile(Ensemble(models))",
    )


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_functions_are_compared_by_the_function():
    models = [holder(act=torch.compile(scaled_by(2), backend="eager")) for _ in range(2)]
    for model in models:
        model.act(torch.ones(1))
    check_members(models)
    models = [holder(act=torch.compile(scaled_by(i))) for i in range(2)]
    [difference] = compare_members(models)
    assert str(difference) == "member 1, `act (closure factor)`: 1; member 0 has 0"


def test_members_with_a_parameter_in_common():
    weight = nn.Parameter(torch.zeros(2, 2))
    models = [holder(lambda m: setattr(m.fc, "weight", weight)) for _ in range(3)]
    message = refuse(
        IncompatibleMembersError,
        models,
        "  member 1, `fc.weight`: the memory of `fc.weight` of member 0\n"
        "  member 2, `fc.weight`: the memory of `fc.weight` of member 0\n",
        'Ensemble(models, shared=["fc.weight"])',
        "copy.deepcopy(model)",
    )
    assert "fc.bias" not in message
    check_members(models, shared=["fc.weight"])


def test_members_with_memory_in_common():
    data = torch.zeros(2, 2)
    models = [holder(lambda m: setattr(m.fc, "weight", nn.Parameter(data))) for _ in range(2)]
    refuse(IncompatibleMembersError, models, "`fc.weight`: the memory of `fc.weight` of member 0")


def test_members_with_a_submodule_in_common():
    backbone = mlp()
    models = [nn.Sequential(OrderedDict(body=backbone, head=nn.Linear(2, 2))) for _ in range(2)]
    message = refuse(
        IncompatibleMembersError, models, "member 1, `body`: the very module `body` of member 0"
    )
    assert "body.a" not in message
    check_members(models, shared=[f"body.{name}" for name, _ in backbone.named_parameters()])
    refuse(IncompatibleMembersError, models, "`body`: the very", shared=["body.a.weight"])


def test_members_may_have_in_common_what_has_no_memory():
    relu, empty = nn.ReLU(), torch.empty(0)
    models = [nn.Sequential(nn.Linear(2, 2), relu) for _ in range(2)]
    check_members(models)
    models = [holder(lambda m: m.register_buffer("e", empty.detach())) for _ in range(2)]
    check_members(models)
    check_members([nn.Linear(2, 2, device="meta") for _ in range(2)])


def test_views_of_one_stacked_tensor_are_not_in_common():
    stacked = torch.randn(2, 3, 2)
    for dim in (0, 2):  # members one after the other, and interleaved
        models = [
            holder(lambda m, w=w: setattr(m.fc, "weight", nn.Parameter(w)))
            for w in stacked.movedim(0, dim).unbind(dim)
        ]
        check_members(models)


def captures_self(model):
    model.act = lambda x: model.fc(x)


def captures_parameter(model):
    weight = model.fc.weight
    model.acts = {"a": [lambda x: x @ weight]}


def captures_by_default(model):
    model.act = functools.partial(lambda x, fc=model.fc: fc(x))


def captures_by_hook(model):
    model.fc.register_forward_hook(lambda m, args, y: setattr(model, "last", y))


def captures_by_reference(model):
    model.root = weakref.ref(model)


def captures_by_builtin(model):
    model.add = model.fc.weight.add


def captures_nested(model):
    inner = functools.partial(print, model.fc)
    model.act = lambda x: inner(x)


CAPTURES = [
    (captures_self, "`act (closure model)`: the model itself"),
    (captures_parameter, "`acts['a'][0] (closure weight)`: the tensor `fc.weight`"),
    (captures_by_default, "`act.func.__defaults__[0]`: the module `fc`"),
    (captures_by_hook, "`fc._forward_hooks[0] (closure model)`: the model itself"),
    (captures_by_reference, "`root()`: the model itself"),
    (captures_by_builtin, "`add.__self__`: the tensor `fc.weight`"),
    (captures_nested, "`act (closure inner).args[0]`: the module `fc`"),
]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("capture", "text"), CAPTURES, ids=[f.__name__ for f, _ in CAPTURES])
def test_functions_that_hold_on_to_their_member(capture, text, n):
    models = [holder(capture) for _ in range(n)]
    message = refuse(UnsupportedModelError, models, "Make each a method", "def scaled(self, x):")
    for member in range(n):
        assert f"  member {member}, {text}\n" in message
    assert compare_members(models) == []


def test_a_function_copied_with_a_model_holds_on_to_the_original():
    model = holder(captures_self)
    refuse(UnsupportedModelError, [model, copy.deepcopy(model)], "member 0, `act (closure model)`")
    refuse(UnsupportedModelError, [copy.deepcopy(model), model], "member 1, `act (closure model)`")
