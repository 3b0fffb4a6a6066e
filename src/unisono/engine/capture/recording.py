"""Record a call: the tensor ops below functorch, as they reach the device.

The member axis is a layer of dispatch above, so what arrives here is the program on stacked
tensors that the rules have made of the member's ``forward``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unisono.engine.axis import TorchDispatchMode, written_arguments
from unisono.engine.capture.trace import Op, Origin, Ref, Trace, is_random, map_args, refs

# Ops that take a tensor for its shape, dtype and device only, which are guarded.
_LIKE: Final = frozenset(
    f"{prefix}{name}{suffix}"
    for prefix, suffix in (("new_", ""), ("", "_like"))
    for name in ("empty", "zeros", "ones", "full")
) | {"new_empty_strided"}
# Ops whose answer is about the tensor itself, not about its elements.
_ABOUT_LAYOUT: Final = frozenset({"is_same_size", "is_pinned", "_has_same_storage_numel"})
# Ops of which only what they keep for backward has a shape that depends on elements.
_ASIDE: Final = frozenset({"_ctc_loss"})
_MOVES_STORAGE: Final = frozenset({"set_", "resize_", "resize_as_"})
_COPIES: Final = frozenset({"_to_copy", "copy", "copy_"})
_PRODUCTS: Final = (torch.ops.aten.baddbmm.default, torch.ops.aten.bmm.default)
_TURN: Final = torch.ops.aten.transpose.int
_READS: Final = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


PLAIN: Final = (Tensor, nn.Parameter)


class RefusalError(Exception):
    """The call can't be recorded; says what it does."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs ops and notes them in ``trace``.

    Values are told apart by their place in memory, because torch passes on other tensor objects
    than those it was given. Every storage that was seen is therefore kept until the recording
    ends, so that no address comes back.

    Args:
        max_ops: How many ops are recorded before it is given up.
        turned: Whether a product with a weight that is stored transposed, ``x @ w.mT``, is run
            as ``(w @ x.mT).mT``. Between small layers the turns cancel out.

    Attributes:
        can_turn: Whether there was such a product.
    """

    def __init__(self, max_ops: int | None = None, *, turned: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.can_turn = False
        self._turned = turned
        self.refusal: RefusalError | None = None
        self._max_ops = max_ops
        self._refs: dict[object, Ref] = {}
        self._storages: dict[object, tuple[int, Any]] = {}
        self._live: set[int] = set()  # storages that depend on inputs, weights or chance
        self._before: dict[int, tuple[Any, Any]] = {}  # storage -> itself, and a copy
        self._generators: dict[torch.Generator, Tensor] = {}

    def add(self, tensor: Tensor, origin: Origin) -> Ref:
        """Introduce an input or a weight."""
        ref = self._ref(tensor, origin)
        self._live.add(self.trace.values[ref].storage)
        return ref

    def refer(self, tensor: Tensor) -> Ref:
        """The number of the tensor's place."""
        return self._ref(tensor, "constant")

    def _refer_all(self, args: Any) -> Any:
        return map_args(lambda x: self.refer(x) if isinstance(x, Tensor) else x, args)

    def is_live(self, tensor: Tensor) -> bool:
        """Whether the tensor's elements may be others in the next call."""
        return self._storage(self.refer(tensor)) in self._live

    def put_back(self) -> None:
        """Undo what was written to tensors from outside, buffers above all."""
        for storage, copy in self._before.values():
            storage.copy_(copy)
        for generator, state in self._generators.items():
            generator.set_state(state)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and not kwargs and self._is_turned(args[-1]):
            self.can_turn = True
            if self._turned:
                return self._turn(func, *args)
        op = Op(func, self._refer_all(args), self._refer_all(kwargs), None, random=is_random(func))
        places = written_arguments(func, args)
        written = frozenset(
            refs([op.args[k] if k < len(op.args) else op.kwargs.get(name) for k, name in places])
        )
        # Asked before the op runs: it may write to what it reads.
        constant = not op.random and (
            op.name in _LIKE or not any(self._storage(ref) in self._live for ref in op.reads)
        )
        if not constant:
            self._check(op, args)
        if torch.Tag.inplace_view in func.tags:
            written = frozenset()  # it turns the tensor object, not what is in memory
        self._save(written, kwargs)
        known = len(self.trace.origins)
        result = func(*args, **kwargs)
        noted = self._note(result)
        if not constant:
            self._check_result(op, result)
            self._live.update(map(self._storage, written))
            self._live.update(range(known, len(self.trace.origins)))
        op = replace(op, result=noted, written=written, constant=constant)
        if torch.Tag.inplace_view in func.tags:
            op = self._as_view(op, noted)
        self.trace.ops.append(op)
        if self._max_ops is not None and len(self.trace.ops) > self._max_ops:
            raise self.refuse(f"more than {self._max_ops} ops")
        return result

    def _is_turned(self, weight: Tensor) -> bool:
        """Whether it is a weight whose transpose lies in memory row by row."""
        is_weight = self.trace.origin(self.refer(weight)) == "weight"
        return is_weight and weight.mT.is_contiguous()

    def _turn(self, func: Any, *args: Tensor) -> Tensor:
        *bias, x, weight = [self.__torch_dispatch__(_TURN, (), (arg, -2, -1)) for arg in args]
        product = self.__torch_dispatch__(func, (), (*bias, weight, x))
        turned: Tensor = self.__torch_dispatch__(_TURN, (), (product, -2, -1))
        return turned

    def refuse(self, what: str) -> RefusalError:
        """The error to raise; it is kept for the case that ``forward`` swallows it."""
        self.refusal = RefusalError(what)
        return self.refusal

    def _storage(self, ref: Ref) -> int:
        return self.trace.values[ref].storage

    def _note(self, result: Any) -> Any:
        """The result of an op with Refs for tensors, None for the rest."""
        if isinstance(result, list | tuple):
            return [self._note(part) for part in result]
        return self._ref(result, "op") if isinstance(result, Tensor) else None

    def _ref(self, tensor: Tensor, origin: Origin) -> Ref:
        try:
            storage = tensor.untyped_storage()
            address: object = (tensor.device, storage.data_ptr())
        except (NotImplementedError, RuntimeError):
            raise self.refuse(f"a tensor without elements in memory ({tensor.layout})") from None
        if tensor.device.type == "meta":
            address = id(tensor)  # it has no address; the trace keeps the object alive
        place = (
            address, tensor.storage_offset(), tensor.shape, tensor.stride(),
            tensor.dtype, tensor.is_conj(), tensor.is_neg(),
        )  # fmt: skip
        if place in self._refs:
            return self._refs[place]
        trace = self.trace
        if address not in self._storages:
            self._storages[address] = (len(trace.origins), storage)
            trace.origins.append(origin)
            known = True
        else:
            known = origin != "constant"
        number = self._storages[address][0]
        ref = self._refs[place] = trace.add(tensor.detach(), number)
        if not known and trace.origins[number] == "op":
            self._add_view(ref, number)
        return ref

    def _add_view(self, ref: Ref, storage: int) -> None:
        """Define a view that torch made without an op."""
        base = next(Ref(k) for k, v in enumerate(self.trace.values) if v.storage == storage)
        t = self.trace.tensor(ref)
        if self.trace.tensor(base).dtype != t.dtype or t.is_conj() or t.is_neg():
            raise self.refuse("a view of a tensor that no op has made")
        self.trace.ops.append(self._as_view(Op(None, (base,), {}, ref), ref))

    def _as_view(self, op: Op, ref: Ref) -> Op:
        """The op as a view of its first argument."""
        t = self.trace.tensor(ref)
        args = (op.args[0], list(t.shape), list(t.stride()), t.storage_offset())
        return replace(
            op, target=torch.ops.aten.as_strided.default, args=args, kwargs={}, result=ref
        )

    def _save(self, written: Iterable[Ref], kwargs: Mapping[str, Any]) -> None:
        """Before something from outside is written, or a generator drawn from: note its state."""
        storages = dict(self._storages.values())
        for number in {self._storage(ref) for ref in written} - self._before.keys():
            if self.trace.origins[number] != "op":
                self._before[number] = (storages[number], storages[number].clone())
        for value in kwargs.values():
            if isinstance(value, torch.Generator) and value not in self._generators:
                self._generators[value] = value.get_state()

    def _check(self, op: Op, args: Sequence[Any]) -> None:
        """Refuse what depends on the elements of a tensor, or moves it while the device waits."""
        tags = op.target.tags
        by_shape = torch.Tag.dynamic_output_shape in tags and op.name not in _ASIDE
        if op.name == "index":  # tagged, but only a mask makes the shape depend on the elements
            by_shape = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if torch.Tag.data_dependent_output in tags or by_shape:
            raise self.refuse(f"`{op.target}`: what it returns depends on the elements of a tensor")
        if op.name in _MOVES_STORAGE:
            raise self.refuse(f"`{op.target}`: it gives a tensor other memory")

    def _check_result(self, op: Op, result: Any) -> None:
        if isinstance(result, bool | int | float | complex) and op.name not in _ABOUT_LAYOUT:
            raise self.refuse(f"`{op.target}`: what it returns depends on the elements of a tensor")
        if op.name in _COPIES and isinstance(result, Tensor):
            devices = {self.trace.tensor(ref).device for ref in op.reads} | {result.device}
            if len(devices) > 1:
                names = " and ".join(sorted(map(str, devices)))
                raise self.refuse(f"`{op.target}`: it copies between {names}")


class ReadsOutside(TorchFunctionMode):
    """Notices what reads the elements of a tensor without any op.

    Args:
        recorder: Knows which tensors may hold other elements in the next call.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READS and type(args[0]) in PLAIN and self._recorder.is_live(args[0]):
            raise self._recorder.refuse(
                f"`Tensor.{func.__name__}`: what it returns depends on the elements of a tensor"
            )
        return func(*args, **(kwargs or {}))
