"""Weights that leave and enter the world of JAX: safetensors files, as Hugging Face names them.

`model.safetensors`; or `model-00001-of-00003.safetensors` and so on, and `model.safetensors.index.json`, which says
what is where. Names are paths, with dots: `blocks.attention.kernel`.
"""

from __future__ import annotations

import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from safetensors import SafetensorError

from zerojax import host, layout, logical, meshes, tensor_files
from zerojax.masters import MasterWeightsState
from zerojax.plan import Leaf, Plan
from zerojax.tensor_files import CODES, FLOATS, some
from zerojax.train_state import TrainState

PyTree = Any


def export_params(
    directory: str | os.PathLike[str],
    params: TrainState | PyTree,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes weights as safetensors, straight from shards, in full precision.

    Every process calls it; process 0 writes. The folder is there when it is complete.

    Args:
      directory: A new folder.
      params: A `TrainState`, whose weights are float32 where it has `master_weights`; or a tree of arrays, which is
        written as it is: 16-bit params without the masters behind them. In any layout.
      dtype: What floating weights are rounded to: "float32", "bfloat16", "float16" or "float64"; their own dtype by
        default. Integers and bools stay as they are.
      max_shard_bytes: Weights of more than this many bytes go to several files; one array is never parted.

    Raises:
      FileExistsError: the folder is there.
      OSError: it could not be written; nothing is left of it.
      TypeError: a leaf is no array, or of a dtype that safetensors lacks.
      ValueError: two leaves have one name; a number is too large for `dtype`; an unknown `dtype`.

    Memory:
      In host memory the arrays of one file, and one more while it is rounded; on devices, of several processes, one
      array.

    Example:
      >>> import tempfile, jax.numpy as jnp, zerojax
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.zeros(4)}
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> plan = zerojax.make_plan(params, mesh, stage=3)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     export_params(folder + "/weights", jax.device_put(params, plan.params))
      ...     sorted(import_params(folder + "/weights", plan))
      ['b', 'w']
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes!r}.")
    folder = pathlib.Path(directory).absolute()
    leaves = _weights(params)
    dtypes = {name: _dtype_of(name, leaf.dtype, dtype) for name, leaf in leaves.items()}
    if not _everywhere(not folder.exists()):
        raise FileExistsError(f"{folder} is there: name a new folder, or delete it first; nothing was overwritten.")
    arrays = (leaf.read() for leaf in leaves.values())
    sizes = {name: math.prod(leaf.shape) * dtypes[name].itemsize for name, leaf in leaves.items()}
    error: Exception | None = None
    try:
        if jax.process_index() == 0:
            tensor_files.write(folder, map(_rounded, arrays, dtypes.values(), dtypes), sizes, max_shard_bytes)
    except Exception as e:  # whatever it is, the others wait for process 0
        error = e
    if jax.process_count() > 1:
        for _ in arrays:  # gathering takes all processes, whether or not the files can be written
            pass
    if _everywhere(error is None):
        return
    if error is not None and not isinstance(error, OSError | SafetensorError):
        raise error
    raise OSError(
        f"the weights were not written to {folder}: {error or 'process 0 says why'}. Nothing is left of them; make "
        "room or mend the cause, and export again."
    ) from error


def import_params(
    path: str | os.PathLike[str],
    plan: Plan,
    *,
    rename: Callable[[str], str] | Mapping[str, str] | None = None,
    strict: bool = True,
) -> PyTree:
    """Reads safetensors into the layout of a plan; each device reads its own slices.

    Args:
      path: A folder as `export_params` or Hugging Face writes it, or one file.
      plan: Where the params shall live, and their names, shapes and dtypes. Floating weights are rounded to nearest
        where the plan's dtype is narrower; integers and bools must be as the plan has them.
      rename: The file's name of a leaf, by the plan's, `blocks/attention/kernel`; a function or a mapping. By default,
        and of leaves that a mapping lacks, the same with dots. Several leaves may have one name, as tied weights do.
      strict: Whether a file's array that no leaf wants is an error.

    Returns:
      Params, laid out as `plan.params`.

    Raises:
      FileNotFoundError: there is no such file, or the folder has none.
      ValueError: a file is damaged; a leaf is missing, is one too many, has another shape or kind of dtype, or a number
        too large for the plan's; `rename` names a leaf that the plan lacks; the plan's mesh has no devices.
      MemoryError: the plan keeps more params in host memory than this process has.

    Memory:
      In host memory one array's part of a device at a time, on devices nothing but their shards.

    Example:
      >>> import tempfile, jax.numpy as jnp, zerojax
      >>> from safetensors.numpy import save_file
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> plan = zerojax.make_plan({"w": jnp.ones((8, 4), "bfloat16")}, mesh, stage=3)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_file({"dense.weight": np.ones((8, 4), np.float32)}, folder + "/model.safetensors")
      ...     import_params(folder, plan, rename={"w": "dense.weight"})["w"].dtype.name
      'bfloat16'
    """
    path = pathlib.Path(path).absolute()
    if not isinstance(plan.mesh, jax.sharding.Mesh):
        raise ValueError(
            "import_params wants a plan of devices; this one's mesh is an AbstractMesh: see jax.make_mesh."
        )
    wanted = _renamed([leaf.name for leaf in plan.leaves], rename)
    opened = tensor_files.slices_at(path)
    for name, theirs in wanted.items():
        if theirs not in opened:
            raise ValueError(
                f"{path} lacks {theirs!r}, wanted for {name!r}; it has {some(opened)}. rename= maps names."
            )
    taken = set(wanted.values())
    if strict and (more := [name for name in opened if name not in taken]):
        raise ValueError(f"{path} holds {some(more)}, which this model lacks; strict=False leaves it out.")
    host.check_room(plan.param_bytes(on_host=True), plan.mesh, "the params have")
    shardings = plan.treedef.flatten_up_to(plan.params)
    checked = [_check(opened[wanted[leaf.name]], wanted[leaf.name], leaf, path) for leaf in plan.leaves]
    arrays = [
        jax.make_array_from_callback(leaf.shape, sharding, functools.partial(_slice, source, leaf))
        for leaf, sharding, source in zip(plan.leaves, shardings, checked, strict=True)
    ]
    return plan.treedef.unflatten(arrays)


class _Weight:
    """A leaf's weights, with the master behind a 16-bit param."""

    def __init__(self, name: str, param: Any, master: Any) -> None:
        self._param, self._master = param, master
        self.shape, dtype = layout.shape_dtype(param, name)
        own = getattr(param, "dtype", dtype)  # 64 bits of NumPy's stay 64, whatever JAX would make of them
        self.dtype: Any = own if master is None else np.dtype(np.float32)

    def read(self) -> np.ndarray:
        """The whole array, in host memory."""
        if self._master is None:
            return _gathered(self._param)
        master = _gathered(self._master)
        if master.dtype == np.float32:
            return master
        upper = _gathered(self._param).view(np.uint16).astype(np.uint32)
        return (upper << 16 | master).view(np.float32)


def _weights(params: TrainState | PyTree) -> dict[str, _Weight]:
    """By name."""
    opt_state = None
    if isinstance(params, TrainState):
        params, opt_state = params.params, params.opt_state
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    treedef: Any = structure
    is_state = lambda x: isinstance(x, MasterWeightsState)
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]
    # Of a partitioned optimizer each state has the masters of its params, and `optax.MaskedNode` for the others.
    masters = [treedef.flatten_up_to(state.masters) for state in states]
    found: dict[str, _Weight] = {}
    for i, (path, x) in enumerate(leaves):
        behind = [of[i] for of in masters if of[i] is not None and not isinstance(of[i], optax.MaskedNode)]
        name = _dotted(meshes.path_name(path))
        if name in found:
            raise ValueError(f"two leaves have the name {name!r} in a file: rename one of them in the tree.")
        if len(behind) > 1:
            raise ValueError(
                f"leaf {name!r} has {len(behind)} master weights; wrap its optimizer in one master_weights."
            )
        found[name] = _Weight(name, x, *(behind or [None]))
    return found


def _dtype_of(name: str, own: Any, dtype: Any) -> np.dtype:
    """Of a leaf in the file."""
    if dtype is not None and (asked := jax.numpy.dtype(dtype).name) not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(FLOATS)}, got {asked!r}; integers keep their own dtype.")
    if str(own) not in CODES:
        raise TypeError(
            f"leaf {name!r} has dtype {own}, safetensors takes {', '.join(CODES)}: leave it out or cast it."
        )
    return jax.numpy.dtype(dtype) if dtype is not None and str(own) in FLOATS else np.dtype(own)


def _rounded(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """In another dtype, to nearest; a finite number stays finite."""
    with np.errstate(over="ignore"):  # told below, with the leaf's name
        new = x.astype(dtype, order="C", copy=False)
    if new.dtype != x.dtype and np.any(np.isfinite(x) & ~np.isfinite(new)):
        largest = jax.numpy.finfo(dtype).max
        raise ValueError(f"{name!r} has numbers beyond {largest}, the largest {dtype}: take bfloat16 or float32.")
    return new


def _gathered(x: Any) -> np.ndarray:
    x = logical.snapshot(x) if host.is_pieces(x) else x
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    whole = np.empty(x.shape, x.dtype)  # `np.asarray(x)` would stay with x
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = shard.data
    return whole


def _dotted(name: str) -> str:
    return name.replace("/", ".")


def _everywhere(well: bool) -> bool:
    """Whether it is well with process 0, on all of them."""
    if jax.process_count() == 1:
        return well
    return bool(multihost_utils.broadcast_one_to_all(np.int32(well)))


def _renamed(names: list[str], rename: Callable[[str], str] | Mapping[str, str] | None) -> dict[str, str]:
    """The file's name of each leaf."""
    if callable(rename):
        return {name: rename(name) for name in names}
    given = dict(rename or {})
    if unknown := sorted(given.keys() - set(names)):
        raise ValueError(f"rename has {some(unknown)}, which the plan lacks; its leaves are {some(names)}.")
    return {name: given.get(name, _dotted(name)) for name in names}


def _check(source: Any, theirs: str, leaf: Leaf, path: pathlib.Path) -> Any:
    """`source`, unless it cannot become the leaf."""
    shape, dtype = tuple(source.get_shape()), source.get_dtype()
    own = leaf.dtype.name
    same = dtype in FLOATS.values() if own in FLOATS else dtype == CODES.get(own)
    if shape == leaf.shape and same:
        return source
    raise ValueError(
        f"{path} holds {theirs!r} as {dtype} {list(shape)}, leaf {leaf.name!r} is {leaf.dtype} {list(leaf.shape)}: "
        "import with the plan of the model that was exported; transpose in the files what is stored otherwise."
    )


def _slice(source: Any, leaf: Leaf, index: tuple[slice, ...]) -> np.ndarray:
    if 0 in leaf.shape:  # of such there are no slices
        return np.zeros([len(range(n)[s]) for n, s in zip(leaf.shape, index, strict=True)], leaf.dtype)
    return _rounded(np.asarray(source[index]), leaf.dtype, leaf.name)
