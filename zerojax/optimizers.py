"""Optax's Adam, AdamW and LAMB over `pallas_kernels`, and `apply`, which updates and applies in one pass.

A transformation's `update` returns what is to be added; `optax.apply_updates` adds it. Between the two stands a tree
of the params' size, which XLA fuses away where it can see both, and no kernel can. So a fused optimizer has a third
function, `apply(grads, state, params) -> (params, state)`, which `zerojax.apply` and the train step look for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from pallas_kernels import formats
from pallas_kernels.adam import adam, adam_choice, adam_scalars, adam_step
from pallas_kernels.dispatch import Choice
from pallas_kernels.formats import Place
from pallas_kernels.lamb import TrustRatio, lamb, lamb_choice, lamb_scalars, lamb_step
from pallas_kernels.squares import squares, squares_choice
from zerojax import meshes
from zerojax.plan import Plan
from zerojax.scaling import update_as_scale
from zerojax.zero import ZeroTransformation

PyTree = Any
VARIANTS = ("optax", "deepspeed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rule:
    """An optimizer of `pallas_kernels`.

    Attributes:
      op: `op(params, grads, mu, nu, scalars, *, decay, places, implementation)` on lists of leaves.
      choice: Which implementation it runs.
      step: What it adds to one leaf, and the leaf's new moments.
      norms: Whether a step depends on the norm of the whole leaf; then `op` takes `across`, which adds up shards'.
    """

    op: Callable[..., Any]
    choice: Callable[..., Choice]
    step: Callable[..., Any]
    norms: bool = False


_ADAM = _Rule(op=adam, choice=adam_choice, step=adam_step)


class FusedTransformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation that can also update and apply in one pass.

    Attributes:
      apply: `apply(grads, state, params, *, plan=None, finite=None, scale=None, **extra_args) -> (params, state)`.
        Leaves of `params` may be `formats.Split` or `formats.Copied`. `plan` says how global arrays are cut;
        `finite`, a bool scalar, leaves everything as it is where it is False; `scale` multiplies the gradients.
      skips: Whether gradients that are not finite leave everything as it is.
    """

    apply: Callable[..., tuple[PyTree, PyTree]]
    skips: bool

    def __new__(
        cls, init: Any, update: Any, apply: Callable[..., tuple[PyTree, PyTree]], *, skips: bool = False
    ) -> FusedTransformation:
        self = super().__new__(cls, init, update)
        self.apply, self.skips = apply, skips
        return self


def fused_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any = None,
    implementation: str | None = None,
) -> FusedTransformation:
    """`optax.adam` in one pass over the params, their gradients and moments.

    Args:
      learning_rate: A float, or a schedule of the number of steps done.
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      eps: Added to the square root.
      eps_root: Added inside it.
      mu_dtype: Dtype of the first moment; by default the params', and float32 for 16-bit params. "bfloat16" is
        rounded stochastically, "int8" is too, in blocks of 32 that share a power of two (`formats.Blocks`).
      nesterov: Nesterov momentum.
      nu_dtype: Dtype of the second moment, likewise; float16 is refused, which has no range for squares.
      implementation: Of `pallas_kernels.adam`, used by `apply`; None picks by what was measured.

    Returns:
      A transformation whose state is `optax.ScaleByAdamState`. `update` is Optax's in XLA; `zerojax.apply` and the
      train step run the kernel.

    Precision:
      float32 arithmetic whatever is stored. Departures from Optax: moments of 16-bit params are float32 by default,
      and bfloat16 ones are rounded stochastically, since at b2 = 0.999 one that is rounded to nearest never decays.
      The random bits are a hash of step, leaf and element: the same at every stage and on any number of devices.

    Memory:
      Bytes a param: 8 for float32 moments, 4 for bfloat16 ones, 2.07 for int8 ones.

    References:
      Kingma and Ba, arXiv:1412.6980, Algorithm 1.

    Example:
      >>> import zerojax
      >>> tx = fused_adam(0.1)
      >>> params, grads = {"w": jnp.ones(4)}, {"w": jnp.full(4, 0.5)}
      >>> params, state = zerojax.apply(tx, grads, tx.init(params), params)
      >>> round(float(params["w"][0]), 6), int(state.count)
      (0.9, 1)
    """
    scalars = functools.partial(adam_scalars, b1=b1, b2=b2, eps=eps, eps_root=eps_root, nesterov=nesterov)
    dtypes = {"mu_dtype": mu_dtype, "nu_dtype": nu_dtype}
    return _fused(_ADAM, scalars, learning_rate, **dtypes, mask=False, implementation=implementation)


def fused_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    mu_dtype: Any = None,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any = None,
    implementation: str | None = None,
) -> FusedTransformation:
    """`optax.adamw` in one pass: `fused_adam` with decoupled weight decay.

    Args:
      learning_rate: A float, or a schedule of the number of steps done.
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      eps: Added to the square root.
      eps_root: Added inside it.
      mu_dtype: Dtype of the first moment, as in `fused_adam`.
      weight_decay: Times the learning rate, a float or a schedule.
      mask: Which leaves decay: a tree of bools, a prefix of the params', or a function from params to one.
      nesterov: Nesterov momentum.
      nu_dtype: Dtype of the second moment, as in `fused_adam`.
      implementation: Of `pallas_kernels.adam`.

    Returns:
      A transformation as `fused_adam`'s.

    References:
      Loshchilov and Hutter, arXiv:1711.05101, Algorithm 2.

    Example:
      >>> import zerojax
      >>> tx = zerojax.chain(optax.clip_by_global_norm(1.0), fused_adamw(1e-3, mask=lambda p: {"w": True, "b": False}))
      >>> params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
      >>> params, state = zerojax.apply(tx, params, tx.init(params), params)
      >>> round(float(params["w"][0, 0]), 7), round(float(params["b"][0]), 7)
      (0.9989999, 0.999)
    """
    scalars = functools.partial(adam_scalars, b1=b1, b2=b2, eps=eps, eps_root=eps_root, nesterov=nesterov)
    dtypes = {"mu_dtype": mu_dtype, "nu_dtype": nu_dtype}
    decay = {"weight_decay": weight_decay, "mask": mask}
    return _fused(_ADAM, scalars, learning_rate, **dtypes, **decay, implementation=implementation)


def fused_lamb(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    eps_root: Any = 0.0,
    weight_decay: Any = 0.0,
    mask: Any = None,
    *,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    min_trust_ratio: float | None = None,
    max_trust_ratio: float | None = None,
    variant: str = "optax",
    implementation: str | None = None,
) -> FusedTransformation:
    """`optax.lamb`, or DeepSpeed's LAMB: Adam's step, scaled for each leaf by ||param|| / ||step||.

    Under `zero` the norms are those of whole leaves at every stage.

    Args:
      learning_rate: A float, or a schedule of the number of steps done.
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      eps: Added to the square root.
      eps_root: Added inside it.
      weight_decay: Added to the step before its norm is taken, a float or a schedule.
      mask: Which leaves decay: a tree of bools, a prefix of the params', or a function from params to one.
      mu_dtype: Dtype of the first moment, as in `fused_adam`.
      nu_dtype: Dtype of the second moment, as in `fused_adam`.
      min_trust_ratio: Limit of the ratio; None for none, 0.01 with variant="deepspeed".
      max_trust_ratio: Likewise; None for none, 10 with variant="deepspeed".
      variant: "optax": bias-corrected moments inside the ratio, as in the paper. "deepspeed": raw moments inside, the
        correction on the learning rate.
      implementation: Of `pallas_kernels.lamb`.

    Returns:
      A transformation as `fused_adam`'s.

    Raises:
      ValueError: `variant` is neither.

    References:
      You et al., arXiv:1904.00962, Algorithm 2.

    Example:
      >>> import zerojax
      >>> tx, params = fused_lamb(0.1), {"w": jnp.full(4, 2.0)}
      >>> params, _ = zerojax.apply(tx, {"w": jnp.ones(4)}, tx.init(params), params)
      >>> round(float(params["w"][0]), 5)
      1.8
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}.")
    if variant == "deepspeed":
        min_trust_ratio = 0.01 if min_trust_ratio is None else min_trust_ratio
        max_trust_ratio = 10.0 if max_trust_ratio is None else max_trust_ratio
    trust = TrustRatio(min_trust_ratio, max_trust_ratio)
    scalars = functools.partial(lamb_scalars, variant=variant, b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    rule = _Rule(
        op=functools.partial(lamb, trust=trust),
        choice=lamb_choice,
        step=lambda s, *leaf: lamb_step(s, trust, *leaf),
        norms=True,
    )
    dtypes = {"mu_dtype": mu_dtype, "nu_dtype": nu_dtype}
    decay = {"weight_decay": weight_decay, "mask": mask}
    return _fused(rule, scalars, learning_rate, **dtypes, **decay, implementation=implementation)


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.chain`, which keeps a fused last link visible to `apply`.

    Example:
      >>> tx = chain(optax.clip_by_global_norm(1.0), fused_adamw(3e-4))
      >>> isinstance(tx, FusedTransformation)
      True
    """
    chained = optax.chain(*transforms)
    if not transforms or not isinstance(transforms[-1], FusedTransformation):
        return chained
    *links, last = transforms
    before = optax.chain(*links)

    def apply(
        grads: PyTree, state: PyTree, params: PyTree, *, finite: Any = None, scale: Any = None, **options: Any
    ) -> tuple[PyTree, PyTree]:
        extra = {k: v for k, v in options.items() if k != "plan"}
        if links and scale is not None:  # what the links do to gradients need not be linear
            grads, scale = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads), None
        # All links at once: behind one that scales, the next wants the scaled gradients. In float32, where a norm of
        # 16-bit gradients would be none.
        wide = jax.tree.map(formats.widen, grads)
        sums = _squares(grads, options.get("plan")) if links else None
        linked, factor, new = update_as_scale(before, wide, state[:-1], whole(params), squares=sums, **extra)
        grads, factor = (linked, scale) if factor is None else (grads, factor)
        params, last_state = last.apply(grads, state[-1], params, finite=finite, scale=factor, **options)
        return params, (*_keep(finite, new, state[:-1]), last_state)

    return FusedTransformation(chained.init, chained.update, apply, skips=last.skips)


def apply(
    tx: optax.GradientTransformation, grads: PyTree, state: PyTree, params: PyTree, **extra_args: Any
) -> tuple[PyTree, PyTree]:
    """One optimizer step: `tx.update` and `optax.apply_updates`, in one pass where `tx` allows.

    A fused optimizer is seen through `chain` and `zero`; any other transformation takes the two passes.

    Args:
      tx: Any Optax transformation.
      grads: Gradients.
      state: Of `tx.init(params)`.
      params: Params. Donate them and the state to the jit around this call, and the update is in place; in the order in
        which they are returned, `jax.jit(lambda params, state, grads: ..., donate_argnums=(0, 1))`, since JAX pairs
        donated buffers with results of their shape by position and copies what it cannot pair.
      **extra_args: What transformations ask for by name, `value` for instance.

    Returns:
      New `(params, state)`.

    Example:
      >>> params = {"w": jnp.ones(2)}
      >>> tx = optax.sgd(0.5)
      >>> apply(tx, params, tx.init(params), params)[0]["w"].tolist()
      [0.5, 0.5]
    """
    if reserved := {"plan", "finite", "scale"} & set(extra_args):
        raise TypeError(
            f"apply has a meaning of its own for {', '.join(sorted(reserved))}; no transformation gets them."
        )
    if not isinstance(tx, ZeroTransformation):
        return apply_link(tx, grads, state, params, **extra_args)
    plan = tx.plan
    plan.check(grads, "grads")
    plan.check(params)

    functions = {k: extra_args.pop(k) for k in list(extra_args) if callable(extra_args[k])}  # no arguments of a jit

    def on_shards(grads: PyTree, state: PyTree, params: PyTree, extra_args: dict[str, Any]) -> tuple[PyTree, PyTree]:
        return apply_sharded(tx, grads, state, params, **extra_args, **functions)

    run = meshes.on_mesh(plan.mesh, on_shards, (plan.param_specs, plan.opt_state_specs(tx.inner)))
    return (run if meshes.tracing((grads, state, params)) else jax.jit(run))(grads, state, params, extra_args)


def apply_sharded(
    tx: ZeroTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    finite: jax.Array | None = None,
    **extra_args: Any,
) -> tuple[PyTree, PyTree]:
    """One optimizer step, inside `meshes.on_mesh`: devices update their shards of the params, then gather them.

    Cheaper than `tx.update` and `optax.apply_updates`: what travels is the params in their own dtype, and the addition
    too is done once for each element and not on every device. Where `finite` is False everything stays as it is.
    """
    plan = tx.plan
    grads, shards = (meshes.constrain(tree, plan.update_specs) for tree in (grads, params))
    shards, new_state = apply_link(tx.inner, grads, state, shards, plan=plan, finite=finite, **extra_args)
    # Gradients may be wider than the params that Optax took its state's dtypes from; what is stored keeps its dtype.
    new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
    return meshes.constrain(meshes.constrain(shards, plan.update_specs), plan.param_specs), new_state


def apply_link(
    tx: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    plan: Plan | None = None,
    finite: jax.Array | None = None,
    **extra_args: Any,
) -> tuple[PyTree, PyTree]:
    """One step of a transformation that may be fused, as `FusedTransformation.apply`, params stored plainly."""
    if isinstance(tx, FusedTransformation):
        return tx.apply(grads, state, params, plan=plan, finite=finite, **extra_args)
    updates, new_state = optax.with_extra_args_support(tx).update(grads, state, params, **extra_args)
    return _keep(finite, (optax.apply_updates(params, updates), new_state), (params, state))


def _keep(finite: jax.Array | None, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the gradients were finite, else `old`."""
    return new if finite is None else jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def _fused(
    rule: _Rule,
    scalars: Callable[..., Any],
    learning_rate: optax.ScalarOrSchedule,
    *,
    mu_dtype: Any,
    nu_dtype: Any,
    weight_decay: Any = 0.0,
    mask: Any,
    implementation: str | None,
) -> FusedTransformation:
    """The transformation of a rule; `scalars(count, learning_rate, ...)` are those of a step."""
    mu_dtype, nu_dtype = _moment_dtype("mu_dtype", mu_dtype), _moment_dtype("nu_dtype", nu_dtype)

    def init(params: PyTree) -> optax.ScaleByAdamState:
        mu, nu = _zeros(params, mu_dtype, signed=True), _zeros(params, nu_dtype, signed=False)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def scalars_of(count: jax.Array, **once: Any) -> Any:
        at = lambda x: x(count) if callable(x) else x
        options = {} if mask is False else {"weight_decay": at(weight_decay)}
        return scalars(optax.safe_increment(count), at(learning_rate), **once, **options)

    def update(
        updates: PyTree, state: optax.ScaleByAdamState, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        if params is None and (rule.norms or mask is not False):
            raise ValueError("this optimizer needs the params: call update(grads, state, params).")
        grads, treedef = _flatten(updates)
        mu, nu = map(treedef.flatten_up_to, (state.mu, state.nu))
        weights = [None] * len(grads) if params is None else treedef.flatten_up_to(params)
        leaves = zip(weights, grads, mu, nu, _decayed(mask, params, len(grads)), _places(len(grads)), strict=True)
        s = scalars_of(state.count)
        stepped = [rule.step(s, None if p is None else formats.widen(p), *rest) for p, *rest in leaves]
        # As Optax: 16 bits where gradients and params have no more.
        likes = [jnp.result_type(g, *() if p is None else (p,)) for g, p in zip(grads, weights, strict=True)]
        deltas = [x[0].astype(dtype) for x, dtype in zip(stepped, likes, strict=True)]
        mu, nu = (treedef.unflatten([x[k] for x in stepped]) for k in (1, 2))
        return treedef.unflatten(deltas), optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)

    def apply(
        grads: PyTree,
        state: optax.ScaleByAdamState,
        params: PyTree,
        *,
        plan: Plan | None = None,
        finite: jax.Array | None = None,
        scale: jax.Array | None = None,
        **_: Any,
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        leaves, treedef = _flatten(params)
        lists = [leaves, *map(treedef.flatten_up_to, (grads, state.mu, state.nu))]
        # Without a plan, how arrays are cut is not known, and a kernel would have them gathered.
        chosen = meshes.kernel_implementation() if implementation is None and plan is None else implementation
        s = scalars_of(state.count, scale=1.0 if scale is None else scale, apply=True if finite is None else finite)
        decay = _decayed(mask, whole(params), len(leaves))
        run: Any = functools.partial(rule.op, implementation=chosen)
        if plan is None or rule.choice(*lists, implementation=chosen).implementation == "xla":
            new = run(*lists, s, decay=decay)
        else:
            new = _on_shards(rule, run, plan, lists, s, decay)
        params, mu, nu = map(treedef.unflatten, new)
        count = _keep(finite, optax.safe_increment(state.count), state.count)
        return params, optax.ScaleByAdamState(count, mu, nu)

    return FusedTransformation(init, update, apply)


def whole(params: PyTree) -> PyTree:
    """Params with each leaf one array, of float32 where it is stored as a format is."""
    plain = lambda x: formats.decode(x) if formats.is_stored(x) else x
    return jax.tree.map(plain, params, is_leaf=formats.is_stored)


def _squares(grads: PyTree, plan: Plan | None) -> Callable[[], jax.Array] | None:
    """Sums of squares of all leaves by one kernel, for links that take a global norm; None where XLA's are to run."""
    leaves = jax.tree.leaves(grads)
    chosen = meshes.kernel_implementation() if plan is None else None
    if not leaves or squares_choice(leaves, implementation=chosen).implementation == "xla":
        return None
    if plan is None:
        return lambda: squares(leaves)
    specs = plan.treedef.flatten_up_to(plan.update_specs)
    across = _sum_over_shards(specs)
    local = lambda *xs: across(squares(xs)[:, None])[:, 0]
    return lambda: jax.shard_map(local, in_specs=tuple(specs), out_specs=PartitionSpec(), check_vma=False)(*leaves)


def _on_shards(
    rule: _Rule, run: Callable[..., Any], plan: Plan, lists: list[list[Any]], scalars: Any, decay: list[bool]
) -> list[list[Any]]:
    """A kernel, run by each device on its shards: on global arrays XLA would gather them for it.

    A leaf of which shards end within a group of 8-bit moments is left to XLA, which exchanges what it must.
    """
    specs = plan.treedef.flatten_up_to(plan.update_specs)
    rows = list(zip(*lists, strict=True))
    parted = [any(_parts_groups(x, spec, plan.mesh) for x in row) for row, spec in zip(rows, specs, strict=True)]
    new: list[list[Any]] = [[None] * len(rows) for _ in range(3)]

    def collect(some: list[int], result: Any) -> None:
        for k, column in enumerate(result):
            for i, leaf in zip(some, column, strict=True):
                new[k][i] = leaf

    if some := [i for i, is_parted in enumerate(parted) if is_parted]:
        pick = [[x[i] for i in some] for x in lists]
        options: Any = {"decay": [decay[i] for i in some], "places": [Place(i) for i in some]}
        collect(some, rule.op(*pick, scalars, implementation="xla", **options))
    if some := [i for i, is_parted in enumerate(parted) if not is_parted]:
        mine, shapes = [specs[i] for i in some], [formats.shape_of(lists[0][i]) for i in some]

        def on_shards(*args: Any) -> Any:
            places = [_place(i, shape, spec, plan.mesh) for i, shape, spec in zip(some, shapes, mine, strict=True)]
            norms = {"across": _sum_over_shards(mine)} if rule.norms else {}
            return run(*args, decay=[decay[i] for i in some], places=places, **norms)

        shard_map = jax.shard_map(
            on_shards, in_specs=((mine,) * 4) + (PartitionSpec(),), out_specs=(mine,) * 3, check_vma=False
        )
        collect(some, shard_map(*[[x[i] for i in some] for x in lists], scalars))
    return new


def _parts_groups(leaf: Any, spec: PartitionSpec, mesh: meshes.AnyMesh) -> bool:
    """Whether shards of a leaf end within groups of its 8-bit numbers."""
    if not isinstance(leaf, formats.Blocks) or len(spec) < leaf.codes.ndim or not leaf.codes.ndim:
        return False
    return leaf.codes.shape[-1] // meshes.shards(mesh, spec[-1]) % formats.GROUP != 0 and spec[-1] is not None


def _place(leaf: int, shape: tuple[int, ...], spec: PartitionSpec, mesh: meshes.AnyMesh) -> Place:
    """Where this device's shard of a leaf lies in it; inside a `shard_map`."""
    cuts, behind = [], 1
    for dim in reversed(range(len(shape))):
        if axes := meshes.axis_names(spec[dim] if dim < len(spec) else None):
            n = shape[dim] // meshes.shards(mesh, spec[dim])
            step = np.uint32(n * behind % 2**32).view(np.int32)
            stride = (shape[dim] - n) * behind if dim else 0
            cuts.append(formats.Cut(n * behind, stride, jax.lax.axis_index(axes) * step))
        behind *= shape[dim]
    return Place(leaf, tuple(cuts))


def _places(count: int) -> list[Place]:
    return list(map(Place, range(count)))


def _sum_over_shards(specs: list[PartitionSpec]) -> Callable[[jax.Array], jax.Array]:
    """Sums [leaves, k], numbers of each leaf's shard, over the devices that share the leaf; inside a `shard_map`."""
    cut = [tuple(name for entry in spec for name in meshes.axis_names(entry)) for spec in specs]

    def across(x: jax.Array) -> jax.Array:
        for axes in sorted(set(cut) - {()}):
            here = jnp.array([axes == other for other in cut])[:, None]
            x = jnp.where(here, jax.lax.psum(jnp.where(here, x, 0), axes), x)
        return x

    return across


def _flatten(tree: PyTree) -> tuple[list[Any], Any]:
    leaves, treedef = jax.tree.flatten(tree, is_leaf=formats.is_stored)
    return leaves, treedef


def _moment_dtype(name: str, dtype: Any) -> Any:
    """A dtype that a moment may have, or None for the params'."""
    if dtype is None:
        return None
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as e:
        raise ValueError(f"{name}={dtype!r} is no dtype; take float32, bfloat16 or int8.") from e
    if dtype == jnp.int8 or (jnp.issubdtype(dtype, jnp.floating) and (name, dtype) != ("nu_dtype", jnp.float16)):
        return dtype
    why = ": squares leave its range" if dtype == jnp.float16 else ""
    raise ValueError(f"{name}={dtype.name!r} cannot hold a moment{why}; take float32, bfloat16 or int8.")


def _zeros(params: PyTree, dtype: Any, *, signed: bool) -> PyTree:
    """Moments of params; 16-bit ones get float32."""

    def one(path: tuple[Any, ...], x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"params: leaf {meshes.path_name(path)!r} of dtype {x.dtype} has no Adam moments: freeze it, by "
                "optax.masked for instance."
            )
        if dtype == jnp.int8:
            return formats.zeros(x.shape, signed=signed)
        return jnp.zeros_like(x, dtype=dtype or jnp.promote_types(x.dtype, jnp.float32))

    return jax.tree_util.tree_map_with_path(one, params)


def _decayed(mask: Any, params: PyTree, count: int) -> list[bool]:
    """For each leaf whether it decays."""
    if mask is None or isinstance(mask, bool):
        return [mask is None or mask] * count
    tree = mask(params) if callable(mask) else mask
    decay = jax.tree.leaves(jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), tree, params))
    return [bool(flag) for flag in decay]
