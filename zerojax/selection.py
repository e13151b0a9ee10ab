"""Which leaves of a state go to host memory, and into how many pieces each is cut there. All by shapes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from pallas_kernels import formats
from zerojax import host, report
from zerojax.host import Offload, Rest


def select(
    rests: Sequence[Rest],
    offload: Offload,
    params: Sequence[tuple[Sequence[int], Sequence[int], int]],
    *,
    beside: int,
    in_pieces: bool,
) -> list[Rest]:
    """`rests` with what `offload` sends to the host.

    Args:
      rests: The leaves of a state, all on the device.
      offload: What is to go.
      params: Of each param its shape, into how many shards each dim is cut, and its bytes that come to each device from
        host memory.
      beside: Bytes on each device of what is no state.
      in_pieces: Whether leaves may be cut.
    """
    on_host = _chosen(rests, offload, beside)
    held = [size for _, _, size in params]  # what is on the host of each param and its state, in bytes
    for rest, is_moved in zip(rests, on_host, strict=True):
        if is_moved and rest.param is not None:
            held[rest.param] += rest.size
    grids = [grid_for(shape, cuts, size, offload) for (shape, cuts, _), size in zip(params, held, strict=True)]

    def grid(rest: Rest, is_moved: bool) -> tuple[int, ...]:
        return grids[rest.param] if is_moved and in_pieces and rest.param is not None else rest.grid

    pairs = zip(rests, on_host, strict=True)
    return [dataclasses.replace(rest, on_host=is_moved, grid=grid(rest, is_moved)) for rest, is_moved in pairs]


def _chosen(rests: Sequence[Rest], offload: Offload, beside: int) -> list[bool]:
    """Which leaves go."""
    named = lambda rest: offload.pattern is None or re.search(offload.pattern, rest.name) is not None
    candidates = [math.prod(rest.shape) > 0 and len(rest.shape) > 0 and named(rest) for rest in rests]
    if offload.pattern is not None and not any(candidates):
        raise ValueError(
            f"Offload: pattern={offload.pattern!r} names no array of the optimizer's state; it has "
            f"{', '.join(rest.name for rest in rests[:8])}{', ...' if len(rests) > 8 else ''}."
        )
    sizes = [rest.size for rest in rests]
    total = sum(size for size, able in zip(sizes, candidates, strict=True) if able)
    if offload.hbm_budget_bytes is None:
        share = int(offload.fraction * total)
        return moved(sizes, candidates, least=share, most=share)
    at_rest = beside + sum(sizes)
    least = at_rest - offload.hbm_budget_bytes
    if least > total:
        raise ValueError(
            f"Offload: params, gradients and state take {report.format_bytes(at_rest)} on each device, of which "
            f"{report.format_bytes(total)} could go to the host: more than hbm_budget_bytes="
            f"{report.format_bytes(offload.hbm_budget_bytes)}. Take more devices, a higher stage or narrower "
            "moments."
        )
    return moved(sizes, candidates, least=max(least, 0), most=total)


def moved(sizes: Sequence[int], candidates: Sequence[bool], least: int, most: int) -> list[bool]:
    """Which leaves move: of the candidates the largest, until at least `least` bytes do, but never more than `most`.

    Example:
      >>> moved([5, 80, 15], [True, True, True], least=20, most=20)
      [True, False, True]
    """
    chosen, total = [False] * len(sizes), 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if candidates[i] and total < least and total + sizes[i] <= most:
            chosen[i], total = True, total + sizes[i]
    return chosen


def grid_for(shape: Sequence[int], cuts: Sequence[int], size: int, offload: Offload) -> tuple[int, ...]:
    """The grid of a leaf of which `size` bytes come to the device, so that a piece of them fits into a bucket."""
    return grid_of(shape, cuts, math.ceil(size / max(offload.filled_bytes, host.LEAST_BYTES)))


def grid_of(shape: Sequence[int], cuts: Sequence[int], count: int) -> tuple[int, ...]:
    """Into how many equal parts each dim is cut, for `count` pieces or a few more; leading dims first.

    Args:
      shape: Of a leaf.
      cuts: Into how many shards each dim is cut already; only dims of one are cut further.
      count: Wanted pieces; where the dims have no such divisors there are fewer.

    Example:
      >>> grid_of((24, 2048, 8192), (1, 1, 8), 100)
      (8, 16, 1)
      >>> grid_of((50257, 2048), (1, 1), 30)
      (1, 32)
    """
    parts = [_divisors(_units(shape, d)) if cuts[d] == 1 else [1] for d in range(len(shape))]

    def preference(grid: tuple[int, ...]) -> tuple[Any, ...]:
        pieces = math.prod(grid)
        return pieces < count, pieces if pieces >= count else -pieces, [-k for k in grid]

    return min(itertools.product(*parts), key=preference)


def _units(shape: Sequence[int], dim: int) -> int:
    """How many parts a dim may have: along the last, groups of 8-bit numbers stay whole."""
    n = shape[dim]
    return n if dim < len(shape) - 1 else (n // formats.GROUP if n % formats.GROUP == 0 else 1)


def _divisors(n: int) -> list[int]:
    return sorted({k for d in range(1, math.isqrt(n) + 1) if n % d == 0 for k in (d, n // d)}) or [1]
