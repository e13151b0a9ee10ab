"""Softmax over the last dim and its gradient, in one pass each: y = exp(z - max z) / sum exp(z - max z), z = scale * x.

x: [..., columns] in float32, bfloat16 or float16; computed in float32. Bytes: the forward reads x and writes y, the
backward reads y and dy and writes dx; causal, neither reads the masked half. Masks come on top: a byte an element of
`where`, in both, and `bias` as it is, forward. Nothing is reused, so the bound is bandwidth.
"""

from __future__ import annotations

import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, softmax_rows
from pallas_kernels.dispatch import Choice
from pallas_kernels.softmax_rows import LONGEST, Call

SERVED = ("float32", "bfloat16", "float16")


def bytes_moved(x: Any, *, causal: bool = False, backward: bool = False) -> int:
    """Bytes that the forward or backward pass has to move; of a causal one the masked half is written, not read.

    Example:
      >>> bytes_moved(jnp.ones((4, 8)))
      256
    """
    read = x.size
    if causal and x.size:
        queries, keys = x.shape[-2:]
        read = x.size // (queries * keys) * sum(min(max(i + 1 + keys - queries, 0), keys) for i in range(queries))
    return (read * (2 if backward else 1) + x.size) * x.dtype.itemsize


def softmax(
    x: jax.Array,
    *,
    scale: float = 1.0,
    where: jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax of `scale * x + bias` over the last dim, where `where` and `causal` keep it.

    A row of which nothing is kept is zeros, and has a zero gradient. A row of -inf is NaN, as in `jax.nn.softmax`; a
    NaN stays in its row. Differentiable once in `x` and `bias`.

    Args:
      x: [..., columns], any real floating dtype; the kernel serves float32, bfloat16 and float16.
      scale: A Python number; each value of it compiles anew.
      where: Booleans, broadcastable to x: which elements are kept; the others are zeros.
      bias: Added to `scale * x`, broadcastable to x; an additive mask, for instance.
      causal: Keeps of query i, the next to last dim's, the keys j <= i + keys - queries, the last dim's.
      implementation: "mosaic", "xla", "interpret", or None, the fastest that runs here.

    Returns:
      x.shape, x.dtype; computed in float32, or in float64 where x is.

    Raises:
      TypeError: `x` is not real floating, `where` not boolean, or `scale` not a Python number.
      ValueError: `causal` with fewer than two dims; `where` or `bias` do not broadcast to x; `implementation` asks for
        a kernel that cannot run.

    Example:
      >>> softmax(jnp.zeros((2, 2)), causal=True)
      Array([[1. , 0. ],
             [0.5, 0.5]], dtype=float32)

    References:
      Milakov and Gimelshein, Online normalizer calculation for softmax, https://arxiv.org/abs/1805.02867
    """
    choice = softmax_choice(x, scale=scale, where=where, bias=bias, causal=causal, implementation=implementation)
    return _softmax(Call(float(scale), causal, choice.implementation), x, where, bias)


def softmax_choice(
    x: Any,
    *,
    scale: float = 1.0,
    where: Any = None,
    bias: Any = None,
    causal: bool = False,
    implementation: str | None = None,
) -> Choice:
    """Which implementation `softmax` runs for these arguments, and why.

    Args and Raises: as `softmax`; arrays may be `ShapeDtypeStruct`s.

    Example:
      >>> softmax_choice(jnp.ones((2, 2)), implementation="xla")
      Choice(implementation='xla', why='it was asked for')
    """
    _check(x, scale, where, bias, causal)
    unserved = slower = None
    if x.dtype.name not in SERVED:
        unserved = f"the kernel serves {', '.join(SERVED)}, this is {x.dtype.name}"
    elif bias is not None and bias.dtype.name not in SERVED:
        unserved = f"the kernel serves biases of {', '.join(SERVED)}, this is {bias.dtype.name}"
    elif scale == 0:
        unserved = "the kernel divides by no scale of 0"
    elif x.shape[-1] > LONGEST:
        unserved = f"the kernel serves rows of {LONGEST} elements at most, these have {x.shape[-1]}"
    elif x.shape[-1] < 128:
        slower = "rows of fewer than 128 elements leave most of a warp idle"
    arrays = [a for a in (x, where, bias) if a is not None]
    return dispatch.choose("softmax", implementation, arrays, empty=x.size == 0, unserved=unserved, slower=slower)


def _check(x: Any, scale: float, where: Any, bias: Any, causal: bool) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"softmax: x must have a real floating dtype, got {x.dtype.name}; cast it first.")
    if not isinstance(scale, numbers.Real | np.floating | np.integer):
        raise TypeError(
            f"softmax: scale must be a Python number, got {type(scale).__name__}; multiply x by it instead."
        )
    if x.ndim < 1 or (causal and x.ndim < 2):
        wanted = "queries and keys, so at least two dims, with causal=True" if causal else "at least one dim"
        raise ValueError(f"softmax: x must have {wanted}; got shape {x.shape}.")
    if where is not None and where.dtype != bool:
        raise TypeError(f"softmax: where must be boolean, got {where.dtype.name}; an additive mask goes in bias.")
    for name, mask in (("where", where), ("bias", bias)):
        if mask is None:
            continue
        fits = mask.ndim <= x.ndim and all(m in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False))
        if not fits:
            raise ValueError(f"softmax: {name} must broadcast to x's shape {x.shape}, got {mask.shape}.")


def softmax_reference(
    x: jax.Array,
    *,
    scale: float = 1.0,
    where: jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:
    """`softmax` in jnp, which autodiff can differentiate as often as one likes.

    Example:
      >>> softmax_reference(jnp.zeros(2))
      Array([0.5, 0.5], dtype=float32)
    """
    z = _wide(x) * scale if scale != 1.0 else _wide(x)
    if bias is not None:
        z = z + bias.astype(z.dtype)
    keep = _kept(x, where, causal)
    if keep is None:
        shifted = jnp.exp(z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True, initial=-jnp.inf)))
        return (shifted / jnp.sum(shifted, axis=-1, keepdims=True)).astype(x.dtype)
    largest = jnp.max(z, axis=-1, keepdims=True, initial=-jnp.inf, where=keep)
    empty = ~jnp.any(keep, axis=-1, keepdims=True)
    largest = jax.lax.stop_gradient(jnp.where(empty, 0, largest))
    # What is masked becomes finite before it is subtracted, and zero after: no NaN of it in values or gradients.
    shifted = jnp.where(keep, jnp.exp(jnp.where(keep, z, 0) - jnp.where(keep, largest, 0)), 0)
    total = jnp.where(empty, 1, jnp.sum(shifted, axis=-1, keepdims=True))
    return jnp.where(keep, shifted / total, 0).astype(x.dtype)


def _wide(x: jax.Array) -> jax.Array:
    """In the dtype that is computed in: float32, and float64 of float64."""
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _kept(x: jax.Array, where: jax.Array | None, causal: bool) -> jax.Array | None:
    if not causal:
        return where
    queries, keys = x.shape[-2:]
    lower = jnp.arange(keys) <= jnp.arange(queries)[:, None] + (keys - queries)
    return lower if where is None else lower & where


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(call: Call, x: jax.Array, where: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    return _run(call, x, where, bias)


def _run(call: Call, x: jax.Array, where: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    if call.implementation == "xla":
        return softmax_reference(x, scale=call.scale, where=where, bias=bias, causal=call.causal)
    return softmax_rows.forward(call, x, where, bias)


def _softmax_fwd(call: Call, x: jax.Array, where: jax.Array | None, bias: jax.Array | None) -> tuple[jax.Array, Any]:
    y = _run(call, x, where, bias)
    return y, (y, where, bias)


def _softmax_bwd(call: Call, saved: Any, dy: jax.Array) -> tuple[jax.Array, None, jax.Array | None]:
    y, where, bias = saved
    kernel = call.implementation != "xla"
    if kernel and bias is None:
        return softmax_rows.backward(call, y, dy, where), None, None
    p, g = _wide(y), _wide(dy)
    if (keep := _kept(y, where, call.causal)) is not None:
        g = jnp.where(keep, g, 0)
    dz = (g - jnp.sum(g * p, axis=-1, keepdims=True)) * p
    # Of the kernel's dx and XLA's dbias each reads y and dy for itself; one that is not asked for is not computed.
    dx = softmax_rows.backward(call, y, dy, where) if kernel else (dz * call.scale).astype(y.dtype)
    return dx, None, None if bias is None else _summed_to(dz, bias)


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


def _summed_to(dz: jax.Array, bias: jax.Array) -> jax.Array:
    """The gradient of an array that was broadcast."""
    lead = dz.ndim - bias.ndim
    repeated = [d for d in range(bias.ndim) if bias.shape[d] == 1 and dz.shape[lead + d] != 1]
    summed = jnp.sum(dz, axis=(*range(lead), *(lead + d for d in repeated)))
    return jnp.expand_dims(summed, repeated).astype(bias.dtype)
