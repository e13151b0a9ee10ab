"""Functions of `jax.nn` that have a kernel here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.softmax import softmax as kernel_softmax
from zerojax import meshes

# What is computed in float32 and rounded once, float64 apart; other dtypes are left to jax.nn.
_FLOATS = ("bfloat16", "float16", "float32", "float64")


def softmax(
    x: Any,
    axis: int | Sequence[int] | None = -1,
    where: Any = None,
    *,
    scale: float = 1.0,
    causal: bool = False,
) -> jax.Array:
    """`jax.nn.softmax` of `scale * x`, by one kernel where that is ahead, and with causal masks.

    Differentiable once in reverse mode, not by `jax.jvp`; `jax.nn.softmax` is.

    Args:
      x: Array of any shape, sharded in any way over dims that are not reduced.
      axis: The dim, dims, or, by None, all dims to normalize over. The kernel serves the last dim.
      where: Booleans, broadcastable to x: which elements are kept; the others are zeros. A row of which nothing is kept
        is zeros and has a zero gradient.
      scale: A Python number; each value of it compiles anew.
      causal: Keeps of query i, the next to last dim's, the keys j <= i + keys - queries, the last dim's. A masked half
        is not read by the kernel.

    Returns:
      As `jax.nn.softmax`. float16 and bfloat16 are computed in float32 and rounded once.

    Raises:
      TypeError: `scale` is not a Python number.
      ValueError: `causal` with an `axis` other than the last, or fewer than two dims; `where` does not broadcast.

    Communication:
      None where the dims that are normalized over are not sharded. On a global array that is sharded XLA's form runs;
      inside `jax.shard_map` over all mesh axes the kernel does.

    Example:
      >>> softmax(jnp.zeros((2, 2)), causal=True)
      Array([[1. , 0. ],
             [0.5, 0.5]], dtype=float32)
    """
    x = jnp.asarray(x)
    dim = axis % x.ndim if isinstance(axis, int) and -x.ndim <= axis < x.ndim else None
    if causal and (dim is None or dim != x.ndim - 1):
        raise ValueError(
            f"softmax: causal masks are over the last two dims, so axis must be the last; got axis={axis}."
        )
    if where is not None:
        where = jnp.asarray(where).astype(bool)
    if dim is None or x.dtype.name not in _FLOATS:
        if causal:
            raise TypeError(
                f"softmax: causal=True needs a dtype among {', '.join(_FLOATS)}, got {x.dtype.name}; cast x."
            )
        return jax.nn.softmax(x if scale == 1.0 else x * scale, axis=axis, where=where)
    if dim == x.ndim - 1:
        return kernel_softmax(x, scale=scale, where=where, causal=causal, implementation=meshes.kernel_implementation())
    if where is not None:
        where = jnp.moveaxis(jnp.expand_dims(where, range(x.ndim - where.ndim)), dim, -1)
    # XLA moves no data for the other dims; a kernel would need it moved.
    y = kernel_softmax(jnp.moveaxis(x, dim, -1), scale=scale, where=where, implementation="xla")
    return jnp.moveaxis(y, -1, dim)
