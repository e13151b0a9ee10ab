"""The kernels of LayerNorm, forward and backward: blocks that walk over rows, which lie in the registers of warps.

x is read once. A warp finds the mean of what it has of a row, then the sum of squared differences from that mean; warps
that share a row combine their parts by Chan's formula, so that they tell each other once. The backward keeps its sums
over rows, dscale and dbias, in registers all the way; a second small kernel adds up those of all blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.column_sums import column_sums
from pallas_kernels.rows import SHARED_BYTES, Config, Grid
from pallas_kernels.walk import launch

Array = jax.Array
# Of each row: its mean, what that lacks of the true one (the rounding of numbers far from zero), and
# 1 / sqrt(variance + epsilon); float32.
Statistics = tuple[Array, Array, Array]


# What was fastest on an H200 (benchmarks/results/layer-norm-nvidia-h200.md): for elements of so many bytes, rows of at
# most so many elements and of at least so many in number. Forward, many small blocks of few rows balance best over
# processors that are not all equally far from memory; float32 does without copies ahead.
_DIRECT = Config(stages=0, blocks=10**6, hold=False)
_FORWARD: dict[int, list[tuple[int, int, Config]]] = {
    2: [
        (128, 0, Config(stages=4, blocks=24, turns=2)),
        (256, 0, Config(stages=3, blocks=24, turns=2)),
        (256, 131072, Config(stages=2, blocks=96, turns=2)),
        (1024, 0, Config(stages=2, blocks=3)),
        (1024, 12288, Config(stages=2, blocks=12)),
        (1024, 49152, Config(stages=2, blocks=48)),
        (2048, 0, Config(stages=2, blocks=3)),
        (2048, 12288, Config(stages=2, blocks=12)),
        (2048, 49152, Config(stages=2, blocks=24)),
        (4096, 0, Config(warps=4, stages=2, blocks=3)),
        (4096, 8192, Config(warps=4, stages=3, blocks=24)),
        (4096, 16384, Config(warps=4, stages=2, blocks=48)),
        (4096, 32768, Config(warps=4, stages=3, blocks=96)),
        (4096, 65536, Config(warps=4, stages=2, blocks=192)),
        (8192, 0, Config(warps=4, stages=3, blocks=4)),
        (8192, 8192, Config(warps=4, stages=3, blocks=12)),
        (8192, 16384, Config(warps=4, stages=3, blocks=24)),
        (16384, 0, Config(warps=8, cluster=2, stages=2)),
        (16384, 6144, Config(warps=8, cluster=2, stages=3, blocks=20)),
    ],
    4: [
        (128, 0, Config(stages=3, blocks=24, turns=2)),
        (128, 262144, Config(stages=3, blocks=96, turns=2)),
        (256, 0, Config(stages=3, blocks=24, turns=2)),
        (256, 131072, dataclasses.replace(_DIRECT, warpgroups=4)),
        (1024, 0, Config(stages=2, blocks=3)),
        (1024, 6144, Config(stages=2, blocks=12)),
        (1024, 24576, dataclasses.replace(_DIRECT, warpgroups=4)),
        (4096, 0, dataclasses.replace(_DIRECT, warps=4)),
        (4096, 6144, Config(warps=4, stages=2, blocks=48)),
        (4096, 16384, dataclasses.replace(_DIRECT, warps=4)),
        (8192, 0, dataclasses.replace(_DIRECT, warps=4)),
        (8192, 12288, Config(warps=4, stages=2, blocks=124)),
        (16384, 0, dataclasses.replace(_DIRECT, warps=4)),
    ],
}
# Backward, as few blocks as there may be: each writes its sums over rows.
_BACKWARD: dict[int, list[tuple[int, int, Config]]] = {
    2: [
        (128, 0, Config(warpgroups=4, stages=3, turns=2)),
        (256, 0, Config(warpgroups=4, stages=4, turns=2)),
        (512, 0, Config(warpgroups=4, stages=3)),
        # Two blocks of 384 threads fit a processor by 80 registers a thread.
        (1024, 0, Config(warps=4, warpgroups=3, stages=3, blocks=2)),
        (2048, 0, Config(warps=4, warpgroups=4, stages=3, again=True)),
        (3072, 0, Config(warps=4, warpgroups=4, stages=3, again=True)),
        (4096, 0, Config(warps=8, warpgroups=4, stages=4, again=True)),
        (6144, 0, Config(warps=8, warpgroups=4, stages=4, again=True, later=True)),
        (8192, 0, Config(warps=16, warpgroups=4, stages=4)),
    ],
    4: [
        (512, 0, Config(warpgroups=4, stages=3)),
        (1024, 0, Config(warps=4, warpgroups=4, stages=5)),
        (2048, 0, Config(warps=8, warpgroups=4, stages=4)),
        (4096, 0, Config(warps=16, warpgroups=4, stages=3)),
        (8192, 0, Config(warps=8, warpgroups=2, stages=3)),
    ],
}
# For longer rows: how many columns a block of a cluster had better have, and how blocks of at most so many take them.
_CLUSTERED: dict[tuple[str, int], tuple[int, list[tuple[int, Config]]]] = {
    ("forward", 2): (
        8192,
        [(8192, Config(warps=4, stages=3, blocks=24)), (16384, Config(warps=8, warpgroups=2, stages=2))],
    ),
    ("forward", 4): (16384, [(16384, Config(warps=8, warpgroups=2, stages=2, blocks=12))]),
    ("backward", 2): (
        8192,
        [
            (6144, Config(warps=8, warpgroups=2, stages=4, again=True, later=True)),
            (8192, Config(warps=16, warpgroups=4, stages=4, again=True, later=True)),
        ],
    ),
    ("backward", 4): (8192, [(8192, Config(warps=8, warpgroups=2, stages=3, again=True, later=True))]),
}
_CLUSTER = 16  # blocks at most
_LONGEST = {kind: _CLUSTER * _CLUSTERED[kind, 4][1][-1][0] for kind in ("forward", "backward")}


def config_for(kind: str, rows: int, n: int, itemsize: int, streams: int) -> Config:
    """The launch of a kernel for rows like these.

    The number of rows decides how many a block takes, and not how a row lies over threads: its result does not depend
    on its neighbours.

    Args:
      kind: "forward" or "backward".
      rows: How many rows there are.
      n: Elements of a row.
      itemsize: Bytes of an element.
      streams: Arrays that a tile is copied from.

    Example:
      >>> config_for("backward", 65536, 8192, 2, 2)
      Config(warps=16, warpgroups=4, cluster=1, stages=4, blocks=1, hold=True, again=False, turns=1, later=False)
    """
    table = (_FORWARD if kind == "forward" else _BACKWARD)[itemsize]
    fitting = [(longest, config) for longest, fewest, config in table if longest >= n and fewest <= rows]
    if fitting:
        config = [config for longest, config in fitting if longest == fitting[0][0]][-1]
    else:
        columns, configs = _CLUSTERED[kind, itemsize]
        cluster = min(_CLUSTER, 1 << math.ceil(math.log2(n / columns)))
        config = next(config for most, config in configs if n <= cluster * most)
        config = dataclasses.replace(config, warps=config.warps * cluster, cluster=cluster)
    if kind == "backward" and streams > 2:  # whose elements take registers that a second block has not
        config = dataclasses.replace(config, warpgroups=config.warpgroups * config.blocks, blocks=1)
    if Grid(rows, n, itemsize, config).vector_bytes < 4:  # asynchronous copies are of 4, 8 or 16 bytes
        return dataclasses.replace(config, stages=0, again=False, turns=1, later=False)
    return _fitted(config, n, itemsize, streams)


def _fitted(config: Config, n: int, itemsize: int, streams: int) -> Config:
    """With fewer rows under way, where more do not fit shared memory."""
    while (grid := Grid(1, n, itemsize, config)).ring_bytes(streams) > SHARED_BYTES:
        if config.ahead > 1:
            config = dataclasses.replace(config, stages=config.stages - 1)
        elif config.turns > 1:
            config = dataclasses.replace(config, turns=1)
        elif grid.teams > 1:
            config = dataclasses.replace(config, warpgroups=config.warpgroups - grid.group)
        else:
            config = dataclasses.replace(config, stages=config.stages - 1, later=False)
    return config


def unserved(kind: str, x: Any) -> str | None:
    """Why a pass's kernel cannot take rows like x's, or None."""
    n, dtype = jnp.shape(x)[-1], jnp.result_type(x)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"the kernel takes float32, bfloat16 and float16, not {dtype}"
    if not 2 <= n <= _LONGEST[kind]:
        return f"the kernel takes rows of 2 to {_LONGEST[kind]} elements, not of {n}"
    return None


def slower(x: Any) -> str | None:
    """Why XLA's form is faster for rows like x's, or None."""
    n, dtype = jnp.shape(x)[-1], jnp.result_type(x)
    if dtype.itemsize == 2 and n % 2 and n > 8192:  # an H200 takes 1.8 ms for 2048 x 50257
        return f"blocks that share a row load {n} elements of 16 bits, an odd number, one by one"
    return None


# Of a row, or of a part of it, a number a row each: its mean, what that lacks of the true one, and the sum of squared
# differences from the true one. The mean of numbers near 1e4 is known to 1e-3 in float32; the mean of the differences
# from it says what it lacks.
_Moments = tuple[Array, Array, Array]


def _of_warp(walk: Any, x: Array) -> tuple[Array, _Moments]:
    """x less the mean of what this warp has of its row, and the moments of that."""
    share = walk.share()
    # Rounded: a difference that was fused with the product would be from another mean than the one that is kept.
    mean = walk.product(jnp.sum(x, axis=1), share)
    centred = walk.kept(x - walk.spread(mean))
    rest = jnp.sum(centred, axis=1)
    return centred, (mean, rest * share, jnp.sum(centred * centred, axis=1) - rest * (rest * share))


def _of_block(walk: Any, i: Array, parts: Sequence[_Moments]) -> list[_Moments]:
    """Of each turn of the i-th tile, what the warps of this block have of the row."""
    if not walk.grid.shared:
        return list(parts)
    return _together(walk.exchange(i, *(a for part in parts for a in part)), walk.counts())


def _of_row(walk: Any, i: Array, parts: Sequence[_Moments]) -> list[_Moments]:
    """Of each turn, the row; where a cluster shares it, what its blocks told each other."""
    if walk.grid.config.cluster == 1:
        return list(parts)
    return _together(walk.hear_blocks(i, 3 * len(parts)), walk.grid.block_counts)


def _together(heard: Sequence[Sequence[Array]], counts: Sequence[Any]) -> list[_Moments]:
    return [_combined(counts, *heard[k : k + 3]) for k in range(0, len(heard), 3)]


def _combined(
    counts: Sequence[Any], means: Sequence[Array], rests: Sequence[Array], squares: Sequence[Array]
) -> _Moments:
    """Of parts together that have so many numbers each.

    Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    total = _tree(counts)
    share = 1 / total if isinstance(total, int) else 1 / jnp.maximum(total, 1.0)
    first = means[0]
    offsets = [(mean - first) + rest for mean, rest in zip(means, rests, strict=True)]
    offset = _tree([away * (k * share) for away, k in zip(offsets, counts, strict=True)])
    spread = [lax.square(away - offset) * k + s for away, k, s in zip(offsets, counts, squares, strict=True)]
    mean = first + offset
    return mean, (first - mean) + offset, _tree(spread)


def _tree(values: Sequence[Any]) -> Any:
    """Sums of pairs, and of pairs of pairs: short chains, in an order that is always the same."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return _tree(values[:half]) + _tree(values[half:])


def forward_kernel(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    residual: Array | None,
    *,
    epsilon: float,
    implementation: str,
    config: Config | None = None,
) -> tuple[Array, Array | None, Statistics]:
    """y, the sum with the residual if there is one, and of each row the mean, what it lacks, and rstd: float32."""
    n = x.shape[-1]
    config = config or config_for("forward", x.size // n, n, x.dtype.itemsize, 1 if residual is None else 2)
    return _forward(x, scale, bias, residual, epsilon, implementation, config)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))  # so that like layers of a model are lowered once
def _forward(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    residual: Array | None,
    epsilon: float,
    implementation: str,
    config: Config,
) -> tuple[Array, Array | None, Statistics]:
    n = x.shape[-1]
    sources = [x] if residual is None else [x, residual]
    weights = [w for w in (scale, bias) if w is not None]

    def body(walk: Any, _: Any, weight_refs: Sequence[Any], outs: Sequence[Any]) -> None:
        *ys, mean_out, rest_out, rstd_out = outs
        held = [walk.columns(w) for w in weight_refs] if config.hold else None

        def total(i: Array, turn: int) -> Array:
            total, *more = walk.tile(i, turn)
            return (total + more[0]).astype(x.dtype).astype(jnp.float32) if more else total

        def begin(i: Array, _: None) -> tuple[None, Any]:
            kept, moments = [], []
            for turn in range(config.turns):
                row = total(i, turn)
                if residual is not None:
                    walk.store(ys[1], i, turn, row)
                centred, found = _of_warp(walk, row)
                kept.append((None if config.again else centred, *found[:2]))
                moments.append(found)
            moments = _of_block(walk, i, moments)
            if walk.grid.config.cluster > 1:
                walk.tell_blocks(i, *(a for found in moments for a in found))
            return None, (kept, moments)

        def finish(i: Array, begun: Any, _: None) -> None:
            kept, moments = begun
            for turn, (whole, lack, squares) in enumerate(_of_row(walk, i, moments)):
                centred, mean, rest = kept[turn]
                if config.again:
                    centred = walk.kept(total(i, turn) - walk.spread(mean))
                rstd = lax.rsqrt(jnp.maximum(squares * (1 / n), 0.0) + epsilon)
                away = (whole - mean) + lack if walk.grid.shared else rest
                y = centred * walk.spread(rstd) - walk.spread(away * rstd)
                factors = held or [walk.columns(w) for w in weight_refs]
                if scale is not None:
                    y = y * factors[0]
                if bias is not None:
                    y = y + factors[-1]
                walk.store(ys[0], i, turn, y)
                walk.store_numbers([mean_out, rest_out, rstd_out], i, turn, [whole, lack, rstd])

        walk.over_tiles(begin, finish, None, None)

    *ys, mean, rest, rstd = launch(
        "zerojax_layer_norm",
        body,
        config,
        sources,
        [],
        weights,
        rows_out=[x.dtype] * len(sources),
        numbers_out=3,
        sums_out=0,
        values=3,
        implementation=implementation,
    )
    ys = [y.reshape(x.shape) for y in ys]
    return ys[0], ys[1] if residual is not None else None, (mean, rest, rstd)


def backward_kernel(
    x: Array,
    dy: Array,
    dtotal: Array | None,
    scale: Array | None,
    statistics: Sequence[Array],
    dtypes: Sequence[Any],
    *,
    implementation: str,
    config: Config | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """dx in x's dtype; dscale and dbias in these dtypes, or None where the dtype is."""
    n = x.shape[-1]
    config = config or config_for("backward", x.size // n, n, x.dtype.itemsize, 2 if dtotal is None else 3)
    return _backward(x, dy, dtotal, scale, statistics, tuple(dtypes), implementation, config)


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _backward(
    x: Array,
    dy: Array,
    dtotal: Array | None,
    scale: Array | None,
    statistics: Sequence[Array],
    dtypes: tuple[Any, ...],
    implementation: str,
    config: Config,
) -> tuple[Array, Array | None, Array | None]:
    n, wide = x.shape[-1], x.dtype.itemsize > 2
    sources = [x, dy] if dtotal is None else [x, dy, dtotal]
    wanted = [k for k, dtype in enumerate(dtypes) if dtype is not None]

    def body(walk: Any, number_refs: Sequence[Any], weight_refs: Sequence[Any], outs: Sequence[Any]) -> None:
        dx_out, *sum_outs = outs
        held = [walk.columns(w) for w in weight_refs] if config.hold else None
        turns = range(config.turns)

        def terms(i: Array, turn: int, numbers: Any) -> tuple[Array, ...]:
            mean, rest, rstd = numbers[turn]
            x, dy, *more = walk.tile(i, turn)
            centred = x - walk.spread(mean)
            if wide:  # of shorter numbers the mean's rounding is less than their own
                centred = centred - walk.spread(rest)
            factors = held or [walk.columns(w) for w in weight_refs]
            return centred * walk.spread(rstd), dy, dy * factors[0] if factors else dy, *more

        def begin(i: Array, numbers: Any) -> tuple[Any, Any]:
            ahead = [walk.load_numbers(number_refs, i + 1, turn) for turn in turns]  # not waited for in this tile
            rows, told = [], []
            for turn in turns:
                unit, dy, dunit, *more = terms(i, turn, numbers)
                told += [jnp.sum(dunit * unit, axis=1), jnp.sum(dunit, axis=1)]
                rows.append(None if config.again else (unit, dy, dunit, *more))
            if walk.grid.config.cluster > 1:
                walk.tell_sums(i, *told)
            elif walk.grid.shared:
                told = [_tree(parts) for parts in walk.exchange(i, *told)]
            return ahead, (numbers, rows, told)

        def finish(i: Array, begun: Any, sums: list[Array]) -> list[Array]:
            numbers, rows, told = begun
            if walk.grid.config.cluster > 1:
                told = [_tree(parts) for parts in walk.hear_blocks(i, len(told))]
            for turn in turns:
                unit, dy, dunit, *more = terms(i, turn, numbers) if config.again else rows[turn]
                rstd = numbers[turn][2]
                along, shift = (a * (rstd * (1 / n)) for a in told[2 * turn : 2 * turn + 2])
                dx = dunit * walk.spread(rstd) - (unit * walk.spread(along) + walk.spread(shift))
                if more:
                    dx = dx + more[0]
                walk.store(dx_out, i, turn, dx)
                news = [dy * unit, dy]
                sums = [a + news[k] for a, k in zip(sums, wanted, strict=True)]
            return sums

        start = [walk.load_numbers(number_refs, jnp.int32(0), turn) for turn in turns]
        sums = walk.over_tiles(begin, finish, start, [walk.zeros() for _ in wanted])
        if wanted:
            walk.store_sums(sum_outs, sums)

    dx, *slabs = launch(
        "zerojax_layer_norm_backward",
        body,
        config,
        sources,
        statistics,
        [] if scale is None else [scale],
        rows_out=[x.dtype],
        numbers_out=0,
        sums_out=len(wanted),
        values=2,
        last_first=True,  # what the op before wrote or read last is still in the L2 cache
        implementation=implementation,
    )
    sums = iter(
        column_sums("zerojax_layer_norm_sums", slabs, [dtypes[k] for k in wanted], implementation) if slabs else []
    )
    dscale, dbias = (None if dtype is None else next(sums) for dtype in dtypes)
    return dx.reshape(x.shape), dscale, dbias
