"""Checkpoints that any plan restores, through Orbax, with checksums; saved at once or behind training.

The only file that imports Orbax.
"""

from __future__ import annotations

import datetime
import errno
import functools
import importlib
import importlib.metadata
import json
import math
import operator
import os
import pathlib
import shutil
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from zerojax import host, logical, manifest, meshes, report
from zerojax.host import HOST, Rest
from zerojax.manifest import Manifest
from zerojax.plan import Plan
from zerojax.train_state import TrainState
from zerojax.zero import zero

PyTree = Any
Directory = str | os.PathLike[str]
_TIMEOUT_S = 6 * 3600  # Orbax gives a save up after it; the default of 10 minutes is less than a large one takes
_LIBRARIES = ("zerojax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def save_checkpoint(
    directory: Directory,
    state: TrainState,
    *,
    step: int | None = None,
    extra: PyTree = None,
    wait: bool = True,
    max_to_keep: int | None = None,
) -> None:
    """Saves a training state as `directory/STEP`, whole arrays by name: any plan restores it.

    Every process calls it. A checkpoint is complete or not there: it is written under another name, checksums and all,
    and renamed. An earlier one is deleted only when the new one is complete.

    Args:
      directory: Holds the checkpoints of a run, a folder for each step; made if missing, seen by all processes.
      state: A `TrainState`, in any layout, offloaded or not.
      step: The checkpoint's number; `state.step` by default.
      extra: What else to keep: dicts, lists, numbers, strings, NumPy arrays, random keys. Process 0's is kept.
      wait: True returns when the checkpoint is durable. False returns when the state has been copied to host memory,
        after which the state may go into a step; `wait_until_finished` waits for the rest.
      max_to_keep: Deletes all but so many, the latest steps; this one always stays.

    Raises:
      FileExistsError: `directory/STEP` is there.
      OSError: it could not be written, or with `wait=False` the one before; earlier checkpoints are as they were.
      TypeError: `state` is no `TrainState`, `step` no integer, or `extra` holds what JSON does not.
      ValueError: the state's arrays are deleted, or two have one name; `max_to_keep` is below 1, `step` below 0.

    Memory:
      In host memory, of each process what its devices hold of the state, each shard once, until it is written.

    Example:
      >>> import tempfile, jax.numpy as jnp, zerojax
      >>> params, tx = {"w": jnp.ones((8, 4))}, optax.adam(1e-3)
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> plan = zerojax.make_plan(params, mesh, stage=1)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     save_checkpoint(directory, zerojax.create_train_state(params, tx, plan), extra={"epoch": 3})
      ...     state, extra = restore_checkpoint(directory, tx, plan)
      >>> int(state.step), extra
      (0, {'epoch': 3})
    """
    wait_until_finished()
    if not isinstance(state, TrainState):
        raise TypeError(
            f"save_checkpoint saves a zerojax.TrainState, got {type(state).__name__}; a loop of one's own makes one: "
            "TrainState(step, params, opt_state, loss_scale=None, skipped=jnp.int32(0))."
        )
    if max_to_keep is not None and max_to_keep < 1:
        raise ValueError(f"max_to_keep must be at least 1, got {max_to_keep}.")
    leaves = logical.named(state)
    if gone := [name for name, x in leaves.items() if any(part.is_deleted() for part in jax.tree.leaves(x))]:
        raise ValueError(f"{gone[0]} of this state is deleted: a step took it over, and returned the state to save.")
    step = int(state.step) if step is None else _number(step)
    folder = _local(directory) / str(step)
    if folder.exists():
        raise FileExistsError(f"{folder} is there: pass another step=, or delete it first; nothing was overwritten.")
    text = json.dumps(manifest.encode(extra))
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_room(folder, sum(x.nbytes for x in jax.tree.leaves(leaves)))
    global _running
    _running = _Save(folder, step, leaves, text, max_to_keep)
    if wait:
        wait_until_finished()


def wait_until_finished() -> None:
    """Waits for the save that `save_checkpoint(..., wait=False)` began; every process calls it.

    Raises:
      OSError: that checkpoint could not be written; earlier ones are as they were.
    """
    global _running
    running, _running = _running, None
    if running is not None:
        running.finish()


def latest_step(directory: Directory) -> int | None:
    """The latest step of which `directory` holds a complete checkpoint, or None.

    Example:
      >>> latest_step("/nowhere") is None
      True
    """
    return max(manifest.steps_in(_local(directory)), default=None)


def restore_checkpoint(
    directory: Directory, tx: optax.GradientTransformation, plan: Plan, *, step: int | None = None
) -> tuple[TrainState, PyTree]:
    """Restores what `save_checkpoint` saved, from whatever plan, laid out by this one.

    Every file is compared with its checksum first. Each device reads its own shards.

    Args:
      directory: What `save_checkpoint` was given.
      tx: The optimizer, in `zero(...)` or bare; of the structure of the one saved.
      plan: Where the state shall live: any stage, mesh, number of devices and processes, with or without `offload`.
      step: Which; the latest complete one by default.

    Returns:
      `(state, extra)`. `state.loss_scale` is what was saved, None where there was none. Of `extra`, tuples come back as
      lists and arrays as NumPy's.

    Raises:
      FileNotFoundError: no checkpoint there, or none of that step.
      ValueError: a file is damaged; or a leaf has another shape or dtype than `tx` and `plan` want, is missing, or is
        one too many. The error names it, and what to do.

    Example:
      >>> import jax.numpy as jnp, zerojax
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> plan = zerojax.make_plan({"w": jnp.ones((8, 4))}, mesh, stage=1)
      >>> restore_checkpoint("/nowhere", optax.adam(1e-3), plan)
      Traceback (most recent call last):
      FileNotFoundError: /nowhere holds no checkpoint: there is no such directory.
    """
    wait_until_finished()
    meshes.check_devices(plan.mesh)
    tx = zero(tx, plan)
    folder = _find(_local(directory), step)
    saved = manifest.read_manifest(folder)
    _check_files(folder, saved)
    wanted = logical.wanted(tx, plan, saved.leaves)
    logical.check(saved.leaves, wanted, f"the checkpoint {folder}")
    tx.check_room()
    leaves: dict[str, Any] = logical.empty(wanted, plan)
    names = [name for name in wanted if name not in leaves]
    for part in host.parts([wanted[name] for name in names]):
        group = {names[i]: wanted[names[i]] for i in part}
        leaves |= {name: logical.kept(x, wanted[name]) for name, x in _read(folder, group, plan).items()}
    extra = manifest.decode(json.loads((folder / manifest.EXTRA).read_text()))
    return logical.state_of(leaves, tx, plan), extra


class _Save:
    """One save: the constructor returns when the state may change; the rest is done behind training."""

    def __init__(
        self, folder: pathlib.Path, step: int, leaves: dict[str, Any], extra: str, max_to_keep: int | None
    ) -> None:
        self._folder, self._max_to_keep = folder, max_to_keep
        self._main = jax.process_index() == 0
        self._error: BaseException | None = None
        if self._main:
            _delete(*manifest.leftovers(folder.parent))
        describe = functools.partial(
            Manifest,
            step=step,
            leaves={name: logical.describe(x) for name, x in leaves.items()},
            mesh=logical.mesh_of(leaves),
            processes=jax.process_count(),
            versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
            saved=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

        def seal(folder: pathlib.Path) -> None:
            manifest.write_durably(folder / manifest.EXTRA, extra)
            describe(files=manifest.checksums(folder)).write(folder)

        options = ocp.AsyncOptions(timeout_secs=_TIMEOUT_S)
        self._checkpointer = ocp.AsyncCheckpointer(_Handler(seal), async_options=options)
        try:
            arrays = {name: logical.snapshot(x) for name, x in leaves.items() if math.prod(host.whole_shape(x))}
            self._checkpointer.save(folder, args=_SaveArgs(arrays))  # Orbax has no arrays of no elements
        except Exception as e:
            self._fail(e)
        self._thread = threading.Thread(target=self._complete, name="zerojax-save")
        self._thread.start()

    def _complete(self) -> None:
        try:
            self._checkpointer.wait_until_finished()
            if self._main:
                manifest.sync(self._folder.parent)
                self._prune()
        except BaseException as e:  # raised where the user waits
            self._error = e

    def finish(self) -> None:
        """Waits until the checkpoint is durable."""
        self._thread.join()
        if self._error is not None:
            self._fail(self._error)
        self._checkpointer.close()

    def _fail(self, error: BaseException) -> NoReturn:
        if self._main:
            _delete(*manifest.leftovers(self._folder.parent))
        raise OSError(
            f"the checkpoint {self._folder} was not saved: {type(error).__name__}: {error}. Checkpoints before it "
            "are as they were. Make room or mend the cause, and save again."
        ) from error

    def _prune(self) -> None:
        if self._max_to_keep is None:
            return
        directory = self._folder.parent
        others = [step for step in manifest.steps_in(directory) if str(step) != self._folder.name]
        for step in others[: max(len(others) + 1 - self._max_to_keep, 0)]:
            # Under its name a checkpoint is whole: a deletion begins with another name.
            _delete((directory / str(step)).rename(directory / f"{step}.deleted"))


class _Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler, which calls `seal(folder)` when all files are written, before the folder gets its name."""

    def __init__(self, seal: Callable[[pathlib.Path], None] | None = None) -> None:
        super().__init__(use_compression=False)  # numbers in training hardly get smaller by it
        self._seal = seal

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        if self._seal is not None:
            self._seal(pathlib.Path(directory))


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)  # Orbax wants both
class _SaveArgs(ocp.args.PyTreeSave):
    pass


_running: _Save | None = None


def _finish_at_exit() -> None:
    try:
        wait_until_finished()
    except OSError:
        traceback.print_exc()


# A program may end while its last save is under way. At `atexit` it is too late: Python's thread pools, in which Orbax
# writes, take no work any more. They are shut down by what is registered here, the last first. Python 3.12 starts no
# thread even here: the save fails then, and says so.
importlib.import_module("concurrent.futures.thread")
threading._register_atexit(_finish_at_exit)  # type: ignore[attr-defined]


def _local(directory: Directory) -> pathlib.Path:
    if "://" in (name := os.fspath(directory)):
        raise ValueError(f"checkpoints go to folders of a file system, which {name!r} is not: mount it, or copy them.")
    return pathlib.Path(name).absolute()


def _number(step: Any) -> int:
    """A step, of whatever type of integers."""
    try:
        number = operator.index(step)
    except TypeError:
        raise TypeError(f"step must be an integer, got {step!r} of type {type(step).__name__}.") from None
    if number < 0:
        raise ValueError(f"step must be at least 0, got {number}.")
    return number


def _check_room(folder: pathlib.Path, wanted: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < wanted:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint takes {report.format_bytes(wanted)}, {report.format_bytes(free)} are left; nothing was "
            "written. Make room: fewer checkpoints, by max_to_keep=, say",
            str(folder),
        )


def _delete(*folders: pathlib.Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _find(directory: pathlib.Path, step: int | None) -> pathlib.Path:
    steps, step = manifest.steps_in(directory), None if step is None else _number(step)
    if step is None and steps:
        return directory / str(steps[-1])
    if step is not None and (directory / str(step)).is_dir():
        return directory / str(step)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} holds no checkpoint: there is no such directory.")
    held = f"it holds the steps {', '.join(map(str, steps))}" if steps else "it holds none"
    raise FileNotFoundError(f"{directory} holds no checkpoint{'' if step is None else f' of step {step}'}: {held}.")


def _check_files(folder: pathlib.Path, saved: Manifest) -> None:
    """Raises `ValueError` where a file is not as it was written; processes share the work, and agree."""
    names = sorted(saved.files)
    mine = names[jax.process_index() :: jax.process_count()]
    wrong = manifest.damage(folder, {name: saved.files[name] for name in mine})
    if jax.process_count() > 1:
        found = np.array([name in wrong for name in names])
        for i in np.flatnonzero(np.any(multihost_utils.process_allgather(found), axis=0)):
            wrong.setdefault(names[i], "is damaged")
    if wrong:
        listed = "; ".join(f"{folder / name} {what}" for name, what in sorted(wrong.items()))
        raise ValueError(f"checkpoint of step {saved.step}: {listed}. To go on: {manifest.way_out(folder)}")


def _read(folder: pathlib.Path, group: dict[str, Rest], plan: Plan) -> dict[str, jax.Array]:
    """Some arrays, whole, each device its own shards."""

    def how(rest: Rest) -> ocp.ArrayRestoreArgs:
        sharding = NamedSharding(plan.mesh, rest.spec, memory_kind=HOST if rest.on_host else None)
        x = logical.stored(rest)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=x.shape, dtype=x.dtype)

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(
            item=dict.fromkeys(group, 0),
            restore_args={name: how(rest) for name, rest in group.items()},
            partial_restore=True,
        )
        return checkpointer.restore(folder, args=args)
