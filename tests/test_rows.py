"""Rows of single members: `Ensemble.copy_`, and what it is made of."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from cases import CASES, members
from unisono import Ensemble
from unisono.rows import copy_rows, stacked_tensors


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


class Witness:
    def __init__(self):
        self.seen = []

    def copy_members(self, src, dst):
        self.seen.append((src, dst))


@pytest.mark.parametrize("case", CASES)
def test_a_copied_member_equals_its_source_bitwise_and_others_stay(case):
    ens = Ensemble(members(case, 4))
    before = [member.state_dict() for member in ens.unstack()]
    ens.copy_([3, 0], [0, 1])
    after = [member.state_dict() for member in ens.unstack()]
    for i, source in enumerate([3, 0, 2, 3]):
        assert after[i].keys() == before[source].keys()
        for name, tensor in after[i].items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(tensor, before[source][name]), (i, name)


def test_one_member_by_a_negative_index():
    ens = Ensemble([net() for _ in range(3)])
    ens.copy_(-1, 0)
    assert torch.equal(ens.members[0].weight[0], ens.members[0].weight[2])


def test_what_forward_keeps_in_attributes_is_copied():
    class Counter(nn.Module):
        def __init__(self, start):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("start", torch.tensor(float(start)))
            self.last = None

        def forward(self, x):
            self.last = self.linear(x).detach() + self.start
            return self.last

    ens = Ensemble([Counter(i) for i in range(3)], strategy="fused")
    ens(torch.ones(1, 2))
    assert "last" in ens.stacked_tensors()
    ens.copy_(2, 0)
    assert torch.equal(ens[0].last, ens[2].last)


def test_shared_tensors_are_left_alone():
    make = net
    models = [make() for _ in range(2)]
    models[1][0].load_state_dict(models[0][0].state_dict())
    ens = Ensemble(models, shared="0.*")
    assert ens.shared == {"0.weight", "0.bias"}
    assert not ens.shared & ens.stacked_tensors().keys()
    kept = ens.members[0].weight.clone()
    ens.copy_(1, 0)
    assert torch.equal(ens.members[0].weight, kept)


def test_followers_are_told_and_not_kept_alive():
    ens = Ensemble([net() for _ in range(3)])
    witness = Witness()
    ens.follow(witness)
    ens.copy_([0, 1], [1, 2])
    assert witness.seen == [([0, 1], [1, 2])]
    alive = weakref.ref(witness)
    del witness
    gc.collect()
    assert alive() is None
    ens.copy_(0, 1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_of_an_ensemble_have_no_followers(duplicate):
    ens = Ensemble([net() for _ in range(3)])
    witness = Witness()
    ens.follow(witness)
    other = duplicate(ens)
    other.copy_(0, 1)
    assert witness.seen == []
    assert torch.equal(other.members[0].weight[0], other.members[0].weight[1])


@pytest.mark.parametrize(
    ("src", "dst", "kind", "message"),
    [
        (5, 0, IndexError, r"ens\[5\]: there are 3 members, 0 to 2"),
        (0, "x", TypeError, r"ens\[\.\.\.\]: .*got 'x'"),
        (
            [0, 1],
            [2],
            ValueError,
            r"src and dst are as many members; got src=\[0, 1\] and dst=\[2\]",
        ),
        ([0, 1], [2, 2], ValueError, r"dst names each member once; got \[2\] twice"),
    ],
)
def test_members_that_do_not_exist_or_do_not_pair(src, dst, kind, message):
    ens = Ensemble([net() for _ in range(3)])
    with pytest.raises(kind, match=message):
        ens.copy_(src, dst)


def test_rows_keep_the_physical_order():
    ens = Ensemble([nn.Linear(3, 2) for _ in range(3)])
    transposed = torch.empty(3, 3, 2).mT.copy_(ens.members.weight.detach())
    ens.members.weight.data = transposed
    strides = ens.members.weight.stride()
    ens.copy_(0, 2)
    assert ens.members.weight.stride() == strides
    assert torch.equal(ens.members.weight[2], ens.members.weight[0])


def test_copy_rows_between_ensembles_of_different_sizes():
    large, small = Ensemble([net() for _ in range(5)]), Ensemble([net() for _ in range(2)])
    copy_rows(large.stacked_tensors(), [4, 1], small.stacked_tensors(), [0, 1])
    for name, tensor in stacked_tensors(large.members).items():
        assert torch.equal(tensor[[4, 1]], small.stacked_tensors()[name])
