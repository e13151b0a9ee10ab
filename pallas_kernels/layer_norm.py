"""Layer normalisation over the last dim: y = (x - mean) / sqrt(var + epsilon) * scale + bias  (arXiv:1607.06450).

x: float[..., n]; scale, bias: float[n], each in a dtype of its own, either may be absent. Statistics are float32, the
variance is that of the differences from the mean, in two passes over a row that is on the chip by then.

Bytes: the forward reads x and writes y, with `residual` it reads two and writes two; the backward reads x and dy and
writes dx. Everything else is n or rows long. Nothing is read from memory twice, so the bound is bandwidth.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.layer_norm_rows import Statistics, backward_kernel, forward_kernel, slower, unserved
from pallas_kernels.rows import varying_like

Array = jax.Array


def bytes_moved(x: Any, *, residual: bool = False) -> dict[str, int]:
    """The least that the forward and the backward pass read and write, in bytes, weights and statistics left out."""
    size = x.size * jnp.dtype(x.dtype).itemsize
    return {"forward": (4 if residual else 2) * size, "backward": (4 if residual else 3) * size}


def layer_norm(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    epsilon: float = 1e-6,
    residual: Array | None = None,
    implementation: str | None = None,
) -> Any:
    """Normalises the last dim, then scales and shifts it; with `residual`, adds that first.

    Args:
      x: float[..., n], any number of leading dims.
      scale: float[n] in any float dtype, or None for ones.
      bias: float[n] in any float dtype, or None for zeros.
      epsilon: Added to the variance; a Python number.
      residual: x's shape and dtype. The sum `x + residual` is rounded to x's dtype and normalised as rounded, so that
        the result is that of a layer that is given the sum.
      implementation: None for the fastest that runs here, or one of `dispatch.IMPLEMENTATIONS`.

    Returns:
      x's shape and dtype; with `residual` a pair, the result and the rounded sum.

    Raises:
      ValueError: a shape does not fit x's, or `implementation` cannot run.
      TypeError: an array is not of a float dtype, or the residual's dtype is not x's.

    Precision:
      float32 inside, whatever is stored. Each gradient comes in its argument's dtype; dscale and dbias are summed over
      rows in float32, in a fixed order: two runs give the same bits. Differentiable once by `jax.grad`, in reverse;
      `layer_norm_reference` is plain JAX, for other derivatives.

    Example:
      >>> layer_norm(jnp.array([[1.0, 1.0, 3.0, 3.0]]), epsilon=0.0).tolist()
      [[-1.0, -1.0, 1.0, 1.0]]
      >>> y, total = layer_norm(jnp.ones((2, 4)), residual=jnp.ones((2, 4)))
      >>> total[0].tolist()
      [2.0, 2.0, 2.0, 2.0]

    References:
      Ba, Kiros, Hinton, Layer Normalization, arXiv:1607.06450, equation 4.
    """
    choice = layer_norm_choice(x, scale, bias, epsilon=epsilon, residual=residual, implementation=implementation)
    x = jnp.asarray(x)
    scale, bias, residual = (None if a is None else varying_like(x, jnp.asarray(a)) for a in (scale, bias, residual))
    y, total = _layer_norm(x, scale, bias, residual, float(epsilon), choice.implementation)
    return y if residual is None else (y, total)


def layer_norm_reference(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    epsilon: float = 1e-6,
    residual: Array | None = None,
) -> Any:
    """What `layer_norm` computes, in plain JAX: same arguments, same results.

    Example:
      >>> layer_norm_reference(jnp.array([1.0, 3.0]), jnp.full(2, 10.0), jnp.ones(2), epsilon=0.0).tolist()
      [-9.0, 11.0]
    """
    y, total, _ = _reference(x, scale, bias, residual, epsilon)
    return y if residual is None else (y, total)


def layer_norm_choice(
    x: Any,
    scale: Any = None,
    bias: Any = None,
    *,
    epsilon: float = 1e-6,
    residual: Any = None,
    implementation: str | None = None,
) -> dispatch.Choice:
    """Which implementation `layer_norm` runs for these arguments, and why; `jax.ShapeDtypeStruct`s will do.

    Raises:
      ValueError, TypeError: As `layer_norm`.

    Example:
      >>> layer_norm_choice(jnp.ones((2, 8)), implementation="xla").why
      'it was asked for'
    """
    _check(x, scale, bias, residual)
    arrays = [a for a in (x, scale, bias, residual) if a is not None]
    choice = dispatch.choose(
        "layer_norm",
        implementation,
        arrays,
        empty=0 in jnp.shape(x),
        unserved=unserved("forward", x),
        slower=slower(x),
    )
    if choice.implementation != "xla" and (why := unserved("backward", x)):
        return dataclasses.replace(choice, why=f"{choice.why}; the backward pass is XLA's: {why}")
    return choice


def _check(x: Any, scale: Any, bias: Any, residual: Any) -> None:
    """Raises for what no implementation takes."""
    named = {"x": x, "scale": scale, "bias": bias, "residual": residual}
    for name, a in named.items():
        if a is not None and not jnp.issubdtype(jnp.result_type(a), jnp.floating):
            raise TypeError(f"layer_norm: {name} must have a float dtype, got {jnp.result_type(a)}; cast it first.")
    if jnp.ndim(x) == 0:
        raise ValueError("layer_norm: x must have a last dim to normalise, got a scalar.")
    for name in ("scale", "bias"):
        a = named[name]
        if a is not None and jnp.shape(a) != jnp.shape(x)[-1:]:
            raise ValueError(
                f"layer_norm: {name} must have the shape of x's last dim, {jnp.shape(x)[-1:]}, got {jnp.shape(a)}."
            )
    if residual is not None and jnp.shape(residual) != jnp.shape(x):
        raise ValueError(f"layer_norm: residual must have x's shape, {jnp.shape(x)}, got {jnp.shape(residual)}.")
    if residual is not None and jnp.result_type(residual) != jnp.result_type(x):
        raise TypeError(
            f"layer_norm: residual must have x's dtype, {jnp.result_type(x)}, got {jnp.result_type(residual)}."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _layer_norm(
    x: Array, scale: Array | None, bias: Array | None, residual: Array | None, epsilon: float, implementation: str
) -> tuple[Array, Array | None]:
    return _run(x, scale, bias, residual, epsilon, implementation)[:2]


def _run(
    x: Array, scale: Array | None, bias: Array | None, residual: Array | None, epsilon: float, implementation: str
) -> tuple[Array, Array | None, Statistics]:
    if implementation == "xla":
        return _reference(x, scale, bias, residual, epsilon)
    return forward_kernel(x, scale, bias, residual, epsilon=epsilon, implementation=implementation)


def _fwd(
    x: Array, scale: Array | None, bias: Array | None, residual: Array | None, epsilon: float, implementation: str
) -> tuple[Any, Any]:
    y, total, statistics = _run(x, scale, bias, residual, epsilon, implementation)
    like_bias = None if bias is None else jnp.zeros((0,), bias.dtype)
    return (y, total), (x if total is None else total, scale, like_bias, statistics)


def _bwd(epsilon: float, implementation: str, saved: Any, cotangents: tuple[Array, Array | None]) -> tuple[Any, ...]:
    x, scale, like_bias, statistics = saved
    dtypes = [None if a is None else a.dtype for a in (scale, like_bias)]
    if implementation == "xla" or unserved("backward", x):
        columns = [a.reshape(*x.shape[:-1], 1) for a in statistics]
        dx, *wide = _reference_backward(x, *cotangents, scale, columns)
        dscale, dbias = (None if dtype is None else a.astype(dtype) for a, dtype in zip(wide, dtypes, strict=True))
    else:
        dx, dscale, dbias = backward_kernel(x, *cotangents, scale, statistics, dtypes, implementation=implementation)
    return dx, dscale, dbias, None if cotangents[1] is None else dx


_layer_norm.defvjp(_fwd, _bwd)


def _reference(
    x: Array, scale: Array | None, bias: Array | None, residual: Array | None, epsilon: float
) -> tuple[Array, Array | None, Statistics]:
    """y, the sum with the residual if there is one, and statistics [..., 1]."""
    total = None if residual is None else _rounded(x + residual)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows = (x if total is None else total).astype(wide)
    mean = jnp.mean(rows, -1, keepdims=True)
    centred = rows - mean
    rest, var = jnp.zeros_like(mean), jnp.mean(centred * centred, -1, keepdims=True)
    if x.dtype.itemsize > 2:  # of shorter numbers the mean's rounding is less than their own
        rest = jnp.mean(centred, -1, keepdims=True)
        centred, var = centred - rest, jnp.maximum(var - rest * rest, 0.0)
    rstd = lax.rsqrt(var + epsilon)
    y = centred * rstd
    if scale is not None:
        y *= scale.astype(wide)
    if bias is not None:
        y += bias.astype(wide)
    return y.astype(x.dtype), total, (mean, rest, rstd)


def _rounded(a: Array) -> Array:
    """`a`; XLA may otherwise carry an intermediate result in more precision than its dtype has."""
    return lax.reduce_precision(a, jnp.finfo(a.dtype).nexp, jnp.finfo(a.dtype).nmant)


def _reference_backward(
    x: Array, dy: Array, dtotal: Array | None, scale: Array | None, statistics: Sequence[Array]
) -> tuple[Array, Array, Array]:
    """dx in x's dtype, dscale and dbias wide. No reshape: leading dims may be sharded."""
    mean, rest, rstd = statistics
    centred = (x.astype(mean.dtype) - mean - rest) * rstd
    dwide = dy.astype(mean.dtype)
    dcentred = dwide if scale is None else dwide * scale.astype(mean.dtype)
    along = jnp.mean(dcentred * centred, -1, keepdims=True)
    dx = (dcentred - jnp.mean(dcentred, -1, keepdims=True) - centred * along) * rstd
    if dtotal is not None:
        dx += dtotal.astype(mean.dtype)
    leading = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), jnp.sum(dwide * centred, leading), jnp.sum(dwide, leading)
