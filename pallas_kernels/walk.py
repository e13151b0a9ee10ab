"""What a kernel does to its rows on a GPU, in the compiler's own terms where Pallas has no words for it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxlib.mlir.dialects import gpu
from jaxlib.mlir.dialects import nvvm as _nvvm

from pallas_kernels import dispatch, meetings, mlir
from pallas_kernels.dispatch import plgpu
from pallas_kernels.mlir import LANES, WARPS
from pallas_kernels.rows import FLOAT_BYTES, Begin, Config, Finish, Grid, SimulatedWalk, in_order, varying_like

Array = jax.Array
nvvm: Any = _nvvm
_REF, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where this thread's elements lie.

    Attributes:
      row: Of all of them.
      column: Of the first one.
      lane: Among those that have the row.
      part: This warp's number among those of a cluster that share the row,
      warp: And among those of its block.
      begin: The first column of its block,
      end: And the one after the last.
      kept: Which of its vectors are there; None of those that are there for certain.
    """

    row: ir.Value
    column: ir.Value
    lane: ir.Value
    part: ir.Value
    warp: ir.Value
    begin: ir.Value
    end: ir.Value
    kept: list[ir.Value | None]


class Walk:
    """What a kernel's body may do, on a GPU.

    `ring` is shared memory, bytes: tiles to come, and at the end sums over rows. `slots` is shared memory too, for sums
    along rows: float32[values * grid.slots].
    """

    def __init__(self, grid: Grid, last_first: bool, sources: Sequence[Any], ring: Any, slots: Any):
        self.grid, self.last_first = grid, last_first
        self.sources, self.ring, self.slots = sources, ring, slots
        config = grid.config
        self.block = lax.axis_index("block")
        warpgroup = lax.axis_index("warpgroup") if config.warpgroups > 1 else jnp.int32(0)
        self.team = warpgroup // grid.group
        self.first = (warpgroup % grid.group) * WARPS  # part of this warpgroup's first warp
        if config.cluster > 1:
            self.first += lax.axis_index("cluster") * (grid.group * WARPS)
            self._open()

    def over_tiles(self, begin: Begin, finish: Finish, ahead: Any, carry: Any) -> Any:
        """Works on every tile of this block, in two steps.

        Args:
          begin: begin(i, ahead) -> (ahead, begun): the i-th tile's first step; gives the next tile's `ahead`.
          finish: finish(i, begun, carry) -> carry: its second step.
          ahead: Of the first tile.
          carry: Before the first tile.

        Returns:
          The last carry.
        """
        grid, config = self.grid, self.grid.config
        for i in range(config.ahead):
            self._fetch(jnp.int32(i))

        def fetch_and_begin(i: Array, ahead: Any) -> tuple[Any, Any]:
            if config.stages:
                self._fetch(i + config.ahead)
            return begin(i, ahead)

        if grid.blocks == grid.tiles:
            _, begun = fetch_and_begin(jnp.int32(0), ahead)
            return finish(jnp.int32(0), begun, carry)
        count = (grid.tiles - self.block + grid.blocks - 1) // grid.blocks
        return in_order(config, count, fetch_and_begin, finish, ahead, carry)

    def _open(self) -> None:
        @plgpu.inline_mgpu(arg_types=(_REF,))
        def run(_: Any, slots: ir.Value) -> None:
            meetings.prepare(mlir.at(mlir.address(slots, mlir.SHARED), _barriers(slots)))

        run(self.slots)

    def row(self, i: Array, turn: int) -> Array:
        """The first row that this team has of the i-th tile in a turn."""
        grid = self.grid
        tile = grid.tile(self.block, i, last_first=self.last_first)
        return tile * grid.tile_rows + self.team * grid.team_rows + turn * grid.turn_rows

    def spread(self, values: Array) -> Array:
        """A number a row, over its columns."""
        return lax.broadcast_in_dim(values, self.grid.block, (0,))

    def zeros(self) -> Array:
        return plgpu.layout_cast(jnp.zeros(self.grid.block, jnp.float32), self.grid.layout)

    def _fetch(self, i: Array) -> None:
        """Begins to copy the i-th tile of each source; of rows that are not there, zeros."""
        grid = self.grid

        @plgpu.inline_mgpu(arg_types=(*[_REF] * (1 + len(self.sources)), *[_SCALAR] * 3))
        def run(_: Any, *args: Any) -> None:
            *sources, ring, row, first, i = args
            modifier = nvvm.LoadCacheModifierKind.CG if grid.vector_bytes == 16 else nvvm.LoadCacheModifierKind.CA
            for turn in range(grid.config.turns):
                slot, place = self._slot(ring, i, turn), _place(grid, row, first, turn)
                for s, source in enumerate(sources):
                    begin = mlir.at(mlir.address(source, mlir.GLOBAL), _offset(grid, place, grid.itemsize))
                    for j, kept in enumerate(place.kept):
                        there: Any = mlir.every(mlir.less(place.row, grid.rows), kept)
                        nvvm.cp_async_shared_global(
                            mlir.at(slot, self._stored(s, j)),
                            mlir.at(begin, j * grid.stride * grid.itemsize),
                            grid.vector_bytes,
                            modifier,
                            cp_size=arith.select(there, mlir.int32(grid.vector_bytes), mlir.int32(0)),
                        )
            nvvm.cp_async_commit_group()

        run(*self.sources, self.ring, self.row(i, 0), self.first, i)

    def _slot(self, ring: ir.Value, i: Any, turn: int) -> ir.Value:
        """Where this thread's elements of the i-th tile are in shared memory."""
        config = self.grid.config
        stage = arith.remui(mlir.to_index(i), mlir.index(config.stages))
        size = self._stored(len(self.sources), 0)
        here = mlir.times(mlir.to_index(mgpu.thread_idx()), self.grid.vector_bytes)
        here = mlir.plus(arith.addi(mlir.times(stage, config.turns * size), here), turn * size)
        return mlir.at(mlir.address(ring, mlir.SHARED), here)

    def _stored(self, source: int, register: int) -> int:
        threads = self.grid.config.warpgroups * WARPS * LANES
        return (source * self.grid.registers + register) * threads * self.grid.vector_bytes

    def tile(self, i: Array, turn: int) -> list[Array]:
        """What a team has in a turn of the i-th tile of each source, float32; zeros where nothing is."""
        grid = self.grid
        layout = grid.layout.to_mgpu()
        kinds = tuple(plgpu.ShapeDtypeStruct(grid.block, a.dtype, layout=grid.layout) for a in self.sources)

        @plgpu.inline_mgpu(arg_types=(*[_REF] * (1 + len(self.sources)), *[_SCALAR] * 3), return_type=kinds)
        def run(_: Any, *args: Any) -> tuple[Any, ...]:
            *sources, ring, row, first, i = args
            place = _place(grid, row, first)
            if grid.config.stages:
                nvvm.cp_async_wait_group(grid.config.ahead)
                slot = self._slot(ring, i, turn)
            results = []
            for s, source in enumerate(sources):
                kind = layout.registers_element_type(ir.MemRefType(source.type).element_type)
                begin = mlir.at(mlir.address(source, mlir.GLOBAL), _offset(grid, place, grid.itemsize))
                registers = np.empty(layout.registers_shape(grid.block), dtype=object)
                for j, kept in enumerate(place.kept):
                    if grid.config.stages:
                        registers.flat[j] = mlir.load(kind, mlir.at(slot, self._stored(s, j)))
                    else:
                        there = mlir.every(mlir.less(place.row, grid.rows), kept)
                        read = functools.partial(mlir.load, kind, mlir.at(begin, j * grid.stride * grid.itemsize))
                        registers.flat[j] = mlir.when(there, read, mlir.zeros(kind))
                results.append(mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None))
            return tuple(results)

        return [a.astype(jnp.float32) for a in run(*self.sources, self.ring, self.row(i, turn), self.first, i)]

    def store(self, ref: Any, i: Array, turn: int, value: Array) -> None:
        """Writes what is there."""
        grid = self.grid

        @plgpu.inline_mgpu(arg_types=(_REF, grid.layout, _SCALAR, _SCALAR))
        def run(_: Any, ref: ir.Value, value: Any, row: Any, first: Any) -> None:
            place = _place(grid, row, first)
            begin = mlir.at(mlir.address(ref, mlir.GLOBAL), _offset(grid, place, grid.itemsize))
            row_there = None if grid.rows % grid.tile_rows == 0 else mlir.less(place.row, grid.rows)
            for j, (kept, register) in enumerate(zip(place.kept, value.registers.flat, strict=True)):
                mlir.store_where(mlir.every(row_there, kept), register, mlir.at(begin, j * grid.stride * grid.itemsize))

        run(ref, value.astype(ref.dtype), self.row(i, turn), self.first)

    def columns(self, ref: Any) -> Array:
        """What an array of one number a column has for a tile, float32; zeros beyond the row's end."""
        grid = self.grid
        layout = grid.layout.to_mgpu()

        @plgpu.inline_mgpu(
            arg_types=(_REF, _SCALAR),
            return_type=plgpu.ShapeDtypeStruct(grid.block, ref.dtype, layout=grid.layout),
        )
        def run(_: Any, ref: ir.Value, first: Any) -> Any:
            element = ir.MemRefType(ref.type).element_type
            place, kind = _place(grid, None, first), layout.registers_element_type(element)
            width = mgpu.bytewidth(element)
            begin = mlir.at(mlir.address(ref, mlir.GLOBAL), mlir.times(place.column, width))
            registers = np.empty(layout.registers_shape(grid.block), dtype=object)
            for j, kept in enumerate(place.kept):
                read = functools.partial(mlir.load, kind, mlir.at(begin, j * grid.stride * width))
                registers.flat[j] = mlir.when(kept, read, mlir.zeros(kind))
            return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

        return run(ref, self.first).astype(jnp.float32)

    def kept(self, value: Array) -> Array:
        """`value`, zero beyond the row's end."""
        grid = self.grid
        if grid.whole:
            return value

        @plgpu.inline_mgpu(
            arg_types=(grid.layout, _SCALAR),
            return_type=plgpu.ShapeDtypeStruct(grid.block, jnp.float32, layout=grid.layout),
        )
        def run(_: Any, value: Any, first: Any) -> Any:
            registers = np.empty_like(value.registers)
            place = _place(grid, None, first)
            for j, (kept, register) in enumerate(zip(place.kept, value.registers.flat, strict=True)):
                registers.flat[j] = (
                    register if kept is None else arith.select(kept, register, mlir.zeros(register.type))
                )
            return mgpu.FragmentedArray(_registers=registers, _layout=value.layout, _is_signed=None)

        return run(value, self.first)

    def counts(self) -> list[Any]:
        """How many columns of its row each warp of this block has: numbers, or arrays of one a row."""
        grid = self.grid
        if grid.config.cluster == 1:
            return grid.warp_counts
        if grid.whole:
            return [grid.part] * grid.warps
        kind = plgpu.ShapeDtypeStruct((grid.block[0],), jnp.float32, layout=grid.numbers)

        @plgpu.inline_mgpu(arg_types=(_SCALAR,), return_type=tuple(kind for _ in range(grid.warps)))
        def run(_: Any, first: Any) -> tuple[Any, ...]:
            place = _place(grid, None, first)
            begins = [mlir.plus(place.begin, w * grid.span) for w in range(grid.warps)]
            return tuple(self._number(_count(grid, begin, place.end)) for begin in begins)

        return list(run(self.first))

    def share(self) -> Array | float:
        """1 / the columns that a warp has of its row, or 1 where it has none."""
        grid = self.grid
        if grid.whole or not grid.shared:
            return 1 / min(grid.part, grid.columns)

        @plgpu.inline_mgpu(
            arg_types=(_SCALAR,),
            return_type=plgpu.ShapeDtypeStruct((grid.block[0],), jnp.float32, layout=grid.numbers),
        )
        def run(_: Any, first: Any) -> Any:
            place = _place(grid, None, first)
            begin = arith.addi(place.begin, mlir.times(place.warp, grid.span))
            return self._number(_count(grid, begin, place.end))

        return 1 / jnp.maximum(run(self.first), 1.0)

    def product(self, a: Array, b: Array | float) -> Array:
        """a * b of numbers a row, rounded: a sum that it is a term of does not see more of its digits."""
        grid = self.grid
        b = plgpu.layout_cast(jnp.full(a.shape, b), grid.numbers) if isinstance(b, float) else b

        @plgpu.inline_mgpu(
            arg_types=(grid.numbers, grid.numbers),
            return_type=plgpu.ShapeDtypeStruct(a.shape, jnp.float32, layout=grid.numbers),
        )
        def run(_: Any, a: Any, b: Any) -> Any:
            return self._number(mlir.product(*(vector.extract(v.registers.item(), [], [0]) for v in (a, b))))

        return run(a, b)

    def _number(self, value: ir.Value) -> mgpu.FragmentedArray:
        """A number a row that this thread knows."""
        layout = self.grid.numbers.to_mgpu()
        registers = np.empty(layout.registers_shape((self.grid.block[0],)), dtype=object)
        registers.flat[0] = vector.broadcast(layout.registers_element_type(value.type), value)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    def load_numbers(self, refs: Sequence[Any], i: Array, turn: int) -> list[Array]:
        """Of arrays of one float32 a row, those of a turn of the i-th tile; zeros where no row is."""
        grid = self.grid
        kind = plgpu.ShapeDtypeStruct((grid.block[0],), jnp.float32, layout=grid.numbers)

        @plgpu.inline_mgpu(
            arg_types=(*[_REF] * len(refs), _SCALAR, _SCALAR),
            return_type=tuple(kind for _ in refs),
        )
        def run(_: Any, *args: Any) -> tuple[Any, ...]:
            *refs, row, first = args
            place, one = _place(grid, row, first), mlir.floats(1)
            there, results = mlir.less(place.row, grid.rows), []
            for ref in refs:
                here = mlir.at(mlir.address(ref, mlir.GLOBAL), mlir.times(place.row, FLOAT_BYTES))
                value = mlir.when(there, functools.partial(mlir.load, one, here), mlir.zeros(one))
                results.append(self._number(vector.extract(value, [], [0])))
            return tuple(results)

        return list(run(*refs, self.row(i, turn), self.first))

    def store_numbers(self, refs: Sequence[Any], i: Array, turn: int, values: Sequence[Array]) -> None:
        """Writes one float32 a row, by one thread a row."""
        grid = self.grid
        many = len(refs)

        @plgpu.inline_mgpu(
            arg_types=(*[_REF] * many, *[grid.numbers] * many, _SCALAR, _SCALAR),
        )
        def run(_: Any, *args: Any) -> None:
            row, first = args[2 * many :]
            place = _place(grid, row, first)
            mine = mlir.every(mlir.equal(place.lane, 0), mlir.equal(place.part, 0) if grid.shared else None)

            def write() -> None:
                for ref, value in zip(args[:many], args[many : 2 * many], strict=True):
                    here = mlir.at(mlir.address(ref, mlir.GLOBAL), mlir.times(place.row, FLOAT_BYTES))
                    mlir.store(value.registers.item(), here)

            mlir.when(mlir.every(mine, mlir.less(place.row, grid.rows)), write)

        run(*refs, *values, self.row(i, turn), self.first)

    def exchange(self, i: Array, *values: Array) -> list[list[Array]]:
        """For each value, which every warp has one of: those of all warps of the block that share its row, in order."""
        grid = self.grid
        slots = len(values) * grid.warps * FLOAT_BYTES

        def run(ref: ir.Value, i: ir.Value, team: ir.Value, place: _Place, values: Sequence[Any]) -> list[Any]:
            base = mlir.times(arith.addi(mlir.times(_odd(i), grid.teams), team), slots)
            begin = mlir.at(mlir.address(ref, mlir.SHARED), base)
            for k, value in enumerate(values):  # all lanes the same number; the memory takes it once
                here = mlir.times(mlir.plus(place.warp, k * grid.warps), FLOAT_BYTES)
                mlir.store(value.registers.item(), mlir.at(begin, here))
            if grid.teams == 1:
                gpu.barrier()
            else:
                # Numbers of barriers that neither `gpu.barrier` nor a warpgroup's own use.
                barrier = arith.addi(mlir.to_int32(team), mlir.int32(8))
                nvvm.barrier(barrier_id=barrier, number_of_threads=mlir.int32(grid.group * WARPS * LANES))
            return self._heard(begin, len(values) * grid.warps)

        heard = self._exchange(run, len(values) * grid.warps, i, values)
        return [heard[k * grid.warps : (k + 1) * grid.warps] for k in range(len(values))]

    def tell_blocks(self, i: Array, *values: Array) -> None:
        """Sends numbers, which every warp has, to all blocks of the cluster, for `hear_blocks`; waits for nobody."""

        def run(ref: ir.Value, i: ir.Value, _: ir.Value, place: _Place, values: Sequence[Any]) -> list[Any]:
            numbers = [vector.extract(value.registers.item(), [], [0]) for value in values]
            self._tell(ref, i, place, len(values), lambda: numbers)
            return []

        self._exchange(run, 0, i, values)

    def tell_sums(self, i: Array, *values: Array) -> None:
        """Sends the sums over this block's warps of numbers that each has one of; only the first warp waits."""
        grid = self.grid

        def run(ref: ir.Value, i: ir.Value, _: ir.Value, place: _Place, values: Sequence[Any]) -> list[Any]:
            shared = mlir.address(ref, mlir.SHARED)
            begin = mlir.at(shared, mlir.times(_odd(i), len(values) * grid.warps * FLOAT_BYTES))
            here = mlir.at(begin, mlir.times(place.warp, FLOAT_BYTES))
            for k, value in enumerate(values):
                mlir.store(value.registers.item(), mlir.at(here, k * grid.warps * FLOAT_BYTES))
            # Two barriers in turns: warps that do not wait may be here again before the first has waited. They are not
            # here for the third time before it has told, which they hear of in between.
            barrier = arith.addi(mlir.to_int32(_odd(i)), mlir.int32(8))
            _, lane = mlir.thread()

            def totals() -> list[ir.Value]:
                meetings.wait_for_all(barrier, grid.warps * LANES)
                mine = mlir.at(begin, mlir.times(arith.remui(lane, mlir.index(grid.warps)), FLOAT_BYTES))
                one = mlir.floats(1)
                found = [mlir.load(one, mlir.at(mine, k * grid.warps * FLOAT_BYTES)) for k in range(len(values))]
                return [_over_lanes(vector.extract(x, [], [0]), grid.warps) for x in found]

            self._tell(ref, i, place, len(values), totals, lambda: meetings.arrive(barrier, grid.warps * LANES))
            return []

        self._exchange(run, 0, i, values)

    def _tell(
        self,
        slots: ir.Value,
        i: ir.Value,
        place: _Place,
        many: int,
        numbers: Callable[[], Sequence[ir.Value]],
        others: Callable[[], None] | None = None,
    ) -> None:
        """The first warp tells all blocks of the cluster so many numbers; the others do something else."""
        cluster = self.grid.config.cluster
        meeting, begin = self._meeting(slots, i, many)
        meeting.expect(many * cluster * FLOAT_BYTES)
        block = arith.divui(place.part, mlir.index(self.grid.warps))
        warp, lane = mlir.thread()

        def tell() -> None:
            values = numbers()

            def send() -> None:  # a lane for each block that is to hear it
                for k, value in enumerate(values):
                    here = mlir.at(begin, mlir.times(mlir.plus(block, k * cluster), FLOAT_BYTES))
                    meeting.tell(value, here, lane)

            mlir.when(mlir.less(lane, cluster), send)

        mlir.branch(mlir.equal(warp, 0), tell, others)

    def hear_blocks(self, i: Array, many: int) -> list[list[Array]]:
        """Of each of so many values that were told of the i-th tile: those of all blocks of the cluster, in order."""
        cluster = self.grid.config.cluster

        def run(ref: ir.Value, i: ir.Value, *_: Any) -> list[Any]:
            meeting, begin = self._meeting(ref, i, many)
            meeting.wait()
            return self._heard(begin, many * cluster)

        heard = self._exchange(run, many * cluster, i, [])
        return [heard[k * cluster : (k + 1) * cluster] for k in range(many)]

    def _meeting(self, slots: ir.Value, i: ir.Value, many: int) -> tuple[meetings.Meeting, ir.Value]:
        """Of the i-th tile, and where so many values of each block of the cluster are told in it."""
        grid, shared = self.grid, mlir.address(slots, mlir.SHARED)
        meeting = meetings.Meeting(mlir.at(shared, _barriers(slots)), i)
        after = 2 * grid.teams * many * grid.warps * FLOAT_BYTES
        place = mlir.times(meeting.place, many * grid.config.cluster * FLOAT_BYTES)
        return meeting, mlir.at(shared, mlir.plus(place, after))

    def _exchange(self, run: Callable[..., Any], results: int, i: Array, values: Sequence[Array]) -> list[Array]:
        grid = self.grid
        kind = plgpu.ShapeDtypeStruct((grid.block[0],), jnp.float32, layout=grid.numbers)

        @plgpu.inline_mgpu(
            arg_types=(_REF, *[grid.numbers] * len(values), *[_SCALAR] * 3),
            return_type=tuple(kind for _ in range(results)) or None,
        )
        def inline(_: Any, slots: ir.Value, *args: Any) -> Any:
            *values, first, team, i = args
            results = run(slots, mlir.to_index(i), mlir.to_index(team), _place(grid, None, first), values)
            return tuple(results) or None

        return list(inline(self.slots, *values, self.first, self.team, i) or ())

    def _heard(self, begin: ir.Value, many: int) -> list[Any]:
        width = math.gcd(4, many)
        loaded = [mlir.load(mlir.floats(width), mlir.at(begin, j * FLOAT_BYTES)) for j in range(0, many, width)]
        return [self._number(vector.extract(a, [], [k])) for a in loaded for k in range(width)]

    def store_sums(self, refs: Sequence[Any], values: Sequence[Array]) -> None:
        """Writes this block's sums over its rows to its row of `refs`: float32[blocks, columns] each."""
        grid = self.grid
        many, config = len(refs), grid.config

        @plgpu.inline_mgpu(
            arg_types=(*[_REF] * (many + 1), *[grid.layout] * many, *[_SCALAR] * 3),
        )
        def run(_: Any, *args: Any) -> None:
            refs, ring, values, (block, first, team) = args[:many], args[many], args[many + 1 : -3], args[-3:]
            place = _place(grid, None, first)
            rows, width = grid.sums
            out = mlir.times(mlir.to_index(block), grid.columns * FLOAT_BYTES)
            if rows == 1:
                here = arith.addi(out, mlir.times(place.column, FLOAT_BYTES))
                for ref, value in zip(refs, values, strict=True):
                    self._store_columns(mlir.at(mlir.address(ref, mlir.GLOBAL), here), value, place.kept)
                return
            # Through shared memory, which the tiles no longer need.
            shared = mlir.address(ring, mlir.SHARED)
            row = arith.addi(mlir.times(mlir.to_index(team), grid.turn_rows), place.row)
            begin = mlir.times(arith.addi(mlir.times(row, width), place.column), FLOAT_BYTES)
            nvvm.cp_async_wait_group(0)
            gpu.barrier()
            for k, value in enumerate(values):
                self._store_columns(
                    mlir.at(mlir.at(shared, begin), k * grid.sums_bytes), value, [None] * grid.registers
                )
            gpu.barrier()
            threads = config.warpgroups * WARPS * LANES
            me = mlir.to_index(mgpu.thread_idx())
            for column in range(0, grid.columns, threads):
                mine = mlir.plus(me, column)
                add_up = functools.partial(self._add_up, refs, shared, out, mlir.times(mine, FLOAT_BYTES))
                mlir.when(None if column + threads <= grid.columns else mlir.less(mine, grid.columns), add_up)

        run(*refs, self.ring, *values, self.block, self.first, self.team)

    def _add_up(self, refs: Sequence[ir.Value], shared: ir.Value, out: ir.Value, column: ir.Value) -> None:
        """Adds up one column of each of the blocks of sums that lie one after the other in shared memory."""
        rows, width = self.grid.sums
        for k, ref in enumerate(refs):
            begin = mlir.at(mlir.at(shared, column), k * self.grid.sums_bytes)
            found = [mlir.load(mlir.floats(1), mlir.at(begin, r * width * FLOAT_BYTES)) for r in range(rows)]
            total = functools.reduce(arith.addf, found)
            mlir.store(total, mlir.at(mlir.address(ref, mlir.GLOBAL), arith.addi(out, column)))

    def _store_columns(self, begin: ir.Value, value: Any, kept: Sequence[ir.Value | None]) -> None:
        for j, (there, register) in enumerate(zip(kept, value.registers.flat, strict=True)):
            here = mlir.at(begin, j * self.grid.stride * FLOAT_BYTES)
            mlir.when(there, functools.partial(mlir.store, register, here))


def _over_lanes(x: ir.Value, lanes: int) -> ir.Value:
    """The sum over so many lanes, a power of two, which all of them have; in an order that is always the same."""
    for k in range(lanes.bit_length() - 1):
        x = arith.addf(x, mgpu.utils.shfl_bfly(x, 1 << k))
    return x


def _odd(i: ir.Value) -> ir.Value:
    """1 of odd tiles, whose numbers have their own places: who is late may still read the other ones."""
    return arith.andi(i, mlir.index(1))


def _barriers(slots: ir.Value) -> int:
    """Where, of the slots' memory, the barriers of a cluster's meetings lie: at its end."""
    return ir.MemRefType(slots.type).shape[0] * FLOAT_BYTES - meetings.BARRIER_BYTES


def _place(grid: Grid, row: Any, first: Any, turn: int = 0) -> _Place:
    warp, lane = mlir.thread()
    warp = arith.remui(warp, mlir.index(WARPS))
    row = mlir.index(0) if row is None else mlir.plus(mlir.to_index(row), turn * grid.turn_rows)
    part = arith.addi(mlir.to_index(first), warp)
    lanes = LANES // grid.side
    if grid.side > 1:
        row = arith.addi(row, arith.divui(lane, mlir.index(lanes)))
        lane = arith.remui(lane, mlir.index(lanes))
    among, block = part, mlir.index(0)
    if grid.config.cluster > 1:
        among, block = arith.remui(part, mlir.index(grid.warps)), arith.divui(part, mlir.index(grid.warps))
    begin = mlir.times(block, grid.block_columns)
    end = arith.minsi(mlir.plus(begin, grid.block_columns), mlir.index(grid.columns))
    column = arith.addi(begin, mlir.times(lane, grid.vector))
    if grid.shared:
        column = arith.addi(column, mlir.times(among, grid.span))
    else:
        row = arith.addi(row, mlir.times(warp, grid.side))
    starts = [mlir.plus(column, j * grid.stride) for j in range(grid.registers)]
    # What no thread lacks needs no question.
    kept = [None if j < grid.full else mlir.less(start, end) for j, start in enumerate(starts)]
    return _Place(row, column, lane, part, among, begin, end, kept)


def _offset(grid: Grid, place: _Place, width: int) -> ir.Value:
    """In bytes, of a thread's first element in an array of rows."""
    return mlir.times(arith.addi(mlir.times(place.row, grid.columns), place.column), width)


def _count(grid: Grid, begin: ir.Value, end: ir.Value) -> ir.Value:
    """float32: how many columns a warp has whose first one is at `begin`, of a block whose columns end at `end`."""
    total = mlir.index(grid.full * grid.span)
    for j in range(grid.full, grid.registers):
        left = arith.subi(end, mlir.plus(begin, j * grid.stride))
        left = arith.minsi(arith.maxsi(left, mlir.index(0)), mlir.index(grid.span))
        total = arith.addi(total, left)
    return arith.uitofp(ir.F32Type.get(), mlir.to_int32(total))


def launch(
    name: str,
    body: Any,
    config: Config,
    sources: Sequence[Array],
    numbers: Sequence[Array],
    weights: Sequence[Array],
    *,
    rows_out: Sequence[Any],
    numbers_out: int,
    sums_out: int,
    values: int,
    last_first: bool = False,
    implementation: str,
) -> list[Array]:
    """Walks over rows, by the body of a kernel.

    Args:
      name: Of the kernel, as profiles show it.
      body: body(walk, number_refs, weight_refs, outs), `walk` a `Walk` or a `SimulatedWalk` over `sources`.
      config: Launch choices.
      sources: Arrays of rows, all of one shape [..., n] and dtype, which the walk loads.
      numbers: Of one float32 a row.
      weights: Of one number a column.
      rows_out: Dtypes of the results that are rows,
      numbers_out: how many then are float32[rows],
      sums_out: and how many float32[blocks, n], each block's sums over its rows.
      values: At most how many numbers of a row the body exchanges at once.
      last_first: Whether blocks walk from the last row to the first.
      implementation: "mosaic" or "interpret".
    """
    simulated = implementation == "interpret"
    if simulated:  # by one team of one warpgroup
        config = dataclasses.replace(config, warps=min(config.warps, WARPS), warpgroups=1, cluster=1)
    n = sources[0].shape[-1]
    grid = Grid(sources[0].size // n, n, sources[0].dtype.itemsize, config)
    sources = [a.reshape(grid.rows, n) for a in sources]
    numbers = [a.reshape(grid.rows) for a in numbers]
    rows, columns = grid.rows, n
    if simulated:
        rows, columns = grid.tiles * grid.tile_rows, grid.part * config.warps
        more = (0, rows - grid.rows), (0, columns - n)
        sources = [jnp.pad(a, more) for a in sources]
        numbers = [jnp.pad(a, more[:1]) for a in numbers]
        weights = [jnp.pad(a, more[1:]) for a in weights]

    def kernel(*refs: Any) -> None:
        split = [len(sources), len(numbers), len(weights), len(rows_out) + numbers_out + sums_out]
        source_refs, number_refs, weight_refs, outs, scratch = _split(refs, *split)
        walk = (
            SimulatedWalk(grid, last_first, source_refs) if simulated else Walk(grid, last_first, source_refs, *scratch)
        )
        body(walk, number_refs, weight_refs, outs)

    kinds: dict[str, Any] = {}
    if not simulated:
        ring_bytes = max(16, grid.ring_bytes(len(sources)), grid.sums_bytes * sums_out)
        slots = values * config.turns * grid.slots
        if config.cluster > 1:
            slots += meetings.BARRIER_BYTES // FLOAT_BYTES
        kinds["scratch_types"] = [plgpu.SMEM((ring_bytes,), jnp.int8), plgpu.SMEM((slots,), jnp.float32)]
        if config.cluster > 1:
            kinds |= {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
        if config.warpgroups > 1:
            kinds |= {"num_threads": config.warpgroups, "thread_name": "warpgroup"}
    results = plgpu.kernel(
        kernel,
        out_type=[
            *[jax.ShapeDtypeStruct((rows, columns), dtype) for dtype in rows_out],
            *[jax.ShapeDtypeStruct((rows,), jnp.float32)] * numbers_out,
            *[jax.ShapeDtypeStruct((grid.blocks, columns), jnp.float32)] * sums_out,
        ],
        grid=(grid.blocks,),
        grid_names=("block",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=dispatch.interpret_params(implementation),
        **kinds,
    )(*sources, *numbers, *weights)
    if simulated:
        row_outs, number_outs, sums = _split(results, len(rows_out), numbers_out)
        results = [a[: grid.rows, :n] for a in row_outs]
        results += [*[a[: grid.rows] for a in number_outs], *[a[:, :n] for a in sums]]
    return [varying_like(sources[0], a) for a in results]


def _split(refs: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    """Consecutive parts of these sizes, and what is left."""
    parts = []
    for size in sizes:
        parts.append(refs[:size])
        refs = refs[size:]
    return [*parts, refs]
