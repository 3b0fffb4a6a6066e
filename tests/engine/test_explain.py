"""What `Ensemble.explain` tells."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from unisono import Ensemble, OpRecord, per_member
from unisono.engine.planning.plan import Plan, seconds


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=True, num_layers=2, dropout=0.5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 4), nn.Tanh())

    def forward(self, ids: Tensor) -> Tensor:
        h, _ = self.rnn(self.embed(ids))
        h, _ = self.attention(h, h, h, need_weights=False)
        y: Tensor = self.head(h.mean(1))
        return y


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def ops(plan: Plan) -> dict[tuple[str, str], tuple[str, str]]:
    return {(op.path, op.op): (op.how, op.rule) for op in plan.ops}


def test_fused_each_op_with_its_place_and_how_it_ran() -> None:
    plan = Ensemble([Net() for _ in range(3)], strategy="fused").explain(IDS)
    found = ops(plan)
    assert found["embed", "embedding"] == ("rule", "embedding")
    assert found["rnn", "lstm"] == ("member", "")  # each member draws for itself
    assert found["attention", "linear"] == ("rule", "linear")
    assert found["attention", "scaled_dot_product_attention"] == ("rule", "attention")
    assert found["", "mean"] == ("torch", "")
    assert found["head.0", "linear"] == ("rule", "linear")
    assert found["head.1", "tanh"] == ("torch", "")
    assert list(dict.fromkeys(op.path for op in plan.ops)) == [
        "embed", "rnn", "attention", "", "head.0", "head.1"
    ]  # fmt: skip


def test_a_recurrent_layer_that_draws_nothing_has_a_rule() -> None:
    plan = Ensemble([Net().eval() for _ in range(3)], strategy="fused").explain(IDS)
    assert ops(plan)["rnn", "lstm"] == ("rule", "lstm")


@pytest.mark.parametrize("strategy", ["fused", "vmap", "loop"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_shares_are_those_of_the_whole(strategy: str, chunk_size: int | None) -> None:
    models = [nn.Sequential(nn.Linear(4, 3), nn.ReLU()) for _ in range(4)]
    ens = Ensemble(models, strategy=strategy, chunk_size=chunk_size)  # type: ignore[arg-type]
    plan = ens.explain(per_member(torch.randn(4, 8, 4)))
    assert plan.strategy == strategy
    assert plan.reason == f'strategy="{strategy}" was asked for'
    assert [op.op for op in plan.ops] == ["linear", "relu"]
    assert sum(op.share for op in plan.ops) == pytest.approx(1.0)
    how = {"fused": ["rule", "torch"], "vmap": ["torch"] * 2, "loop": ["member"] * 2}[strategy]
    assert [op.how for op in plan.ops] == how


def test_auto_the_candidates_and_why() -> None:
    plan = Ensemble([nn.Linear(4, 3) for _ in range(4)]).explain(torch.randn(8, 4))
    assert {"fused", "vmap", "loop"} <= set(plan.candidates)
    assert list(plan.candidates.values()) == sorted(plan.candidates.values())
    assert " when the first call of this kind was timed: " in plan.reason


def test_a_layer_that_torch_runs_as_one_op_is_one_op() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    ens = Ensemble([layer, copy.deepcopy(layer)], strategy="fused").eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        native = ens.explain(x)
    assert ops(native)["", "_transformer_encoder_layer_fwd"] == ("rule", "encoder_layer")
    assert ("linear1", "linear") in ops(ens.explain(x))  # with gradients it runs in parts
    torch.testing.assert_close(ens(x), torch.stack([layer.eval()(x)] * 2))


def test_it_is_frozen() -> None:
    plan = Plan("fused", None, "because")
    with pytest.raises(AttributeError, match="cannot assign to field"):
        plan.strategy = "loop"  # type: ignore[misc]


SHOWN = Plan(
    "fused",
    None,
    "the fastest when the first call of this kind was timed: 2.50x as fast as loop",
    {"fused": 0.00012, "loop": 0.0003},
    ops=(
        OpRecord("fc1", "linear", "rule", "linear", 0.75),
        OpRecord("", "relu", "torch", "", 0.05),
        OpRecord("rnn", "lstm", "member", "", 0.2),
    ),
)


def test_as_a_table() -> None:
    assert str(SHOWN) == (
        "Plan: fused\n"
        "  the fastest when the first call of this kind was timed: 2.50x as fast as loop\n"
        "\n"
        "  candidate    time\n"
        "  ---------  ------\n"
        "  fused      120 us\n"
        "  loop       300 us\n"
        "\n"
        "  module    op      how                      share\n"
        "  --------  ------  -----------------------  -----\n"
        "  fc1       linear  rule of unisono: linear  75.0%\n"
        "  (member)  relu    rule of torch             5.0%\n"
        "  rnn       lstm    member by member         20.0%"
    )


def test_as_a_dict() -> None:
    fields = json.loads(json.dumps(SHOWN.to_dict()))
    assert fields["strategy"] == "fused"
    assert fields["candidates"] == {"fused": 0.00012, "loop": 0.0003}
    assert fields["ops"][0] == {
        "path": "fc1", "op": "linear", "how": "rule", "rule": "linear", "share": 0.75
    }  # fmt: skip


def test_as_html() -> None:
    plan = Plan("loop", None, "`<lambda>` can't run", {"loop": 1.0}, ops=SHOWN.ops)
    html = plan._repr_html_()
    assert "<lambda>" not in html
    assert "&lt;lambda&gt;" in html
    assert html.count("<tr>") == 1 + 1 + 1 + 3
    assert "rule of unisono: linear" in html


@pytest.mark.parametrize(
    ("time", "text"), [(2.5, "2.5 s"), (0.012345, "12.3 ms"), (4.56e-5, "45.6 us"), (0, "0 us")]
)
def test_times_have_units(time: float, text: str) -> None:
    assert seconds(time) == text
