"""`Ensemble`: the module that owns the stacked tensors of N models."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor, nn

from unisono.block import Block
from unisono.checkpoint import ensemble_file
from unisono.checkpoint.gathering import gather
from unisono.checkpoint.member_file import Select, save_member
from unisono.combination import Combination
from unisono.describe import list_facts
from unisono.differences import check_in_place, check_members
from unisono.engine.axis import Randomness
from unisono.engine.capture import Capture
from unisono.engine.inputs import check_inputs
from unisono.engine.parts import Call, call_member
from unisono.engine.planning.plan import Plan, StrategyName
from unisono.engine.planning.planner import Options, Planner
from unisono.engine.pool import Pool
from unisono.engine.rng import devices_of, drawing_apart
from unisono.errors import EnsembleWarning
from unisono.module_tree import named_tensors
from unisono.options import (
    check_build,
    check_copies,
    check_index,
    check_indices,
    check_make_model,
    check_member_count,
    check_members_to_load,
    check_model,
    check_options,
    check_paths,
    resolve_shared,
    share_values,
)
from unisono.refusals import refuse_no_list
from unisono.rows import copy_rows, stacked_tensors
from unisono.stacking import MemberTree, make_template, select, stack, unstack


class Follower(Protocol):
    """What holds one row for each member beside the ensemble, such as the state of an optimizer."""

    def copy_members(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy the rows of members ``src`` over those of members ``dst``."""


class Ensemble(nn.Module):
    """N models of one architecture as one module: ``ens(x)[i] == models[i](x)``.

    The ensemble copies the models' tensors; training it leaves ``models`` untouched. It is an
    ordinary module whose parameters carry the member axis in front: ``ens.members.fc1.weight``
    has shape (N, out, in) where a member's has (out, in).

    Args:
        models: The members, at least one. They may differ only in the values of their
            parameters and buffers.
        shared: Dotted names, or glob patterns such as ``"backbone.*"``, of parameters and
            buffers that are the same in all models and are to stay so: they are stored once,
            without a member axis, and what depends on them alone is computed once.
        strategy: How a call runs. ``"fused"`` runs all members at once, ``"vmap"`` does it by
            PyTorch's own recipe, ``"loop"`` runs them one after another. ``"auto"`` times these
            ways on the first call of each kind and keeps the fastest; what can't run for all
            members at once runs one by one, with one `EnsembleWarning`. See `explain`.
        randomness: Whether dropout and the like draw ``"different"`` numbers for each member,
            the ``"same"``, or raise an ``"error"``.
        chunk_size: How many members run at once; None for all. Smaller chunks take less memory;
            ``"auto"`` takes the largest that keeps a call within ``memory_limit``.
        memory_limit: For ``chunk_size="auto"``: the bytes that a call may allocate, beside its
            inputs and the ensemble itself; None for half of what is free.

    Shape:
        - input: (*) shared by all members, or (N, *) where marked with `per_member`
        - output: (N, *), for every tensor the models return

    Raises:
        IncompatibleMembersError: If the models differ in more than the values of their tensors.
        UnsupportedModelError: If they are of a kind that can't be stacked.

    Example:
        >>> ens = Ensemble([nn.Linear(3, 2) for _ in range(5)])
        >>> x = torch.randn(8, 3)
        >>> ens(x).shape
        torch.Size([5, 8, 2])
        >>> torch.testing.assert_close(ens(x)[4], ens[4](x))

    Reference: https://docs.pytorch.org/tutorials/intermediate/ensembling.html
    """

    members: MemberTree
    combination: Combination
    block: Block | None  # the place among other ranks, of `unisono.distributed`
    _followers: weakref.WeakSet[Follower]

    def __init__(
        self,
        models: Sequence[nn.Module],
        *,
        shared: str | Sequence[str] = (),
        strategy: StrategyName = "auto",
        randomness: Randomness = "different",
        chunk_size: int | Literal["auto"] | None = None,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__()
        check_options(strategy, randomness, chunk_size, memory_limit)
        refuse_no_list(models)
        models = list(models)
        names = resolve_shared(models[0], shared) if models else frozenset()
        check_members(models, shared=names)
        self._assemble(make_template(models[0]), stack(models, shared=names), names, len(models))
        self.strategy = strategy
        self.randomness = randomness
        self.chunk_size = chunk_size
        self.memory_limit = memory_limit

    @classmethod
    def build(
        cls,
        make_model: Callable[[], nn.Module],
        n: int,
        *,
        seed: int = 0,
        shared: str | Sequence[str] = (),
        strategy: StrategyName = "auto",
        randomness: Randomness = "different",
        chunk_size: int | Literal["auto"] | None = None,
        memory_limit: int | None = None,
    ) -> Ensemble:
        """Build an ensemble of n new models with weights of their own.

        Member i is ``make_model()`` under ``torch.manual_seed(seed + i)``, whatever n is; the
        global random state is afterwards as before.

        Args:
            make_model: Returns a new model each time it is called.
            n: The number of members.
            seed: Seed of member 0.
            shared: As for `Ensemble`; all members get the values of member 0.
            strategy: As for `Ensemble`.
            randomness: As for `Ensemble`.
            chunk_size: As for `Ensemble`.
            memory_limit: As for `Ensemble`.

        Returns:
            The ensemble.

        Raises:
            ValueError: If n isn't positive.
            TypeError: If ``make_model`` isn't a function, or n or seed no integer.

        Example:
            >>> ens = Ensemble.build(lambda: nn.Linear(3, 2), 5, seed=0)
            >>> len(ens)
            5
        """
        check_build(make_model, n, seed)
        models = []
        with _own_randomness():
            for i in range(n):
                torch.manual_seed(seed + i)
                models.append(make_model())
        share_values(models, shared)
        return cls(
            models,
            shared=shared,
            strategy=strategy,
            randomness=randomness,
            chunk_size=chunk_size,
            memory_limit=memory_limit,
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        make_model: Callable[[], nn.Module],
        *,
        members: Sequence[int] | None = None,
        device: str | torch.device | None = None,
    ) -> Ensemble:
        """Load an ensemble, or some of its members, from a file that `save` wrote.

        ``Ensemble.load(path, make_model)`` equals the saved ensemble bitwise: parameters, all
        buffers, what is tied, shared, frozen, and in eval mode, ``combination`` and the options.
        Nothing in the file is run. Every tensor is compared with its checksum.

        Args:
            path: The file, or a folder with ``model.safetensors``.
            make_model: Returns a model of the members' architecture; it is called once, and its
                values aren't used, so it may be made under ``torch.device("meta")``.
            members: Which members to load, in this order; None for all. Only their bytes are read.
            device: Where the tensors are to lie; None for where the model's lie.

        Returns:
            The ensemble.

        Raises:
            OSError: If the file can't be read.
            CheckpointError: If it is something else, damaged, or of another architecture.
            IndexError: If there is no such member.

        Example:
            >>> import tempfile
            >>> path = tempfile.mkdtemp() + "/ens.safetensors"
            >>> make_model = lambda: nn.Linear(3, 2)
            >>> Ensemble.build(make_model, 5).save(path)
            >>> (
            ...     len(Ensemble.load(path, make_model)),
            ...     len(Ensemble.load(path, make_model, members=[0, 4])),
            ... )
            (5, 2)
        """
        model = _one(make_model, "Ensemble.load")
        chosen = check_members_to_load(members)
        place = None if device is None else torch.device(device)
        with torch.inference_mode(False):  # or the tensors could never be trained
            stored = ensemble_file.load(path, model, members=chosen, device=place)
        if stored.remarks:
            warnings.warn(
                f"Ensemble.load: {os.fspath(path)} was saved from a model that differs in"
                f" attributes of classes of your own; the values of make_model() are taken:\n"
                f"{list_facts(stored.remarks)}",
                EnsembleWarning,
                stacklevel=2,
            )
        ensemble = cls._of(model, stored.members, stored.shared, stored.count, stored.options)
        own = next(iter(named_tensors(stored.members).values()), torch.empty(0))
        ensemble.combination.make_room(stored.combination, "", own.device)
        ensemble.combination.load_state_dict(stored.combination)
        return ensemble

    @classmethod
    def from_checkpoints(
        cls,
        make_model: Callable[[], nn.Module],
        paths: Sequence[str | os.PathLike[str]],
        *,
        select: Select | None = None,
        device: str | torch.device | None = None,
        shared: str | Sequence[str] = (),
        strategy: StrategyName = "auto",
        randomness: Randomness = "different",
        chunk_size: int | Literal["auto"] | None = None,
        memory_limit: int | None = None,
    ) -> Ensemble:
        """Make an ensemble of N files that hold one trained model each.

        Member i has the values of ``paths[i]``. The files are read one after another into the
        stacked tensors, so at no time more than one of them is in memory beside these.

        Args:
            make_model: Returns a model of their architecture; it is called once.
            paths: ``.safetensors``; ``.pt``, ``.pth``, ``.bin`` or ``.ckpt``, read by
                ``torch.load(weights_only=True)``, which runs no code; or folders as the Hugging
                Face Hub has them, in one piece or in shards with an index.
            select: Picks the state dict out of what a file holds, as in
                ``lambda found: found["state_dict"]``.
            device: Where the tensors are to lie; None for where the model's lie.
            shared: As for `Ensemble`; these have to be equal in all files.
            strategy: As for `Ensemble`.
            randomness: As for `Ensemble`.
            chunk_size: As for `Ensemble`.
            memory_limit: As for `Ensemble`.

        Returns:
            The ensemble, in the mode that ``make_model`` makes: call ``eval()`` for predictions.

        Raises:
            OSError: If a file can't be read.
            CheckpointError: If any file doesn't fit; its ``problems`` name all files and tensors.

        Example:
            >>> import tempfile
            >>> paths = [f"{tempfile.mkdtemp()}/{i}.pt" for i in range(5)]
            >>> for path in paths:
            ...     torch.save(nn.Linear(3, 2).state_dict(), path)
            >>> len(Ensemble.from_checkpoints(lambda: nn.Linear(3, 2), paths))
            5
        """
        check_options(strategy, randomness, chunk_size, memory_limit)
        check_paths(paths)
        model = _one(make_model, "Ensemble.from_checkpoints")
        names = resolve_shared(model, shared)
        place = None if device is None else torch.device(device)
        with torch.inference_mode(False):
            members = gather(model, paths, select=select, shared=names, device=place)
        options = {"strategy": strategy, "randomness": randomness, "chunk_size": chunk_size}
        ensemble = cls._of(model, members, names, len(paths), options)
        ensemble.memory_limit = memory_limit
        return ensemble

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ensemble to one safetensors file, as a whole or not at all.

        A crash or a full disk leaves a file that was there before as it was. The stacked tensors
        have the names of ``state_dict()``, so other programs can read them; the classes of the
        members aren't in the file, `load` takes them from ``make_model``.

        Args:
            path: The file, by custom ``NAME.safetensors``.

        Raises:
            OSError: If the disk refuses.
            TypeError: If a tensor is of a kind that can't be stored.
            ValueError: If ``combination`` holds values that can't have been set, such as NaN.

        Example:
            >>> import tempfile
            >>> from safetensors.torch import load_file
            >>> path = tempfile.mkdtemp() + "/ens.safetensors"
            >>> Ensemble.build(lambda: nn.Linear(3, 2), 5).save(path)
            >>> {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}
            {'members.bias': (5, 2), 'members.weight': (5, 2, 3)}
        """
        self._tell_what_is_left_out()
        ensemble_file.save(
            path,
            self._planner.pool.module,
            self.members,
            shared=self.shared,
            count=self._n,
            combination=dict(self.combination.named_buffers()),
            options={
                "strategy": self.strategy,
                "randomness": self.randomness,
                "chunk_size": self.chunk_size,
            },
        )

    def save_member(self, index: int, path: str | os.PathLike[str]) -> None:
        """Write one member's state dict to a file that plain PyTorch loads.

        Args:
            index: The member.
            path: ``NAME.safetensors``, or ``.pt`` or ``.pth`` for `torch.save`.

        Raises:
            IndexError: If there is no such member.
            ValueError: If the name ends otherwise.
            OSError: If the disk refuses; a file that was there before is as it was.

        Example:
            >>> import tempfile
            >>> path = tempfile.mkdtemp() + "/best.pt"
            >>> ens = Ensemble.build(lambda: nn.Linear(3, 2), 5)
            >>> ens.save_member(3, path)
            >>> nn.Linear(3, 2).load_state_dict(torch.load(path))
            <All keys matched successfully>
        """
        save_member(path, self._member(check_index(index, self._n), copy=True))

    def forward(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call every member: ``ens(x)[i] == ens[i](x)``.

        Args:
            *args: What the members' ``forward`` takes. Every member sees the whole of it, and
                its own part of what is marked with `per_member`.
            **kwargs: Likewise.

        Returns:
            What a member returns, every tensor in it with the member axis in front. Leaves that
            aren't tensors are passed through.

        Raises:
            ValueError: If a marked tensor has no member axis of length N.
        """
        return self.run(call_member, *args, **kwargs)

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run ``fn(member, *args, **kwargs)`` for all members at once.

        The general form of the call: ``ens(x) == ens.run(lambda member, x: member(x), x)``. In
        ``fn`` a member behaves as a plain module; it may be called several times, or not.

        Args:
            fn: A function of a member and of the inputs.
            *args: Its inputs, with `per_member` marks as for a call.
            **kwargs: Likewise.

        Returns:
            What ``fn`` returns, every tensor in it with the member axis in front.

        Raises:
            ValueError: If a marked tensor has no member axis of length N.
            TypeError: If ``fn`` isn't a function.

        Example:
            >>> ens = Ensemble([nn.Linear(3, 3) for _ in range(5)])
            >>> x = torch.randn(8, 3)
            >>> loss = ens.run(lambda member, x: (member(member(x)) - x).square().mean(), x)
            >>> loss.shape
            torch.Size([5])
        """
        call = self._call(fn, args, kwargs)
        with self._random_numbers():
            return self._planner.run(call, self._options())

    def explain(self, /, *args: Any, **kwargs: Any) -> Plan:
        """Tell how a call with these arguments runs, and why.

        Nothing of it stays: parameters, buffers and the random state are afterwards as before.
        With ``strategy="auto"`` a call of a new kind is timed, as a call would do it.

        Args:
            *args: As for a call.
            **kwargs: As for a call.

        Returns:
            The plan of the call with strategy, chunk size, reason, the candidates' times in
            seconds, and for each op of the forward where it stands, how it ran, and its share of
            the time. It prints as a table.

        Raises:
            ValueError: If a marked tensor has no member axis of length N.

        Example:
            >>> ens = Ensemble([nn.Linear(3, 2) for _ in range(5)], strategy="fused")
            >>> plan = ens.explain(torch.randn(8, 3))
            >>> plan.strategy, [(op.op, op.how, op.rule) for op in plan.ops]
            ('fused', [('linear', 'rule', 'linear')])
        """
        call = self._call(call_member, args, kwargs)
        return self._planner.explain(call, self._options())

    def capture(self, /, *args: Any, **kwargs: Any) -> Capture:
        """Record one call without gradients, to be replayed without Python overhead.

        ``capture(x) == ens(x)`` for every ``x`` of the recorded shape and dtype; other shapes
        are recorded when they come. The weights stay live: a step of an optimizer shows in the
        next replay. What ``forward`` does in Python is frozen.

        Args:
            *args: Example inputs, with `per_member` marks as for a call.
            **kwargs: Likewise.

        Returns:
            A function that takes what the ensemble takes. Its ``code`` is the program as Python
            text; ``on_change`` and ``max_programs`` say what happens at other shapes.

        Raises:
            UnsupportedModelError: If what ``forward`` does depends on the elements of a tensor.

        Example:
            >>> ens = Ensemble([nn.Linear(3, 2) for _ in range(5)])
            >>> predict = ens.capture(torch.randn(8, 3))
            >>> predict(torch.randn(8, 3)).shape
            torch.Size([5, 8, 2])
        """
        call = self._call(call_member, args, kwargs)
        chunk_size = self._planner.prepare(call, self._options())
        return Capture(self._planner.pool, call, self.strategy, chunk_size)

    def unstack(self) -> list[nn.Module]:
        """N independent ordinary modules, of the models' class, with copies of the tensors.

        Returns:
            The members, in order; ``Ensemble(ens.unstack())`` equals ``ens`` bitwise.

        Example:
            >>> models = Ensemble([nn.Linear(3, 2) for _ in range(5)]).unstack()
            >>> models[4]
            Linear(in_features=3, out_features=2, bias=True)
        """
        return [self._member(i, copy=True) for i in range(self._n)]

    @property
    def shared(self) -> frozenset[str]:
        """Names, in ``ens.members``, of the tensors kept once for all members."""
        return self._planner.pool.shared

    def copy_(self, src: int | Sequence[int], dst: int | Sequence[int]) -> None:
        """Copy members over others, in place: ``ens[dst]`` then equals ``ens[src]``.

        The exploit step of population-based training (https://arxiv.org/abs/1711.09846). The
        state that optimizers of `unisono.optim` keep for these members is copied too, as are
        their weights and temperatures in ``ens.combination``; their hyperparameters are not. All
        members ``src`` are read before any is written.

        Args:
            src: The member to copy, or several.
            dst: The member to be written over, or as many.

        Raises:
            IndexError: If there is no such member.
            ValueError: If there aren't as many, or one is to be written over twice.

        Example:
            >>> ens = Ensemble([nn.Linear(3, 2) for _ in range(5)])
            >>> ens.copy_(4, 0)  # member 0 was the worst, member 4 the best
            >>> bool((ens.members.weight[0] == ens.members.weight[4]).all())
            True
        """
        of, to = check_copies(src, dst, self._n)
        tensors = self.stacked_tensors()
        copy_rows(tensors, to, tensors, of)
        self.combination.copy_members(of, to)
        for follower in list(self._followers):
            follower.copy_members(of, to)

    def follow(self, follower: Follower) -> None:
        """Tell ``follower`` of each `copy_` from now on; it isn't kept alive for that.

        Args:
            follower: Its ``copy_members(src, dst)`` is called with lists of members.
        """
        self._followers.add(follower)

    def stacked_tensors(self) -> dict[str, Tensor]:
        """All tensors with a member axis, by their names in ``ens.members``, tied ones once.

        Returns:
            Parameters, buffers, and what ``forward`` keeps in attributes, not copied.

        Shape:
            - every tensor: (N, *)
        """
        pool = self._planner.pool
        return stacked_tensors(self.members, shared=pool.shared, attributes=pool.attributes)

    def __len__(self) -> int:
        """The number of members."""
        return self._n

    def __iter__(self) -> Iterator[nn.Module]:
        """The members in order, each as ``ens[i]``."""
        return (self._member(i, copy=False) for i in range(self._n))

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Ensemble: ...
    def __getitem__(self, index: Any) -> nn.Module | Ensemble:
        """Member i as an ordinary module, or some of the members as an ensemble.

        Args:
            index: An integer gives member i on the ensemble's own storage: a write to one is
                seen by the other. A slice, a list of integers, or a one-dimensional tensor of
                integers or booleans gives an ensemble with copies of those members.

        Returns:
            The module or the sub-ensemble.

        Raises:
            IndexError: If there is no such member, or none is chosen.
            TypeError: If the index is of another kind.
        """
        if isinstance(index, slice):
            return self._sub_ensemble(list(range(self._n))[index])
        if isinstance(index, Sequence) or getattr(index, "ndim", 0) > 0:
            return self._sub_ensemble(check_indices(index, self._n))
        return self._member(check_index(index, self._n), copy=False)

    def train(self, mode: bool = True) -> Ensemble:
        """Set train or eval mode, as the members' own ``train`` method does it."""
        super().train(mode)
        template = self._planner.pool.module
        template.train(mode)  # a model that keeps its batch norm frozen overrides train
        trees = dict(self.members.named_modules())
        for path, module in template.named_modules():
            trees[path].training = module.training
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> Ensemble:
        """Apply ``fn`` to every module of each member: ``ens[i].apply(fn)`` for every i.

        So weights are initialised as in a solo run, ``fn`` sees modules of the members' own
        classes, and each member draws numbers of its own.

        Args:
            fn: A function that writes to the tensors of a module, in place.

        Returns:
            This ensemble.

        Raises:
            EnsembleError: If ``fn`` changes anything else, which the members couldn't keep.

        Example:
            >>> def init(module: nn.Module) -> None:
            ...     if isinstance(module, nn.Linear):
            ...         nn.init.orthogonal_(module.weight)
            >>> ens = Ensemble([nn.Linear(3, 3) for _ in range(5)]).apply(init)
            >>> torch.testing.assert_close(ens[4].weight @ ens[4].weight.T, torch.eye(3))
        """
        for i in range(self._n):
            before, member = self._member(i, copy=False), self._member(i, copy=False)
            member.apply(fn)
            check_in_place(before, member, i)
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state as `torch.nn.Module.load_state_dict` does.

        Raises:
            CheckpointError: If the state is that of another number of members; nothing is loaded.
        """
        check_member_count(self.state_dict(), state_dict, self._n)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def __repr__(self) -> str:
        """The number of members, the options, and the member's own tree."""
        total = sum(p.numel() for p in self.parameters())
        names = self._planner.pool.shared
        shared = sum(p.numel() for name, p in self.members.named_parameters() if name in names)
        each = (total - shared) // self._n
        facts = [f"{self._n} members of {each:,} parameters"]
        if shared:
            facts.append(f"{shared:,} shared by all")
        facts += [f"strategy={self.strategy!r}", f"randomness={self.randomness!r}"]
        if self.chunk_size is not None:
            facts.append(f"chunk_size={self.chunk_size}")
        member = repr(self._planner.pool.module).replace("\n", "\n  ")
        return f"Ensemble(\n  {', '.join(facts)}\n  (member): {member}\n)"

    def _assemble(
        self, template: nn.Module, members: MemberTree, shared: frozenset[str], n: int
    ) -> None:
        self._n = n
        self.block = None
        self.members = members
        self.combination = Combination(n).train(members.training)
        self.training = members.training
        self._planner = Planner(Pool(template, members, shared))
        self._followers = weakref.WeakSet()

    @classmethod
    def _of(
        cls,
        model: nn.Module,
        members: MemberTree,
        shared: frozenset[str],
        n: int,
        options: Mapping[str, Any],
    ) -> Ensemble:
        """The ensemble of these stacked tensors, without a limit of memory."""
        ensemble = cls.__new__(cls)
        nn.Module.__init__(ensemble)
        ensemble._assemble(make_template(model), members, shared, n)
        ensemble.strategy = options["strategy"]
        ensemble.randomness = options["randomness"]
        ensemble.chunk_size = options["chunk_size"]
        ensemble.memory_limit = None
        return ensemble

    def _tell_what_is_left_out(self) -> None:
        registered = named_tensors(self.members)
        kept = sorted(self.stacked_tensors().keys() - registered.keys())
        extra = [
            f"{path}.get_extra_state()" if path else "get_extra_state()"
            for path, module in self._planner.pool.module.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        ]
        for names, what in ((kept, "forward keeps in plain attributes"), (extra, "modules add")):
            if names:
                warnings.warn(
                    f"ens.save: the file leaves out what {what}"
                    f" ({', '.join(f'`{name}`' for name in names)}); make it a buffer",
                    EnsembleWarning,
                    stacklevel=3,
                )

    def __getstate__(self) -> dict[str, Any]:
        """All but the followers, which are tied to this very ensemble."""
        return {name: value for name, value in vars(self).items() if name != "_followers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._followers = weakref.WeakSet()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Here and not in `load_state_dict`, which isn't called for an ensemble inside a module.
        own = named_tensors(self.members)
        if any(f"{prefix}members.{name}" in state_dict for name in own):
            device = next(iter(own.values())).device
            self.combination.make_room(state_dict, f"{prefix}combination.", device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        check_options(self.strategy, self.randomness, self.chunk_size, self.memory_limit)
        if not callable(fn):
            raise TypeError(f"ens.run: fn is a function fn(member, ...); got {fn!r}")
        check_inputs("ens(...)", self._n, args, kwargs)
        return Call(fn, args, kwargs, self._n, self.randomness)

    def _random_numbers(self) -> AbstractContextManager[None]:
        """Members on other ranks draw other numbers, as members on this one do."""
        block = self.block
        if block is None or block.num_places == 1 or self.randomness != "different":
            return nullcontext()
        if torch.compiler.is_compiling():
            return nullcontext()
        first = next(self.members.parameters(), None)
        return drawing_apart(block.place, devices_of([first]))

    def _options(self) -> Options:
        return Options(self.strategy, self.chunk_size, self.memory_limit)

    def _member(self, index: int, *, copy: bool) -> nn.Module:
        pool = self._planner.pool
        return unstack(
            pool.module,
            self.members,
            index,
            shared=pool.shared,
            attributes=pool.attributes,
            copy=copy,
        )

    def _sub_ensemble(self, indices: list[int]) -> Ensemble:
        if not indices:
            raise IndexError("ens[...]: an ensemble has at least one member; none was chosen")
        pool = self._planner.pool
        members = select(self.members, indices, shared=pool.shared, attributes=pool.attributes)
        ensemble = Ensemble._of(pool.module, members, pool.shared, len(indices), vars(self))
        ensemble.combination = self.combination.select(indices)
        ensemble._planner.pool.attributes = pool.attributes
        ensemble.memory_limit = self.memory_limit
        return ensemble


def _one(make_model: Callable[[], nn.Module], call: str) -> nn.Module:
    """A model, made without a trace in the global random state."""
    check_make_model(make_model, call)
    with _own_randomness(), torch.inference_mode(False):
        return check_model(make_model(), call)


def _own_randomness() -> AbstractContextManager[None]:
    return torch.random.fork_rng(list(range(torch.cuda.device_count())))
