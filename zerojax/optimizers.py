"""Optax's Adam, AdamW and LAMB over `pallas_kernels`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pallas_kernels import formats
from pallas_kernels.adam import adam, adam_choice, adam_scalars, adam_step
from pallas_kernels.formats import Place
from pallas_kernels.lamb import TrustRatio, lamb, lamb_choice, lamb_scalars, lamb_step
from zerojax import meshes
from zerojax.fused import FusedTransformation, Work, keep, whole
from zerojax.plan import Plan
from zerojax.shards import Rule

PyTree = Any
VARIANTS = ("optax", "deepspeed")


_ADAM = Rule(op=adam, choice=adam_choice, step=adam_step)


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
    bias_correction: bool = True,
    implementation: str | None = None,
) -> FusedTransformation:
    """`optax.adam` in one pass over the params, their gradients and moments.

    Args:
      learning_rate: A float, or a schedule of the number of steps done.
      b1: Decay rate of the first moment, a float or a schedule, as the next three.
      b2: Decay rate of the second moment.
      eps: Added to the square root.
      eps_root: Added inside it.
      mu_dtype: Dtype of the first moment; by default the params', and float32 for 16-bit params. "bfloat16" is
        rounded stochastically, "int8" is too, in blocks of 32 that share a power of two (`formats.Blocks`).
      nesterov: Nesterov momentum.
      nu_dtype: Dtype of the second moment, likewise; float16 is refused, which has no range for squares.
      bias_correction: Whether moments are divided by 1 - b**t.
      implementation: Of `pallas_kernels.adam`, used by `apply`; None picks by what was measured.

    Returns:
      A transformation whose state is `optax.ScaleByAdamState`. `update` is Optax's in XLA; `zerojax.apply` and the
      train step run the kernel. In `optax.inject_hyperparams` of 16-bit params give `hyperparam_dtype=jnp.float32`:
      else it rounds b2 to the params' dtype, 0.999 to 1.

    Precision:
      float32 arithmetic whatever is stored. Departures from Optax: moments of 16-bit params are float32 by default,
      and bfloat16 ones are rounded stochastically, since at b2 = 0.999 one that is rounded to nearest never decays.
      The random bits are a hash of step, leaf and element: the same at every stage and on any number of devices.
      Elements are counted modulo 2**32: in a larger leaf those 2**32 apart share their bits, each rounded without bias
      still.

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
    rates = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    scalars = functools.partial(adam_scalars, nesterov=nesterov, bias_correction=bias_correction)
    dtypes = {"mu_dtype": mu_dtype, "nu_dtype": nu_dtype}
    return _fused(_ADAM, scalars, learning_rate, rates, **dtypes, mask=False, implementation=implementation)


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
    bias_correction: bool = True,
    implementation: str | None = None,
) -> FusedTransformation:
    """`optax.adamw` in one pass: `fused_adam` with decoupled weight decay.

    Args:
      learning_rate: A float, or a schedule of the number of steps done.
      b1: Decay rate of the first moment, a float or a schedule, as the next three.
      b2: Decay rate of the second moment.
      eps: Added to the square root.
      eps_root: Added inside it.
      mu_dtype: Dtype of the first moment, as in `fused_adam`.
      weight_decay: Times the learning rate, a float or a schedule.
      mask: Which leaves decay: a tree of bools, a prefix of the params', or a function from params to one.
      nesterov: Nesterov momentum.
      nu_dtype: Dtype of the second moment, as in `fused_adam`.
      bias_correction: Whether moments are divided by 1 - b**t.
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
    rates = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    scalars = functools.partial(adam_scalars, nesterov=nesterov, bias_correction=bias_correction)
    dtypes = {"mu_dtype": mu_dtype, "nu_dtype": nu_dtype}
    decay = {"weight_decay": weight_decay, "mask": mask}
    return _fused(_ADAM, scalars, learning_rate, rates, **dtypes, **decay, implementation=implementation)


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
    bias_correction: bool = True,
    implementation: str | None = None,
) -> FusedTransformation:
    """`optax.lamb`, or DeepSpeed's LAMB: Adam's step, scaled for each leaf by ||param|| / ||step||.

    Under `zero` the norms are those of whole leaves at every stage.

    Args:
      learning_rate: A float, or a schedule of the number of steps done.
      b1: Decay rate of the first moment, a float or a schedule, as the next three.
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
      bias_correction: Whether there is such a correction.
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
    rates = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    scalars = functools.partial(lamb_scalars, variant=variant, bias_correction=bias_correction)
    rule = Rule(
        op=functools.partial(lamb, trust=trust),
        choice=lamb_choice,
        step=lambda s, *leaf: lamb_step(s, trust, *leaf),
        norms=True,
    )
    dtypes = {"mu_dtype": mu_dtype, "nu_dtype": nu_dtype}
    decay = {"weight_decay": weight_decay, "mask": mask}
    return _fused(rule, scalars, learning_rate, rates, **dtypes, **decay, implementation=implementation)


def _fused(
    rule: Rule,
    scalars: Callable[..., Any],
    learning_rate: optax.ScalarOrSchedule,
    rates: dict[str, Any],
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
        options = {name: at(x) for name, x in rates.items()}
        if mask is not False:
            options["weight_decay"] = at(weight_decay)
        return scalars(optax.safe_increment(count), at(learning_rate), **once, **options)

    def update(
        updates: PyTree, state: optax.ScaleByAdamState, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        if params is None and (rule.norms or mask is not False):
            raise ValueError("this optimizer needs the params: call update(grads, state, params).")
        grads, treedef = _flatten(updates)
        mu, nu = map(treedef.flatten_up_to, (state.mu, state.nu))
        weights = [None] * len(grads) if params is None else treedef.flatten_up_to(params)
        leaves = zip(
            weights, grads, mu, nu, _decayed(mask, params, len(grads)), map(Place, range(len(grads))), strict=True
        )
        s = scalars_of(state.count)
        stepped = [rule.step(s, None if p is None else formats.widen(p), *rest) for p, *rest in leaves]
        # As Optax: 16 bits where gradients and params have no more.
        likes = [jnp.result_type(g, *() if p is None else (p,)) for g, p in zip(grads, weights, strict=True)]
        deltas = [x[0].astype(dtype) for x, dtype in zip(stepped, likes, strict=True)]
        mu, nu = (treedef.unflatten([x[k] for x in stepped]) for k in (1, 2))
        return treedef.unflatten(deltas), optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)

    def prepare(
        grads: PyTree,
        state: optax.ScaleByAdamState,
        params: PyTree,
        *,
        plan: Plan | None = None,
        finite: jax.Array | None = None,
        scale: jax.Array | None = None,
        **_: Any,
    ) -> Work:
        leaves, treedef = _flatten(params)
        grads, mu, nu = map(treedef.flatten_up_to, (grads, state.mu, state.nu))
        # Without a plan, how arrays are cut is not known, and a kernel would have them gathered.
        chosen = meshes.kernel_implementation() if implementation is None and plan is None else implementation

        def finish(count: jax.Array, new: Sequence[Sequence[Any]]) -> tuple[PyTree, optax.ScaleByAdamState]:
            params, mu, nu = (treedef.unflatten(x) for x in new)
            return params, optax.ScaleByAdamState(count, mu, nu)

        return Work(
            rule=rule,
            params=leaves,
            grads=grads,
            mu=mu,
            nu=nu,
            scalars=scalars_of(
                state.count, scale=1.0 if scale is None else scale, apply=True if finite is None else finite
            ),
            decay=_decayed(mask, params, len(leaves)),
            implementation=chosen,
            rest=keep(finite, optax.safe_increment(state.count), state.count),
            finish=finish,
        )

    return FusedTransformation(init, update, prepare, unit="leaf" if rule.norms else "element")


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
    if (full := whole(params)) is None:  # of params that are elsewhere a mask sees shapes and dtypes
        zeros = lambda x: jnp.zeros(formats.shape_of(x), jnp.float32 if formats.is_stored(x) else x.dtype)
        full = jax.tree.map(zeros, params, is_leaf=formats.is_stored)
    tree = mask(full) if callable(mask) else mask
    decay = jax.tree.leaves(jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), tree, full))
    return [bool(flag) for flag in decay]
