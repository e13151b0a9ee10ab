"""Kernels over lists of leaves that are stored in formats of `formats.py`: `leaves.run`, in float32 for the body."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import formats, leaves
from pallas_kernels.formats import Format, Place

Lists = Sequence[Sequence[Any]]


def run(
    name: str,
    body: Callable[..., Sequence[jax.Array]],
    scalars: jax.Array,
    written: Lists,
    read: Lists,
    *,
    halves: Sequence[int | None],
    factors: jax.Array,
    seed: jax.Array,
    places: Sequence[Place],
    sums: int = 0,
    config: leaves.Config | None,
    implementation: str,
) -> tuple[list[list[Any]], jax.Array]:
    """Runs `body` over each element of each leaf, in place where the caller donates.

    Args:
      name: Of the kernel.
      body: `body(tools, scalars, *values, *factors) -> new`, elementwise: `values` are float32 blocks of one leaf's
        `written` and `read` lists; `new` are those of its `written` ones, then `sums` ones. A function of a module:
        launches of an equal one are lowered once.
      scalars: float32[k]; the last is 0 where all is to stay as it is.
      written: Lists of leaves that change, in any format.
      read: Lists of leaves that do not.
      halves: For each list, which half of the random bits rounds it, as in `Format`.
      factors: float32[leaves, k].
      seed: int32, of the step.
      places: Of the leaves.
      sums: How many of `body`'s results are summed over each leaf.
      config: Launch choices; None for the default of the formats.
      implementation: "mosaic" or "interpret".

    Returns:
      `written`, new; and float32[leaves, sums].
    """
    lists = [*written, *read]
    new = [list(x) for x in written]
    totals = jnp.zeros((len(lists[0]), sums), jnp.float32)
    kinds = [
        tuple(formats.format_of(leaf, half=half) for leaf, half in zip(row, halves, strict=True))
        for row in zip(*lists, strict=True)
    ]
    for kind in dict.fromkeys(kinds):
        some = [i for i, other in enumerate(kinds) if other == kind]
        arrays = [[formats.arrays_of(x[i]) for i in some] for x in lists]
        by_array = [[list(column) for column in zip(*rows, strict=True)] for rows in arrays]
        for k in range(len(written), len(lists)):
            by_array[k] = [column for a, column in enumerate(by_array[k]) if a not in kind[k].unread]
        number = [len(columns) for columns in by_array]
        results, part = leaves.run(
            name,
            _OnArrays(body, kind, len(written)),
            scalars,
            list(itertools.chain(*by_array[: len(written)])),
            list(itertools.chain(*by_array[len(written) :])),
            factors=factors[jnp.array(some)],
            keys=_keys(kind, seed, [places[i] for i in some]),
            unread=[sum(number[:k]) + a for k in range(len(written)) for a in kind[k].unread],
            sums=sums,
            config=config or _config(kind),
            implementation=implementation,
        )
        for k, stored in enumerate(new):
            mine = results[sum(number[:k]) : sum(number[: k + 1])]
            for i, column in zip(some, zip(*mine, strict=True), strict=True):
                stored[i] = formats.leaf_of(column, stored[i])
        totals = totals.at[jnp.array(some)].set(part)
    return new, totals


@dataclasses.dataclass(frozen=True)
class _OnArrays:
    """`body` between the arrays of one kind of leaves, as `leaves.run` wants it."""

    body: Callable[..., Sequence[jax.Array]]
    kind: tuple[Format, ...]
    writes: int

    def __call__(self, here: leaves.Here, *arrays: jax.Array) -> list[jax.Array]:
        rest = list(arrays)
        tools = here.fast if any(f.fast for f in self.kind) else here.exact
        values = [f.decode([rest.pop(0) for a in range(len(f.dtypes)) if a not in f.unread], tools) for f in self.kind]
        new = list(self.body(tools, here.scalars, *values, *here.factors))
        stored = [f.encode(x, here.bits, tools) for f, x in zip(self.kind, new[: self.writes], strict=False)]
        return [*itertools.chain(*stored), *new[self.writes :]]


def _keys(kind: Sequence[Format], seed: jax.Array, places: Sequence[Place]) -> leaves.Keys | None:
    if not any(f.random for f in kind):
        return None
    key = formats.leaf_key(seed, jnp.array([place.leaf for place in places], jnp.int32))
    return leaves.Keys(key, [place.cuts for place in places])


def _config(kind: Sequence[Format]) -> leaves.Config:
    """The fastest measured for adamw on an H200, where threads load 16 bytes at once of most arrays."""
    if any(f.fast for f in kind):
        return leaves.Config(block=2048, vector=16, tiles=4, stages=3, leaves=64)
    if 2 * sum(f.narrow for f in kind) >= len(kind):
        return leaves.Config(vector=8, tiles=4, stages=3)
    return leaves.Config()


def by_service(
    kernel: Callable[..., Lists], reference: Callable[..., Lists], lists: Lists, *others: Sequence[Any]
) -> list[list[Any]]:
    """`kernel(lists, *others)` on the leaves that it serves, `reference` on the rest: of 8-bit ones of ragged rows."""
    served = [all(map(formats.whole_groups, row)) for row in zip(*lists, strict=True)]
    new: list[list[Any]] = [[None] * len(served) for _ in range(3)]
    for run, which in ((kernel, True), (reference, False)):
        some = [i for i, is_served in enumerate(served) if is_served == which]
        if some:
            pick = lambda x, some=some: [x[i] for i in some]
            for k, column in enumerate(run([pick(x) for x in lists], *map(pick, others))):
                for i, leaf in zip(some, column, strict=True):
                    new[k][i] = leaf
    return new
