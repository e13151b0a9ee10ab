"""`initialize`: from a config and a Flax model to an engine that trains, a thin facade over plan, step, checkpoint."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from zerojax import config as configs
from zerojax import meshes
from zerojax.data import Dataloader
from zerojax.deepspeed import looks_like_deepspeed
from zerojax.nn.models import as_functions
from zerojax.plan import Plan, make_plan
from zerojax.step import make_eval_step, make_train_step
from zerojax.train_state import TrainState, create_train_state
from zerojax.zero import ZeroTransformation, zero

PyTree = Any
LossFn = Callable[[PyTree, PyTree], Any]


class Engine:
    """What `initialize` returns first: a state, and what is done with it.

    Attributes:
      state: The `TrainState`; may be set.
      plan: The `Plan`.
      optimizer: The Optax transformation, in `zero`.
      schedule: The learning rate, of the number of updates done.
      dataloader: The `Dataloader` of the training data, or None.
      config: The whole config.
    """

    def __init__(
        self,
        config: ConfigDict,
        loss_fn: LossFn,
        state: TrainState,
        plan: Plan,
        optimizer: ZeroTransformation,
        schedule: optax.Schedule,
        dataloader: Dataloader | None,
    ) -> None:
        self.config, self.state, self.plan = config, state, plan
        self.optimizer, self.schedule, self.dataloader = optimizer, schedule, dataloader
        self._batch = configs.solve_batch(config, plan.num_shards)
        options = configs.step_options(config, plan.num_shards)
        self._train_step = make_train_step(loss_fn, optimizer, plan, **options)
        shared = {name: options[name] for name in ("reduce", "layerwise")}
        self._eval_step = make_eval_step(loss_fn, plan, **shared)
        self._steps, self._norm = int(state.step), None

    def train_batch(self, batch: PyTree = None) -> dict[str, Any]:
        """One optimizer step, over all micro-batches.

        Args:
          batch: The global batch: devices x micro-batches x rows leading. None takes the dataloader's next.

        Returns:
          Metrics of `make_train_step`: `loss`, `grad_norm`, `finite`, `skipped` and others, on the device.
        """
        if batch is None:
            if self.dataloader is None:
                raise ValueError("train_batch() without a batch needs training_data=, which initialize was not given.")
            batch = self.dataloader.next_batch()
        self._check_rows(batch)
        self.state, metrics = self._train_step(self.state, batch)
        if meshes.simulated(self.plan.mesh):
            jax.block_until_ready(metrics)  # queued steps starve one another's collectives of the CPU's threads
        self._steps += 1
        self._norm = metrics["grad_norm"]
        every = self.config.logging.every
        if every and self._steps % every == 0 and jax.process_index() == 0:
            numbers = ", ".join(f"{name} {float(metrics[name]):.4g}" for name in ("loss", "grad_norm"))
            print(
                f"step {self._steps}: {numbers}, rate {self.get_lr()[0]:.4g}, skipped {self.skipped_steps}", flush=True
            )
        return metrics

    def eval_batch(self, batch: PyTree) -> dict[str, Any]:
        """`{"loss": ...}` of a batch of any number of rows that the devices divide; changes nothing."""
        return self._eval_step(self.state.params, batch)

    @property
    def global_steps(self) -> int:
        """Calls of `train_batch` so far, skipped ones too, those before the checkpoint that was loaded too."""
        return self._steps

    @property
    def skipped_steps(self) -> int:
        """Steps that an overflow kept from changing anything."""
        return int(self.state.skipped)

    def get_lr(self) -> list[float]:
        """The rate of the next update; a list of one, as DeepSpeed has one for each group of params."""
        return [float(self.schedule(int(self.state.step) - self.skipped_steps))]

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradients before clipping, without the loss scale; None before the first step."""
        return None if self._norm is None else float(self._norm)

    def save_checkpoint(self, directory: str | os.PathLike[str], *, extra: PyTree = None, wait: bool = True) -> None:
        """Saves the state, the data's position and `extra` as step `global_steps`; see `zerojax.save_checkpoint`."""
        from zerojax.checkpoint import save_checkpoint  # Orbax takes a second to import

        position = None if self.dataloader is None else self.dataloader.state()
        options = {"max_to_keep": keep} if (keep := self.config.checkpoint.max_to_keep) else {}
        whole = {"extra": extra, "data": position}
        save_checkpoint(directory, self.state, step=self._steps, extra=whole, wait=wait, **options)

    def load_checkpoint(
        self, directory: str | os.PathLike[str], *, step: int | None = None, data: bool = True
    ) -> PyTree:
        """Takes up the state that `save_checkpoint` left, from any stage and number of devices.

        Args:
          directory: What `save_checkpoint` was given.
          step: Which; the latest by default.
          data: Whether the dataloader goes to where it was.

        Returns:
          What `save_checkpoint` was given as `extra`.
        """
        from zerojax.checkpoint import restore_checkpoint

        self.state, whole = restore_checkpoint(directory, self.optimizer, self.plan, step=step)
        self._steps, self._norm = int(self.state.step), None
        if data and self.dataloader is not None and whole["data"] is not None:
            self.dataloader.restore(whole["data"])
        return whole["extra"]

    def _check_rows(self, batch: PyTree) -> None:
        rows = {np.shape(x)[0] for x in jax.tree.leaves(batch) if np.shape(x)}
        if self._batch.rows is not None and rows and rows != {self._batch.rows}:
            raise ValueError(
                f"train_batch got {', '.join(map(str, sorted(rows)))} rows; the config says {self._batch.rows}: "
                f"{self._batch.micro_rows} x {self._batch.accumulate} micro-batches x {self.plan.num_shards} devices. "
                "A batch holds all rows of a step."
            )


def initialize(
    config: ConfigDict | Mapping[str, Any] | str | os.PathLike[str],
    *,
    model: Any,
    loss_fn: LossFn | None = None,
    sample_batch: PyTree = None,
    training_data: Any = None,
    mesh: Mesh | None = None,
    seed: int = 0,
) -> tuple[Engine, ZeroTransformation, Dataloader | None, optax.Schedule]:
    """Everything that training takes, as `deepspeed.initialize`.

    Args:
      config: A config of `zerojax.config`, a dict that says some of it, a dict as DeepSpeed has it, or the path of a
        DeepSpeed JSON file.
      model: A Flax model: a Linen module; an NNX module, whose params are where training begins; or a function of
        `nnx.Rngs` that makes one, its class for instance, which is run sharded.
      loss_fn: `loss_fn(params, batch) -> loss`, a scalar, the mean over the rows it is given. `params` is the bare
        "params" collection (of an NNX module the pure dict of its `Param`s, which `nnx.merge` takes). None where the
        model itself maps a batch to its loss.
      sample_batch: What a Linen model is initialised with: a batch, or, where the model takes less than a batch, the
        entries that its arguments name, or the first entry; a row of the training data by default. Arrays or
        `ShapeDtypeStruct`s: shapes and dtypes are read.
      training_data: Arrays, a data set with `len` and `[i]`, or an iterable of batches; see `Dataloader`.
      mesh: The mesh; that of `config.mesh` by default.
      seed: Of the params, and of the data's order.

    Returns:
      `(engine, optimizer, dataloader, schedule)`; `dataloader` is None without `training_data`.

    Raises:
      ValueError, TypeError: what the config has wrong, by key; or what the model has.

    Example:
      >>> from flax import linen as nn
      >>> import jax.numpy as jnp
      >>> config = {"train_batch_size": 8, "zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}
      >>> loss_fn = lambda params, batch: jnp.mean((model.apply({"params": params}, batch["x"]) - batch["y"]) ** 2)
      >>> model, batch = nn.Dense(3), {"x": np.ones((8, 4), np.float32), "y": np.ones((8, 3), np.float32)}
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> engine, *_ = initialize(config, model=model, loss_fn=loss_fn, sample_batch=batch, mesh=mesh)
      >>> metrics = engine.train_batch(batch)
      >>> engine.global_steps, engine.get_lr()
      (1, [0.001])
    """
    c = _read(config)
    schedule = configs.make_schedule(c)
    optimizer = configs.make_optimizer(c, schedule)
    mesh = configs.make_mesh(c) if mesh is None else mesh
    options = configs.plan_options(c)
    axis = options["axis"] = _axis(c, mesh)
    dataloader = None
    if training_data is not None:
        rows = configs.solve_batch(c, meshes.shards(mesh, axis)).rows
        sharding = NamedSharding(mesh, PartitionSpec(axis))
        dataloader = Dataloader(training_data, sharding, rows, seed=seed, **c.data)
        sample_batch = dataloader.example() if sample_batch is None else sample_batch
    pure = as_functions(model, loss_fn, sample_batch)
    start, loss = configs.in_dtype(c, pure.start), _on_cast_batch(pure.loss_fn, c)
    args = (jax.random.key(seed),) if callable(start) else ()
    shapes = jax.eval_shape(start, *args) if callable(start) else start
    plan = make_plan(shapes, mesh, param_specs=pure.param_specs, **options)
    tx = zero(optimizer, plan)
    state = create_train_state(start, tx, plan, *args, loss_scale=configs.make_loss_scale(c))
    engine = Engine(c, loss, state, plan, tx, schedule, dataloader)
    return engine, tx, dataloader, schedule


def _read(config: Any) -> ConfigDict:
    if isinstance(config, str | os.PathLike):
        if pathlib.Path(config).suffix == ".py":
            raise ValueError(f"{config} is a program: pass what its get_config() returns.")
        return configs.from_deepspeed(config)
    if isinstance(config, Mapping) and looks_like_deepspeed(config):
        return configs.from_deepspeed(config)
    return configs.check(config)


def _axis(c: ConfigDict, mesh: Mesh) -> str | tuple[str, ...]:
    """The mesh axes that ZeRO shards over; a mesh of one axis leaves no choice."""
    if len(mesh.axis_names) == 1:
        return mesh.axis_names[0]
    axes = tuple(c.zero.axis)
    if not set(axes) <= set(mesh.axis_names):
        raise ValueError(f"config: zero.axis={axes} names no axes of the mesh, which has {mesh.axis_names}.")
    return axes if len(axes) > 1 else axes[0]


def _on_cast_batch(loss_fn: LossFn, c: ConfigDict) -> LossFn:
    if not c.precision.cast_batch:
        return loss_fn
    return lambda params, batch: loss_fn(params, configs.in_dtype(c, batch))
