"""`zero(inner, plan)`: any Optax transformation, its state sharded over the devices of a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import optax

from zerojax import host, meshes
from zerojax.plan import Plan

PyTree = Any
T = TypeVar("T")


class ZeroTransformation(optax.GradientTransformationExtraArgs):
    """What `zero` returns: an Optax transformation that knows its `inner` one and its `plan`.

    Attributes:
      made: What `once` keeps of it.
    """

    inner: optax.GradientTransformationExtraArgs
    plan: Plan
    made: dict[Any, Any]

    def __new__(
        cls, init: Any, update: Any, inner: optax.GradientTransformationExtraArgs, plan: Plan
    ) -> ZeroTransformation:
        self = super().__new__(cls, init, update)
        self.inner, self.plan, self.made = inner, plan, {}
        return self

    @functools.cached_property
    def rests(self) -> PyTree:
        """How each leaf of the state is kept."""
        return self.plan.rests(self.inner)

    def in_use(self, state: PyTree) -> PyTree:
        """A state, all its leaves whole and on the device."""
        return jax.tree.map(lambda rest, x: host.in_use(x, rest), self.rests, state)

    def at_rest(self, state: PyTree) -> PyTree:
        """A state as the plan keeps it; inside a jit, but not in `meshes.on_mesh`."""
        return jax.tree.map(lambda rest, x: host.at_rest(x, rest, self.plan.mesh), self.rests, state)

    def check_room(self) -> None:
        """Raises `MemoryError` where this process has less host memory than the plan sends there."""
        what = (
            "the optimizer's state and the params have"
            if any(leaf.on_host for leaf in self.plan.leaves)
            else "the optimizer's state has"
        )
        host.check_room(self.plan.memory(self.inner).host, self.plan.mesh, what)

    @property
    def unit(self) -> str | None:
        """As of a `FusedTransformation`, where `inner` is one."""
        return getattr(self.inner, "unit", None)


def once(make: Callable[[ZeroTransformation], T]) -> Callable[[ZeroTransformation], T]:
    """`make` of a transformation, which keeps the result: programs live as long as what they are of."""

    @functools.wraps(make)
    def kept(tx: ZeroTransformation) -> T:
        if make not in tx.made:
            tx.made[make] = make(tx)
        result: T = tx.made[make]
        return result

    return kept


def made(f: Callable[..., PyTree], args: tuple[Any, ...], rests: PyTree, plan: Plan) -> PyTree:
    """`f(*args)` as `rests` keep it: by the gigabyte, so that a device has little more than what it is to keep.

    Random numbers take several times the memory of what is made of them; and what goes to the host is never all on the
    device.
    """
    treedef: Any = jax.tree.structure(rests)
    leaves: list[host.Rest] = jax.tree.leaves(rests)
    new: list[Any] = []
    for part in host.parts(leaves):

        def some(*args: Any, part: list[int] = part) -> list[Any]:
            all_leaves = treedef.flatten_up_to(f(*args))
            return [all_leaves[i] for i in part]

        run = meshes.on_mesh(plan.mesh, some, [leaves[i].spec for i in part])
        cut = lambda *args, run=run, part=part: [
            host.cut(x, leaves[i].grid) for x, i in zip(run(*args), part, strict=True)
        ]
        new += jax.jit(cut, out_shardings=[leaves[i].sharding(plan.mesh) for i in part])(*args)
    return treedef.unflatten(new)


def zero(inner: optax.GradientTransformation, plan: Plan) -> ZeroTransformation:
    """Wraps `inner` so that each device of `plan` keeps and updates its share of the optimizer state.

    The state is `inner`'s own, laid out: no wrapper, so checkpoints, `optax.tree.get` and schedules see what they saw
    before. It works in any jitted loop, and in `make_train_step`, which also reduce-scatters gradients by construction.

    Args:
      inner: Any Optax transformation, chains and wrappers included.
      plan: From `make_plan`; at stage 0 everything stays replicated.

    Returns:
      An Optax transformation. `init` takes arrays, and `ShapeDtypeStruct`s where `inner` does, and gives the state in
      `plan.opt_state(inner)`; `update` takes gradients in any layout and gives updates laid out as the params are.

    Raises:
      ValueError: params or gradients do not match the plan; or `inner` is already `zero` of another plan.
      TypeError: `inner` is no gradient transformation.

    Communication:
      For `update` alone, at stages 1 and 2: an all-gather of the updates, where an all-reduced gradient is sliced for
        free; XLA may turn the caller's all-reduce and that slice into a reduce-scatter.

    Memory:
      1/n of `inner`'s state, for n devices, and of what `plan.table()` lists as whole, all of it.

    References:
      Rajbhandari et al., arXiv:1910.02054, section 5.1.

    Example:
      >>> import jax, jax.numpy as jnp, zerojax
      >>> params = {"w": jnp.ones((8, 4))}
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> tx = zero(optax.sgd(0.5), zerojax.make_plan(params, mesh, stage=1))
      >>> updates, _ = tx.update({"w": jnp.ones((8, 4))}, tx.init(params), params)
      >>> float(updates["w"][0, 0])
      -0.5
    """
    if isinstance(inner, ZeroTransformation):
        if inner.plan is not plan:
            raise ValueError(
                "zero() was given a transformation that zero() already wraps with another plan; pass the inner one."
            )
        return inner
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"zero() wraps an optax.GradientTransformation, got {type(inner).__name__}: pass optax.adamw(...) or "
            "the like."
        )
    inner = optax.with_extra_args_support(inner)
    state_specs = functools.cache(lambda: plan.opt_state_specs(inner))

    def init(params: PyTree) -> PyTree:
        plan.check(params)

        def sharded_init(params: PyTree) -> PyTree:
            return inner.init(meshes.constrain(plan.on_device(params), plan.update_specs))

        if meshes.tracing(params):
            return tx.at_rest(meshes.on_mesh(plan.mesh, sharded_init, state_specs())(params))
        meshes.check_devices(plan.mesh)
        tx.check_room()
        # Eagerly, Optax would make the whole state on each device before it could be cut.
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
            return made(lambda: inner.init(params), (), tx.rests, plan)
        return made(sharded_init, (jax.device_put(params, plan.params),), tx.rests, plan)

    def sharded_update(
        functions: dict[str, Any], updates: PyTree, state: PyTree, params: PyTree | None, arrays: dict[str, Any]
    ) -> tuple[PyTree, PyTree]:
        def body(
            updates: PyTree, state: PyTree, params: PyTree | None, arrays: dict[str, Any]
        ) -> tuple[PyTree, PyTree]:
            updates = meshes.constrain(updates, plan.update_specs)
            if params is not None:
                params = meshes.constrain(params, plan.update_specs)
            return inner.update(updates, state, params, **arrays, **functions)

        run = meshes.on_mesh(plan.mesh, body, (plan.param_specs, state_specs()))
        params = None if params is None else plan.on_device(params)
        updates, state = run(updates, tx.in_use(state), params, arrays)
        return updates, tx.at_rest(state)

    jitted_update = jax.jit(functools.partial(sharded_update, {}))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        plan.check(updates, "updates")
        if params is not None:
            plan.check(params)
        # On an Explicit mesh arrays have to enter as arguments; functions (L-BFGS's value_fn) cannot.
        arrays = {k: v for k, v in extra_args.items() if all(map(_is_array, jax.tree.leaves(v)))}
        functions = {k: v for k, v in extra_args.items() if k not in arrays}
        run: Any = jax.jit(functools.partial(sharded_update, functions)) if functions else jitted_update
        return run(updates, state, params, arrays)

    tx = ZeroTransformation(init, update, inner, plan)
    return tx


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | int | float)
