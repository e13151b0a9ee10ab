"""How what an optimizer keeps in host memory lies there, and how it comes to the device and goes back.

Transfers move whole arrays, so a leaf that is larger than a bucket is kept as several: `Pieces`, a node of the state's
tree. Pieces are equal blocks of a leaf, cut along dims that no mesh axis shards, so that cutting moves nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from zerojax import meshes

PyTree = Any
HOST, DEVICE = "pinned_host", "device"
_POOL = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
LIVE = 4  # buckets on the device at once: one leaves, one is or will be updated, two come in
PART_BYTES = 2**30  # of what is made or read at once: what goes to the host is on the device, or twice there, meanwhile
LEAST_BYTES = 2**20  # of a piece: the time of a smaller transfer is its latency


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offload:
    """What of the optimizer's state, and of the params, lives in pinned host memory.

    Scalars stay on the device. Of two ways to say how much, `fraction` and `hbm_budget_bytes`, give one.

    Attributes:
      fraction: Share of the state's bytes, the largest leaves first.
      hbm_budget_bytes: What params, gradients and state at rest may take on each device, in bytes: as much of the
        state as does not fit is on the host, the largest leaves first. The update's buckets come on top.
      pattern: A regex on paths of the state's leaves, `0/mu/blocks/kernel` say: others stay on the device.
      bucket_bytes: The update takes less than four times this much memory of each device; large buckets cost fewer
        calls, small ones less memory.
      params: Whether params are in host memory, too: at stage 3, all that are sharded. What `layerwise` names comes to
        the device layer by layer, in the forward and again in the backward pass, the rest for as long as these take; to
        be updated it comes in the buckets, or, with an optimizer that is not streamed, as a whole. How much of the
        state goes is said by the other attributes.

    Example:
      >>> Offload(pattern="nu")
      Offload(fraction=1.0, hbm_budget_bytes=None, pattern='nu', bucket_bytes=33554432, params=False)
    """

    fraction: float = 1.0
    hbm_budget_bytes: int | None = None
    pattern: str | None = None
    bucket_bytes: int = 2**25
    params: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"Offload: fraction must be from 0 to 1, got {self.fraction!r}.")
        if self.hbm_budget_bytes is not None and self.fraction != 1:
            raise ValueError("Offload: give fraction or hbm_budget_bytes, not both.")
        if self.bucket_bytes < 1:
            raise ValueError(f"Offload: bucket_bytes must be at least 1, got {self.bucket_bytes!r}.")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as e:
                raise ValueError(f"Offload: pattern={self.pattern!r} is no regular expression: {e}.") from e

    @property
    def filled_bytes(self) -> int:
        """What buckets are filled to: `LIVE` of them are on the device, which are to be less than four of the asked."""
        return max(self.bucket_bytes * 15 // (4 * LIVE), 1)


def as_offload(offload: str | Offload | None) -> Offload | None:
    """What `make_plan` takes as `offload`."""
    if offload == HOST:
        return Offload()
    if offload is None or isinstance(offload, Offload):
        return offload
    raise ValueError(f"offload must be None, {HOST!r} or a zerojax.Offload, got {offload!r}.")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["grid"])
@dataclasses.dataclass(frozen=True)
class Pieces:
    """One leaf, kept as equal blocks.

    Attributes:
      parts: The blocks, in row-major order.
      grid: How many there are along each dim.
    """

    parts: tuple[Any, ...]
    grid: tuple[int, ...]


def cut(x: Any, grid: tuple[int, ...]) -> Any:
    """A leaf as it is kept: as it is, or in `Pieces`.

    Example:
      >>> [p.tolist() for p in cut(jnp.arange(4), (2,)).parts]
      [[0, 1], [2, 3]]
    """
    if math.prod(grid) == 1:
        return x
    return Pieces(tuple(piece(x, at, grid) for at in places(grid)), grid)


def whole_shape(x: Any) -> tuple[int, ...]:
    """Shape of a leaf that may be in pieces."""
    if not isinstance(x, Pieces):
        return tuple(x.shape)
    return tuple(n * k for n, k in zip(x.parts[0].shape, x.grid, strict=True))


def is_pieces(x: Any) -> bool:
    """For `jax.tree.map(..., is_leaf=is_pieces)`."""
    return isinstance(x, Pieces)


def places(grid: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Where in a grid each piece is."""
    return itertools.product(*map(range, grid))


def piece_shape(shape: Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    """Shape of a piece."""
    return tuple(n // k for n, k in zip(shape, grid, strict=True))


def piece(x: jax.Array, at: Sequence[Any], grid: Sequence[int]) -> jax.Array:
    """One piece of a leaf, at a place of the grid."""
    if math.prod(grid) == 1:
        return x
    sizes = piece_shape(x.shape, grid)
    return jax.lax.dynamic_slice(x, [i * n for i, n in zip(at, sizes, strict=True)], sizes)


def with_piece(x: jax.Array, new: jax.Array, at: Sequence[Any], grid: Sequence[int]) -> jax.Array:
    """A leaf with one piece replaced."""
    if math.prod(grid) == 1:
        return new
    return jax.lax.dynamic_update_slice(x, new, [i * n for i, n in zip(at, new.shape, strict=True)])


def _joined(x: Any) -> jax.Array:
    if not isinstance(x, Pieces):
        return x
    parts = list(x.parts)
    for dim in reversed(range(len(x.grid))):
        n = x.grid[dim]
        parts = [jnp.concatenate(parts[k : k + n], axis=dim) for k in range(0, len(parts), n)]
    return parts[0]


@dataclasses.dataclass(frozen=True)  # no pytree: a leaf of trees
class Rest:
    """How one leaf of the state, or a param, is kept at rest.

    Attributes:
      name: Its path.
      shape: Of the whole leaf.
      dtype: Its dtype.
      spec: Its `PartitionSpec`, that of its pieces too.
      size: Its bytes on each device.
      param: Number of the param that it is or belongs to, or None.
      on_host: Whether it is in host memory.
      grid: Of its pieces.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    spec: PartitionSpec
    size: int
    param: int | None
    on_host: bool = False
    grid: tuple[int, ...] = ()

    def sharding(self, mesh: meshes.AnyMesh) -> Any:
        """The leaf's `NamedSharding`, or `Pieces` of it."""
        one = NamedSharding(mesh, self.spec, memory_kind=HOST if self.on_host else None)
        count = math.prod(self.grid)
        return one if count == 1 else Pieces((one,) * count, self.grid)


def in_use(x: Any, rest: Rest) -> jax.Array:
    """A leaf that is kept as `rest` says, whole and on the device."""
    return _joined(jax.device_put(x, jax.memory.Space.Device)) if rest.on_host else x


def at_rest(x: jax.Array, rest: Rest, mesh: meshes.AnyMesh) -> Any:
    """A whole leaf as it is kept; inside a jit, but not in `meshes.on_mesh`, which lays out on the device."""
    return jax.device_put(cut(x, rest.grid), rest.sharding(mesh)) if rest.on_host else x


def parts(rests: Sequence[Rest]) -> list[list[int]]:
    """Numbers of arrays that are made or read together: `PART_BYTES` of a device one after another, or a larger one."""
    found: list[list[int]] = []
    room = 0
    for i, rest in enumerate(rests):
        if not found or rest.size > room:
            found.append([])
            room = PART_BYTES
        found[-1].append(i)
        room -= rest.size
    return found


def copied(x: Any, sharding: NamedSharding) -> jax.Array:
    """A copy, in whichever memory, by no way that can turn out to be an alias: what is donated is the caller's own."""
    on_device = sharding.with_memory_kind(DEVICE)
    new = jax.device_put(jax.jit(_strong_copy, out_shardings=on_device)(jax.device_put(x, on_device)), sharding)
    return jax.block_until_ready(new) if sharding.memory_kind == HOST else new  # so that no two are on the device


def _strong_copy(x: jax.Array) -> jax.Array:
    return jnp.array(x, x.dtype)


def check_room(bytes_per_device: int, mesh: meshes.AnyMesh, what: str) -> None:
    """Raises `MemoryError` where this process has less host memory than is to be pinned."""
    if not bytes_per_device or not isinstance(mesh, jax.sharding.Mesh):
        return
    wanted = bytes_per_device * len(mesh.local_devices)
    shown = f"{what} {wanted / 1e9:.1f} GB for this process's host memory"
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > machine:
        raise MemoryError(
            f"{shown}, the machine has {machine / 1e9:.1f} GB: take more devices, narrower moments, a smaller "
            "Offload(fraction=) or Offload(params=False)."
        )
    limit = int(os.environ.get(_POOL, "64")) * 2**30
    if not meshes.simulated(mesh) and wanted > limit:
        raise MemoryError(
            f"{shown}, JAX pins at most {limit / 1e9:.1f} GB: put {_POOL}="
            f"{math.ceil(1.1 * wanted / 2**30)} into the environment before the program starts."
        )


@dataclasses.dataclass(frozen=True)
class Absent:
    """Stands for an array of a state or of params that is elsewhere while the rest is worked on; no pytree, a leaf.

    Attributes:
      number: Which array.
      shape: Its shape.
      dtype: Its dtype.
    """

    number: int
    shape: tuple[int, ...]
    dtype: Any
