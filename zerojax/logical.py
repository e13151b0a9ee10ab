"""A training state as whole arrays by name, which know no stage, mesh or memory kind; and back, as a plan keeps it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from zerojax import host, meshes
from zerojax.host import HOST, Rest
from zerojax.plan import Plan
from zerojax.precision import LossScaleState
from zerojax.train_state import TrainState
from zerojax.zero import ZeroTransformation

PyTree = Any


def named(state: TrainState) -> dict[str, Any]:
    """The arrays of a state by name, some in `host.Pieces`.

    Raises:
      ValueError: two have one name.
    """
    leaves: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state, is_leaf=host.is_pieces):
        name = _name(path)
        if name in leaves:
            raise ValueError(
                f"two leaves of this state are named {name!r}: a checkpoint keeps leaves by name; rename the key that "
                "holds a '/'."
            )
        leaves[name] = x
    return leaves


def _name(path: tuple[Any, ...]) -> str:
    """Params and the optimizer's leaves are named as plans name them: params that are one array are `params/(root)`."""
    part = meshes.path_name(path[:1])
    return f"{part}/{meshes.path_name(path[1:])}" if part in ("params", "opt_state") else meshes.path_name(path)


def describe(x: Any) -> dict[str, Any]:
    """Shape and dtype of an array, and for people where it was, as JSON holds it."""
    part = _parts(x)[0]
    return {
        "shape": list(host.whole_shape(x)),
        "dtype": str(part.dtype),
        "spec": str(getattr(part.sharding, "spec", PartitionSpec())),
        "memory": part.sharding.memory_kind,
    }


def mesh_of(leaves: dict[str, Any]) -> dict[str, int]:
    """Axes of the mesh that arrays are on."""
    found = (getattr(x.sharding, "mesh", None) for x in jax.tree.leaves(leaves))
    return next((dict(mesh.shape) for mesh in found if mesh is not None), {})


def _parts(x: Any) -> tuple[Any, ...]:
    return x.parts if host.is_pieces(x) else (x,)


def snapshot(x: Any) -> jax.Array:
    """An array as Orbax shall write it: whole, and in nobody else's memory.

    Orbax writes straight from host memory what is there, where the next step would work on it.
    """
    parts = _parts(x)
    if _is_key(parts[0].dtype):
        return jax.random.key_data(x)
    sharding = parts[0].sharding
    if sharding.memory_kind != HOST:
        return x
    grid = x.grid if host.is_pieces(x) else (1,) * x.ndim
    shards = [part.addressable_shards for part in parts]
    arrays = []
    for k, shard in enumerate(shards[0]):
        size = shard.data.shape
        whole = np.empty([n * k for n, k in zip(size, grid, strict=True)], parts[0].dtype)
        for at, of_part in zip(host.places(grid), shards, strict=True):
            whole[tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, size, strict=True))] = of_part[k].data
        arrays.append(jax.device_put(whole, SingleDeviceSharding(shard.device, memory_kind=HOST)))
    return jax.make_array_from_single_device_arrays(host.whole_shape(x), sharding, arrays)


def _is_key(dtype: Any) -> bool:
    return jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)


def stored(rest: Rest) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf as `snapshot` gives it: of random keys their numbers."""
    x = jax.ShapeDtypeStruct(rest.shape, rest.dtype)
    return jax.eval_shape(jax.random.key_data, x) if _is_key(rest.dtype) else x


def wanted(tx: ZeroTransformation, plan: Plan, saved: Mapping[str, Any]) -> dict[str, Rest]:
    """How each array of the state is kept, by name; with a loss scale if one is among the names in `saved`."""
    one = lambda name, dtype: Rest(name, (), np.dtype(dtype), PartitionSpec(), 0, None)
    state = [one("step", np.int32), one("skipped", np.int32)]
    fields = zip(LossScaleState._fields, (np.float32, np.int32, np.int32), strict=True)
    state += [one(f"loss_scale/{name}", dtype) for name, dtype in fields if f"loss_scale/{name}" in saved]
    for leaf in plan.leaves:
        spec = leaf.sharded if plan.stage >= 3 else leaf.whole
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        grid = (1,) * len(leaf.shape)
        rest = Rest(f"params/{leaf.name}", leaf.shape, leaf.dtype, spec, size, None, on_host=leaf.on_host, grid=grid)
        state.append(rest)
    for rest in jax.tree.leaves(tx.rests):
        state.append(dataclasses.replace(rest, name=f"opt_state/{rest.name}"))
    return {rest.name: rest for rest in state}


_WAYS = {
    "params": "restore it with the model that was saved",
    "opt_state": "restore it with the optimizer that was saved, its wrappers and the dtypes of its moments included",
}


def check(saved: Mapping[str, Any], wanted: Mapping[str, Rest], where: str) -> None:
    """Raises `ValueError` unless the arrays that were saved, as `describe` has it, are just those wanted."""
    shown = lambda leaf: f"{leaf['dtype']} {leaf['shape']}"
    have = {name: shown(leaf) for name, leaf in saved.items()}
    want = {name: shown({"dtype": rest.dtype, "shape": list(rest.shape)}) for name, rest in wanted.items()}
    for name in [*want, *have]:
        part = name.split("/")[0]
        what = "optimizer" if part == "opt_state" else "model"
        if name not in have:
            problem = f"lacks {name!r}, {want[name]} of this {what}"
        elif name not in want:
            problem = f"holds {name!r}, {have[name]}, which this {what} lacks"
        elif have[name] != want[name]:
            problem = f"holds {name!r} as {have[name]}, this {what} has {want[name]}"
        else:
            continue
        raise ValueError(f"{where} {problem}: {_WAYS.get(part, 'another version wrote it')}.")


def empty(wanted: Mapping[str, Rest], plan: Plan) -> dict[str, jax.Array]:
    """The arrays without elements."""
    none = {name: rest for name, rest in wanted.items() if 0 in rest.shape}
    zeros = lambda rest: jax.device_put(np.zeros(rest.shape, rest.dtype), NamedSharding(plan.mesh, rest.spec))
    return {name: zeros(rest) for name, rest in none.items()}


def kept(x: jax.Array, rest: Rest) -> Any:
    """What `snapshot` gave as the plan keeps it: what is in pieces is cut in host memory, shard by shard."""
    if _is_key(rest.dtype):
        return jax.random.wrap_key_data(x, impl=rest.dtype)
    if math.prod(rest.grid) == 1:
        return x
    size = host.piece_shape(x.addressable_shards[0].data.shape, rest.grid)
    shards = [(shard.device, np.asarray(shard.data)) for shard in x.addressable_shards]

    def part(at: tuple[int, ...]) -> jax.Array:
        index = tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, size, strict=True))
        blocks = [
            jax.device_put(np.ascontiguousarray(shard[index]), SingleDeviceSharding(device, memory_kind=HOST))
            for device, shard in shards
        ]
        shape = host.piece_shape(rest.shape, rest.grid)
        return jax.make_array_from_single_device_arrays(shape, x.sharding, blocks)

    return host.Pieces(tuple(part(at) for at in host.places(rest.grid)), rest.grid)


def state_of(leaves: Mapping[str, Any], tx: ZeroTransformation, plan: Plan) -> TrainState:
    """The state, of its arrays by name as the plan keeps them."""
    params = [leaves[f"params/{leaf.name}"] for leaf in plan.leaves]
    opt_state = jax.tree.map(lambda rest: leaves[f"opt_state/{rest.name}"], tx.rests)
    scale = {name: leaves[key] for name in LossScaleState._fields if (key := f"loss_scale/{name}") in leaves}
    return TrainState(
        step=leaves["step"],
        params=plan.treedef.unflatten(params),
        opt_state=opt_state,
        loss_scale=LossScaleState(**scale) if scale else None,
        skipped=leaves["skipped"],
    )
