"""The kernels of LayerNorm, forward and backward: tiles of rows that come through a ring in shared memory.

A block of threads stays on its processor and walks over tiles of a few rows. A ring of
tiles in shared memory is filled by asynchronous copies several tiles ahead, which keeps enough bytes in flight however
long the arithmetic of a tile takes. Of a tile a warp has whole rows where rows are short, so that a sum is a few
shuffles; four warps share a row where it is longer, several warpgroups where it is longer still. The backward keeps its
sums over rows, dscale and dbias, in registers all the way, and writes them once a block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels.dispatch import plgpu

Array = jax.Array

_SHARED_BYTES = 220 * 1024  # of the 227 KB a block may have, less what barriers and sums need
_PROCESSORS = 132  # of an H200; a launch of more blocks than fit is right too, only slower


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Launch choices.

    Attributes:
      rows: Rows of a tile, a power of two: 1, 2, or warps' worth of whole rows.
      warpgroups: Threads of a block / 128; they share a row.
      stages: Tiles of a block in shared memory, one of them in work.
      blocks: Blocks of one processor.
      hold: Whether scale and bias stay in registers; else every tile reads them through the caches.
    """

    rows: int
    warpgroups: int
    stages: int
    blocks: int
    hold: bool = True


# (pass, n, bytes of an element) -> what was faster on an H200 than the rule below
# (benchmarks/results/layer-norm-nvidia-h200.md).
_TUNED: dict[tuple[str, int, int], Config] = {
    ("forward", 1024, 2): Config(rows=4, warpgroups=1, stages=3, blocks=8),  # 86.8 us where the rule has 89.6
    ("forward", 1024, 4): Config(rows=4, warpgroups=1, stages=3, blocks=4),  # 157 us, 161
    ("backward", 8192, 4): Config(rows=1, warpgroups=4, stages=3, blocks=1),  # 447 us, 464
}


def config_for(kind: str, n: int, itemsize: int, streams: int) -> Config:
    """The launch of rows of n elements: the tuned one, or by the rules of thumb that were the start of tuning.

    Only n and the dtype count, never the number of rows, so a row's result does not depend on its neighbours.

    Args:
      kind: "forward" or "backward".
      n: Elements of a row.
      itemsize: Bytes of an element.
      streams: Arrays that a tile is copied from.
    """
    if config := _TUNED.get((kind, n, itemsize)) if streams == (1 if kind == "forward" else 2) else None:
        return config
    # About 32 elements a thread: their weights (and sums) fit its registers, and three or four blocks a processor.
    rows = min(32, 2 ** max(0, (4096 // n).bit_length() - 1))
    wanted = pl.cdiv(n, 4096)
    warpgroups = next((w for w in (1, 2, 4, 8) if w >= wanted and (w == 1 or n % (128 * w) == 0)), 1)
    blocks = max(1, (4 if kind == "forward" else 2) // warpgroups)
    tile_bytes = rows * n * itemsize * streams
    # A group of barriers has 32 at most, one for each warpgroup's stage.
    stages = max(2, min(8, 32 // warpgroups, _SHARED_BYTES * 3 // 4 // (blocks * tile_bytes)))
    while blocks > 1 and blocks * stages * tile_bytes > _SHARED_BYTES:
        blocks -= 1
    return Config(
        rows=rows,
        warpgroups=warpgroups,
        stages=stages,
        blocks=blocks,
        hold=n <= 4096 * warpgroups and warpgroups <= (4 if kind == "forward" else 2),
    )


def unserved(kind: str, x: Any, streams: int) -> str | None:
    """Why a pass's kernel cannot take rows like x's, or None."""
    n, dtype = jnp.shape(x)[-1], jnp.result_type(x)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"the kernel takes float32, bfloat16 and float16, not {dtype}"
    if 0 in jnp.shape(x):
        return "there is nothing to normalise"
    if n < 32 or n * dtype.itemsize % 16:
        return f"the kernel takes rows of 32 elements and more whose bytes divide by 16, not of {n} {dtype} elements"
    config = config_for(kind, n, dtype.itemsize, streams)
    if config.stages * config.rows * n * dtype.itemsize * streams > _SHARED_BYTES:
        return f"two rows of {n} {dtype} elements of {streams} arrays do not fit shared memory"
    # The backward keeps two sums for each element of a row; the forward's code grows with the elements of a thread.
    if n > config.warpgroups * (8192 if kind == "backward" else 16384):
        return f"a row of {n} elements does not divide among enough threads"
    return None


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


# One derivative for all implementations. XLA's own of the reference reads and writes nearly twice as much.
@dataclasses.dataclass(frozen=True)
class _Walk:
    """How a block's threads lie on a tile, and how the blocks walk over the tiles.

    Where several warpgroups share a row, each of their warps has a part of it to itself: the array is seen as one of
    more rows, `parts` for each, of which a warpgroup takes four.

    A row, or a part, is cut into chunks of `span` elements, one vector of up to 16 bytes a thread. The last chunk of a
    ragged row begins early, so that it ends where the row ends; what it has in common with the chunk before is written
    twice, with the same values, and left out of sums along the row. Likewise the last tile begins early.
    """

    config: Config
    rows: int  # of the whole array
    n: int
    itemsize: int

    @property
    def parts(self) -> int:
        return 4 * self.config.warpgroups if self.config.warpgroups > 1 else 1

    @property
    def height(self) -> int:
        """Rows, or parts of one, that a warpgroup has of a tile."""
        return 4 if self.parts > 1 else self.config.rows

    @property
    def width(self) -> int:
        return self.n // self.parts

    @property
    def view(self) -> tuple[int, int]:
        """Shape in which a kernel sees the array."""
        return self.rows * self.parts, self.width

    @property
    def vector(self) -> int:
        """Elements of a thread that lie together."""
        vector, warps = 16 // self.itemsize, 4 // min(4, self.height)
        while vector > 1 and (32 * vector * warps > self.width or (self.parts > 1 and self.width % (32 * vector))):
            vector //= 2
        return vector

    @property
    def span(self) -> int:
        return 32 * self.vector * (4 // min(4, self.height))

    @property
    def chunks(self) -> list[int]:
        """Where chunks begin."""
        whole = list(range(0, self.width - self.span + 1, self.span))
        return whole + [self.width - self.span] * bool(self.width % self.span)

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.rows, self.config.rows)

    @property
    def grid(self) -> int:
        return min(self.tiles, self.config.blocks * _PROCESSORS)

    @property
    def layout(self) -> Any:
        """Of a chunk in registers. Along a row: warps, then lanes, then vectors."""
        vector, lanes = self.vector, 32 * self.vector
        if self.height == 1:
            return plgpu.Layout.WG_STRIDED((self.span,), vec_size=vector)
        if self.height == 2:
            return plgpu.Layout.TILED(plgpu.Tiling(((2, self.span), (lanes,), (vector,))), (-4, -3), (-2,), -1)
        return plgpu.Layout.TILED(plgpu.Tiling(((4, lanes), (vector,))), (-3,), (-2,), -1)

    @property
    def weights_layout(self) -> Any:
        return self.layout if self.single else self.layout.reduce(0)

    @property
    def single(self) -> bool:
        """Whether a tile is one row; what is known of a row is a scalar then."""
        return self.config.rows == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a chunk."""
        return (self.span,) if self.height == 1 else (self.height, self.span)

    def place(self, i: Array) -> Any:
        """Index of the rows of the i-th tile of this block."""
        return self.first_row(i) if self.single else pl.ds(self.first_row(i), self.config.rows)

    def weights(self, w: Array) -> Array:
        """Scale or bias as a kernel sees it."""
        return w.reshape(self.parts, self.width) if self.parts > 1 else w

    def seen(self, row: Any) -> Any:
        """Index, in the view, of what this warpgroup has of a tile that begins at a row."""
        if self.parts > 1:
            return pl.ds(row * self.parts + lax.axis_index("warpgroup") * 4, 4)
        return row if self.single else pl.ds(row, self.height)

    def indices(self, dim: int) -> Array:
        """int32 of a chunk's shape: each element's place along a dim of it."""
        return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, self.shape, len(self.shape) + dim), self.layout)

    def first_row(self, i: Array) -> Array:
        """Of the i-th tile of this block."""
        return jnp.minimum((lax.axis_index("block") + i * self.grid) * self.config.rows, self.rows - self.config.rows)

    @property
    def count(self) -> Array:
        """Number of tiles of this block."""
        return lax.div(self.tiles - lax.axis_index("block") + self.grid - 1, self.grid)

    def scratch(self, dtype: Any, streams: int, sums: int) -> list[Any]:
        """The ring and its barriers; and for sums along rows that warpgroups share, places and a barrier."""
        groups, config = self.config.warpgroups, self.config
        padded = pl.cdiv(self.width, self.span) * self.span
        return [
            plgpu.SMEM((groups, config.stages, streams, self.height, padded), dtype),
            plgpu.Barrier(num_arrivals=streams * self._copies, num_barriers=(groups, config.stages)),
            plgpu.SMEM((2, sums, groups, 4), jnp.float32),
            plgpu.Barrier(num_arrivals=groups),
        ]

    @property
    def _copies(self) -> int:
        """Of a tile: one where its rows are contiguous on both sides."""
        return self.height if self.width % self.span else 1

    def fetch(self, i: Array, sources: Sequence[Any], ring: Any, full: Any) -> None:
        """Begins to copy the i-th tile of this block."""
        group, slot = lax.axis_index("warpgroup"), lax.rem(i, self.config.stages)
        first = self.first_row(i) * self.parts + (group * 4 if self.parts > 1 else 0)
        height = self.height // self._copies
        for s, source in enumerate(sources):
            for row in range(0, self.height, height):
                plgpu.copy_gmem_to_smem(
                    source.at[pl.ds(first + row, height)],
                    ring.at[group, slot, s, pl.ds(row, height), pl.ds(0, self.width)],
                    full.at[group, slot],
                    oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )

    def over_tiles(
        self, sources: Sequence[Any], ring: Any, full: Any, tile: Callable[[Array, Any, Any], Any], carry: Any
    ) -> Any:
        """Calls tile(i, its part of the ring, carry) -> carry for every tile of this block."""
        ahead = self.config.stages - 1
        for i in range(ahead):
            pl.when(i < self.count)(functools.partial(self.fetch, jnp.int32(i), sources, ring, full))

        def step(i: Array, carry: Any) -> Any:
            plgpu.commit_smem()  # all threads are done with the slot that is filled next
            pl.when(i + ahead < self.count)(functools.partial(self.fetch, i + ahead, sources, ring, full))
            group, slot = lax.axis_index("warpgroup"), lax.rem(i, self.config.stages)
            plgpu.barrier_wait(full.at[group, slot])
            return tile(i, ring.at[group, slot], carry)

        return lax.fori_loop(0, self.count, step, carry)

    def load(self, ref: Any, chunk: int) -> Array:
        """A chunk of a tile, in float32."""
        row = 0 if self.height == 1 else slice(None)
        return plgpu.load(ref.at[row, pl.ds(chunk, self.span)], layout=self.layout).astype(jnp.float32)

    def load_weights(self, ref: Any, chunk: int) -> Array:
        here = pl.ds(chunk, self.span)
        here = ref.at[self.seen(0), here] if self.parts > 1 else ref.at[here]
        return plgpu.load(here, layout=self.weights_layout, optimized=False).astype(jnp.float32)

    def load_statistic(self, ref: Any, i: Array) -> Array:
        if self.single:
            return ref[self.place(i)]
        return plgpu.load(ref.at[self.place(i)], layout=self.layout.reduce(1), optimized=False)

    def across(self, row: Array) -> Array:
        """What is known of a row, at each element of a chunk."""
        return row if self.single else lax.broadcast_in_dim(row, self.shape, (0,))

    def down(self, weights: Array) -> Array:
        """[span] at each row of a chunk."""
        return weights if self.single else lax.broadcast_in_dim(weights, self.shape, (1,))

    def means(self, terms: Callable[[int], Sequence[Array]], parts: Any, met: Any, turn: Any) -> list[Array]:
        """Means along rows, as `load_statistic` has them, of what `terms` gives of a chunk."""
        sums: list[Array] = []
        for chunk in self.chunks:
            news = list(terms(chunk))
            if chunk % self.span:
                fresh = self.indices(-1) >= self.span - self.width % self.span
                news = [jnp.where(fresh, new, 0.0) for new in news]
            sums = [a + b for a, b in zip(sums, news, strict=True)] if sums else news
        totals = [jnp.sum(a, axis=-1) for a in sums]
        if self.config.warpgroups > 1:
            totals = self._over_warpgroups(totals, parts, met, turn)
        return [a * (1 / self.n) for a in totals]

    def store_sums(self, out: Any, sums: Sequence[Array], columns: Any) -> None:
        """Writes a block's sums over its rows, of each chunk float32[rows, span], to its row of `out`."""
        block = lax.axis_index("block")
        if self.single:
            for chunk, a in zip(self.chunks, sums, strict=True):
                _store(out.at[self.seen(block), pl.ds(chunk, self.span)], a)
            return
        plgpu.commit_smem()
        for chunk, a in zip(self.chunks, sums, strict=True):
            _store(columns.at[:, pl.ds(chunk, self.span)], a)
        plgpu.commit_smem()
        for chunk in self.chunks:
            here = pl.ds(chunk, self.span)
            rows = [
                plgpu.load(columns.at[r, here], layout=self.layout.reduce(0), optimized=False)
                for r in range(self.config.rows)
            ]
            _store(out.at[block, here], functools.reduce(jnp.add, rows))

    def _over_warpgroups(self, sums: Sequence[Array], parts: Any, met: Any, turn: Any) -> list[Array]:
        """Adds the warpgroups' sums, in one order for all. Places alternate: who is late still reads the other one."""
        group = lax.axis_index("warpgroup")
        for k, a in enumerate(sums):
            _store(parts.at[turn, k, group], a)
        plgpu.commit_smem()
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        places = [(g, warp) for g in range(self.config.warpgroups) for warp in range(4)]
        return [functools.reduce(jnp.add, [parts[turn, k, *place] for place in places]) for k in range(len(sums))]

    def run(
        self,
        body: Callable[..., None],
        name: str,
        out_type: Any,
        scratch: Any,
        implementation: str,
        args: Sequence[Array],
    ) -> list[Array]:
        """Launches a kernel. Its results vary over the mesh axes that its first argument does."""
        kernel = plgpu.kernel(
            body,
            kernel_name=name,
            out_type=out_type,
            grid=(self.grid,),
            grid_names=("block",),
            num_threads=self.config.warpgroups,
            thread_name="warpgroup",
            scratch_types=scratch,
            # Barriers are few and stand where they are needed: by default every store has two of them.
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
                unsafe_no_auto_barriers=True,
            ),
            interpret=dispatch.interpret_params(implementation),
        )
        return [varying_like(args[0], a) for a in kernel(*args)]


def _walk(kind: str, x: Array, streams: int, config: Config | None) -> tuple[_Walk, int]:
    """The walk over x's rows, and how many rows to add so that they fill a tile."""
    n, itemsize = x.shape[-1], x.dtype.itemsize
    config = config or config_for(kind, n, itemsize, streams)
    rows = x.size // n
    return _Walk(config, max(rows, config.rows), n, itemsize), max(0, config.rows - rows)


def _padded(a: Array, rows: int) -> Array:
    return jnp.pad(a, ((0, rows),) + ((0, 0),) * (a.ndim - 1)) if rows else a


def forward_kernel(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    residual: Array | None,
    *,
    epsilon: float,
    implementation: str,
    config: Config | None = None,
) -> tuple[Array, Array | None, Array, Array]:
    """y, the sum with the residual if there is one, mean float32[rows], rstd float32[rows]."""
    sources = [x] if residual is None else [x, residual]
    walk, missing = _walk("forward", x, len(sources), config)
    sources = [_padded(a.reshape(-1, walk.n), missing).reshape(walk.view) for a in sources]
    weights = [walk.weights(w) for w in (scale, bias) if w is not None]

    def body(*refs: Any) -> None:
        streams, weight_refs, outs, scratch = _split(refs, len(sources), len(weights), len(sources) + 2)
        ys, mean_out, rstd_out = outs[:-2], *outs[-2:]
        ring, full, parts, met = scratch
        held = [[walk.load_weights(w, c) for w in weight_refs] for c in walk.chunks] if walk.config.hold else None

        def tile(i: Array, slot: Any, _: Any) -> None:
            def rows(chunk: int) -> Array:
                if residual is None:
                    return walk.load(slot.at[0], chunk)
                added = walk.load(slot.at[0], chunk) + walk.load(slot.at[1], chunk)
                return added.astype(x.dtype).astype(jnp.float32)

            (mean,) = walk.means(lambda c: [rows(c)], parts, met, 0)
            (var,) = walk.means(lambda c: [lax.square(rows(c) - walk.across(mean))], parts, met, 1)
            rstd = lax.rsqrt(var + epsilon)
            here = walk.seen(walk.first_row(i))
            for k, chunk in enumerate(walk.chunks):
                there = here, pl.ds(chunk, walk.span)
                value = rows(chunk)
                if residual is not None:
                    _store(ys[1].at[there], value.astype(x.dtype))
                y = (value - walk.across(mean)) * walk.across(rstd)
                factors = held[k] if held else [walk.load_weights(w, chunk) for w in weight_refs]
                if scale is not None:
                    y = y * walk.down(factors[0])
                if bias is not None:
                    y = y + walk.down(factors[-1])
                _store(ys[0].at[there], y.astype(x.dtype))
            _store(mean_out.at[walk.place(i)], mean)
            _store(rstd_out.at[walk.place(i)], rstd)

        walk.over_tiles(streams, ring, full, tile, None)

    out = jax.ShapeDtypeStruct(walk.view, x.dtype)
    statistic = jax.ShapeDtypeStruct((walk.rows,), jnp.float32)
    outs = walk.run(
        body,
        "zerojax_layer_norm",
        [out] * len(sources) + [statistic] * 2,
        walk.scratch(x.dtype, len(sources), 1),
        implementation,
        [*sources, *weights],
    )
    rows = x.size // walk.n
    *ys, mean, rstd = [a[:rows] if missing else a for a in outs]
    ys = [y.reshape(x.shape) for y in ys]
    return ys[0], ys[1] if residual is not None else None, mean, rstd


def backward_kernel(
    x: Array,
    dy: Array,
    dtotal: Array | None,
    scale: Array | None,
    mean: Array,
    rstd: Array,
    *,
    implementation: str,
    config: Config | None = None,
) -> tuple[Array, Array, Array]:
    """dx in x's dtype, dscale and dbias float32."""
    sources = [x, dy] if dtotal is None else [x, dy, dtotal]
    walk, missing = _walk("backward", x, len(sources), config)
    # A padded row has zero statistics and gradient, and adds nothing.
    sources = [_padded(a.reshape(-1, walk.n), missing).reshape(walk.view) for a in sources]
    statistics = [_padded(a, missing) for a in (mean, rstd)]
    weights = [] if scale is None else [walk.weights(scale)]
    ragged = walk.rows % walk.config.rows

    def body(*refs: Any) -> None:
        streams, stat_refs, weight_refs, outs, scratch = _split(refs, len(sources), 2, len(weights), 3)
        dx_out, *sum_outs = outs
        ring, full, parts, met, columns = scratch
        held = [[walk.load_weights(w, c) for w in weight_refs] for c in walk.chunks] if walk.config.hold else None
        nothing = plgpu.layout_cast(jnp.zeros(walk.shape, jnp.float32), walk.layout)

        def tile(i: Array, slot: Any, carry: Any) -> Any:
            (mean, rstd), sums = carry
            ahead = [walk.load_statistic(a, i + 1) for a in stat_refs]  # not waited for in this tile

            def terms(k: int) -> tuple[Array, Array, Array]:
                chunk = walk.chunks[k]
                centred = (walk.load(slot.at[0], chunk) - walk.across(mean)) * walk.across(rstd)
                dy = walk.load(slot.at[1], chunk)
                factors = held[k] if held else [walk.load_weights(w, chunk) for w in weight_refs]
                return centred, dy, dy * walk.down(factors[0]) if factors else dy

            def products(chunk: int) -> tuple[Array, Array]:
                centred, _, dcentred = terms(walk.chunks.index(chunk))
                return dcentred * centred, dcentred

            along, shift = walk.means(products, parts, met, lax.rem(i, 2))
            here = walk.seen(walk.first_row(i))
            added = []
            for k, chunk in enumerate(walk.chunks):
                centred, dy, dcentred = terms(k)
                dx = (dcentred - (walk.across(shift) + centred * walk.across(along))) * walk.across(rstd)
                if dtotal is not None:
                    dx = dx + walk.load(slot.at[2], chunk)
                _store(dx_out.at[here, pl.ds(chunk, walk.span)], dx.astype(x.dtype))
                news = [dy * centred, dy]
                if ragged:  # the last tile repeats rows of the one before
                    repeated = (lax.axis_index("block") + i * walk.grid) * walk.config.rows - walk.first_row(i)
                    news = [jnp.where(walk.indices(-2) >= repeated, new, 0.0) for new in news]
                added.append([a + b for a, b in zip(sums[k], news, strict=True)])
            return ahead, added

        start = [walk.load_statistic(a, jnp.int32(0)) for a in stat_refs]
        _, sums = walk.over_tiles(streams, ring, full, tile, (start, [[nothing, nothing] for _ in walk.chunks]))
        for q, out in enumerate(sum_outs):
            walk.store_sums(out, [pair[q] for pair in sums], columns)

    columns = plgpu.SMEM((walk.config.rows, pl.cdiv(walk.n, walk.span) * walk.span), jnp.float32)
    if walk.single:
        columns = plgpu.SMEM((1, 128), jnp.float32)
    slab = jax.ShapeDtypeStruct((walk.grid * walk.parts, walk.width), jnp.float32)
    dx, dscale, dbias = walk.run(
        body,
        "zerojax_layer_norm_backward",
        [jax.ShapeDtypeStruct(walk.view, x.dtype), slab, slab],
        [*walk.scratch(x.dtype, len(sources), 2), columns],
        implementation,
        [*sources, *statistics, *weights],
    )
    dx = dx[: x.size // walk.n] if missing else dx
    dscale, dbias = (jnp.sum(a.reshape(-1, walk.n), 0) for a in (dscale, dbias))
    return dx.reshape(x.shape), dscale, dbias


def _store(ref: Any, value: Array) -> None:
    """`ref[...] = value`, which from jax 0.12 on refuses what is not made of whole 32-byte sectors."""
    if hasattr(plgpu, "store") and value.ndim:
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _split(refs: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    """Consecutive parts of these sizes, and what is left."""
    parts = []
    for size in sizes:
        parts.append(refs[:size])
        refs = refs[size:]
    return [*parts, refs]
