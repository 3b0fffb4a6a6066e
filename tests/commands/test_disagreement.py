"""The order of the divided images."""

import torch
from torch.nn import functional as F

from unisono.commands.disagreement import DividedImage, most_divided


def logits_of(votes, classes=3, sharpness=4.0):
    """Logits (N, B, classes) of members that answer `votes` (N, B) equally surely."""
    return F.one_hot(torch.tensor(votes), classes).double() * sharpness


def test_the_most_divided_comes_first_and_unanimous_images_are_left_out():
    votes = [[0, 1, 0, 2], [0, 1, 1, 2], [0, 1, 2, 1]]  # by member; by image: aaa aaa abc aab
    divided = most_divided(logits_of(votes), torch.tensor([0, 1, 2, 1]))
    assert divided == [
        DividedImage(index=2, label=2, votes=(1, 1, 1)),
        DividedImage(index=3, label=1, votes=(0, 1, 2)),
    ]


def test_among_equal_votes_the_surer_members_come_first():
    logits = logits_of([[0, 1, 0], [1, 2, 2]])
    logits[:, 1] *= 2  # as divided by vote, but surer
    assert [case.index for case in most_divided(logits, torch.tensor([0, 0, 0]))] == [1, 0, 2]


def test_equal_shares_tie_in_whatever_order_the_classes_come():
    # Entropies of 3:3:4, summed in three orders, need not be equal to the last bit.
    columns = [
        [0] * 3 + [1] * 3 + [2] * 4,
        [0] * 4 + [1] * 3 + [2] * 3,
        [0] * 3 + [1] * 4 + [2] * 3,
    ]
    logits = logits_of([list(row) for row in zip(*columns, strict=True)])
    logits[:, 2] *= 2
    assert most_divided(logits, torch.tensor([0, 0, 0]))[0].index == 2


def test_one_member_agrees_with_itself():
    assert most_divided(logits_of([[0, 1, 2]]), torch.tensor([0, 0, 0])) == []


def test_members_without_an_answer_do_no_harm():
    assert most_divided(torch.full((2, 3, 4), torch.nan), torch.tensor([0, 1, 2])) == []
