"""The training step: loss, gradients, update and gather in one jitted, donated program."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from zerojax import meshes
from zerojax.fused import apply_sharded
from zerojax.gradients import Layerwise, LossFn, Objective, Result
from zerojax.offload import Streamed, streamed
from zerojax.plan import Plan
from zerojax.precision import LossScale, LossScaleState
from zerojax.train_state import TrainState, check_alive, state_specs
from zerojax.zero import ZeroTransformation, zero

PyTree = Any


class TrainStep:
    """What `make_train_step` returns: call it, or `lower` it to read the compiled program."""

    def __init__(
        self, run: Callable[..., Any], objective: Objective, tx: ZeroTransformation, loss_scale: LossScale | None
    ) -> None:
        plan = objective.plan
        meshes.check_devices(plan.mesh)
        self._objective = objective
        specs = state_specs(tx, plan, loss_scale)
        self._shardings = meshes.named(plan.mesh, specs)._replace(params=plan.params, opt_state=plan.opt_state(tx))
        self._treedef: Any = jax.tree.structure(self._shardings)
        self._traced = run  # options of the compiler are the outermost jit's alone
        self._run: Any = jax.jit(
            run,
            donate_argnums=0,
            in_shardings=(self._shardings, None),
            out_shardings=(self._shardings, None),
            compiler_options=meshes.compiler_options(plan.mesh),
        )

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Any]]:
        """One optimizer step; `state` is donated: use the one returned."""
        self._check(state)
        batch = place_batch(self._objective, batch)
        if meshes.tracing((state, batch)):
            return self._traced(state, batch)
        try:
            return self._run(state, batch)
        except ValueError as e:
            if "shard" in str(e).lower() or "memory" in str(e).lower():
                self._explain_placement(state, e)
            raise

    def lower(self, state: TrainState, batch: PyTree) -> jax.stages.Lowered:
        """As `jax.jit(...).lower`; arrays or `ShapeDtypeStruct`s."""
        self._check(state)
        return self._run.lower(state, place_batch(self._objective, batch))

    def _check(self, state: TrainState) -> None:
        if not isinstance(state, TrainState):
            raise TypeError(f"step wants the TrainState of create_train_state, got {type(state).__name__}.")
        check_alive(state)
        self._objective.plan.check(state.params)
        if jax.tree.structure(state) != self._treedef:
            raise ValueError(
                "the state was created with another tx, plan or loss_scale than the step: its opt_state and "
                f"loss_scale are {jax.tree.structure(state[2:4])}. Pass the same tx, plan and loss_scale to "
                "create_train_state and make_train_step."
            )

    def _explain_placement(self, state: TrainState, cause: ValueError) -> None:
        """Raises an error that names the first leaf of `state` that is not where the plan wants it, if there is one."""
        expected = jax.tree.leaves(self._shardings)
        for (path, x), sharding in zip(jax.tree_util.tree_leaves_with_path(state), expected, strict=True):
            if not isinstance(x, jax.Array) or x.sharding.is_equivalent_to(sharding, x.ndim):
                continue
            if x.sharding.memory_kind != sharding.memory_kind:
                raise ValueError(
                    f"the state's leaf {meshes.path_name(path)!r} {list(x.shape)} is in {x.sharding.memory_kind} "
                    f"memory, the step's plan wants it in {sharding.memory_kind} memory: a state of offload_states "
                    "comes back by zerojax.reload_states(state, plan), with the step's plan."
                ) from cause
            raise ValueError(
                f"the state's leaf {meshes.path_name(path)!r} {list(x.shape)} is laid out as {x.sharding}, the "
                f"step's plan wants {sharding}: it was made with another plan. Pass both the same plan, or place "
                "the state anew: create_train_state(state.params, tx, plan)."
            ) from cause


class StreamedTrainStep(TrainStep):
    """A `TrainStep` whose optimizer state is in host memory, and streamed through the device.

    Several programs, dispatched one after another: the gradients, an update for each bucket. `lower` gives the first.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        objective: Objective,
        tx: ZeroTransformation,
        loss_scale: LossScale | None,
        first: Callable[..., Any],
        stream: Streamed,
    ) -> None:
        super().__init__(run, objective, tx, loss_scale)
        self._stream = stream
        rest = self._shardings._replace(params=None, opt_state=None)
        self._first = jax.jit(
            first,
            donate_argnums=2,
            in_shardings=(None, self._shardings.params, rest, None),
            compiler_options=meshes.compiler_options(objective.plan.mesh),
        )
        self._run = self._streamed

    def _streamed(self, state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Any]]:
        walk = self._stream.walk(state.opt_state, state.params, consume=True)
        begun, new, metrics = self._first(*self._parts(state), batch)
        params, opt_state = walk.finish(begun)
        return new._replace(params=params, opt_state=opt_state), metrics

    def lower(self, state: TrainState, batch: PyTree) -> jax.stages.Lowered:
        """As `jax.jit(...).lower`, of the program that computes the gradients; arrays or `ShapeDtypeStruct`s."""
        self._check(state)
        return self._first.lower(*self._parts(state), place_batch(self._objective, batch))

    def _parts(self, state: TrainState) -> tuple[list[jax.Array], PyTree, TrainState]:
        return self._stream.small(state.opt_state), state.params, state._replace(params=None, opt_state=None)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    plan: Plan,
    *,
    accumulate: int = 1,
    has_aux: bool = False,
    reduce: str = "mean",
    grad_dtype: Any = None,
    loss_scale: LossScale | None = None,
    layerwise: Layerwise = None,
) -> TrainStep:
    """The training step of any stage.

    Args:
      loss_fn: `loss_fn(params, batch) -> loss`, a floating scalar, over the rows it is given: it sees one device's rows
        of one micro-batch, and full params (but for `layerwise`). The same function serves every stage.
      tx: The optimizer, in `zero(..., plan)` or bare.
      plan: From `make_plan`.
      accumulate: Micro-batches in a batch, taken one after another. Device i gets the i-th block of rows, its
        micro-batches follow one another in it.
      has_aux: `loss_fn` returns `(loss, aux)`. Each array in `aux` is reduced as the loss is.
      reduce: "mean" or "sum" of the loss over devices and micro-batches.
      grad_dtype: Dtype in which gradients are summed over devices; each param's own by default. Micro-batches are
        summed in float32 whatever it is. The optimizer gets gradients in the wider of it and the param's dtype; those
        of `layerwise` leaves have been rounded to the param's.
      loss_scale: Multiplies the loss, and takes it out of the gradients in float32. A step with an overflow then
        changes nothing but the scale, and is counted.
      layerwise: At stage 3, a regex or predicate on leaf paths: leaves that the model gathers itself, layer by layer,
        by `zerojax.gather` or `zerojax.nn.gathered`. All others are gathered before `loss_fn` runs.

    Returns:
      `step(state, batch) -> (state, metrics)`, which donates `state`. `batch` is a pytree of arrays, the global batch
      leading: devices x micro-batches x rows. `metrics`: `loss`; `grad_norm` float32, before clipping and without the
      loss scale; `finite`, whether every gradient was; `skipped`, steps so far; `loss_scale`, the scale used, and
      `at_minimum`, whether an overflow met a scale that can go no lower, where there is one; `aux` with `has_aux`.

    Raises:
      ValueError: batch rows are no multiple of devices x micro-batches; params do not match the plan; the loss is no
        scalar.
      TypeError: a param without a gradient (integers).

    Warns:
      UserWarning: float16 params without a loss scale, once in a process: their small gradients become zero.

    Communication:
      Bytes a device and step, for n devices, P bytes of params and G of gradients in the dtype they travel in, times (n
      - 1) / n: stage 0, an all-reduce 2 G; stage 1, a reduce-scatter and an all-gather G + P; stage 2, `accumulate` G +
      P; stage 3, P + `accumulate` G, and for `layerwise` leaves twice P for each micro-batch (forward and backward).

    References:
      Rajbhandari et al., arXiv:1910.02054, sections 5 and 7.

    Example:
      >>> import zerojax
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"w": jnp.zeros((4,))}
      >>> plan = zerojax.make_plan(params, mesh, stage=2)
      >>> tx = zerojax.zero(optax.sgd(0.1), plan)
      >>> state = zerojax.create_train_state(params, tx, plan)
      >>> step = make_train_step(lambda params, x: jnp.mean((x @ params["w"] - 1) ** 2), tx, plan)
      >>> state, metrics = step(state, jnp.ones((2, 4)))
      >>> float(metrics["loss"]), float(metrics["grad_norm"])
      (1.0, 4.0)
    """
    tx = zero(tx, plan)
    objective = Objective(
        loss_fn=loss_fn,
        plan=plan,
        accumulate=accumulate,
        has_aux=has_aux,
        reduce=reduce,
        grad_dtype=grad_dtype,
        layerwise=layerwise,
    )
    specs = state_specs(tx, plan, loss_scale)
    if loss_scale is None:
        _warn_of_float16(plan)

    skips = loss_scale is not None or getattr(tx.inner, "skips", False)

    def gradients(params: PyTree, scale: LossScaleState | None, batch: PyTree) -> Result:
        factor = None if scale is None else scale.scale
        return objective.loss_and_grads(params, batch, sharded=plan.stage >= 1, scale=factor)

    def after(state: TrainState, out: Result) -> tuple[TrainState, dict[str, Any]]:
        """All of the next state but params and optimizer state; metrics."""
        new = state._replace(step=state.step + 1)
        metrics = {"loss": out.loss, "grad_norm": out.norm, "finite": out.finite}
        if skips:
            new = new._replace(skipped=state.skipped + ~out.finite)
        if loss_scale is not None:
            new, scale_metrics = _next_scale(loss_scale, new, out.finite)
            metrics |= scale_metrics
        return new, metrics | {"skipped": new.skipped} | ({"aux": out.aux} if has_aux else {})

    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Any]]:
        out = gradients(state.params, state.loss_scale, batch)
        finite = out.finite if skips else None
        params, opt_state = apply_sharded(tx, out.grads, state.opt_state, state.params, finite=finite, value=out.loss)
        new, metrics = after(state, out)
        return new._replace(params=params, opt_state=opt_state), metrics

    def begin(
        small: list[jax.Array], params: PyTree, state: TrainState, batch: PyTree
    ) -> tuple[Any, TrainState, dict[str, Any]]:
        """As `train_step`, up to the first bucket; `state` lacks params and `opt_state`."""
        out = gradients(params, state.loss_scale, batch)
        assert stream is not None
        begun = stream.begin(out.grads, small, finite=out.finite if skips else None, value=out.loss)
        new, metrics = after(state, out)
        return begun, new, metrics

    def at_once(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Any]]:
        new, metrics = meshes.on_mesh(plan.mesh, train_step, (specs, PartitionSpec()))(state, batch)
        return new._replace(params=plan.at_rest(new.params), opt_state=tx.at_rest(new.opt_state)), metrics

    stream = streamed(tx)
    if stream is None:
        return TrainStep(at_once, objective, tx, loss_scale)
    scalar = PartitionSpec()
    first = meshes.on_mesh(plan.mesh, begin, (stream.specs, specs._replace(params=None, opt_state=None), scalar))
    return StreamedTrainStep(at_once, objective, tx, loss_scale, first, stream)


def make_eval_step(
    loss_fn: LossFn, plan: Plan, *, has_aux: bool = False, reduce: str = "mean", layerwise: Layerwise = None
) -> Callable[[PyTree, PyTree], dict[str, Any]]:
    """`eval_step(params, batch) -> metrics`: the loss (and `aux`) of the training step, without gradient or update.

    Args and errors are those of `make_train_step`.

    Example:
      >>> import zerojax
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"w": jnp.zeros((4,))}
      >>> plan = zerojax.make_plan(params, mesh, stage=0)
      >>> eval_step = make_eval_step(lambda params, x: jnp.mean((x @ params["w"] - 1) ** 2), plan)
      >>> float(eval_step(params, jnp.ones((2, 4)))["loss"])
      1.0
    """
    objective = Objective(loss_fn=loss_fn, plan=plan, has_aux=has_aux, reduce=reduce, layerwise=layerwise)

    def eval_step(params: PyTree, batch: PyTree) -> dict[str, Any]:
        loss, aux = objective.loss(params, batch)
        return {"loss": loss} | ({"aux": aux} if has_aux else {})

    return _jitted(meshes.on_mesh(plan.mesh, eval_step, PartitionSpec()), objective)


def value_and_grad(
    loss_fn: LossFn,
    plan: Plan,
    *,
    accumulate: int = 1,
    has_aux: bool = False,
    reduce: str = "mean",
    grad_dtype: Any = None,
    layerwise: Layerwise = None,
) -> Callable[[PyTree, PyTree], tuple[Any, PyTree]]:
    """`jax.value_and_grad` for a loop of one's own: gradients come reduced over the devices, laid out by `plan.grads`.

    Args and errors are those of `make_train_step`. The function returned is jitted and may be called inside another
    jit; it returns `(loss, grads)`, or `((loss, aux), grads)` with `has_aux`.

    Example:
      >>> import zerojax
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"w": jnp.zeros((4,))}
      >>> plan = zerojax.make_plan(params, mesh, stage=2)
      >>> loss, grads = value_and_grad(lambda params, x: jnp.mean(x @ params["w"]), plan)(params, jnp.ones((2, 4)))
      >>> grads["w"].tolist()
      [1.0, 1.0, 1.0, 1.0]
    """
    objective = Objective(
        loss_fn=loss_fn,
        plan=plan,
        accumulate=accumulate,
        has_aux=has_aux,
        reduce=reduce,
        grad_dtype=grad_dtype,
        layerwise=layerwise,
    )

    def value_and_grad(params: PyTree, batch: PyTree) -> tuple[Any, PyTree]:
        out = objective.loss_and_grads(params, batch, sharded=plan.stage >= 2)
        return ((out.loss, out.aux) if has_aux else out.loss), out.grads

    return _jitted(meshes.on_mesh(plan.mesh, value_and_grad, (PartitionSpec(), plan.grad_specs)), objective)


def _jitted(traced: Callable[..., Any], objective: Objective) -> Callable[[PyTree, PyTree], Any]:
    """A function of params and a batch, jitted where it is not inside a transformation already."""
    plan = objective.plan
    jitted = jax.jit(traced, in_shardings=(plan.params, None), compiler_options=meshes.compiler_options(plan.mesh))

    def run(params: PyTree, batch: PyTree) -> Any:
        batch = place_batch(objective, batch)
        return (traced if meshes.tracing((params, batch)) else jitted)(params, batch)

    return run


def place_batch(objective: Objective, batch: PyTree) -> PyTree:
    """Checks a batch, and puts what is not on the plan's devices yet on them, rows over the ZeRO axis."""
    objective.check_batch(batch)
    sharding = objective.plan.batch

    def place(path: tuple[Any, ...], x: Any) -> Any:
        if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
            return x
        if isinstance(x, jax.Array) and x.sharding.device_set == sharding.device_set:
            return x
        if jax.process_count() > 1:
            raise ValueError(
                f"batch: leaf {meshes.path_name(path)!r} is local to one of {jax.process_count()} processes; build "
                "global arrays, with jax.make_array_from_process_local_data(plan.batch, rows) for instance."
            )
        return jax.device_put(x, sharding)

    return jax.tree_util.tree_map_with_path(place, batch)


_warned_of_float16 = False


def _warn_of_float16(plan: Plan) -> None:
    """Warns, once in a process, of float16 params whose loss is not scaled."""
    global _warned_of_float16
    half = [leaf.name for leaf in plan.leaves if leaf.dtype == jnp.float16]
    if not half or _warned_of_float16:
        return
    _warned_of_float16 = True
    warnings.warn(
        f"make_train_step: {len(half)} params are float16, {half[0]!r} for one, and the loss is not scaled: gradients "
        "below 6e-8 become zero, and sums above 65504 infinite. Pass loss_scale=zerojax.dynamic_loss_scale() to "
        "create_train_state and make_train_step, or take bfloat16 params, which need none.",
        stacklevel=3,
    )


def _next_scale(loss_scale: LossScale, state: TrainState, finite: jax.Array) -> tuple[TrainState, dict[str, Any]]:
    """The state with the next step's loss scale; and metrics."""
    before = state.loss_scale
    assert before is not None
    after = loss_scale.update(before, finite)
    at_minimum = ~finite & (getattr(before, "hysteresis", 1) == 1) & (after.scale >= before.scale)
    return state._replace(loss_scale=after), {"loss_scale": before.scale, "at_minimum": at_minimum}
