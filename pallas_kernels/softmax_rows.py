"""The kernels of softmax: rows in the registers of warps, read once and written once.

A row lies in the registers of one warp, or of 4, 8 or 16 warps of a thread block, or of up to 16 such blocks (a
cluster). Warps that share a row find their own maximum and sum, tell each other once through shared memory, and then
scale what they hold: x is read once, however long the row (the online rule, arXiv:1805.02867).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, scf, vector
from jaxlib.mlir.dialects import gpu, nvvm

from pallas_kernels import dispatch
from pallas_kernels.dispatch import plgpu

WARPS = 4  # of a warpgroup
LANES = 32  # of a warp
LONGEST = 2**19  # elements of a row: 16 blocks of 16 warps, 64 elements a thread
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Launch choices: they change speed, and the order of a row's sum, which depends on its length alone.

    Attributes:
      warps: That share a row: 1, or 4 times `warpgroups` times `cluster`.
      warpgroups: In a thread block.
      cluster: Thread blocks that share a row, at most 16.
      rows: That one warp takes at once, where it has them for itself.
    """

    warps: int = 4
    warpgroups: int = 1
    cluster: int = 1
    rows: int = 1


_ROW, _BLOCK, _TWO, _FOUR = (
    Config(warps=1),
    Config(),
    Config(warps=8, warpgroups=2),
    Config(warps=16, warpgroups=4),
)
# (columns, itemsize, backward) -> what was fastest on an H200, where that is not what the rule below gives; beside it
# what part that is of a copy's bandwidth (jax 0.11.2, 2**28 elements). All that was tried:
# benchmarks/results/softmax-nvidia-h200.md.
_TUNED: dict[tuple[int, int, bool], Config] = {
    (512, 2, False): _ROW,  # 0.95 of the copy
    (512, 4, False): _BLOCK,  # 0.93
    (512, 4, True): _ROW,  # 0.98
    (1024, 2, False): Config(warps=1, rows=2),  # 0.95
    (1024, 2, True): _BLOCK,  # 0.97
    (1024, 4, False): _BLOCK,  # 0.95
    (1024, 4, True): _BLOCK,  # 0.97
    (4096, 4, True): _FOUR,  # 0.96
    (8192, 2, True): Config(warps=8, cluster=2),  # 0.99
    (8192, 4, False): _TWO,  # 0.93
    (8192, 4, True): _FOUR,  # 1.00
    (16384, 4, True): _TWO,  # 1.00
    (32768, 2, True): _FOUR,  # 0.94
    (32768, 4, True): Config(warps=32, warpgroups=2, cluster=4),  # 1.00
    (65536, 2, True): Config(warps=32, warpgroups=4, cluster=2),  # 0.88
    (131072, 2, True): Config(warps=64, warpgroups=4, cluster=4),  # 0.84
    (262144, 2, False): Config(warps=128, warpgroups=2, cluster=16),  # 0.29
    (262144, 2, True): Config(warps=128, warpgroups=4, cluster=8),  # 0.71
    (262144, 4, False): Config(warps=128, warpgroups=2, cluster=16),  # 0.51
    (262144, 4, True): Config(warps=128, warpgroups=2, cluster=16),  # 0.82
}


def config_for(columns: int, itemsize: int, *, backward: bool) -> Config:
    """Launch choices for rows of a length: the tuned ones, else as few warps as hold the row in registers.

    Args:
      columns: Length of a row.
      itemsize: Of an element, in bytes.
      backward: Whether for the backward kernel, which holds two rows.

    Example:
      >>> config_for(1000, 4, backward=False)
      Config(warps=1, warpgroups=1, cluster=1, rows=1)
    """
    if (columns, itemsize, backward) in _TUNED:
        return _TUNED[columns, itemsize, backward]
    if columns <= 32 * LANES:
        return Config(warps=1, rows=min(4, 16 * LANES // columns) or 1)
    held = (32 if backward else 64) * LANES * WARPS  # elements a warpgroup, 32 or 64 a thread
    if columns <= held:
        return Config()
    sharing = 1 << math.ceil(math.log2(columns / held))
    warpgroups = min(sharing, 4)
    cluster = min(sharing // warpgroups, 16)
    return Config(warps=WARPS * warpgroups * cluster, warpgroups=warpgroups, cluster=cluster)


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static of a call of `softmax`."""

    scale: float
    causal: bool
    implementation: str


@dataclasses.dataclass(frozen=True)
class _Grid:
    """How rows lie over warps, and in the registers of their lanes.

    A block of values is [4 * rows, part]: the row of a block that warp w of the warpgroup holds is w, w + 4 and so on.
    Where a row is its warps' alone (`shared` False) they are rows of the array; else they are parts of one row.
    """

    rows: int
    columns: int
    vector: int
    config: Config
    queries: int | None  # of a causal call

    @classmethod
    def make(cls, shape: Sequence[int], dtype: Any, *, causal: bool, config: Config) -> _Grid:
        columns = shape[-1]
        vector = math.gcd(columns, 16 // np.dtype(dtype).itemsize)
        return cls(math.prod(shape[:-1]), columns, vector, config, shape[-2] if causal else None)

    @property
    def shared(self) -> bool:
        return self.config.warps > 1

    @property
    def part(self) -> int:
        """Columns that a warp holds, rounded up."""
        return math.ceil(self.columns / (self.config.warps * LANES * self.vector)) * LANES * self.vector

    @property
    def block(self) -> tuple[int, int]:
        return WARPS * self.config.rows, self.part

    @property
    def blocks(self) -> int:
        return self.rows if self.shared else math.ceil(self.rows / self.block[0])

    @property
    def layout(self) -> Any:
        """Warps over rows, lanes over columns, so that a warp reads LANES * vector neighbours at once."""
        tiling = mgpu.fragmented_array.Tiling(((WARPS, LANES * self.vector), (self.vector,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def limit(self, row: Any) -> Any:
        """How many columns of a row are kept; none or fewer where nothing is."""
        if self.queries is None:
            return self.columns
        return row % self.queries + (1 + self.columns - self.queries)


def _forward_body(grid: _Grid, call: Call, tools: _Tools, x_ref: Any, y_ref: Any) -> None:
    sign = math.copysign(1.0, call.scale)
    rate = abs(call.scale) * _LOG2_E
    x = tools.load(x_ref, -sign * math.inf).astype(jnp.float32)
    x = x if sign > 0 else -x
    largest = jnp.max(x, axis=1)
    if not grid.shared:
        shifted = jnp.exp2((x - tools.spread(largest)) * rate)
        tools.store(y_ref, shifted * tools.spread(1.0 / jnp.sum(shifted, axis=1)))
        return
    # A part that is masked, or -inf, throughout has no maximum to subtract.
    shifted = jnp.exp2((x - tools.spread(jnp.where(largest == -math.inf, 0.0, largest))) * rate)
    maxima, sums = tools.exchange(largest, jnp.sum(shifted, axis=1))
    highest = _tree(jnp.maximum, maxima)
    total = _tree(jnp.add, [s * jnp.exp2((m - highest) * rate) for m, s in zip(maxima, sums, strict=True)])
    tools.store(y_ref, shifted * tools.spread(jnp.exp2((largest - highest) * rate) * (1.0 / total)))


def _backward_body(grid: _Grid, call: Call, tools: _Tools, y_ref: Any, dy_ref: Any, dx_ref: Any) -> None:
    y, dy = (tools.load(ref, 0.0).astype(jnp.float32) for ref in (y_ref, dy_ref))
    dot = jnp.sum(y * dy, axis=1)
    if grid.shared:
        (parts,) = tools.exchange(dot)
        tools.store(dx_ref, (dy - _tree(jnp.add, parts)) * (y * call.scale))
    else:
        tools.store(dx_ref, (dy - tools.spread(dot)) * (y * call.scale))


def _tree(combine: Callable[[Any, Any], Any], values: Sequence[Any]) -> Any:
    """Pairs, and pairs of pairs: short chains, in an order that is always the same."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return combine(_tree(combine, values[:half]), _tree(combine, values[half:]))


class _Tools:
    """What a body may do to a block of its rows, on a GPU: loads and stores that skip what is masked or not there."""

    def __init__(self, grid: _Grid, slots: Any):
        self.grid, self.slots = grid, slots  # slots: shared memory, one element a part and value
        config = grid.config
        self.row = jax.lax.axis_index("rows") * (1 if grid.shared else grid.block[0])
        self.first = jnp.int32(0)  # part of this warpgroup's first warp
        if config.cluster > 1:
            self.first += jax.lax.axis_index("cluster") * (config.warpgroups * WARPS)
        if config.warpgroups > 1:
            self.first += jax.lax.axis_index("warpgroup") * WARPS

    def spread(self, value: jax.Array) -> jax.Array:
        """A number a row, over its columns."""
        return jax.lax.broadcast_in_dim(value, self.grid.block, (0,))

    def load(self, ref: Any, fill: float) -> jax.Array:
        layout, shape = self.grid.layout, self.grid.block

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT),
            return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout),
        )
        def run(_: Any, ref: ir.Value, row: Any, first: Any) -> mgpu.FragmentedArray:
            element = ir.MemRefType(ref.type).element_type
            kind = layout.to_mgpu().registers_element_type(element)
            filled = vector.broadcast(kind, mgpu.c(fill, element))
            registers = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
            for at, place in zip(np.ndindex(*registers.shape), _places(self.grid, row, first), strict=True):
                read = lambda place=place: vector.load(kind, ref, [place.row, place.column], alignment=_bytes(kind))
                loaded = _if(_all([place.there, place.kept_first]), read, filled)
                registers[at] = loaded if place.kept is None else arith.select(place.kept, loaded, filled)
            return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

        return run(ref, self.row, self.first)

    def store(self, ref: Any, value: jax.Array) -> None:
        layout = self.grid.layout

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), layout, plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT), return_type=()
        )
        def run(_: Any, ref: ir.Value, value: mgpu.FragmentedArray, row: Any, first: Any) -> tuple[()]:
            for register, place in zip(value.registers.flat, _places(self.grid, row, first), strict=True):
                if place.kept is not None:
                    zero = vector.broadcast(register.type, mgpu.c(0.0, value.mlir_dtype))
                    register = arith.select(place.kept, register, zero)
                write = lambda register=register, place=place: vector.store(
                    register, ref, [place.row, place.column], alignment=_bytes(register.type)
                )
                _if(_all([place.there]), write)
            return ()

        run(ref, value.astype(ref.dtype), self.row, self.first)

    def exchange(self, *values: jax.Array) -> list[list[jax.Array]]:
        """For each value, which every warp has one of for its part: those of all parts of the row."""
        config = self.grid.config
        scalar = plgpu.ShapeDtypeStruct((), jnp.float32, layout=plgpu.Layout.WG_SPLAT)

        @plgpu.inline_mgpu(
            arg_types=(
                plgpu.RefType(),
                plgpu.Layout.WG_SPLAT,
                tuple(self.grid.layout.reduce(1) for _ in values),
            ),
            return_type=tuple(scalar for _ in range(len(values) * config.warps)),
        )
        def run(_: Any, mine: ir.Value, first: Any, values: Any) -> tuple[Any, ...]:
            everyone = [mine] if config.cluster == 1 else [_of_block(mine, block) for block in range(config.cluster)]
            warp, _ = _thread()
            part = arith.addi(_number(first), warp)
            for k, value in enumerate(values):
                number = vector.extract(value.registers.item(), [], [0])
                for slots in everyone:  # all lanes the same number; the memory takes it once
                    memref.store(number, slots, [_plus(part, k * config.warps)])
            if config.cluster > 1:
                nvvm.cluster_arrive(aligned=True)
                nvvm.cluster_wait(aligned=True)
            elif config.warpgroups > 1:
                gpu.barrier()
            else:
                mgpu.warpgroup_barrier()
            heard = [memref.load(mine, [_index(i)]) for i in range(len(values) * config.warps)]
            return tuple(mgpu.FragmentedArray.splat(x, ()) for x in heard)

        heard = run(self.slots, self.first, values)
        return [list(heard[k * config.warps : (k + 1) * config.warps]) for k in range(len(values))]


class _Simulated:
    """The same for the interpreter, which knows neither registers nor clusters: masks, and rows that are padded."""

    def __init__(self, grid: _Grid):
        self.grid = grid
        block = jax.lax.axis_index("rows")
        self.here = block if grid.shared else jax.experimental.pallas.ds(block * grid.block[0], grid.block[0])
        row = block if grid.shared else block * grid.block[0] + jnp.arange(grid.block[0])[:, None]
        columns = jnp.arange(grid.part * grid.config.warps).reshape(grid.block if grid.shared else (1, -1))
        self.kept = columns < grid.limit(row)

    def spread(self, value: jax.Array) -> jax.Array:
        return value[:, None]

    def load(self, ref: Any, fill: float) -> jax.Array:
        return jnp.where(self.kept, ref[self.here].reshape(self.grid.block), jnp.asarray(fill, ref.dtype))

    def store(self, ref: Any, value: jax.Array) -> None:
        ref[self.here] = jnp.where(self.kept, value, 0).astype(ref.dtype).reshape(ref[self.here].shape)

    def exchange(self, *values: jax.Array) -> list[list[jax.Array]]:
        return [[value[part] for part in range(self.grid.config.warps)] for value in values]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a register lies in the array, and what of it is there and kept; None stands for all, always."""

    row: ir.Value
    column: ir.Value
    there: ir.Value | None
    kept_first: ir.Value | None
    kept: ir.Value | None


def _places(grid: _Grid, row: Any, first: Any) -> list[_Place]:
    """The place of each of this thread's registers."""
    warp, lane = _thread()
    start = arith.muli(lane, _index(grid.vector))
    if grid.shared:
        start = arith.addi(start, arith.muli(arith.addi(_number(first), warp), _index(grid.part)))
    places = []
    for i in range(grid.config.rows):
        here = _number(row) if grid.shared else _plus(arith.addi(_number(row), warp), WARPS * i)
        row_there = None if grid.rows % grid.block[0] == 0 or grid.shared else _less(here, _index(grid.rows))
        if grid.queries is not None:
            limit = _plus(arith.remui(here, _index(grid.queries)), 1 + grid.columns - grid.queries)
        for j in range(grid.part // (LANES * grid.vector)):
            column = _plus(start, j * LANES * grid.vector)
            whole = grid.part * grid.config.warps == grid.columns
            there = _all([row_there, None if whole else _less(column, _index(grid.columns))])
            kept_first = kept = None
            if grid.queries is not None:
                kept_first = _less(column, limit)
                lanes = ir.VectorType.get((grid.vector,), ir.IndexType.get())
                each = arith.addi(vector.broadcast(lanes, column), vector.step(lanes))
                kept = _less(each, vector.broadcast(lanes, limit))
            places.append(_Place(here, column, there, kept_first, kept))
    return places


def _of_block(slots: ir.Value, block: int) -> ir.Value:
    """The same shared memory of another block of the cluster."""
    return mgpu.get_cluster_ref(slots, gpu.Dimension.x, _index(block))


def _thread() -> tuple[ir.Value, ir.Value]:
    """This thread's warp in the warpgroup, and lane in the warp."""
    thread = arith.index_cast(ir.IndexType.get(), mgpu.thread_idx())
    warp = arith.remui(arith.divui(thread, _index(LANES)), _index(WARPS))
    return warp, arith.remui(thread, _index(LANES))


def _index(n: int) -> ir.Value:
    return mgpu.c(n, ir.IndexType.get())


def _number(x: Any) -> ir.Value:
    """A scalar argument of `inline_mgpu` as an index."""
    return arith.index_cast(ir.IndexType.get(), x if isinstance(x, ir.Value) else x.registers.item())


def _plus(x: ir.Value, n: int) -> ir.Value:
    return arith.addi(x, _index(n))


def _less(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def _all(conditions: Sequence[ir.Value | None]) -> ir.Value | None:
    """Whether all hold; None where all are None, which is always."""
    some = [condition for condition in conditions if condition is not None]
    return functools.reduce(arith.andi, some) if some else None


def _if(condition: ir.Value | None, then: Callable[[], Any], otherwise: ir.Value | None = None) -> Any:
    """`then()` where the condition holds, else `otherwise`."""
    if condition is None:
        return then()
    results = [] if otherwise is None else [otherwise.type]
    branch = cast(Any, scf).IfOp(condition, results, has_else=otherwise is not None)
    with ir.InsertionPoint(branch.then_block):
        value = then()
        scf.yield_([value] if results else [])
    if otherwise is None:
        return None
    with ir.InsertionPoint(branch.else_block):
        scf.yield_([otherwise])
    return branch.results[0]


def _bytes(kind: ir.Type) -> int:
    return ir.VectorType(kind).shape[0] * mgpu.bytewidth(ir.VectorType(kind).element_type)


def _launch(name: str, body: Callable[..., None], call: Call, grid: _Grid, arrays: Sequence[jax.Array]) -> jax.Array:
    """Runs a body over rows: arrays[..., columns] in, one like them out."""
    shape, dtype = arrays[0].shape, arrays[0].dtype
    simulated = call.implementation == "interpret"
    config = grid.config
    rows, columns = grid.rows, grid.columns
    flat = [x.reshape(rows, columns) for x in arrays]
    if simulated:
        rows = grid.blocks * (1 if grid.shared else grid.block[0])
        columns = grid.part * config.warps
        flat = [jnp.pad(x, ((0, rows - grid.rows), (0, columns - grid.columns))) for x in flat]

    def kernel(*refs: Any) -> None:
        if simulated:
            body(grid, call, _Simulated(grid), *refs)
        elif grid.shared:
            body(grid, call, _Tools(grid, refs[-1]), *refs[:-1])
        else:
            body(grid, call, _Tools(grid, None), *refs)

    kinds: dict[str, Any] = {}
    if not simulated:
        if grid.shared:
            kinds["scratch_types"] = [plgpu.SMEM((2 * config.warps,), jnp.float32)]
        if config.cluster > 1:
            kinds |= {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
        if config.warpgroups > 1:
            kinds |= {"num_threads": config.warpgroups, "thread_name": "warpgroup"}
    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, columns), dtype),
        grid=(grid.blocks,),
        grid_names=("rows",),
        kernel_name=f"zerojax_{name}",
        # exp2 and 1/x by the hardware's instructions, right to 2 in the last place.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
        interpret=dispatch.interpret_params(call.implementation),
        **kinds,
    )(*flat)
    return y[: grid.rows, : grid.columns].reshape(shape)


def _batched(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Under `vmap` the new dim is one more leading dim: rows are independent."""

    @functools.partial(jax.jit, static_argnums=0)
    def call_it(call: Call, *arrays: jax.Array) -> jax.Array:
        mapped = jax.custom_batching.custom_vmap(functools.partial(run, call))

        @mapped.def_vmap
        def _(size: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
            whole = [
                x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
                for x, is_batched in zip(arrays, batched, strict=True)
            ]
            return call_it(call, *whole), True

        return mapped(*arrays)

    return call_it


def _grid_of(call: Call, x: jax.Array, *, backward: bool) -> _Grid:
    config = config_for(x.shape[-1], x.dtype.itemsize, backward=backward)
    if call.implementation == "interpret" and config.warps > WARPS:
        config = Config()  # the interpreter knows neither clusters nor what warpgroups say to each other
    return _Grid.make(x.shape, x.dtype, causal=call.causal, config=config)


@_batched
def forward(call: Call, x: jax.Array) -> jax.Array:
    """y of x: [..., columns]."""
    return _launch("softmax", _forward_body, call, _grid_of(call, x, backward=False), [x])


@_batched
def backward(call: Call, y: jax.Array, dy: jax.Array) -> jax.Array:
    """dx of y and dy: [..., columns]."""
    return _launch("softmax_backward", _backward_body, call, _grid_of(call, y, backward=True), [y, dy])
