"""What an optimizer of 16-bit params wears: exact weights behind them, and steps skipped that are not finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pallas_kernels import formats
from zerojax import meshes
from zerojax.fused import FusedTransformation, Work, all_finite, keep, prepare_link

PyTree = Any
KINDS = ("split", "float32")


class MasterWeightsState(NamedTuple):
    """`masters`: for each param what makes it exact: uint16 with kind="split", float32, or None where it is float32.

    `inner_state`: of the optimizer, which sees float32 params.
    """

    masters: PyTree
    inner_state: optax.OptState


def master_weights(inner: optax.GradientTransformation, *, kind: str = "split") -> FusedTransformation:
    """Exact float32 weights behind 16-bit params, for any optimizer.

    The model holds 16-bit params; what is updated is float32 weights. Under `zero` the masters are sharded as the
    optimizer's state is; what travels is the 16-bit params by `zerojax.apply` and the train step, float32 updates by
    `update`.

    Args:
      inner: Any Optax transformation; it sees the float32 weights. A fused one updates them in one pass.
      kind: "split" keeps the lower 16 bits of each weight beside a bfloat16 param, which is its upper 16 bits: the
        param is the weight truncated. "float32" keeps the whole weight beside a bfloat16 or float16 param, which is the
        weight rounded to nearest. Float32 params have no master.

    Returns:
      A transformation whose state is a `MasterWeightsState`; `full_precision` reads the weights from it.

    Raises:
      ValueError: an unknown `kind`.
      TypeError: a param that is no float; a float16 one with kind="split".

    Memory:
      Bytes a param beside the 16-bit param itself: 2 with "split", 4 with "float32".

    Precision:
      As float32 training, bit for bit, by `zerojax.apply` and the train step. By `update` and `optax.apply_updates`
      too, but for a weight that falls below 2**-15 of its size in one step: off by less than its old rounding error.

    Example:
      >>> import zerojax
      >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
      >>> tx = master_weights(optax.sgd(1e-4))
      >>> params, state = zerojax.apply(tx, params, tx.init(params), params)
      >>> params["w"].dtype.name, full_precision(params, state)["w"].tolist()
      ('bfloat16', [0.9998999834060669, 0.9998999834060669])
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
    inner = optax.with_extra_args_support(inner) if not isinstance(inner, FusedTransformation) else inner

    def init(params: PyTree) -> MasterWeightsState:
        masters = jax.tree_util.tree_map_with_path(lambda path, p: _master(path, p, kind), params)
        if any(isinstance(p, jax.ShapeDtypeStruct) for p in jax.tree.leaves(params)):
            return MasterWeightsState(masters, inner.init(jax.eval_shape(_full, params, masters)))
        return MasterWeightsState(masters, inner.init(_full(params, masters)))

    def update(
        updates: PyTree, state: MasterWeightsState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, MasterWeightsState]:
        if params is None:
            raise ValueError("master_weights needs the params: call update(grads, state, params).")
        full = _full(params, state.masters)
        wide = jax.tree.map(formats.widen, updates)
        deltas, inner_state = inner.update(wide, state.inner_state, full, **extra_args)
        weights = optax.apply_updates(full, deltas)
        treedef: Any = jax.tree.structure(params)
        leaves = map(treedef.flatten_up_to, (params, state.masters, weights, deltas))
        pairs = [_landing(*leaf) for leaf in zip(*leaves, strict=True)]
        first, second = (treedef.unflatten([pair[k] for pair in pairs]) for k in (0, 1))
        return first, MasterWeightsState(second, inner_state)

    def prepare(grads: PyTree, state: MasterWeightsState, params: PyTree, **options: Any) -> Work:
        stored = _stored(params, state.masters)
        return prepare_link(inner, grads, state.inner_state, stored, **options).then(None, finish)

    def finish(_: None, stored: PyTree, inner_state: PyTree) -> tuple[PyTree, MasterWeightsState]:
        part = lambda of: jax.tree.map(of, stored, is_leaf=formats.is_stored)
        return part(_param), MasterWeightsState(part(_kept), inner_state)

    skips, unit = getattr(inner, "skips", False), getattr(inner, "unit", None)
    return FusedTransformation(init, update, prepare, skips=skips, unit=unit)


def full_precision(params: PyTree, opt_state: PyTree) -> PyTree:
    """The float32 weights of params whose optimizer has `master_weights` somewhere in it.

    Raises:
      ValueError: `opt_state` has no master weights, or several.

    Example:
      >>> tx = master_weights(optax.sgd(0.1))
      >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
      >>> full_precision(params, tx.init(params))["w"].dtype.name
      'float32'
    """
    is_master = lambda x: isinstance(x, MasterWeightsState)
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_master) if is_master(x)]
    if len(states) != 1:
        raise ValueError(
            f"full_precision: opt_state has {len(states)} states of master_weights, one is wanted; it is what "
            "zerojax.master_weights(...).init gives, alone, in a chain or in a TrainState's opt_state."
        )
    return _full(params, states[0].masters)


class SkipNonfiniteState(NamedTuple):
    """`skipped`: int32, steps that were skipped. `inner_state`: of the optimizer."""

    skipped: jax.Array
    inner_state: optax.OptState


def skip_nonfinite(inner: optax.GradientTransformation) -> FusedTransformation:
    """Steps whose gradients hold an infinity or NaN change nothing but a count.

    Params, moments, counts and schedules stay as they are, with no word to the host. With a loss scale the train step
    skips by itself; this is for training without one.

    Args:
      inner: Any Optax transformation.

    Returns:
      A transformation whose state is a `SkipNonfiniteState`.

    Example:
      >>> import zerojax
      >>> tx = skip_nonfinite(optax.sgd(0.1))
      >>> params = {"w": jnp.ones(2)}
      >>> params, state = zerojax.apply(tx, {"w": jnp.array([jnp.inf, 0.0])}, tx.init(params), params)
      >>> params["w"].tolist(), int(state.skipped)
      ([1.0, 1.0], 1)
    """
    inner = optax.with_extra_args_support(inner) if not isinstance(inner, FusedTransformation) else inner

    def init(params: PyTree) -> SkipNonfiniteState:
        return SkipNonfiniteState(jnp.int32(0), inner.init(params))

    def update(
        updates: PyTree, state: SkipNonfiniteState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, SkipNonfiniteState]:
        finite = all_finite(updates)
        new, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        new, inner_state = keep(finite, (new, inner_state), (jax.tree.map(jnp.zeros_like, new), state.inner_state))
        return new, SkipNonfiniteState(state.skipped + ~finite, inner_state)

    def prepare(
        grads: PyTree, state: SkipNonfiniteState, params: PyTree, *, finite: jax.Array | None = None, **options: Any
    ) -> Work:
        here = all_finite(grads) if finite is None else finite & all_finite(grads)
        work = prepare_link(inner, grads, state.inner_state, params, finite=here, **options)
        return work.then(
            state.skipped + ~here, lambda skipped, params, inner: (params, SkipNonfiniteState(skipped, inner))
        )

    return FusedTransformation(init, update, prepare, skips=True, unit=getattr(inner, "unit", None))


def _master(path: tuple[Any, ...], p: Any, kind: str) -> jax.Array | None:
    """What is kept beside a param, at first."""
    name = meshes.path_name(path)
    if not jnp.issubdtype(p.dtype, jnp.floating):
        raise TypeError(
            f"master_weights: leaf {name!r} has dtype {p.dtype}; floating params are wanted: freeze others, by "
            "optax.masked for instance."
        )
    if p.dtype.itemsize > 2:
        return None
    if kind == "float32":
        if isinstance(p, jax.ShapeDtypeStruct):
            raise TypeError(
                f'master_weights: leaf {name!r} is a ShapeDtypeStruct; kind="float32" starts with the params\' values: '
                "pass arrays, or trace init with jax.eval_shape."
            )
        return p.astype(jnp.float32)
    if p.dtype != jnp.bfloat16:
        raise TypeError(
            f"master_weights: leaf {name!r} has dtype {p.dtype}, of which a float32 weight has no upper half; take "
            'bfloat16 params, or kind="float32".'
        )
    return jnp.zeros_like(p, dtype=jnp.uint16)


def _stored(params: PyTree, masters: PyTree) -> PyTree:
    """Params and masters as the formats that kernels know."""

    def one(p: jax.Array, master: Any) -> Any:
        if not hasattr(master, "dtype"):  # None, or optax.MaskedNode
            return p
        return formats.Split(p, master) if master.dtype == jnp.uint16 else formats.Copied(master, p)

    treedef: Any = jax.tree.structure(params)
    return treedef.unflatten(map(one, jax.tree.leaves(params), treedef.flatten_up_to(masters)))


def _full(params: PyTree, masters: PyTree) -> PyTree:
    """float32 weights."""
    return jax.tree.map(formats.decode, _stored(params, masters), is_leaf=formats.is_stored)


def _param(leaf: Any) -> jax.Array:
    if isinstance(leaf, formats.Split):
        return leaf.high
    return leaf.copy if isinstance(leaf, formats.Copied) else leaf


def _kept(leaf: Any) -> jax.Array | None:
    if isinstance(leaf, formats.Split):
        return leaf.low
    return leaf.value if isinstance(leaf, formats.Copied) else None


def _landing(p: jax.Array, master: jax.Array | None, weight: jax.Array, delta: jax.Array) -> Any:
    """The update by which `optax.apply_updates` takes a param to its weight, and the new master."""
    if master is None:
        return delta, None
    wanted = formats.encode(weight, _stored(p, master))
    update = _param(wanted).astype(jnp.float32) - p.astype(jnp.float32)
    if not isinstance(wanted, formats.Split):
        return update, wanted.value
    # The sum may round to another param than wanted; then the nearest weight that begins with it is kept.
    landed = (p + update).astype(p.dtype)
    nearest = jnp.where(jnp.abs(weight) > jnp.abs(landed.astype(jnp.float32)), 65535, 0).astype(jnp.uint16)
    return update, jnp.where(landed == wanted.high, wanted.low, nearest)
