"""Flax NNX: a LayerNorm that runs as one kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from pallas_kernels.layer_norm import layer_norm
from zerojax import meshes


class LayerNorm(nnx.LayerNorm):
    """`flax.nnx.LayerNorm`, by `pallas_kernels.layer_norm`: same arguments, params, defaults, dtypes and result.

    All that `zerojax.nn.LayerNorm` says holds here.

    Example:
      >>> layer = LayerNorm(4, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([1.0, 1.0, 3.0, 3.0])).round(3).tolist()
      [-1.0, -1.0, 1.0, 1.0]
    """

    def __call__(self, x: Any, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalises x's last axis; `mask` as in the parent."""
        x = jnp.asarray(x)
        if mask is not None or not self._served(x):
            return super().__call__(x, mask=mask)
        scale, bias = (None if w is None else w[...] for w in (self.scale, self.bias))
        x, scale, bias = self.promote_dtype((x, scale, bias), dtype=self.dtype)
        dtype = dtypes.canonicalize_dtype(x, *(w for w in (scale, bias) if w is not None), dtype=self.dtype)
        y = layer_norm(x, scale, bias, epsilon=self.epsilon, implementation=meshes.kernel_implementation())
        return y.astype(dtype)

    def _served(self, x: jax.Array) -> bool:
        last = (-1, (-1,), [-1], x.ndim - 1, (x.ndim - 1,))
        kinds = (x.dtype, self.param_dtype, self.dtype or x.dtype)
        return (
            x.size > 0
            and x.shape[-1:] == (self.num_features,)
            and self.reduction_axes in last
            and self.feature_axes in last
            and self.axis_name is None
            and all(jnp.dtype(kind) in (jnp.float32, jnp.bfloat16, jnp.float16) for kind in kinds)
        )
