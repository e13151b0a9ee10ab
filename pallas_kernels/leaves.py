"""Elementwise work on many leaves in one launch, in place: what the optimizer kernels have in common.

A launch for each leaf costs some microseconds of a GPU that a small leaf keeps busy for one. So a launch takes all
leaves of the same dtypes, cuts each into blocks, and a block finds its leaf by a binary tree of comparisons with the
grid index, which picks base addresses; the code that loads, computes and stores is there once, however many leaves
there are. The tree halves the number of blocks at each step, so that blocks of large leaves find theirs in few.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import dispatch, tiles
from pallas_kernels.dispatch import plgpu

THREADS = 128  # of a warpgroup
CHUNK = 1024  # sums of blocks that are added at once
_WARPGROUP = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Launch choices: they change speed, never values.

    The defaults are the fastest measured for adamw on an H200. A launch of few leaves has a short tree, one
    of many elements hides the few microseconds that a launch costs: 1.3B params in 292 leaves take 8.85 ms by 24
    leaves a launch and 10.0 ms by one; 300 small leaves 39 us in one, 45 us in three.

    Attributes:
      block: Elements of a leaf that one thread block takes.
      vector: Neighbouring elements that one thread loads at once, 16 bytes of float32.
      leaves: A launch has at least so many leaves, where there are,
      elements: and at least so many elements,
      max_leaves: but no more leaves than this: each array is 8 of the 32,764 bytes that a kernel's parameters may have.
    """

    block: int = 2048
    vector: int = 4
    leaves: int = 24
    elements: int = 2**25
    max_leaves: int = 500


Body = Callable[..., tuple[jax.Array, ...]]


def run(
    name: str,
    body: Body,
    scalars: jax.Array,
    written: Sequence[Sequence[jax.Array]],
    read: Sequence[Sequence[jax.Array]],
    *,
    factors: jax.Array,
    sums: int = 0,
    config: Config,
    implementation: str,
) -> tuple[list[list[jax.Array]], jax.Array]:
    """Runs `body` over each element of each leaf, in place where the caller donates.

    Args:
      name: Of the kernel, as profiles show it.
      body: `body(scalars, *arrays) -> new`, elementwise: `arrays` are blocks of one leaf's `written` and `read`
        arrays, in their own dtypes, then one filled with each of its factors; `new` are the blocks of its
        `written` arrays, then `sums` float32 ones. Beyond a leaf's end `arrays` are zero.
      scalars: float32[k], handed to `body` as a list.
      written: For each array that changes, its leaves: `written[a][leaf]`.
      read: Likewise for arrays that do not change.
      factors: float32[leaves, k], numbers of each leaf.
      sums: How many of `body`'s results are summed over each leaf, in a fixed order.
      config: Launch choices.
      implementation: "mosaic" or "interpret".

    Returns:
      `written`, new; and float32[leaves, sums].
    """
    flat = [[x.reshape(-1) for x in leaves] for leaves in (*written, *read)]
    new = [list(leaves) for leaves in written]
    totals = jnp.zeros((len(flat[0]), sums), jnp.float32)
    simulated = implementation == "interpret"
    for some in _groups(flat, dataclasses.replace(config, max_leaves=1) if simulated else config):
        index = jnp.array(some)
        launch = _Launch(
            name=name,
            body=body,
            scalars=scalars,
            arrays=[[leaves[i] for i in some] for leaves in flat],
            writes=len(written),
            factors=factors[index],
            sums=sums,
            config=config,
        )
        arrays, part = launch.simulate() if simulated else launch.run()
        totals = totals.at[index].set(part)
        for a, leaves in enumerate(arrays):
            for i, x in zip(some, leaves, strict=True):
                new[a][i] = x.reshape(written[a][i].shape)
    return new, totals


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
    """One launch, of leaves that share their dtypes; `arrays[a][leaf]`, flat, the first `writes` of them written."""

    name: str
    body: Body
    scalars: jax.Array
    arrays: list[list[jax.Array]]
    writes: int
    factors: jax.Array
    sums: int
    config: Config

    def run(self) -> tuple[list[list[jax.Array]], jax.Array]:
        """The launch on a GPU: new arrays, and sums of each leaf."""
        count, writes, block = len(self.arrays[0]), self.writes, self.config.block
        starts = [0, *itertools.accumulate(math.ceil(x.size / block) for x in self.arrays[0])]
        layout: Any = plgpu.Layout.WG_STRIDED((block,), vec_size=self.config.vector)
        tile = lambda dtype: plgpu.ShapeDtypeStruct((block,), dtype, layout=layout)
        width = self.factors.shape[1]
        inputs = [*(tile(leaves[0].dtype) for leaves in self.arrays), *[tile(jnp.float32)] * width]

        def select(index: Any, refs: Sequence[Any]) -> tuple[list[tiles.Tile], Any]:
            leaves = [refs[leaf : len(self.arrays) * count : count] for leaf in range(count)]
            return tiles.select(index, leaves, starts, layout.to_mgpu())

        def kernel(scalars_ref: Any, *refs: Any) -> None:
            refs, partials = refs[: len(refs) - self.sums], refs[len(refs) - self.sums :]
            index = jax.lax.axis_index("blocks")
            whole = [plgpu.RefType()] * len(refs)

            @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, *whole), return_type=tuple(inputs))
            def load(_: Any, index: Any, *refs: Any) -> tuple[Any, ...]:
                chosen, leaf = select(index, refs)
                factors = [tiles.splat(refs[-1], leaf, k, width, layout.to_mgpu()) for k in range(width)]
                return (*(tile.load() for tile in chosen), *factors)

            @plgpu.inline_mgpu(
                arg_types=(plgpu.Layout.WG_SPLAT, *[layout] * writes, *whole[: writes * count]), return_type=()
            )
            def store(_: Any, index: Any, *new_and_refs: Any) -> tuple[Any, ...]:
                new, refs = new_and_refs[:writes], new_and_refs[writes:]
                for tile, x in zip(select(index, refs)[0], new, strict=True):
                    tile.store(x)
                return ()

            new = self.body([scalars_ref[k] for k in range(self.scalars.size)], *load(index, *refs))
            for ref, x in zip(partials, new[writes:], strict=True):
                ref[index] = jnp.sum(x)
            if writes:
                store(index, *new[:writes], *refs[: writes * count])

        refs = [jax.new_ref(x) for leaves in self.arrays[:writes] for x in leaves]
        read = [*itertools.chain(*self.arrays[writes:]), self.factors.reshape(-1)]
        partials = plgpu.kernel(
            kernel,
            out_type=[jax.ShapeDtypeStruct((starts[-1] + CHUNK,), jnp.float32)] * self.sums,
            grid=(starts[-1],),
            grid_names=("blocks",),
            kernel_name=f"zerojax_{self.name}",
            compiler_params=_WARPGROUP,
        )(self.scalars, *refs, *read)
        new = [jax.freeze(ref) for ref in refs]
        return [new[a * count : (a + 1) * count] for a in range(writes)], _totals(partials, starts)

    def simulate(self) -> tuple[list[list[jax.Array]], jax.Array]:
        """The same on a CPU, for one leaf: the interpreter knows no addresses, and its last block is padded."""
        size, block = self.arrays[0][0].size, THREADS * self.config.vector
        refs = [jax.new_ref(jnp.pad(x, (0, -size % block))) for (x,) in self.arrays]
        blocks = math.ceil(size / block)

        def kernel(scalars_ref: Any, factors_ref: Any, *refs: Any) -> None:
            index = jax.lax.axis_index("blocks")
            arrays, sums = refs[: len(self.arrays)], refs[len(self.arrays) :]
            here = pl.ds(index * block, block)
            factors = [jnp.full(block, factors_ref[0, k]) for k in range(self.factors.shape[1])]
            loaded = [*(ref[here] for ref in arrays), *factors]
            new = self.body([scalars_ref[k] for k in range(self.scalars.size)], *loaded)
            for ref, x in zip(arrays, new[: self.writes], strict=False):
                ref[here] = x
            for ref, x in zip(sums, new[self.writes :], strict=True):
                ref[index] = jnp.sum(x)

        partials = plgpu.kernel(
            kernel,
            out_type=[jax.ShapeDtypeStruct((blocks,), jnp.float32)] * self.sums,
            grid=(blocks,),
            grid_names=("blocks",),
            kernel_name=f"zerojax_{self.name}",
            interpret=dispatch.interpret_params("interpret"),
        )(self.scalars, self.factors, *refs)
        totals = jnp.array([[jnp.sum(x) for x in partials]], jnp.float32).reshape(1, self.sums)
        return [[jax.freeze(ref)[:size]] for ref in refs[: self.writes]], totals


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
