"""The kernels of softmax: x is read once and y written once, however long the row.

A row is one warp's, or that of 4 to 16 warps of a thread block, or of up to 16 such blocks (a cluster). Short rows lie
in registers, long ones in shared memory, several blocks to a processor, so that loads of one go on while another
computes. Warps that share a row find their own maximum and sum, tell each other once through shared memory, and then
scale what they hold (the online rule, arXiv:1805.02867).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from pallas_kernels import dispatch, meetings, mlir
from pallas_kernels.dispatch import plgpu
from pallas_kernels.mlir import LANES, WARPS
from pallas_kernels.softmax_threads import Mask, Row, Spread

LONGEST = 2**19  # elements of a row: 16 blocks of 16 warps, 64 elements a thread
_LOG2_E = math.log2(math.e)
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Launch choices: they change speed, and the order of a row's sum, which depends on its length alone.

    Attributes:
      warps: That share a row: 1, or 4 times `warpgroups` times `cluster`.
      warpgroups: In a thread block.
      cluster: Thread blocks that share a row, at most 16.
      rows: That one warp takes at once, where it has them for itself.
      staged: Whether a row is held in shared memory, not in registers.
    """

    warps: int = 4
    warpgroups: int = 1
    cluster: int = 1
    rows: int = 1
    staged: bool = False


def _shared(warpgroups: int, cluster: int, *, staged: bool = True) -> Config:
    warps = WARPS * warpgroups * cluster
    return Config(warps=warps, warpgroups=warpgroups, cluster=cluster, staged=staged)


# Device -> (columns, itemsize, backward, causal) -> what was faster than the rule below, or was measured where that was
# not; beside it what part that is of a copy's bandwidth (jax 0.11.2, 2**28 elements; the ceiling, 4264 to 4275 GB/s, by
# the profiler). A backward writes one byte in three, so it may be above it. benchmarks/results/softmax-nvidia-h200.md.
_TUNED: dict[str, dict[tuple[int, int, bool, bool], Config]] = {
    "NVIDIA H200": {
        (512, 4, True, False): Config(),  # 1.03
        (1024, 2, False, False): Config(warps=1, warpgroups=4),  # 0.98
        (1024, 2, True, False): Config(),  # 1.02
        (16384, 4, False, False): _shared(2, 1, staged=False),  # 0.98
        (16384, 4, True, False): _shared(2, 1, staged=False),  # 1.03
        (32768, 4, True, False): _shared(2, 4),  # 1.02
        (50257, 2, False, False): _shared(4, 2),  # 0.89
        (50257, 2, True, False): _shared(2, 8),  # 0.96
        (50257, 4, False, False): _shared(2, 8),  # 0.94
        (4096, 4, True, True): _shared(2, 1, staged=False),  # 0.96
    }
}


def config_for(columns: int, itemsize: int, *, backward: bool, causal: bool = False, device: str = "") -> Config:
    """Launch choices for rows of a length: those tuned for a device, else by what fits where.

    Args:
      columns: Length of a row.
      itemsize: Of an element, in bytes.
      backward: Whether for the backward kernel, which holds two rows.
      causal: Whether what follows the diagonal is masked.
      device: Its kind, as JAX names it.

    Example:
      >>> config_for(1000, 4, backward=False)
      Config(warps=4, warpgroups=1, cluster=1, rows=1, staged=False)
    """
    for kind, tuned in _TUNED.items():
        if kind in device and (columns, itemsize, backward, causal) in tuned:
            return tuned[columns, itemsize, backward, causal]
    arrays = 2 if backward else 1
    if columns * itemsize <= LANES * 16 * (8 if itemsize == 2 and not backward else 4):
        return Config(warps=1, rows=min(4, 16 * LANES // columns) or 1)
    # A thread takes 64 elements, or the 256 bytes of fewer.
    each = min(64, 256 // (itemsize * arrays))
    ragged = columns * itemsize % 16 != 0  # takes more registers, so from 4096 elements on it is held elsewhere
    if columns <= each * LANES * WARPS and not (ragged and not backward and columns > 4096):
        return Config()
    # Of a row longer than 32 KB many small blocks take 16 KB each, or 32 KB: the more of them fit a processor, the
    # less it waits where one of them does.
    share = (32 if ragged and not backward else 16) * 1024
    cluster = min(16, _power_of_two(columns * itemsize / share)) if columns * itemsize > 32 * 1024 else 1
    warpgroups = min(4, _power_of_two(columns / (cluster * each * LANES * WARPS)))
    # Two long rows that leave no room for a second block are faster in registers: 262144 float32 columns 0.95 for 0.92.
    room = (104 if backward and not ragged else 208) * 1024
    return _shared(warpgroups, cluster, staged=columns * itemsize * arrays <= cluster * room)


def _power_of_two(x: float) -> int:
    """The least that is not below x."""
    return 1 << max(0, math.ceil(math.log2(x)))


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static of a call of `softmax`."""

    scale: float
    causal: bool
    implementation: str


def _forward_body(call: Call, rows: Sequence[Any], x_ref: Any, y_ref: Any, bias_ref: Any = None) -> None:
    sources = [x_ref] if bias_ref is None else [x_ref, bias_ref]
    # Without bias the exponent takes the scale; of a negative one the greatest is the least.
    rate = call.scale * _LOG2_E if bias_ref is None else _LOG2_E
    extreme, lowest = ("max", -_LARGEST) if rate > 0 else ("min", _LARGEST)

    def z(x: Any, bias: Any = None) -> Any:
        return x if bias is None else x * call.scale + bias

    def finish(row: Any, held: Sequence[Any]) -> None:
        row.clear(y_ref)
        # Of a part that is -inf, or masked, throughout there is no maximum to subtract.
        largest = row.either(extreme, row.fold(extreme, None if bias_ref is None else z, *held), lowest)
        total = row.fold("add", lambda *v: row.exp2((z(*v) - largest) * rate), *held)
        maxima, totals = row.meet(largest, total)
        highest = row.over_warps(extreme, maxima)
        scaled = [s * row.exp2((m - highest) * rate) for m, s in zip(maxima, totals, strict=True)]
        inverse = 1.0 / row.over_warps("add", scaled)
        # The exponential again costs less than the registers to keep it.
        row.store(y_ref, lambda *v: row.exp2((z(*v) - highest) * rate) * inverse, *held, sound=inverse)

    _rows_of(rows, sources, [math.copysign(math.inf, -call.scale), 0.0], finish)


def _backward_body(call: Call, rows: Sequence[Any], y_ref: Any, dy_ref: Any, dx_ref: Any) -> None:
    def finish(row: Any, held: Sequence[Any]) -> None:
        row.clear(dx_ref)
        (parts,) = row.meet(row.fold("add", lambda y, dy: y * dy, *held))
        dot = row.over_warps("add", parts)
        row.store(dx_ref, lambda y, dy: (dy - dot) * (y * call.scale), *held, sound=dot)

    _rows_of(rows, [y_ref, dy_ref], [0.0, 0.0], finish)


def _rows_of(
    rows: Sequence[Any], sources: Sequence[Any], fills: Sequence[float], finish: Callable[[Any, Sequence[Any]], None]
) -> None:
    """Loads all rows of a warp, so that all are on their way, before it finishes one."""
    held = [row.load(sources, fills[: len(sources)]) for row in rows]
    for row, vectors in zip(rows, held, strict=True):
        finish(row, vectors)


class _Simulated:
    """A row for the interpreter, which knows neither registers nor clusters: whole, and by its index."""

    _FOLDS: ClassVar[dict[str, tuple[Any, Any]]] = {
        "add": (jnp.add, jnp.sum),
        "max": (jnp.maximum, jnp.max),
        "min": (jnp.minimum, jnp.min),
    }

    def __init__(self, row: jax.Array, columns: int, queries: int | None, where: Any):
        self.row = row
        limit = columns if queries is None else row % queries + (1 + columns - queries)
        self.kept = jnp.arange(columns) < limit
        if where is not None:
            self.kept &= where[row]

    def load(self, sources: Sequence[Any], fills: Sequence[float]) -> list[jax.Array]:
        vectors = [source[self.row] for source in sources]
        return [jnp.where(self.kept, x, jnp.asarray(fill, x.dtype)) for x, fill in zip(vectors, fills, strict=True)]

    def fold(self, how: str, term: Callable[..., jax.Array] | None, *held: jax.Array) -> jax.Array:
        wide = [x.astype(jnp.float32) for x in held]
        terms = term(*wide) if term else wide[0]
        return self._FOLDS[how][1](jnp.where(self.kept, terms, 0.0) if how == "add" else terms)

    def either(self, how: str, x: jax.Array, y: float) -> jax.Array:
        return self._FOLDS[how][0](x, y)

    def exp2(self, x: jax.Array) -> jax.Array:
        return jnp.exp2(x)

    def meet(self, *numbers: jax.Array) -> list[list[jax.Array]]:
        return [[number] for number in numbers]

    def over_warps(self, how: str, heard: Sequence[jax.Array]) -> jax.Array:
        return heard[0]

    def clear(self, ref: Any) -> None:
        pass

    def store(self, ref: Any, value: Callable[..., jax.Array], *held: jax.Array, sound: jax.Array) -> None:
        y = value(*(x.astype(jnp.float32) for x in held))
        ref[self.row] = jnp.where(self.kept, y, 0.0).astype(ref.dtype)


def broadcast_terms(shape: Sequence[int], mask: Sequence[int]) -> list[tuple[int, int, int]]:
    """Where the row of an array's row lies in what broadcasts to the array.

    Args:
      shape: Of the array, without its last dim.
      mask: Likewise of what broadcasts to it.

    Returns:
      (divisor, size, stride)s: it is the sum over them of row // divisor % size * stride.

    Example:
      >>> broadcast_terms((8, 12, 64), (8, 1, 1))
      [(768, 8, 1)]
      >>> broadcast_terms((8, 12, 64), (12, 64))
      [(1, 768, 1)]
    """
    terms: list[tuple[int, int, int]] = []
    divisor = stride = 1
    for size, own in itertools.zip_longest(reversed(shape), reversed(mask), fillvalue=1):
        if own > 1 and terms and math.prod(terms[-1][:2]) == divisor and math.prod(terms[-1][1:]) == stride:
            terms[-1] = (terms[-1][0], terms[-1][1] * size, terms[-1][2])  # goes on where the last one ends
        elif own > 1:
            terms.append((divisor, size, stride))
        divisor, stride = divisor * size, stride * own
    return terms


def _launch(
    name: str,
    body: Callable[..., None],
    call: Call,
    config: Config,
    arrays: Sequence[jax.Array],
    where: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Runs a body over rows: arrays[..., columns] in, one like them out."""
    shape, dtype = arrays[0].shape, arrays[0].dtype
    rows, columns = math.prod(shape[:-1]), shape[-1]
    queries = shape[-2] if call.causal else None
    masks = [mask for mask in (bias, where) if mask is not None]
    kinds: dict[str, Any] = {}
    out: tuple[int, ...]
    if call.implementation == "interpret":
        flat = [jnp.broadcast_to(x, shape).reshape(rows, columns) for x in (*arrays, *masks)]
        out, blocks = (rows, columns), rows
    else:
        flat = [x.reshape(-1) for x in (*arrays, *masks)]
        shared = config.warps > 1
        taken = 1 if shared else WARPS * config.warpgroups * config.rows  # rows of a block
        out, blocks = (rows * columns,), math.ceil(rows / taken)
        spread = Spread(
            columns=columns,
            vector=16 // dtype.itemsize,
            threads=LANES * config.warps // config.cluster,
            cluster=config.cluster,
            queries=queries,
        )
        barriers = meetings.BARRIER_BYTES // 4 if config.cluster > 1 else 0
        kinds["scratch_types"] = [plgpu.SMEM((2 * config.warps + barriers,), jnp.float32)] if shared else []
        if config.staged:
            held = len(arrays) * spread.pieces * LANES * WARPS * config.warpgroups * spread.vector
            kinds["scratch_types"].append(plgpu.SMEM((held,), dtype))
        if config.cluster > 1:
            kinds |= {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
        if config.warpgroups > 1:
            kinds |= {"num_threads": config.warpgroups, "thread_name": "warpgroup"}

    def simulated(*refs: Any) -> None:
        *inputs, out_ref = refs
        where_ref = None if where is None else inputs.pop()
        row = _Simulated(jax.lax.axis_index("rows"), columns, queries, where_ref)
        body(call, [row], *inputs[: len(arrays)], out_ref, *inputs[len(arrays) :])

    def kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * len(refs)), return_type=())
        def run(_: Any, block: Any, *refs: Any) -> tuple[()]:
            left = list(refs)
            stage = left.pop() if config.staged else None
            slots = left.pop() if shared else None
            out_ref = left.pop()
            of_masks = [
                Mask(ref, broadcast_terms(shape[:-1], mask.shape[:-1]), mask.shape[-1])
                for ref, mask in zip(left[len(arrays) :], masks, strict=True)
            ]
            keep = None if where is None else of_masks.pop()
            first = mlir.to_index(block)
            if config.cluster > 1:
                assert slots is not None
                meetings.prepare(mlir.at(mlir.address(slots, mlir.SHARED), 2 * config.warps * 4))
            if not shared:
                warp, _ = mlir.thread()
                first = arith.addi(mlir.times(first, taken), warp)
            numbers = [mlir.plus(first, WARPS * config.warpgroups * i) for i in range(config.rows)]
            if rows % taken:  # beyond the last one it is that one, again
                numbers = [arith.minsi(number, mlir.index(rows - 1)) for number in numbers]
            element = ir.MemRefType(out_ref.type).element_type
            body(
                call,
                [Row(spread, n, element, slots, stage, keep) for n in numbers],
                *left[: len(arrays)],
                out_ref,
                *of_masks,
            )
            return ()

        run(jax.lax.axis_index("rows"), *refs)

    y = plgpu.kernel(
        simulated if call.implementation == "interpret" else kernel,
        out_type=jax.ShapeDtypeStruct(out, dtype),
        grid=(blocks,),
        grid_names=("rows",),
        kernel_name=f"zerojax_{name}",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=dispatch.interpret_params(call.implementation),
        **kinds,
    )(*flat)
    return y.reshape(shape)


def _batched(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Under `vmap` the new dim is one more leading dim: rows are independent."""

    @functools.partial(jax.jit, static_argnums=0)
    def call_it(call: Call, *arrays: jax.Array | None) -> jax.Array:
        mapped = jax.custom_batching.custom_vmap(functools.partial(run, call))

        @mapped.def_vmap
        def _(size: int, batched: Sequence[bool], *arrays: jax.Array | None) -> tuple[jax.Array, bool]:
            rank = max(x.ndim - is_batched for x, is_batched in zip(arrays, batched, strict=True) if x is not None)
            whole = []
            for x, is_batched in zip(arrays, batched, strict=True):
                if x is not None and is_batched:  # of what broadcasts, the new dim comes before those it has not
                    x = x.reshape(size, *[1] * (rank + 1 - x.ndim), *x.shape[1:])
                elif x is not None and x.ndim == rank:
                    x = jnp.broadcast_to(x, (size, *x.shape))
                whole.append(x)
            return call_it(call, *whole), True

        return mapped(*arrays)

    return call_it


def _config(call: Call, x: jax.Array, *, backward: bool) -> Config:
    if call.implementation == "interpret":
        return Config()  # of no consequence there
    kind = dispatch.device_kind()
    return config_for(x.shape[-1], x.dtype.itemsize, backward=backward, causal=call.causal, device=kind)


@_batched
def forward(call: Call, x: jax.Array, where: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
    """y of x: [..., columns], and of what broadcasts to it."""
    config = _config(call, x, backward=False)
    return _launch("softmax", _forward_body, call, config, [x], where, bias)


@_batched
def backward(call: Call, y: jax.Array, dy: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """dx of y and dy: [..., columns]."""
    config = _config(call, y, backward=True)
    return _launch("softmax_backward", _backward_body, call, config, [y, dy], where)
