"""Work on several threads: order, errors, how much is under way."""

import threading
import time

import pytest
import torch

from unisono.commands.in_order import map_in_order


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order(threads):
    def slow_first(k):
        time.sleep(0.02 if k == 0 else 0)
        return k

    assert list(map_in_order(slow_first, range(20), threads=threads)) == list(range(20))


def test_few_items_are_under_way():
    drawn = []

    def items():
        for k in range(100):
            drawn.append(k)
            yield k

    results = map_in_order(lambda k: k, items(), threads=2)
    for k, _ in zip(range(10), results, strict=False):
        assert len(drawn) <= k + 4
    results.close()
    assert len(drawn) < 20


def test_an_error_comes_in_the_place_of_its_result_and_ends_the_work():
    begun = []

    def fails(k):
        begun.append(k)
        return 1 / (3 - k)

    results = map_in_order(fails, range(1000), threads=2)
    assert [next(results) for _ in range(3)] == [1 / 3, 1 / 2, 1.0]
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        next(results)
    assert len(begun) < 20
    assert threading.active_count() < 20


def test_threads_of_torch_are_as_before():
    torch.set_num_threads(3)
    own = list(map_in_order(lambda _: torch.get_num_threads(), range(4), threads=2))
    assert own == [1] * 4
    assert torch.get_num_threads() == 3
