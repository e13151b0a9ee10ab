"""Rows in the registers of warps, and blocks of threads that walk over an array of them.

A warp has whole rows where they are short (several side by side where they are very short); 4, 8 or 16 warps of a
block, or those of a cluster of blocks, share a longer one. A block takes many rows, one tile after the other. The rows
that it takes next are on their way to shared memory, by asynchronous copies, each thread those elements that it will
work on itself: so no thread waits for another, but where warps share a row and tell each other their parts of a sum.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.dispatch import plgpu
from pallas_kernels.meetings import PLACES
from pallas_kernels.mlir import LANES, WARPS

Array = jax.Array

PROCESSORS = 132  # of an H200; a launch of more blocks than fit is right too, only slower
# Of them, those that clusters of more than 2 blocks can fill at once: a cluster lies within one of the groups that a
# chip's processors are made in, of which some lack a few. 120 were filled on an H200, 124 were not.
CLUSTERED = 112
SHARED_BYTES = 220 * 1024  # of the 227 KB a block may have, less what sums along rows need
FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Launch choices: they change speed, and the order of a sum along a row, which depends on its length alone.

    Attributes:
      warps: That share a row: 1, or 4 times a power of two, in all blocks of a cluster.
      warpgroups: In a block.
      cluster: Blocks that share a row, at most 16.
      stages: Tiles of a block in shared memory, one of them in work; 0 loads a tile when it is worked on.
      blocks: Of one processor, all at once or one after the other; of few tiles, each has a block of its own.
      hold: Whether what belongs to columns (scale, bias) stays in registers, or is read again for each row.
      again: Whether a tile is read twice from shared memory, and so not kept in registers while sums are waited for.
      turns: Rows, one after the other, that those who share a row take in one tile: they tell each other once for all.
      later: Whether a tile is finished only after its successor is begun: what the blocks of a cluster tell each other
        is on its way meanwhile. Takes a stage more.
    """

    warps: int = 1
    warpgroups: int = 1
    cluster: int = 1
    stages: int = 0
    blocks: int = 1
    hold: bool = True
    again: bool = False
    turns: int = 1
    later: bool = False

    @property
    def ahead(self) -> int:
        """How many tiles are on their way to shared memory while one is worked on; below 0, it is not by that way."""
        return self.stages - 2 if self.later and self.stages else self.stages - 1


@dataclasses.dataclass(frozen=True)
class Grid:
    """How rows lie over warps and in the registers of their lanes, and over the blocks that walk over them.

    A team is the warpgroups of a block that work on the same row, or one that has 4 * `side` rows to itself. It sees
    its rows as [4 * side, part]: whole rows, or 4 parts of one.
    """

    rows: int
    columns: int
    itemsize: int
    config: Config

    @functools.cached_property
    def vector(self) -> int:
        """Neighbours that a thread loads at once."""
        return math.gcd(self.columns, 16 // self.itemsize)

    @property
    def shared(self) -> bool:
        """Whether warps share a row."""
        return self.config.warps > 1

    @functools.cached_property
    def side(self) -> int:
        """Rows that lie side by side in a warp."""
        lanes = 1 << math.ceil(math.log2(math.ceil(self.columns / self.vector)))
        return 1 if self.shared else max(1, LANES // lanes)

    @property
    def span(self) -> int:
        """Columns that the lanes of a row load at once."""
        return LANES // self.side * self.vector

    @property
    def stride(self) -> int:
        """Columns from one of a thread's vectors to its next: warps of a block that share a row take turns along it."""
        return self.span * self.warps

    @property
    def block_columns(self) -> int:
        """Columns that a block has of a row; the last of a cluster may have fewer."""
        return math.ceil(self.columns / self.vector / self.config.cluster) * self.vector

    @property
    def block_counts(self) -> list[int]:
        """How many columns each block of a cluster has."""
        starts = [b * self.block_columns for b in range(self.config.cluster)]
        return [min(max(self.columns - start, 0), self.block_columns) for start in starts]

    @property
    def registers(self) -> int:
        """Vectors of a row that a thread holds, rounded up."""
        return math.ceil(self.block_columns / self.stride)

    @property
    def full(self) -> int:
        """How many of them every thread has."""
        return min(self.block_counts) // self.stride

    @property
    def part(self) -> int:
        """Columns that a warp holds, rounded up."""
        return self.registers * self.span

    @property
    def warp_counts(self) -> list[int]:
        """How many columns each warp has of a row that one block has to itself."""
        starts = [[j * self.stride + w * self.span for j in range(self.registers)] for w in range(self.warps)]
        return [sum(min(max(self.columns - start, 0), self.span) for start in of_warp) for of_warp in starts]

    @property
    def block(self) -> tuple[int, int]:
        """Shape of what a warpgroup holds."""
        return WARPS * self.side, self.part

    @property
    def group(self) -> int:
        """Warpgroups of a team."""
        return max(1, self.config.warps // (WARPS * self.config.cluster))

    @property
    def teams(self) -> int:
        return self.config.warpgroups // self.group

    @property
    def turn_rows(self) -> int:
        """Rows that a team works on at the same time."""
        return 1 if self.shared else self.block[0]

    @property
    def team_rows(self) -> int:
        """Rows that a team has of a tile."""
        return self.turn_rows * self.config.turns

    @property
    def tile_rows(self) -> int:
        return self.team_rows * self.teams

    @property
    def tiles(self) -> int:
        return math.ceil(self.rows / self.tile_rows)

    @property
    def blocks(self) -> int:
        """Blocks of the launch, or clusters of them."""
        processors = PROCESSORS if self.config.cluster <= 2 else CLUSTERED
        return min(self.tiles, max(1, self.config.blocks * processors // self.config.cluster))

    def tile(self, block: Array, i: Array, *, last_first: bool) -> Array:
        """The i-th tile of a block; of those that are not there the number is not below `tiles`."""
        number = block + i * self.blocks
        return jnp.where(number < self.tiles, self.tiles - 1 - number, number) if last_first else number

    @property
    def whole(self) -> bool:
        """Whether rows fill their warps."""
        return self.part * self.config.warps == self.columns

    @property
    def warps(self) -> int:
        """Of a block, that share a row."""
        return self.config.warps // self.config.cluster

    @property
    def slots(self) -> int:
        """float32 in shared memory that an exchange of one value needs."""
        return 2 * self.teams * self.warps + PLACES * self.config.cluster

    @property
    def vector_bytes(self) -> int:
        return self.vector * self.itemsize

    def ring_bytes(self, streams: int) -> int:
        threads = self.config.warpgroups * WARPS * LANES
        return self.config.stages * self.config.turns * streams * self.registers * threads * self.vector_bytes

    @property
    def sums(self) -> tuple[int, int]:
        """Shape of a block's sums over rows before they are added up: rows, or teams that share each, and columns."""
        if self.shared:
            return self.teams, self.part * self.config.warps
        return self.teams * self.turn_rows, self.part

    @property
    def sums_bytes(self) -> int:
        """Of shared memory."""
        rows, width = self.sums
        return rows * width * FLOAT_BYTES if rows > 1 else 0

    @functools.cached_property
    def layout(self) -> Any:
        """Warps over rows or parts, lanes over rows that lie side by side and then over columns."""
        lanes = LANES // self.side * self.vector
        tile = (WARPS * self.side, lanes)
        if self.side == 1:
            return plgpu.Layout.TILED(plgpu.Tiling((tile, (self.vector,))), (-3,), (-2,), -1)
        if self.side == LANES:
            return plgpu.Layout.TILED(plgpu.Tiling((tile, (LANES, self.vector))), (-4,), (-2,), -1)
        return plgpu.Layout.TILED(plgpu.Tiling((tile, (self.side, self.vector))), (-4,), (-2, -3), -1)

    @property
    def numbers(self) -> Any:
        """Layout of a number a row."""
        return self.layout.reduce(1)


Begin = Callable[[Array, Any], tuple[Any, Any]]
Finish = Callable[[Array, Any, Any], Any]


def in_order(config: Config, count: Array, begin: Begin, finish: Finish, ahead: Any, carry: Any) -> Any:
    """`over_tiles` of a walk whose block has so many tiles."""

    def step(i: Array, carried: Any) -> Any:
        ahead, carry = carried
        ahead, begun = begin(i, ahead)
        return ahead, finish(i, begun, carry)

    def later(i: Array, carried: Any) -> Any:
        ahead, before, carry = carried
        ahead, begun = begin(i, ahead)
        return ahead, begun, finish(i - 1, before, carry)

    if not config.later:
        return lax.fori_loop(0, count, step, (ahead, carry))[1]
    first = begin(jnp.int32(0), ahead)
    _, last, carry = lax.fori_loop(1, count, later, (*first, carry))
    return finish(count - 1, last, carry)


class SimulatedWalk:
    """`walk.Walk` for the interpreter, which knows neither registers nor what warpgroups share: rows that are padded.

    One team of one warpgroup takes all.
    """

    def __init__(self, grid: Grid, last_first: bool, sources: Sequence[Any]):
        self.grid, self.last_first, self.sources = grid, last_first, sources
        self.block = lax.axis_index("block")

    def over_tiles(self, begin: Begin, finish: Finish, ahead: Any, carry: Any) -> Any:
        count = (self.grid.tiles - self.block + self.grid.blocks - 1) // self.grid.blocks
        return in_order(self.grid.config, count, begin, finish, ahead, carry)

    def _rows(self, i: Array, turn: int) -> Any:
        grid = self.grid
        tile = jnp.minimum(grid.tile(self.block, i, last_first=self.last_first), grid.tiles - 1)
        return pl.ds(tile * grid.tile_rows + turn * grid.turn_rows, grid.turn_rows)

    def spread(self, values: Array) -> Array:
        return jnp.broadcast_to(values[:, None], self.grid.block)

    def zeros(self) -> Array:
        return jnp.zeros(self.grid.block)

    def _dealt(self, rows: Array) -> Array:
        """[rows, columns] as the warps have it."""
        if not self.grid.shared:
            return rows
        return rows.reshape(self.grid.registers, WARPS, self.grid.span).swapaxes(0, 1).reshape(self.grid.block)

    def _gathered(self, block: Array) -> Array:
        if not self.grid.shared:
            return block
        return block.reshape(WARPS, self.grid.registers, self.grid.span).swapaxes(0, 1).reshape(1, -1)

    def tile(self, i: Array, turn: int) -> list[Array]:
        return [self._dealt(ref[self._rows(i, turn)]).astype(jnp.float32) for ref in self.sources]

    def store(self, ref: Any, i: Array, turn: int, value: Array) -> None:
        ref[self._rows(i, turn)] = self._gathered(value.astype(ref.dtype))

    def columns(self, ref: Any) -> Array:
        return jnp.broadcast_to(self._dealt(ref[...].astype(jnp.float32)[None]), self.grid.block)

    def _there(self) -> Array:
        return self._dealt(jnp.arange(self.grid.part * self.grid.warps)[None]) < self.grid.columns

    def kept(self, value: Array) -> Array:
        return jnp.where(self._there(), value, 0.0)

    def counts(self) -> list[int]:
        return self.grid.warp_counts

    def share(self) -> Array:
        counts = jnp.broadcast_to(jnp.sum(self._there(), axis=1), self.grid.block[:1])
        return 1 / jnp.maximum(counts, 1).astype(jnp.float32)

    def load_numbers(self, refs: Sequence[Any], i: Array, turn: int) -> list[Array]:
        return [jnp.broadcast_to(ref[self._rows(i, turn)], self.grid.block[:1]) for ref in refs]

    def store_numbers(self, refs: Sequence[Any], i: Array, turn: int, values: Sequence[Array]) -> None:
        for ref, value in zip(refs, values, strict=True):
            ref[self._rows(i, turn)] = value[: self.grid.turn_rows]

    def product(self, a: Array, b: Any) -> Array:
        return a * b

    def exchange(self, i: Array, *values: Array) -> list[list[Array]]:
        del i
        return [[jnp.broadcast_to(a[p], a.shape) for p in range(self.grid.warps)] for a in values]

    def store_sums(self, refs: Sequence[Any], values: Sequence[Array]) -> None:
        for ref, value in zip(refs, values, strict=True):
            ref[self.block] = jnp.sum(self._gathered(value), 0)


def varying_like(x: Array, a: Array) -> Array:
    """Marks what all devices of a `shard_map` have as x is: so the gradient is summed over them, by the transpose."""
    axes = _varying(x) - _varying(a)
    return lax.pcast(a, tuple(sorted(axes)), to="varying") if axes else a


def _varying(a: Array) -> frozenset[str]:
    """The mesh axes over which devices have different values of an array, inside a `shard_map` that keeps count."""
    kind = jax.typeof(a)
    if (manual := getattr(kind, "manual_axis_type", None)) is not None:  # jax >= 0.11
        return manual.varying
    return getattr(kind, "vma", frozenset())
