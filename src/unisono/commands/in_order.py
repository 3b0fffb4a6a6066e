"""Work on several threads whose results come in the order of the input."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int
) -> Generator[Result, None, None]:
    """Give ``function(item)`` for each item, in order, computed on several threads.

    Each thread works with one thread of torch, so that they share the cores and not fight for
    them. No more than two items for each thread are under way, so memory stays bounded.

    Args:
        function: What to compute.
        items: Drawn from in the calling thread.
        threads: How many compute at once.

    Yields:
        The results. An error of the function comes in the place of its result.

    Example:
        >>> list(map_in_order(lambda k: k * k, range(5), threads=2))
        [0, 1, 4, 9, 16]
    """
    before = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1))
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # After an error or ctrl-C what has begun ends, the rest never begins.
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
