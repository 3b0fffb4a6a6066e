import pytest
import torch
from torch import nn

from members import NAN, X, Y, assert_told, buffer, holder, layer, with_
from unisono.differences import check_members, compare_members


def plain(tensor):
    return with_(table=tensor)


# member 0, member 1, and all that is said of member 1.
DIFFERENT = {
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
    "long strings": (
        with_(text="a" * 500 + "0" + "c" * 500),
        with_(text="a" * 500 + "1" + "c" * 500),
        f"`text`: …{'a' * 26}1{'c' * 53}…; member 0 has …{'a' * 26}0{'c' * 53}…",
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
}


@pytest.mark.parametrize("case", DIFFERENT.values(), ids=DIFFERENT)
def test_a_difference_is_told_with_path_and_both_values(case):
    assert_told(*case)


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
