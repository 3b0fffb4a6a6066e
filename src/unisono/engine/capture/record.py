"""From a call to a function that replays it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from unisono.engine import rng
from unisono.engine.axis import Randomness
from unisono.engine.call import Strategy, fused, in_chunks, loop, vmap
from unisono.engine.capture.arguments import copy_of, names_of, outline
from unisono.engine.capture.guards import autocast_dtype
from unisono.engine.capture.outputs import Outputs
from unisono.engine.capture.recording import ReadsOutside, Recorder
from unisono.engine.capture.simplify import simplify
from unisono.engine.capture.text import Text, write
from unisono.engine.capture.trace import Ref, Trace
from unisono.engine.capture.writes import write_back
from unisono.engine.parts import Call
from unisono.engine.template import Template
from unisono.engine.tree import leaves, tree_map
from unisono.engine.where import locate
from unisono.errors import UnsupportedModelError

_STRATEGIES: Final[Mapping[str, Strategy]] = {"fused": fused, "vmap": vmap, "loop": loop}

Source = tuple[dict[str, Any], str]
"""Where the ensemble keeps a tensor: a dict of a module, and the key."""


class Request(NamedTuple):
    """What is to be recorded, but for the arguments."""

    fn: Callable[..., Any]
    n: int
    strategy: str
    randomness: Randomness
    chunk_size: int | str | None


class Variant(NamedTuple):
    """In which way a strategy is recorded; see `Recorder`."""

    max_ops: int | None = None
    turned: bool = False


_PLAIN: Final = Variant()


class Layout(NamedTuple):
    """What has to stay the same of a weight."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class WeightView(NamedTuple):
    """A name in the program that stands for a tensor of the ensemble, or for a view of it."""

    source: Source
    weight: Layout
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int  # counted from that of the weight


class Sample(NamedTuple):
    """Inputs to try a recording on."""

    inputs: Sequence[Tensor]
    put_back: Callable[[], None]  # undoes what a replay on them writes
    can_turn: bool


@dataclass(frozen=True)
class Recording:
    """A simplified program, ready to be bound to the ensemble's tensors."""

    strategy: str
    turned: bool
    text: Text
    weights: Mapping[str, WeightView]
    sources: Sequence[Source]  # of all the ensemble's tensors, those that go unused, too
    rebuild: Callable[..., Any]
    frozen: Sequence[str]  # plain attributes that forward assigned

    def bind(self) -> Callable[..., Any] | None:
        """The replay on the tensors that the ensemble has now; None if they don't fit."""
        names = {"torch": torch, "rebuild": self.rebuild, **self.text.bindings}
        for name, view in self.weights.items():
            home, key = view.source
            tensor = home.get(key)
            if not isinstance(tensor, Tensor) or _layout(tensor) != view.weight:
                return None
            plain = tensor.detach()
            if (plain.shape, plain.stride(), 0) != (view.shape, view.strides, view.offset):
                offset = tensor.storage_offset() + view.offset
                plain = plain.as_strided(view.shape, view.strides, offset)
            names[name] = plain
        exec(compile(self.text.code, "<captured ensemble>", "exec"), names)
        replay: Callable[..., Any] = names["replay"]
        return replay


def record(
    name: str,
    template: Template,
    request: Request,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    variant: Variant = _PLAIN,
) -> tuple[Recording, Sample]:
    """Record one call by one strategy; buffers and random state are afterwards as before.

    Raises:
        UnsupportedModelError: If the call can't be replayed.
    """
    # The watch for reads without an op keeps torch's native attention away, so where there is
    # attention it looks on at a rehearsal.
    if template.has_attention:
        _run(name, template, request, args, kwargs, variant, watched=True)[0].put_back()
    recorder, inputs, outputs, frozen = _run(
        name, template, request, args, kwargs, variant, watched=not template.has_attention
    )
    trace = recorder.trace
    program = simplify(trace)
    devices = sorted({v.tensor.device.type for v in trace.values})
    casts = [d for d in devices if torch.amp.is_autocast_available(d) and autocast_dtype(d)]
    form, _ = outline(args, kwargs)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in casts:
            stack.enter_context(torch.autocast(device, enabled=False))
        text = write(program, names_of(template.module, form), outputs.text(), casts)
    views = _weight_views(text, trace, template)
    sources = list({(id(home), key): (home, key) for home, key in _sources(template)}.values())
    recording = Recording(name, variant.turned, text, views, sources, outputs.rebuild(), frozen)
    return recording, Sample(inputs, recorder.put_back, recorder.can_turn)


def _run(
    name: str,
    template: Template,
    request: Request,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    variant: Variant,
    *,
    watched: bool,
) -> tuple[Recorder, Sequence[Tensor], Outputs, list[str]]:
    """Run the call under a recorder."""
    strategy: Strategy = _STRATEGIES[name]
    is_cut = name == "loop"
    size = request.chunk_size
    if isinstance(size, int) and size < request.n and not is_cut:
        strategy, is_cut = in_chunks(strategy, size), True
    args, kwargs = copy_of(args, kwargs)
    call = Call(request.fn, args, kwargs, request.n, request.randomness)
    _, inputs = outline(args, kwargs)
    values = template.values()
    recorder = Recorder(variant.max_ops, turned=variant.turned)
    recorder.trace.inputs = [recorder.add(x, "input") for x in inputs]
    _add_weights(recorder, template, values)
    state = rng.get_state(rng.devices_of([*values, *inputs]))
    torch.clear_autocast_cache()  # a cast made before would look like a constant
    try:
        with ExitStack() as stack:
            if watched:
                stack.enter_context(ReadsOutside(recorder))
            stack.enter_context(recorder)
            result = strategy(template, values, call)
            frozen = write_back(recorder, template, values, result)
            if variant.turned:  # a caller may count on the strides
                result = result._replace(outputs=tree_map(_contiguous, result.outputs))
        if recorder.refusal is not None:  # forward has swallowed it
            raise recorder.refusal
        drew = not rng.is_equal(state, rng.get_state(device for device, _ in state.others))
        if is_cut and drew and request.randomness == "same":
            raise recorder.refuse('random numbers that are the "same" for members run in turn')
        outputs = Outputs(result.outputs)
        recorder.trace.outputs = [recorder.refer(t) for t in outputs.tensors]
        outputs.tensors = []
    except Exception as error:
        recorder.put_back()
        if recorder.refusal is None:
            raise
        raise _refused(locate(error, template.module), str(recorder.refusal)) from None
    finally:
        torch.clear_autocast_cache()
        rng.set_state(state)
    recorder.put_back()
    return recorder, inputs, outputs, frozen


def _add_weights(recorder: Recorder, template: Template, values: Sequence[Any]) -> None:
    """Introduce the ensemble's tensors to the recorder."""
    for slot, value in zip(template.slots, values, strict=True):
        if isinstance(value, Tensor):
            recorder.trace.weights.setdefault(recorder.add(value, "weight"), slot.name)
        else:
            for _, leaf in leaves(value):
                if isinstance(leaf, Tensor):
                    recorder.add(leaf, "weight")


def _refused(place: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"ens.capture(...): {place} can't be recorded, because it does\n\n  {what}\n\n"
        f"A replay runs the same tensor ops every time, without the Python between them. Express"
        f" it with ops of a fixed result (`torch.where`, masks), or call the ensemble itself:"
        f" ens(...)"
    )


def _sources(template: Template) -> list[Source]:
    return [(slot.source, slot.source_key) for slot in template.slots]


def _weight_views(text: Text, trace: Trace, template: Template) -> dict[str, WeightView]:
    sources = {slot.name: (slot.source, slot.source_key) for slot in reversed(template.slots)}

    def view(ref: Ref, weight: Ref) -> WeightView:
        part, whole = trace.tensor(ref), trace.tensor(weight)
        offset = int(part.storage_offset() - whole.storage_offset())
        source = sources[trace.weights[weight]]
        return WeightView(source, _layout(whole), part.shape, part.stride(), offset)

    return {name: view(ref, weight) for name, (ref, weight) in text.weights.items()}


def _contiguous(leaf: Any) -> Any:
    return leaf.contiguous() if isinstance(leaf, Tensor) else leaf


def _layout(tensor: Tensor) -> Layout:
    return Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
