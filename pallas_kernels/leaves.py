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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Launch choices: they change speed, never values.

    The defaults are the fastest measured on an H200 (benchmarks/results/). A launch of few leaves has a short tree, one
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
    config: Config,
    implementation: str,
) -> list[list[jax.Array]]:
    """Runs `body` over each element of each leaf, in place where the caller donates.

    Args:
      name: Of the kernel, as profiles show it.
      body: `body(scalars, *arrays) -> new`, elementwise: `arrays` are blocks of one leaf's `written` and `read`
        arrays, in their own dtypes, and `new` those of its `written` ones.
      scalars: float32[k], handed to `body` as a list.
      written: For each array that changes, its leaves: `written[a][leaf]`.
      read: Likewise for arrays that do not change.
      config: Launch choices.
      implementation: "mosaic" or "interpret".

    Returns:
      `written`, new.
    """
    flat = [[x.reshape(-1) for x in leaves] for leaves in (*written, *read)]
    new = [list(leaves) for leaves in written]
    launch = _launch if implementation == "mosaic" else _simulate
    for some in _groups(flat, config if implementation == "mosaic" else dataclasses.replace(config, max_leaves=1)):
        arrays = [[leaves[i] for i in some] for leaves in flat]
        for a, leaves in enumerate(launch(name, body, scalars, arrays, len(written), config)):
            for i, x in zip(some, leaves, strict=True):
                new[a][i] = x.reshape(written[a][i].shape)
    return new


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


def _launch(
    name: str, body: Body, scalars: jax.Array, arrays: list[list[jax.Array]], writes: int, config: Config
) -> list[list[jax.Array]]:
    """One launch over all leaves; `arrays[a][leaf]`, flat, the first `writes` of them updated in place."""
    sizes = [x.size for x in arrays[0]]
    starts = [0, *itertools.accumulate(math.ceil(n / config.block) for n in sizes)]
    layout: Any = plgpu.Layout.WG_STRIDED((config.block,), vec_size=config.vector)
    block = lambda leaves: plgpu.ShapeDtypeStruct((config.block,), leaves[0].dtype, layout=layout)
    count = len(sizes)
    by_leaf = lambda refs: [refs[leaf::count] for leaf in range(count)]

    def kernel(scalars_ref: Any, *refs: Any) -> None:
        index = jax.lax.axis_index("blocks")
        whole = [plgpu.RefType()] * len(refs)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WG_SPLAT, *whole), return_type=tuple(block(leaves) for leaves in arrays)
        )
        def load(_: Any, index: Any, *refs: Any) -> tuple[Any, ...]:
            return tuple(tile.load() for tile in tiles.select(index, by_leaf(refs), starts, layout.to_mgpu()))

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WG_SPLAT, *[layout] * writes, *whole[: writes * count]), return_type=()
        )
        def store(_: Any, index: Any, *new_and_refs: Any) -> tuple[Any, ...]:
            new, refs = new_and_refs[:writes], new_and_refs[writes:]
            for tile, x in zip(tiles.select(index, by_leaf(refs), starts, layout.to_mgpu()), new, strict=True):
                tile.store(x)
            return ()

        new = body([scalars_ref[k] for k in range(scalars.size)], *load(index, *refs))
        store(index, *new, *refs[: writes * count])

    refs = [jax.new_ref(x) for leaves in arrays[:writes] for x in leaves]
    plgpu.kernel(
        kernel,
        out_type=(),
        grid=(starts[-1],),
        grid_names=("blocks",),
        kernel_name=f"zerojax_{name}",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(scalars, *refs, *itertools.chain(*arrays[writes:]))
    new = [jax.freeze(ref) for ref in refs]
    return [new[a * count : (a + 1) * count] for a in range(writes)]


def _simulate(
    name: str, body: Body, scalars: jax.Array, arrays: list[list[jax.Array]], writes: int, config: Config
) -> list[list[jax.Array]]:
    """The same on a CPU for one leaf: the interpreter knows no addresses, and its last block is padded."""
    size, block = arrays[0][0].size, THREADS * config.vector
    refs = [jax.new_ref(jnp.pad(x, (0, -size % block))) for (x,) in arrays]

    def kernel(scalars_ref: Any, *refs: Any) -> None:
        here = pl.ds(jax.lax.axis_index("blocks") * block, block)
        new = body([scalars_ref[k] for k in range(scalars.size)], *[ref[here] for ref in refs])
        for ref, x in zip(refs, new, strict=False):
            ref[here] = x

    plgpu.kernel(
        kernel,
        out_type=(),
        grid=(math.ceil(size / block),),
        grid_names=("blocks",),
        kernel_name=f"zerojax_{name}",
        interpret=dispatch.interpret_params("interpret"),
    )(scalars, *refs)
    return [[jax.freeze(ref)[:size]] for ref in refs[:writes]]
