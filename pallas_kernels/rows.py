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
from pallas_kernels.mlir import LANES, WARPS

Array = jax.Array

PROCESSORS = 132  # of an H200; a launch of more blocks than fit is right too, only slower
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
    """

    warps: int = 1
    warpgroups: int = 1
    cluster: int = 1
    stages: int = 0
    blocks: int = 1
    hold: bool = True
    again: bool = False
    turns: int = 1


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
    def part(self) -> int:
        """Columns that a warp holds, rounded up."""
        return math.ceil(self.columns / (self.config.warps * self.span)) * self.span

    @property
    def registers(self) -> int:
        return self.part // self.span

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
        # A cluster lies within 16 or 18 processors that are neighbours: of more than 2 blocks, 128 of the 132 have one.
        processors = PROCESSORS if self.config.cluster <= 2 else PROCESSORS // 16 * 16
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

    def counts(self, size: int, number: int) -> list[int]:
        """How many columns of a row each of so many parts of this size has."""
        return [min(max(self.columns - i * size, 0), size) for i in range(number)]

    @property
    def slots(self) -> int:
        """float32 in shared memory that an exchange of one value needs."""
        return 2 * (self.teams * self.warps + self.config.cluster)

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


class SimulatedWalk:
    """`walk.Walk` for the interpreter, which knows neither registers nor what warpgroups share: rows that are padded.

    One team of one warpgroup takes all.
    """

    def __init__(self, grid: Grid, last_first: bool, sources: Sequence[Any]):
        self.grid, self.last_first, self.sources = grid, last_first, sources
        self.block = lax.axis_index("block")

    def over_tiles(self, tile: Callable[[Array, Any], Any], carry: Any) -> Any:
        count = (self.grid.tiles - self.block + self.grid.blocks - 1) // self.grid.blocks
        return lax.fori_loop(0, count, tile, carry)

    def _rows(self, i: Array, turn: int) -> Any:
        grid = self.grid
        tile = jnp.minimum(grid.tile(self.block, i, last_first=self.last_first), grid.tiles - 1)
        return pl.ds(tile * grid.tile_rows + turn * grid.turn_rows, grid.turn_rows)

    def spread(self, values: Array) -> Array:
        return jnp.broadcast_to(values[:, None], self.grid.block)

    def zeros(self) -> Array:
        return jnp.zeros(self.grid.block)

    def tile(self, i: Array, turn: int) -> list[Array]:
        return [ref[self._rows(i, turn)].reshape(self.grid.block).astype(jnp.float32) for ref in self.sources]

    def store(self, ref: Any, i: Array, turn: int, value: Array) -> None:
        ref[self._rows(i, turn)] = value.astype(ref.dtype).reshape(ref[self._rows(i, turn)].shape)

    def columns(self, ref: Any) -> Array:
        return jnp.broadcast_to(ref[...].astype(jnp.float32).reshape(self.grid.warps, -1), self.grid.block)

    def kept(self, value: Array) -> Array:
        width = self.grid.part * self.grid.warps
        return jnp.where((jnp.arange(width) < self.grid.columns).reshape(-1, self.grid.part), value, 0.0)

    def counts(self) -> list[int]:
        return self.grid.counts(self.grid.part, self.grid.warps)

    def share(self) -> Array:
        parts = jnp.arange(self.grid.block[0]) if self.grid.shared else jnp.zeros(self.grid.block[0], int)
        counts = jnp.clip(self.grid.columns - parts * self.grid.part, 1, self.grid.part)
        return 1 / counts.astype(jnp.float32)

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
            ref[self.block] = value.reshape(-1) if self.grid.shared else jnp.sum(value, 0)


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
