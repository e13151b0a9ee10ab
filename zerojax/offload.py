"""Optimizer state in host memory, streamed through the device in buckets.

A step whose transformation leaves its work leaf by leaf (`fused.Work`) is several programs, dispatched from Python
without waiting: first what comes before any leaf, the gradients for one; then one for each bucket, which updates it in
place and copies the last one out. Buckets come in by transfers of their own, beside the programs: a program's own
copies go in one direction at a time, 55 GB/s of an H200's PCIe link, whatever streams they are on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from zerojax import host, layout, meshes, selection
from zerojax.buckets import Bucket, Piece, Program, Row
from zerojax.fused import Work, prepare_link
from zerojax.host import Absent, Pieces, Rest
from zerojax.zero import ZeroTransformation, once

PyTree = Any


class Streamed:
    """The step of a transformation whose state the plan keeps in host memory.

    Attributes:
      specs: `PartitionSpec`s of what `begin` returns, a prefix.
    """

    def __init__(self, tx: ZeroTransformation) -> None:
        assert tx.plan.offload is not None
        self.tx, self.plan, self._offload = tx, tx.plan, tx.plan.offload
        self._rests: list[Rest] = jax.tree.leaves(tx.rests)
        self._treedef: Any = jax.tree.structure(tx.rests)
        self._programs: dict[Any, Program] = {}
        self._work: Work | None = None
        self.specs = (self.plan.treedef.flatten_up_to(self.plan.update_specs), PartitionSpec())

    def small(self, opt_state: PyTree) -> list[jax.Array]:
        """The arrays of a state that belong to no param, on the device: counts, what the links of a chain keep."""
        arrays = zip(self._treedef.flatten_up_to(opt_state), self._rests, strict=True)
        return [host.in_use(x, rest) for x, rest in arrays if rest.param is None]

    def begin(self, grads: PyTree, small: list[jax.Array], **options: Any) -> tuple[list[Any], Any]:
        """What comes before the first bucket, by gradients and `small` alone; inside a jit, in `meshes.on_mesh`.

        Raises:
          Exception: where the transformation wants more than those.
        """
        plan, some = self.plan, iter(small)
        params = [Absent(i, leaf.shape, leaf.dtype) for i, leaf in enumerate(plan.leaves)]
        state = [
            next(some) if rest.param is None else Absent(len(params) + j, rest.shape, rest.dtype)
            for j, rest in enumerate(self._rests)
        ]
        work = prepare_link(
            self.tx.inner,
            meshes.constrain(grads, plan.update_specs),
            self._treedef.unflatten(state),
            plan.treedef.unflatten(params),
            plan=plan,
            **options,
        )
        self._work = dataclasses.replace(work, grads=(), scalars=None, rest=None)  # those are the trace's
        return list(work.grads), (work.scalars, work.rest)

    def walk(self, opt_state: PyTree, params: PyTree, *, consume: bool) -> Walk:
        """Brings the first buckets; call it before what comes before them is dispatched, so that both go on at once.

        Args:
          opt_state: As the plan keeps it.
          params: As the plan keeps them.
          consume: Whether the arrays of both may be freed as soon as they have been read.
        """
        return Walk(self, params, self._treedef.flatten_up_to(opt_state), consume)

    def work(self, begun: tuple[list[Any], Any]) -> Work:
        """What is to be done, of what `begin` returned."""
        assert self._work is not None
        grads, (scalars, rest) = begun
        return dataclasses.replace(self._work, grads=grads, scalars=scalars, rest=rest)

    def landed(self, opt_state: PyTree) -> PyTree:
        """A new state, its small arrays where the plan wants them, too."""
        pairs = zip(self._treedef.flatten_up_to(opt_state), self._rests, strict=True)
        put = lambda x, rest: jax.device_put(x.astype(rest.dtype), rest.sharding(self.plan.mesh))
        return self._treedef.unflatten(x if rest.param is not None else put(x, rest) for x, rest in pairs)

    def rest(self, number: int) -> Rest:
        """Of an array of the state."""
        return self._rests[number - len(self.plan.leaves)]

    @functools.cached_property
    def buckets(self) -> list[Bucket]:
        """All buckets, in the order of the walk; what does not move comes first, at once."""
        assert self._work is not None
        still, large = [], []
        packed: list[list[Piece]] = []
        room = 0
        for i in range(len(self.plan.leaves)):
            row, arrays, size = self._row(self._work, i)
            pieces = [Piece(i, row, arrays, at) for at in host.places(row.grid)]
            if not size:
                still += pieces
            elif len(pieces) > 1:
                large += [[piece] for piece in pieces]
            else:
                if size > room:
                    packed.append([])
                    room = self._offload.filled_bytes
                packed[-1] += pieces
                room -= size
        return [Bucket(pieces, self.plan) for pieces in [*([still] if still else []), *packed, *large]]

    def program(self, work: Work, b: int) -> Program:
        """Of the b-th bucket."""
        assert work.rule is not None
        leaving = self.buckets[b - 1].moved_specs if b else ()
        key = (work.rule, work.implementation, self.buckets[b].rows, leaving)
        return self._programs.setdefault(key, Program(self.plan, *key))

    @property
    def largest_piece(self) -> int:
        """Bytes of the largest piece that comes to each device."""
        assert self._work is not None
        rows = [self._row(self._work, i) for i in range(len(self.plan.leaves))]
        return max(math.ceil(size / math.prod(row.grid)) for row, _, size in rows)

    def _row(self, work: Work, i: int) -> tuple[Row, tuple[int, ...], int]:
        """What programs know of a leaf, its arrays' numbers, and its bytes that come to each device."""
        leaf, spec = self.plan.leaves[i], self.plan.treedef.flatten_up_to(self.plan.update_specs)[i]
        param: Rest = self.plan.treedef.flatten_up_to(self.plan.param_rests)[i]
        slots, stored = jax.tree.flatten((work.params[i], work.mu[i], work.nu[i]))
        arrays = tuple(x.number for x in slots)
        rests = [None if n < len(self.plan.leaves) else self.rest(n) for n in arrays]
        homes = tuple(
            "host" if rest is None and leaf.on_host else "pieces" if rest is not None and rest.on_host else "device"
            for rest in rests
        )
        held = [rest for rest in rests if rest is not None and rest.on_host]
        if held:
            grid = max((rest.grid for rest in held), key=math.prod)
        elif leaf.on_host and self.tx.unit == "element":
            grid = selection.grid_for(
                leaf.shape, layout.cuts(self.plan.mesh, leaf.shape, spec), param.size, self._offload
            )
        else:
            grid = (1,) * len(leaf.shape)
        specs = tuple(spec if rest is None else rest.spec for rest in rests)
        row = Row(leaf.shape, grid, spec, work.decay[i], stored, homes, specs)
        size = sum(rest.size for rest in held) + param.size * leaf.on_host
        return row, arrays, size


class Walk:
    """One walk through all buckets."""

    def __init__(self, streamed: Streamed, params: PyTree, state: list[Any], consume: bool) -> None:
        self._streamed, self._plan, self._consume = streamed, streamed.plan, consume
        self._arrays = [*self._plan.treedef.flatten_up_to(params), *state]
        self._new: dict[int, list[Any]] = {}  # pieces that are back in host memory, by array
        self._read: dict[int, list[Any]] = {}  # old pieces that may be freed, by bucket
        self._coming = [self._bring(bucket) for bucket in streamed.buckets[:2]]

    def finish(self, begun: tuple[list[Any], Any]) -> tuple[PyTree, PyTree]:
        """Updates all buckets; new `(params, opt_state)`, by what `Streamed.begin` returned."""
        work, plan = self._streamed.work(begun), self._plan
        updated = plan.treedef.flatten_up_to(meshes.named(plan.mesh, plan.update_specs))
        here = [i for i, leaf in enumerate(plan.leaves) if not leaf.on_host]
        working = jax.device_put([self._arrays[i] for i in here], [updated[i] for i in here])
        for i, x in zip(here, working, strict=True):
            if self._consume:
                _free_unless_shared(self._arrays[i], x)
            self._arrays[i] = x
        if not self._consume:  # programs update in place what does not move
            buckets = self._streamed.buckets
            for n in {n for bucket in buckets for numbers in (*bucket.staying, *bucket.held) for n in numbers}:
                self._arrays[n] = host.copied(self._arrays[n], self._arrays[n].sharding)
        self._run(work)
        new = [[jax.tree.map(self._at_rest, x) for x in column] for column in (work.params, work.mu, work.nu)]
        params, opt_state = work.finish(work.rest, new)
        return jax.device_put(params, plan.params), self._streamed.landed(opt_state)

    def _run(self, work: Work) -> None:
        buckets = self._streamed.buckets
        leaving: list[jax.Array] = []
        last: list[jax.Array] = []
        left: list[jax.Array] = []
        for b, bucket in enumerate(buckets):
            # Memory is taken by the call, however far Python is ahead of the device: so the program before the last
            # has to be done. `host.LIVE` buckets are on the device then.
            last_but_one, last = last, left
            jax.block_until_ready(last_but_one[:1])
            if b >= 2:
                self._free(buckets[b - 2])
            if 1 <= b < len(buckets) - 1:
                self._coming.append(self._bring(buckets[b + 1]))
            kept, moved, held, left = self._streamed.program(work, b).run(
                [[self._arrays[n] for n in numbers] for numbers in bucket.staying],
                _like(bucket.moving, self._coming.pop(0)),
                [[self._arrays[n] for n in numbers] for numbers in bucket.held],
                [work.grads[i] for i in bucket.leaves],
                work.scalars,
                bucket.numbers,
                bucket.at,
                leaving,
            )
            for numbers, row in zip([*bucket.staying, *bucket.held], [*kept, *held], strict=True):
                for n, x in zip(numbers, row, strict=True):
                    self._arrays[n] = x
            if b:
                self._keep(buckets[b - 1], left)
            leaving = [x for row in moved for x in row]
        out = [NamedSharding(self._plan.mesh, spec, memory_kind=host.HOST) for spec in buckets[-1].moved_specs]
        self._keep(buckets[-1], jax.device_put(leaving, out) if leaving else [])
        for bucket in buckets[-2:]:
            self._free(bucket)

    def _at_rest(self, slot: Absent) -> Any:
        """The new array of a slot, as the plan keeps it."""
        parts = self._new.get(slot.number)
        if parts is None:
            return self._arrays[slot.number]
        return parts[0] if len(parts) == 1 else Pieces(tuple(parts), self._streamed.rest(slot.number).grid)

    def _bring(self, bucket: Bucket) -> list[jax.Array]:
        """A bucket's pieces, on their way to the device."""
        part = lambda x, k: x.parts[k] if isinstance(x, Pieces) else x
        pieces = [part(self._arrays[n], k) for row in bucket.moving for n, k in row]
        if not pieces:
            return []
        if self._consume:
            self._read[id(bucket)] = pieces
        return jax.device_put(pieces, bucket.shardings)

    def _free(self, bucket: Bucket) -> None:
        """Frees a bucket's old pieces, which have been read: earlier, the device's next program would wait for that."""
        for x in self._read.pop(id(bucket), []):
            x.delete()

    def _keep(self, bucket: Bucket, pieces: list[jax.Array]) -> None:
        """Takes a bucket's new pieces, back on the host."""
        for (n, _), x in zip((place for row in bucket.moving for place in row), pieces, strict=True):
            self._new.setdefault(n, []).append(x)


def _like(rows: Sequence[Sequence[Any]], flat: Sequence[Any]) -> list[list[Any]]:
    """Values, in lists as long as those of `rows`."""
    values = iter(flat)
    return [[next(values) for _ in row] for row in rows]


def _free_unless_shared(old: jax.Array, new: jax.Array) -> None:
    """Frees an array of which another layout has been made; an equal layout is the same memory."""
    if not old.sharding.is_equivalent_to(new.sharding, old.ndim):
        old.delete()


@once
def streamed(tx: ZeroTransformation) -> Streamed | None:
    """The streamed step of a transformation, or None where there is nothing to stream.

    Warns where there is, but the transformation cannot be taken leaf by leaf: then all is moved at once.
    """
    if not any(rest.on_host for rest in jax.tree.leaves((tx.rests, tx.plan.param_rests))):
        return None
    why = "it is none of zerojax's optimizers, or wrapped in what hides one, optax.chain for instance"
    if tx.unit is not None:
        new = Streamed(tx)
        small = [jax.ShapeDtypeStruct(rest.shape, rest.dtype) for rest in new._rests if rest.param is None]
        begin = lambda grads, small: new.begin(grads, small, value=jnp.float32(0))
        try:
            jax.eval_shape(meshes.on_mesh(tx.plan.mesh, begin, new.specs), tx.plan.shapes, small)
            return new
        except (TypeError, ValueError, AttributeError) as e:
            why = f"a link before its optimizer wants params, or keeps arrays like theirs ({type(e).__name__}: {e})"
    warnings.warn(
        f"what is in host memory is moved to the device as a whole, after the gradients, not in buckets: {why}. "
        "Streamed are zerojax.fused_adam, fused_adamw and fused_lamb, in zerojax.chain behind links that scale all "
        "gradients.",
        stacklevel=4,
    )
    return None
