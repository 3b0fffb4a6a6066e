"""A replay as one CUDA graph: the GPU runs all ops of the program without waiting for Python."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unisono.engine.tree import tree_map


class GraphReplay:
    """``replay(*inputs)`` on static memory: inputs are copied in, outputs out.

    Args:
        replay: The function to record.
        inputs: Tensors of the shapes and strides that it takes.
        put_back: Undoes what a run writes to buffers.
    """

    def __init__(
        self,
        replay: Callable[..., Any],
        inputs: Sequence[Tensor],
        put_back: Callable[[], None],
    ) -> None:
        self._inputs = inputs
        self._lock = threading.Lock()
        self._graph = torch.cuda.CUDAGraph()
        device = inputs[0].device
        with torch.no_grad(), torch.cuda.device(device):
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):  # libraries set up what must not be set up in a graph
                for _ in range(3):
                    replay(*inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self._outputs = replay(*inputs)
        put_back()

    def __call__(self, *inputs: Tensor) -> Any:
        """The outputs, in memory of their own."""
        with self._lock:  # one set of static memory; two threads take turns
            for static, given in zip(self._inputs, inputs, strict=True):
                static.copy_(given, non_blocking=True)
            self._graph.replay()
            return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self._outputs)
