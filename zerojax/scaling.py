"""Finding that a transformation multiplies all gradients by one number, as clipping by global norm does.

Then the number can go into the optimizer's kernel, and the multiplied gradients, 8 bytes a param written and read, need
never exist. What a transformation does is read from its trace, not from its name: beside the values of its operations
go, where there is one, the gradient that a value is a multiple of, and the factor.
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
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

PyTree = Any
_CALLS = frozenset(("jit", "pjit", "closed_call"))


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value; the scalar that all its elements are, if so; the leaf that it is a multiple of, if so, and by what.

    `square`: the leaf that it is the square of, if so.
    """

    array: Any
    scalar: Any = None
    leaf: int | None = None
    factor: Any = None
    square: int | None = None


def update_as_scale(
    tx: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    squares: Callable[[], jax.Array] | None = None,
    **extra_args: Any,
) -> tuple[PyTree, jax.Array | None, PyTree]:
    """`tx.update`, its result given as `updates` and a factor where it is that.

    Args:
      tx: A transformation.
      updates: What it gets, as all that follow.
      state: Its state.
      params: Params.
      squares: Gives float32[leaves], the sum of squares of each leaf of `updates`: it is called where `tx` takes one,
        instead of what `tx` does.
      **extra_args: For `tx`.

    Returns:
      `(updates, scale, state)`. Where `tx` multiplies all updates by one number, `updates` are those that came and
      `scale` is the number; else they are those of `tx`, and `scale` is None.

    Example:
      >>> g = {"a": jnp.ones(2), "b": jnp.full(2, 3.0)}
      >>> clip = optax.with_extra_args_support(optax.clip_by_global_norm(1.0))
      >>> same, scale, _ = update_as_scale(clip, g, clip.init(g), None)
      >>> same is g, round(float(scale), 5)
      (True, 0.22361)
    """
    leaves, treedef = jax.tree.flatten(updates)
    run = lambda updates: tx.update(updates, state, params, **extra_args)
    closed, shapes = jax.make_jaxpr(run, return_shape=True)(updates)
    one = jnp.float32(1)
    reader = _Reader([x.dtype for x in leaves], one, squares)
    values = reader.read(closed.jaxpr, closed.consts, [_Value(x, None, i, one) for i, x in enumerate(leaves)])
    new, new_state = jax.tree.unflatten(jax.tree.structure(shapes), [v.array for v in values])
    same_tree: bool = jax.tree.structure(new) == treedef  # type: ignore[operator]
    scaled = values[: len(leaves)]
    if same_tree and leaves and all(v.leaf == i and v.factor is scaled[0].factor for i, v in enumerate(scaled)):
        return updates, scaled[0].factor, new_state
    return new, None, new_state


class _Reader:
    """Runs a jaxpr, operation by operation; equal operations on the same scalars are done once, so that `is` tells."""

    def __init__(self, dtypes: list[Any], one: jax.Array, squares: Callable[[], jax.Array] | None) -> None:
        self._dtypes, self._one = dtypes, one
        self._squares = None if squares is None else functools.cache(squares)
        self._done: dict[Any, Any] = {}

    def read(self, jaxpr: Jaxpr, consts: list[Any], args: list[_Value]) -> list[_Value]:
        env = dict(zip(jaxpr.constvars, map(_plain, consts), strict=True))
        env |= dict(zip(jaxpr.invars, args, strict=True))
        get = lambda v: _plain(v.val) if isinstance(v, Literal) else env[v]
        for eqn in jaxpr.eqns:
            env |= dict(zip(eqn.outvars, self._run(eqn, [get(v) for v in eqn.invars]), strict=True))
        return [get(v) for v in jaxpr.outvars]

    def _run(self, eqn: Any, inputs: list[_Value]) -> list[_Value]:
        name, inner = eqn.primitive.name, eqn.params.get("jaxpr")
        if name in _CALLS and isinstance(inner, ClosedJaxpr):
            return self.read(inner.jaxpr, inner.consts, inputs)
        if not eqn.effects and all(v.scalar is v.array for v in inputs) and not any(v.aval.shape for v in eqn.outvars):
            arrays = self._once((name, str(eqn.params)), [v.scalar for v in inputs], lambda: _bind(eqn, inputs))
            return [_Value(x, x) for x in arrays]
        if name == "reduce_sum" and inputs[0].square is not None and not eqn.outvars[0].aval.shape:
            assert self._squares is not None
            return [_plain(self._squares()[inputs[0].square].astype(eqn.outvars[0].aval.dtype))]
        arrays = _bind(eqn, inputs)
        if len(arrays) > 1:
            return [_plain(x) for x in arrays]
        if self._squares is not None and _squares_first(eqn):
            return [self._note_square(inputs[0], arrays[0])]
        return [self._note(name, inputs, arrays[0])]

    def _note_square(self, x: _Value, array: Any) -> _Value:
        if x.factor is self._one:
            return _Value(array, square=x.leaf)
        return _Value(array, x.scalar * x.scalar if _is_number(x.scalar) else None)

    def _note(self, name: str, inputs: list[_Value], array: Any) -> _Value:
        """What is known of the one result of an operation on arrays."""
        if not inputs:
            return _plain(array)
        first, *rest = inputs
        if name == "add" and first.square is not None and _is_number(rest[0].scalar) and rest[0].scalar == 0:
            return _Value(array, square=first.square)  # what Optax adds for the imaginary part of a real number
        if name == "broadcast_in_dim" and first.leaf is None:
            return _Value(array, first.scalar)
        if (
            name == "convert_element_type"
            and first.leaf is not None
            and self._keeps(first.array.dtype, first.leaf, array.dtype)
        ):
            return _Value(array, None, first.leaf, first.factor)
        if name == "mul" and first.leaf is None:
            first, rest = rest[0], [first]
        if name in ("mul", "div") and first.leaf is not None and rest[0].scalar is not None:
            operation = jnp.multiply if name == "mul" else jnp.divide
            return self._multiple(array, first.leaf, name, operation, first.factor, rest[0].scalar)
        if name == "select_n" and first.scalar is not None and len(rest) == 2:
            false, true = rest
            if true.leaf is not None and true.leaf == false.leaf:
                return self._multiple(array, true.leaf, name, jnp.where, first.scalar, true.factor, false.factor)
        return _plain(array)

    def _keeps(self, before: Any, leaf: int, dtype: Any) -> bool:
        """Whether a multiple of a leaf is one in another dtype: a wider one, or the leaf's own; others round it."""
        wider = jnp.promote_types(before, dtype) == dtype
        return jnp.issubdtype(dtype, jnp.floating) and (wider or dtype == self._dtypes[leaf])

    def _multiple(self, array: Any, leaf: int, name: str, operation: Any, *operands: Any) -> _Value:
        (factor,) = self._once(name, operands, lambda: [jnp.asarray(operation(*operands), jnp.float32)])
        return _Value(array, None, leaf, factor)

    def _once(self, key: Any, operands: Any, run: Any) -> Any:
        # Operands by identity, or by value where they are numbers of the program; kept, so that no identity is reused.
        known = tuple((str(x.dtype), repr(x.item())) if _is_number(x) else id(x) for x in operands)
        if (key, known) not in self._done:
            self._done[key, known] = run(), operands
        return self._done[key, known][0]


def _is_number(x: Any) -> bool:
    """Whether x is a number of the program, not one that is computed when it runs."""
    return isinstance(x, np.generic | np.ndarray)


def _squares_first(eqn: Any) -> bool:
    """Whether an operation squares its first operand."""
    name = eqn.primitive.name
    return (
        name == "square"
        or (name == "integer_pow" and eqn.params["y"] == 2)
        or (name == "mul" and eqn.invars[0] is eqn.invars[1])
    )


def _plain(x: Any) -> _Value:
    return _Value(x, x if jnp.ndim(x) == 0 else None)


def _bind(eqn: Any, inputs: list[_Value]) -> list[Any]:
    out = eqn.primitive.bind(*[v.array for v in inputs], **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]
