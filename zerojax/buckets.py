"""Buckets: which pieces of a state move together, and the programs that update them.

A program knows of its leaves what it is traced with, `Row`s; which leaves they are, and where in them a piece lies, are
arguments. So buckets of like leaves share one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from zerojax import host, meshes, shards
from zerojax.plan import Plan
from zerojax.shards import Part, Rule

HOMES = ("device", "pieces", "host")
"""Where an array of a state, or a param, is at rest: whole on the device, or in host memory, in pieces or whole."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What a program knows of a leaf, or of a piece of one, and what it does there.

    Attributes:
      shape: Of the whole param.
      grid: Of its pieces.
      spec: Of the param while it is updated.
      decay: Whether it decays.
      stored: Structure of (param, mu, nu), each in its format.
      homes: Of each array of those, one of `HOMES`.
      specs: Of each array.
    """

    shape: tuple[int, ...]
    grid: tuple[int, ...]
    spec: PartitionSpec
    decay: bool
    stored: Any
    homes: tuple[str, ...]
    specs: tuple[PartitionSpec, ...]

    def split(self, arrays: Sequence[Any]) -> tuple[list[Any], ...]:
        """Arrays, or what is said of each, by where they are: three lists, as `HOMES` has them."""
        pairs = list(zip(arrays, self.homes, strict=True))
        return tuple([x for x, home in pairs if home == wanted] for wanted in HOMES)

    def merge(self, *lists: Sequence[Any]) -> list[Any]:
        """All arrays, in order."""
        sources = {home: iter(some) for home, some in zip(HOMES, lists, strict=True)}
        return [next(sources[home]) for home in self.homes]


@dataclasses.dataclass(frozen=True)
class Program:
    """The update of one bucket; buckets of like leaves share it.

    Attributes:
      rows: Of the bucket.
      leaving: Specs of the last bucket's pieces.
    """

    plan: Plan
    rule: Rule
    implementation: str | None
    rows: tuple[Row, ...]
    leaving: tuple[PartitionSpec, ...]

    @functools.cached_property
    def run(self) -> Callable[..., Any]:
        """`run(kept, moved, held, grads, scalars, numbers, at, leaving) -> (kept, moved, held, left)`.

        The first three, lists a row of lists of arrays, are donated: whole arrays on the device, pieces, and whole
        arrays in host memory; of whole ones a row's piece is replaced. `numbers` int32[rows] are the leaves', `at`
        int32[rows, dims] places in grids. `leaving` are pieces, and `left` the same on the host.
        """
        mesh, everywhere = self.plan.mesh, PartitionSpec()
        specs = tuple(map(list, zip(*(row.split(row.specs) for row in self.rows), strict=True)))
        update = meshes.on_mesh(mesh, self._update, specs)
        there = functools.partial(jax.tree.map, lambda s: NamedSharding(mesh, s, memory_kind=host.HOST))
        out = there(list(self.leaving))
        # A device cuts its own shards, in host memory: the compiler, which could gather them first, has no choice.
        on_shards = functools.partial(jax.shard_map, mesh=mesh, out_specs=specs[2], check_vma=False)
        take = on_shards(self._take, in_specs=(specs[2], everywhere))
        put = on_shards(self._put, in_specs=(specs[2], specs[2], everywhere))

        def run(kept: Any, moved: Any, held: Any, grads: Any, scalars: Any, numbers: Any, at: Any, leaving: Any) -> Any:
            kept, moved, new = update(kept, moved, take(held, at), grads, scalars, numbers, at)
            return kept, moved, put(held, new, at), jax.device_put(leaving, out)

        return jax.jit(
            run,
            donate_argnums=(0, 1, 2),
            out_shardings=(*meshes.named(mesh, specs[:2]), there(specs[2]), out),
            compiler_options=meshes.compiler_options(mesh),
        )

    def _take(self, held: list[list[Any]], at: jax.Array) -> list[list[Any]]:
        """Pieces of arrays in host memory, on the device."""
        rows = enumerate(zip(held, self.rows, strict=True))
        pieces = [[host.piece(x, list(at[r]), row.grid) for x in some] for r, (some, row) in rows]
        return jax.device_put(pieces, jax.memory.Space.Device)

    def _put(self, held: list[list[Any]], new: list[list[Any]], at: jax.Array) -> list[list[Any]]:
        """Arrays in host memory with new pieces."""
        rows = enumerate(zip(held, jax.device_put(new, jax.memory.Space.Host), self.rows, strict=True))
        return [
            [host.with_piece(x, y, list(at[r]), row.grid) for x, y in zip(xs, ys, strict=True)]
            for r, (xs, ys, row) in rows
        ]

    def _update(
        self,
        kept: list[Any],
        moved: list[Any],
        held: list[Any],
        grads: list[Any],
        scalars: Any,
        numbers: jax.Array,
        at: jax.Array,
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """New `kept`, and pieces of the others."""
        lists: list[list[Any]] = [[], [], [], []]
        parts = []
        for r, row in enumerate(self.rows):
            here = list(at[r])
            pieces = [host.piece(x, here, row.grid) for x in kept[r]]
            p, mu, nu = jax.tree.unflatten(row.stored, row.merge(pieces, moved[r], held[r]))
            for column, x in zip(lists, (p, host.piece(grads[r], here, row.grid), mu, nu), strict=True):
                column.append(x)
            sizes = np.array(host.piece_shape(row.shape, row.grid), np.int32)
            starts = at[r, : sizes.size] * sizes if math.prod(row.grid) > 1 else None
            parts.append(Part(numbers[r], row.shape, row.spec, starts))
        decay = [row.decay for row in self.rows]
        new = shards.run(self.rule, self.plan, lists, scalars, decay, implementation=self.implementation, parts=parts)
        new_kept, new_moved, new_held = [], [], []
        for r, (row, *leaves) in enumerate(zip(self.rows, *new, strict=True)):
            stay, move, hold = row.split(jax.tree.leaves(leaves))
            new_kept.append([host.with_piece(x, y, list(at[r]), row.grid) for x, y in zip(kept[r], stay, strict=True)])
            new_moved.append(move)
            new_held.append(hold)
        return new_kept, new_moved, new_held


class Piece(NamedTuple):
    """A leaf, or a piece of one: its number, what programs know of it, its arrays' numbers, its place in its grid."""

    leaf: int
    row: Row
    arrays: tuple[int, ...]
    at: tuple[int, ...]

    @property
    def number(self) -> int:
        """Number of the piece."""
        return int(np.ravel_multi_index(self.at, self.row.grid)) if self.at else 0


class Bucket:
    """Pieces that move together.

    Attributes:
      rows: What programs know of them.
      leaves: Numbers of their leaves.
      staying: Numbers of the whole arrays on the device, a piece a list.
      moving: Numbers of the arrays that move, and of their pieces, likewise.
      held: Numbers of the whole arrays in host memory, likewise.
      numbers: int32[pieces], `leaves` on the device.
      at: int32[pieces, dims], places in grids.
      moved_specs: Specs of what moves.
      shardings: Of what moves, on the device.
    """

    def __init__(self, pieces: Sequence[Piece], plan: Plan) -> None:
        self.rows = tuple(piece.row for piece in pieces)
        self.leaves = [piece.leaf for piece in pieces]
        self.staying, moving, self.held = map(list, zip(*(x.row.split(x.arrays) for x in pieces), strict=True))
        self.moving = [[(n, piece.number) for n in some] for piece, some in zip(pieces, moving, strict=True)]
        self.moved_specs = tuple(spec for row in self.rows for spec in row.split(row.specs)[1])
        self.shardings = [NamedSharding(plan.mesh, spec) for spec in self.moved_specs]
        dims = max(len(piece.at) for piece in pieces)
        at = np.array([[*piece.at, *[0] * (dims - len(piece.at))] for piece in pieces], np.int32)
        leaves = np.array(self.leaves, np.int32)
        everywhere = NamedSharding(plan.mesh, PartitionSpec())
        self.numbers, self.at = jax.device_put((leaves, at.reshape(len(leaves), dims)), everywhere)
