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


@dataclasses.dataclass(frozen=True)
class Row:
    """What a program knows of a leaf, or of a piece of one, and what it does there.

    Attributes:
      shape: Of the whole param.
      grid: Of its pieces.
      spec: Of the param while it is updated.
      decay: Whether it decays.
      stored: Structure of (param, mu, nu), each in its format.
      moved: Of each array of those, whether it comes in pieces from the host.
      specs: Of each array.
    """

    shape: tuple[int, ...]
    grid: tuple[int, ...]
    spec: PartitionSpec
    decay: bool
    stored: Any
    moved: tuple[bool, ...]
    specs: tuple[PartitionSpec, ...]

    def split(self, arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """What stays on the device, and what moves."""
        flags = list(zip(arrays, self.moved, strict=True))
        return [x for x, moved in flags if not moved], [x for x, moved in flags if moved]

    def merge(self, kept: Sequence[Any], moved: Sequence[Any]) -> list[Any]:
        """All arrays, in order."""
        sources = {False: iter(kept), True: iter(moved)}
        return [next(sources[flag]) for flag in self.moved]


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
        """`run(kept, moved, grads, scalars, numbers, at, leaving) -> (kept, moved, left)`.

        `kept` and `moved`, lists a row of lists of arrays, are donated: whole arrays of the device, of which a row's
        piece is replaced, and pieces. `numbers` int32[rows] are the leaves', `at` int32[rows, dims] places in grids.
        `leaving` are pieces, and `left` the same on the host.
        """
        mesh = self.plan.mesh
        split_specs = [row.split(row.specs) for row in self.rows]
        specs = tuple([pair[k] for pair in split_specs] for k in (0, 1))
        update = meshes.on_mesh(mesh, self._update, specs)
        out = [NamedSharding(mesh, spec, memory_kind=host.HOST) for spec in self.leaving]

        def run(kept: Any, moved: Any, grads: Any, scalars: Any, numbers: Any, at: Any, leaving: Any) -> Any:
            return *update(kept, moved, grads, scalars, numbers, at), jax.device_put(leaving, out)

        return jax.jit(
            run,
            donate_argnums=(0, 1),
            out_shardings=(*meshes.named(mesh, specs), out),
            compiler_options=meshes.compiler_options(mesh),
        )

    def _update(
        self, kept: list[Any], moved: list[Any], grads: list[Any], scalars: Any, numbers: jax.Array, at: jax.Array
    ) -> tuple[list[Any], list[Any]]:
        lists: list[list[Any]] = [[], [], [], []]
        parts = []
        for r, row in enumerate(self.rows):
            here = list(at[r])
            pieces = [host.piece(x, here, row.grid) for x in kept[r]]
            p, mu, nu = jax.tree.unflatten(row.stored, row.merge(pieces, moved[r]))
            for column, x in zip(lists, (p, host.piece(grads[r], here, row.grid), mu, nu), strict=True):
                column.append(x)
            sizes = np.array(host.piece_shape(row.shape, row.grid), np.int32)
            starts = at[r, : sizes.size] * sizes if math.prod(row.grid) > 1 else None
            parts.append(Part(numbers[r], row.shape, row.spec, starts))
        decay = [row.decay for row in self.rows]
        new = shards.run(self.rule, self.plan, lists, scalars, decay, implementation=self.implementation, parts=parts)
        new_kept, new_moved = [], []
        for r, (row, *leaves) in enumerate(zip(self.rows, *new, strict=True)):
            stay, move = row.split(jax.tree.leaves(leaves))
            new_kept.append([host.with_piece(x, y, list(at[r]), row.grid) for x, y in zip(kept[r], stay, strict=True)])
            new_moved.append(move)
        return new_kept, new_moved


class Piece(NamedTuple):
    """A leaf, or a piece of one: its number, what programs know of it, its arrays' numbers, its place in its grid."""

    leaf: int
    row: Row
    arrays: tuple[int, ...]
    at: tuple[int, ...]

    @property
    def staying(self) -> list[int]:
        """Numbers of the arrays that stay on the device."""
        return self.row.split(self.arrays)[0]

    @property
    def moving(self) -> list[tuple[int, int]]:
        """Numbers of the arrays that move, and of their pieces."""
        index = int(np.ravel_multi_index(self.at, self.row.grid)) if self.at else 0
        return [(n, index) for n in self.row.split(self.arrays)[1]]


class Bucket:
    """Pieces that move together.

    Attributes:
      rows: What programs know of them.
      leaves: Numbers of their leaves.
      staying: Numbers of the arrays that stay on the device, a piece a list.
      moving: Numbers of the arrays that move, and of their pieces, likewise.
      numbers: int32[pieces], `leaves` on the device.
      at: int32[pieces, dims], places in grids.
      moved_specs: Specs of what moves.
      shardings: Of what moves, on the device.
    """

    def __init__(self, pieces: Sequence[Piece], plan: Plan) -> None:
        self.rows = tuple(piece.row for piece in pieces)
        self.leaves = [piece.leaf for piece in pieces]
        self.staying = [piece.staying for piece in pieces]
        self.moving = [piece.moving for piece in pieces]
        self.moved_specs = tuple(spec for row in self.rows for spec in row.split(row.specs)[1])
        self.shardings = [NamedSharding(plan.mesh, spec) for spec in self.moved_specs]
        dims = max(len(piece.at) for piece in pieces)
        at = np.array([[*piece.at, *[0] * (dims - len(piece.at))] for piece in pieces], np.int32)
        leaves = np.array(self.leaves, np.int32)
        everywhere = NamedSharding(plan.mesh, PartitionSpec())
        self.numbers, self.at = jax.device_put((leaves, at.reshape(len(leaves), dims)), everywhere)
