"""Elementwise work on many leaves in one launch, in place: what the optimizer kernels have in common.

A launch for each leaf costs some microseconds of a GPU that a small leaf keeps busy for one. So a launch takes all
leaves of the same dtypes, cuts each among thread blocks, and a block finds its leaf by a binary tree of comparisons
with the grid index, which picks base addresses; the code that loads, computes and stores is there once, however many
leaves there are. The tree halves the number of blocks at each step, so that blocks of large leaves find theirs in few.
A block takes its part of the leaf tile by tile, and the next tiles are on their way to shared memory while it computes
one: a step on 8-bit moments, which is much work for few bytes, runs at 0.97 of the memory's pace so, and at 0.70 else.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import dispatch, formats, instructions, mlir, tiles
from pallas_kernels.dispatch import plgpu

CHUNK = 1024  # sums of blocks that are added at once
_WARPGROUP = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Launch choices: they change speed, never values.

    The defaults are the fastest measured for adamw in float32 on an H200: 1.3B params in 292 leaves take 8.65 ms, 0.995
    of the pace of a copy; more thread blocks of one tile do as well there as tiles in a row. A launch of few leaves has
    a short tree, one of many elements hides the few microseconds that a launch costs, and its last blocks.

    Attributes:
      block: Elements of a leaf that one thread block takes at once, a tile.
      vector: Neighbouring elements that one thread loads at once, 4 to 32: 16 bytes of float32.
      tiles: That a thread block takes, one after the other.
      stages: Tiles that are on their way or being worked on, 2 at least.
      leaves: A launch has at least so many leaves, where there are,
      elements: and at least so many elements,
      max_leaves: but no more leaves than this: each array is 8 of the 32,764 bytes that a kernel's parameters may have.
    """

    block: int = 1024
    vector: int = 4
    tiles: int = 1
    stages: int = 2
    leaves: int = 24
    elements: int = 2**25
    max_leaves: int = 500


@dataclasses.dataclass(frozen=True)
class Here:
    """What a body knows beside its arrays.

    Attributes:
      scalars: float32 scalars of the launch.
      factors: float32 scalars of the leaf.
      bits: int32 block, random bits of each element; None without keys.
      exact: Right to 2 units in the last place.
      fast: By single instructions, which take numbers below 2**-126 for zero.
    """

    scalars: list[jax.Array]
    factors: list[jax.Array]
    bits: jax.Array | None
    exact: formats.Tools
    fast: formats.Tools


Body = Callable[..., Sequence[jax.Array]]


class Keys(NamedTuple):
    """For random bits: `key` int32[leaves], and where each leaf's elements lie in the whole leaf."""

    key: jax.Array
    cuts: Sequence[Sequence[formats.Cut]]


def run(
    name: str,
    body: Body,
    scalars: jax.Array,
    written: Sequence[Sequence[jax.Array]],
    read: Sequence[Sequence[jax.Array]],
    *,
    factors: jax.Array,
    keys: Keys | None = None,
    unread: Collection[int] = (),
    sums: int = 0,
    config: Config,
    implementation: str,
) -> tuple[list[list[jax.Array]], jax.Array]:
    """Runs `body` over each element of each leaf, in place where the caller donates.

    Args:
      name: Of the kernel, as profiles show it.
      body: `body(here, *arrays) -> new`, elementwise: `here` is a `Here`, `arrays` are blocks of one leaf's `written`
        and `read` arrays, floats in their own dtypes, integers as int32; `new` are the blocks of its `written` arrays,
        then `sums` float32 ones. Beyond a leaf's end `arrays` are zero.
      scalars: float32[k], handed to `body` as a list; where the last is 0 nothing is written.
      written: For each array that changes, its leaves: `written[a][leaf]`. The first has all elements of the leaf,
        others may have one for each `formats.GROUP` of them, row by row.
      read: Likewise for arrays that do not change.
      factors: float32[leaves, k], numbers of each leaf.
      keys: For a body that wants random bits.
      unread: Numbers of `written` arrays whose old values do not matter; `body` gets nothing for them.
      sums: How many of `body`'s results are summed over each leaf, in a fixed order.
      config: Launch choices.
      implementation: "mosaic" or "interpret".

    Returns:
      `written`, new; and float32[leaves, sums].
    """
    flat = [[x.reshape(-1) for x in leaves] for leaves in (*written, *read)]
    new = [list(leaves) for leaves in written]
    totals = jnp.zeros((len(flat[0]), sums), jnp.float32)
    numbers, together = _numbers(keys, config)
    simulated = implementation == "interpret"
    launch = _Launch(
        name=name,
        body=body,
        writes=len(written),
        unread=frozenset(unread),
        together=together,
        sums=sums,
        config=config,
    )
    for some in _groups(flat, dataclasses.replace(config, max_leaves=1) if simulated else config):
        index = jnp.array(some)
        arrays, part = (launch.simulate if simulated else launch.run)(
            scalars,
            [[leaves[i] for i in some] for leaves in flat],
            factors[index],
            None if numbers is None else numbers[index],
        )
        totals = totals.at[index].set(part)
        for a, leaves in enumerate(arrays):
            for i, x in zip(some, leaves, strict=True):
                new[a][i] = x.reshape(written[a][i].shape)
    return new, totals


def _numbers(keys: Keys | None, config: Config) -> tuple[jax.Array | None, bool]:
    """int32[leaves, 1 + 3 * cuts], key and cuts of each; and whether no cut parts the elements of a vector."""
    if keys is None:
        return None, True
    whole = formats.Cut(2**31 - 1, 0, 0)  # of one that is not cut
    most = max((len(cuts) for cuts in keys.cuts), default=0)
    padded = [[*cuts, *[whole] * (most - len(cuts))] for cuts in keys.cuts]
    number = int | np.integer
    wrapped = lambda x: np.uint32(int(x) % 2**32).view(np.int32) if isinstance(x, number) else jnp.asarray(x, jnp.int32)
    rows = [[wrapped(n) for cut in cuts for n in cut] for cuts in padded]
    together = all(cut.period % config.vector == 0 for cuts in keys.cuts for cut in cuts)
    cuts = jnp.array(rows, jnp.int32).reshape(len(rows), 3 * most)
    return jnp.concatenate([keys.key.reshape(-1, 1), cuts], axis=1), together


def _triples(cuts: Sequence[Any]) -> list[Sequence[Any]]:
    return [cuts[k : k + 3] for k in range(0, len(cuts), 3)]


def _groups(flat: list[list[jax.Array]], config: Config) -> Iterator[list[int]]:
    """Which leaves share a launch: those of the same dtypes, in order; leaves without elements are in none."""
    by_dtypes: dict[tuple[Any, ...], list[int]] = {}
    for i, x in enumerate(flat[0]):
        if x.size:
            by_dtypes.setdefault(tuple(leaves[i].dtype for leaves in flat), []).append(i)
    for members in by_dtypes.values():
        group, elements = [], 0
        for i in members:
            group.append(i)
            elements += flat[0][i].size
            if len(group) == config.max_leaves or (len(group) >= config.leaves and elements >= config.elements):
                yield group
                group, elements = [], 0
        if group:
            yield group


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Launch:
    """Launches of one kernel, each of leaves that share their dtypes."""

    name: str
    body: Body
    writes: int
    unread: frozenset[int]
    together: bool
    sums: int
    config: Config

    def loaded(self, arrays: int) -> list[int]:
        """Numbers of the arrays that a body gets."""
        return [a for a in range(arrays) if a not in self.unread]

    # A jit of its own: launches of like leaves, of a model's layers say, are lowered once.
    @functools.partial(jax.jit, static_argnums=0)
    def run(
        self, scalars: jax.Array, arrays: list[list[jax.Array]], factors: jax.Array, numbers: jax.Array | None
    ) -> tuple[list[list[jax.Array]], jax.Array]:
        """A launch on a GPU: new arrays, and sums of each leaf.

        Args:
          scalars: As of `run`.
          arrays: `arrays[a][leaf]`, flat, the first `writes` of them written.
          factors: As of `run`.
          numbers: From `_numbers`.
        """
        config, starts = self.config, self._starts(arrays)
        layout: Any = plgpu.Layout.WG_STRIDED((config.block,), vec_size=config.vector)
        tables = [table for table in (factors, numbers) if table is not None and table.size]
        tools = [instructions.tools(layout, config.block, fast=fast) for fast in (False, True)]
        ring = tiles.Ring(_kinds(arrays), self.loaded(len(arrays)), layout.to_mgpu(), config.stages)

        def kernel(scalars_ref: Any, *refs: Any) -> None:
            refs, partials, slots = refs[: -1 - self.sums], refs[-1 - self.sums : -1], refs[-1]
            find, fetch, load, key_and_place, store = self._inlined(arrays, ring, factors, numbers)
            found = iter(find(jax.lax.axis_index("blocks"), *refs))
            many, words = next(found), list(itertools.islice(found, tiles.Leaf.words_of(len(arrays))))
            row, number = list(itertools.islice(found, factors.shape[1])), list(found)
            here = Here([scalars_ref[k] for k in range(scalars.size)], row, None, *tools)
            for n in range(config.stages - 1):
                fetch(jnp.int32(n), slots, *words)

            def turn(n: jax.Array, totals: Sequence[jax.Array]) -> list[jax.Array]:
                values = load(n, slots, *words)
                fetch(n + (config.stages - 1), slots, *words)
                bits = formats.random_bits(*key_and_place(n, *words, *number)) if number else None
                new = self.body(dataclasses.replace(here, bits=bits), *values)
                if self.writes:
                    store(here.scalars[-1], n, *words, *new[: self.writes])
                return [total + x for total, x in zip(totals, new[self.writes :], strict=True)]

            zero = [plgpu.layout_cast(jnp.zeros(config.block, jnp.float32), layout) for _ in range(self.sums)]
            for ref, x in zip(partials, jax.lax.fori_loop(0, many, turn, zero), strict=True):
                ref[jax.lax.axis_index("blocks")] = jnp.sum(x)

        refs = [jax.new_ref(x) for leaves in arrays[: self.writes] for x in leaves]
        read = [*itertools.chain(*arrays[self.writes :]), *(table.reshape(-1) for table in tables)]
        partials = plgpu.kernel(
            kernel,
            out_type=[jax.ShapeDtypeStruct((starts[-1] + CHUNK,), jnp.float32)] * self.sums,
            grid=(starts[-1],),
            grid_names=("blocks",),
            scratch_types=[plgpu.SMEM((ring.bytes,), jnp.int8)],
            kernel_name=f"zerojax_{self.name}",
            compiler_params=_WARPGROUP,
        )(scalars, *refs, *read)
        new, count = [jax.freeze(ref) for ref in refs], len(arrays[0])
        return [new[a * count : (a + 1) * count] for a in range(self.writes)], _totals(partials, starts)

    def _starts(self, arrays: list[list[jax.Array]]) -> list[int]:
        """Number of the first thread block of each leaf, and of all."""
        elements = self.config.block * self.config.tiles
        return [0, *itertools.accumulate(math.ceil(x.size / elements) for x in arrays[0])]

    def _inlined(
        self, arrays: list[list[jax.Array]], ring: tiles.Ring, factors: jax.Array, numbers: jax.Array | None
    ) -> tuple[Callable[..., Any], ...]:
        """What Pallas has no words for: finds a thread block's leaf, copies, loads, numbers and stores its tiles."""
        config, kinds, starts, count = self.config, ring.kinds, self._starts(arrays), len(arrays[0])
        width, columns = factors.shape[1], 0 if numbers is None else numbers.shape[1]
        splat, ref, words = plgpu.Layout.WG_SPLAT, plgpu.RefType(), tiles.Leaf.words_of(len(arrays))
        layout: Any = plgpu.Layout.WG_STRIDED((config.block,), vec_size=config.vector)
        ragged = any(x.size % config.vector for x in arrays[0])
        scalar = lambda dtype: plgpu.ShapeDtypeStruct((), dtype, layout=splat)
        block = lambda dtype: plgpu.ShapeDtypeStruct((config.block,), dtype, layout=layout)
        slots = lambda ref: mlir.address(ref, mlir.SHARED)

        def tile(n: Any, words: Sequence[Any]) -> tiles.Tile:
            leaf = tiles.Leaf.of([*map(mlir.scalar, words)])
            return tiles.Tile(leaf, mlir.to_index(n), kinds, ring.layout, ragged=ragged)

        @plgpu.inline_mgpu(
            arg_types=(splat, *[ref] * (count * len(arrays) + (width > 0) + (columns > 0))),
            return_type=(
                *[scalar(jnp.int32)] * (1 + words),
                *[scalar(jnp.float32)] * width,
                *[scalar(jnp.int32)] * columns,
            ),
        )
        def find(_: Any, index: Any, *refs: Any) -> tuple[Any, ...]:
            refs, tables = refs[: count * len(arrays)], refs[count * len(arrays) :]
            leaf = tiles.select(index, [refs[i::count] for i in range(count)], starts, config.block * config.tiles)
            row = [tiles.number(tables[0], leaf.number, k, width) for k in range(width)]
            number = [tiles.number(tables[-1], leaf.number, k, columns) for k in range(columns)]
            return tuple(map(tiles.scalar, [leaf.tiles(config.block), *leaf.words(), *row, *number]))

        @plgpu.inline_mgpu(arg_types=(splat, ref, *[splat] * words), return_type=())
        def fetch(_: Any, n: Any, ref: Any, *words: Any) -> tuple[Any, ...]:
            tile(n, words).fetch(ring, slots(ref))
            return ()

        @plgpu.inline_mgpu(
            arg_types=(splat, ref, *[splat] * words), return_type=tuple(block(kinds[a].seen) for a in ring.loaded)
        )
        def load(_: Any, n: Any, ref: Any, *words: Any) -> tuple[Any, ...]:
            return tuple(tile(n, words).load(ring, slots(ref)))

        @plgpu.inline_mgpu(arg_types=(splat,) * (1 + words + columns), return_type=(block(jnp.int32),) * 2)
        def key_and_place(_: Any, n: Any, *found: Any) -> tuple[Any, ...]:
            key, *cuts = map(mlir.scalar, found[words:])
            place = tile(n, found[:words]).places(_triples(cuts), together=self.together)
            return tiles.splat(key, ring.layout), place

        @plgpu.inline_mgpu(arg_types=(*[splat] * (2 + words), *[layout] * self.writes), return_type=())
        def store(_: Any, applied: Any, n: Any, *words_and_new: Any) -> tuple[Any, ...]:
            with tiles.where_positive(applied):
                tile(n, words_and_new[:words]).store(words_and_new[words:])
            return ()

        return find, fetch, load, key_and_place, store

    def simulate(
        self, scalars: jax.Array, arrays: list[list[jax.Array]], factors: jax.Array, numbers: jax.Array | None
    ) -> tuple[list[list[jax.Array]], jax.Array]:
        """The same on a CPU, for one leaf: the interpreter knows no addresses, and its last block is padded."""
        size, block = arrays[0][0].size, tiles.THREADS * self.config.vector
        blocks = math.ceil(size / block)
        # What is shared by neighbours, and what a GPU widens as it loads, is spread out and widened before.
        padded = [
            jnp.pad(jnp.repeat(x, kind.repeat, total_repeat_length=size), (0, blocks * block - size)).astype(kind.seen)
            for (x,), kind in zip(arrays, _kinds(arrays), strict=True)
        ]
        refs = [jax.new_ref(x) for x in padded]

        def kernel(scalars_ref: Any, factors_ref: Any, bits_ref: Any, *refs: Any) -> None:
            index = jax.lax.axis_index("blocks")
            values, sums = refs[: len(arrays)], refs[len(arrays) :]
            span = pl.ds(index * block, block)
            here = Here(
                scalars=[scalars_ref[k] for k in range(scalars.size)],
                factors=[factors_ref[0, k] for k in range(factors.shape[1])],
                bits=None if numbers is None else bits_ref[span],
                exact=formats.EXACT,
                fast=formats.EXACT,
            )
            new = self.body(here, *(values[a][span] for a in self.loaded(len(arrays))))
            for ref, x in zip(values, new[: self.writes], strict=False):
                ref[span] = jnp.where(here.scalars[-1] > 0, x, ref[span])
            for ref, x in zip(sums, new[self.writes :], strict=True):
                ref[index] = jnp.sum(x)

        partials = plgpu.kernel(
            kernel,
            out_type=[jax.ShapeDtypeStruct((blocks,), jnp.float32)] * self.sums,
            grid=(blocks,),
            grid_names=("blocks",),
            kernel_name=f"zerojax_{self.name}",
            interpret=dispatch.interpret_params("interpret"),
        )(scalars, factors, _simulated_bits(numbers, blocks * block), *refs)
        totals = jnp.array([[jnp.sum(x) for x in partials]], jnp.float32).reshape(1, self.sums)
        kinds = zip(refs[: self.writes], _kinds(arrays), strict=False)
        return [[jax.freeze(ref)[: size : kind.repeat].astype(kind.dtype)] for ref, kind in kinds], totals


def _kinds(arrays: list[list[jax.Array]]) -> list[tiles.Kind]:
    whole = arrays[0][0]
    return [tiles.Kind(x.dtype, 1 if x.size == whole.size else formats.GROUP) for (x, *_) in arrays]


def _simulated_bits(numbers: jax.Array | None, size: int) -> jax.Array:
    place = jnp.arange(size, dtype=jnp.int32)
    if numbers is None:
        return place
    key, *cuts = numbers[0]
    for period, stride, offset in _triples(cuts):
        place += (place.view(jnp.uint32) // period.view(jnp.uint32)).view(jnp.int32) * stride + offset
    return formats.random_bits(key, place)


def _totals(partials: Sequence[jax.Array], starts: Sequence[int]) -> jax.Array:
    """float32[leaves, sums] from sums of blocks: one thread block a leaf, in a fixed order."""
    if not partials:
        return jnp.zeros((len(starts) - 1, 0), jnp.float32)
    layout = plgpu.Layout.WG_STRIDED((CHUNK,), vec_size=1)

    def kernel(starts_ref: Any, *refs: Any) -> None:
        leaf = jax.lax.axis_index("leaves")
        start = starts_ref[leaf]
        blocks = starts_ref[leaf + 1] - start
        lane = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, (CHUNK,), 0), layout)
        for ref, out in zip(refs[: len(partials)], refs[len(partials) :], strict=True):

            def add(c: Any, total: jax.Array, ref: Any = ref) -> jax.Array:
                x = plgpu.load(ref.at[pl.ds(start + c * CHUNK, CHUNK)], layout=layout)
                return total + jnp.where(lane + c * CHUNK < blocks, x, 0.0)

            zero = plgpu.layout_cast(jnp.zeros(CHUNK, jnp.float32), layout)
            out[leaf] = jnp.sum(jax.lax.fori_loop(0, (blocks + CHUNK - 1) // CHUNK, add, zero))

    totals = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((len(starts) - 1,), jnp.float32)] * len(partials),
        grid=(len(starts) - 1,),
        grid_names=("leaves",),
        kernel_name="zerojax_totals",
        compiler_params=_WARPGROUP,
    )(jnp.array(starts, jnp.int32), *partials)
    return jnp.stack(totals, axis=1)
