"""Weights that leave and enter the world of JAX: safetensors files, as Hugging Face names them.

`model.safetensors`; or `model-00001-of-00003.safetensors` and so on, and `model.safetensors.index.json`, which says
what is where. Names are paths, with dots: `blocks.attention.kernel`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from zerojax import host, logical, manifest, meshes
from zerojax.masters import MasterWeightsState
from zerojax.plan import Plan
from zerojax.step import TrainState

PyTree = Any
_INDEX = "model.safetensors.index.json"


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
      params: A `TrainState`, whose weights are float32 where it has `master_weights`; or a tree of arrays. In any
        layout.
      dtype: What floating weights are rounded to, "bfloat16" for instance; their own dtype by default.
      max_shard_bytes: Weights of more than this many bytes go to several files.

    Raises:
      FileExistsError: the folder is there.
      OSError: it could not be written; nothing is left of it.

    Memory:
      In host memory the arrays of one file; on devices, of several processes, one array.

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
    folder = pathlib.Path(directory).absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} is there: name a new folder, or delete it first; nothing was overwritten.")
    leaves = _weights(params)
    to = lambda x: np.dtype(dtype) if dtype is not None and jax.numpy.issubdtype(x, np.floating) else np.dtype(x)
    dtypes = {name: to(leaf.dtype) for name, leaf in leaves.items()}
    sizes = {name: math.prod(leaf.shape) * dtypes[name].itemsize for name, leaf in leaves.items()}
    files = list(_files(sizes, max_shard_bytes))
    partial = folder.with_name(f"{folder.name}.partial")
    main = jax.process_index() == 0
    error: Exception | None = None
    try:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as e:
        error = e
    for i, names in enumerate(files):
        # All processes go through all leaves, whether or not the files can be written: gathering takes all of them.
        arrays = {name: leaves[name].read().astype(dtypes[name], order="C", copy=False) for name in names}
        try:
            if main and error is None:
                save_file(arrays, partial / _file_name(i, len(files)), metadata={"format": "np"})
        except (OSError, SafetensorError) as e:
            error = e
    try:
        if main and error is None:
            _complete(partial, folder, files, sum(sizes.values()))
    except OSError as e:
        error = e
    if not _everywhere(error is None):
        shutil.rmtree(partial, ignore_errors=True)
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
      rename: The file's name of a leaf, by the plan's, `blocks/attention/kernel`; a function or a mapping. By default
        the same with dots.
      strict: Whether a file's array that no leaf wants is an error.

    Returns:
      Params, laid out as `plan.params`.

    Raises:
      FileNotFoundError: there is no such file, or the folder has none.
      ValueError: a file is damaged; or a leaf is missing, is one too many, or has another shape or kind of dtype.

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
    if rename is None:
        rename = _dotted
    by_name = rename if callable(rename) else lambda name: rename.get(name, _dotted(name))
    opened = _open(path)
    wanted = {leaf.name: by_name(leaf.name) for leaf in plan.leaves}
    for name, theirs in wanted.items():
        if theirs not in opened:
            raise ValueError(
                f"{path} lacks {theirs!r}, wanted for {name!r}; it has {_some(opened)}. rename= maps names."
            )
    if strict and (more := [name for name in opened if name not in set(wanted.values())]):
        raise ValueError(f"{path} holds {_some(more)}, which this model lacks; strict=False leaves it out.")
    shardings = plan.treedef.flatten_up_to(plan.params)
    checked = [_check(opened[wanted[leaf.name]], wanted[leaf.name], leaf, path) for leaf in plan.leaves]
    arrays = [
        jax.make_array_from_callback(leaf.shape, sharding, functools.partial(_slice, source, leaf.dtype))
        for leaf, sharding, source in zip(plan.leaves, shardings, checked, strict=True)
    ]
    return plan.treedef.unflatten(arrays)


class _Weight:
    """A leaf's weights, with the master behind a 16-bit param."""

    def __init__(self, param: Any, master: Any = None) -> None:
        self._param, self._master = param, master
        self.shape: tuple[int, ...] = host.whole_shape(param)
        self.dtype = np.dtype(param.dtype if master is None else np.float32)

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
    masters = None
    if isinstance(params, TrainState):
        is_master = lambda x: isinstance(x, MasterWeightsState)
        found = [x for x in jax.tree.leaves(params.opt_state, is_leaf=is_master) if is_master(x)]
        masters, params = found[0].masters if len(found) == 1 else None, params.params
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=host.is_pieces)
    treedef: Any = structure
    behind = [None] * len(leaves) if masters is None else treedef.flatten_up_to(masters)
    pairs = zip(leaves, behind, strict=True)
    return {_dotted(meshes.path_name(path)): _Weight(x, master) for (path, x), master in pairs}


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


def _files(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """Names of the arrays of each file."""
    names: list[str] = []
    for name in sizes:
        if names and sum(sizes[n] for n in names) + sizes[name] > most:
            yield names
            names = []
        names.append(name)
    yield names


def _file_name(i: int, files: int) -> str:
    return "model.safetensors" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.safetensors"


def _complete(partial: pathlib.Path, folder: pathlib.Path, files: list[list[str]], size: int) -> None:
    """Adds the index, makes all durable, and gives the folder its name."""
    if len(files) > 1:
        where = {name: _file_name(i, len(files)) for i, names in enumerate(files) for name in names}
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2)
        manifest.write_durably(partial / _INDEX, text)
    for file in partial.iterdir():
        manifest.sync(file)
    partial.rename(folder)
    manifest.sync(folder.parent)


def _everywhere(well: bool) -> bool:
    """Whether all went well for process 0."""
    if jax.process_count() == 1:
        return well
    return bool(multihost_utils.broadcast_one_to_all(np.int32(well)))


def _open(path: pathlib.Path) -> dict[str, Any]:
    """Slices of all arrays by name, of which nothing is read yet."""
    if path.is_dir():
        index = path / _INDEX
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else None
        files = sorted(path.glob("*.safetensors")) if names is None else [path / name for name in sorted(names)]
        if not files:
            raise FileNotFoundError(f"{path} has no .safetensors file.")
    else:
        files = [path]
    slices: dict[str, Any] = {}
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing.")
        try:
            opened = safe_open(file, framework="np")
            # Of an array without elements there are no slices.
            slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
        except SafetensorError as e:
            raise ValueError(f"{file} is damaged or no safetensors file: {e}. Export or download it again.") from e
    return slices


def _check(source: Any, theirs: str, leaf: Any, path: pathlib.Path) -> Any:
    """`source`, unless it cannot become the leaf."""
    shape, dtype = tuple(source.get_shape()), source.get_dtype()
    floating = jax.numpy.issubdtype(leaf.dtype, np.floating)
    same = dtype in ("F64", "F32", "F16", "BF16") if floating else dtype == _code(leaf.dtype)
    if shape == leaf.shape and same:
        return source
    raise ValueError(
        f"{path} holds {theirs!r} as {dtype} {list(shape)}, leaf {leaf.name!r} is {leaf.dtype} {list(leaf.shape)}: "
        "import with the plan of the model that was exported; transpose in the files what is stored otherwise."
    )


def _code(dtype: np.dtype) -> str:
    """A dtype that is not floating, in safetensors' letters."""
    return "BOOL" if dtype.kind == "b" else f"{'U' if dtype.kind == 'u' else 'I'}{8 * dtype.itemsize}"


def _slice(source: Any, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    if 0 in source.get_shape():
        return np.zeros([len(range(n)[s]) for n, s in zip(source.get_shape(), index, strict=True)], dtype)
    return np.asarray(source[index]).astype(dtype)


def _some(names: Any) -> str:
    first = [repr(name) for name in list(names)[:3]]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
