"""Flax Linen: layers whose params are gathered where they are used, and a LayerNorm that runs as one kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes

from pallas_kernels.layer_norm import layer_norm
from zerojax import meshes
from zerojax.gather import gather, keep_expensive


def gathered(
    module_class: type[nn.Module],
    *,
    dtype: Any = None,
    policy: Callable[..., bool] | None = None,
    prevent_cse: bool = True,
    methods: Sequence[str] = ("__call__",),
) -> Callable[..., nn.Module]:
    """A Linen layer that gathers its params before it runs, and again in its backward pass, rather than keep them.

    Its variables are those of `module_class`. Under `nn.scan` one layer is whole at a time; this is ZeRO stage 3's
    memory.

    Args:
      module_class: The layer; name its leaves in `make_train_step(..., layerwise=)`. At stages 0 to 2, and in
        evaluation, where its params are whole already, it computes what `module_class` does.
      dtype: Leaves of two and more dims are cast to it before they travel; the dtype that the layer computes in.
      policy: What the backward pass may keep, one of `jax.checkpoint_policies`; by default `zerojax.keep_expensive`:
        the gather and cheap arithmetic are done twice. `jax.checkpoint_policies.nothing_saveable` is `nn.remat`.
      prevent_cse: As in `nn.remat`: True where layers are unrolled, False under `nn.scan`, which needs no protection.
      methods: Methods of `module_class` that the model calls from outside; each gathers for itself.

    Returns:
      A module constructor with `module_class`'s fields.

    Communication:
      Bytes a layer and step, for P bytes of its params: twice P (n - 1) / n gathered, once scattered; half of the
        former with a 16-bit `dtype`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = gathered(nn.Dense)(4)
      >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((1, 2))))
      {'params': {'bias': (4,), 'kernel': (2, 4)}}
    """
    # mutable=True lets the layer create its params below the map, in their own dtype.
    whole = functools.partial(gather, dtype=dtype)
    mapped = nn.map_variables(module_class, "params", trans_in_fn=whole, mutable=True, methods=methods)
    return nn.remat(mapped, policy=policy or keep_expensive, prevent_cse=prevent_cse, methods=methods)


class LayerNorm(nn.LayerNorm):
    """`flax.linen.LayerNorm`, by `pallas_kernels.layer_norm`: same fields, params, defaults, dtypes and result.

    Over the last axis it is one pass over the data forward, and one backward, params' gradients included. With a mask,
    other axes, statistics over devices or reductions that are not in float32, it is its parent. The kernel runs with
    one device and inside a `jax.shard_map` over all axes; elsewhere XLA's form, which gathers no shards.

    Differentiable once in reverse mode, not by `jax.jvp`; the parent is.

    Precision:
      The variance is always that of the differences from the mean. `use_fast_variance` changes nothing here: Flax's
      fast form subtracts two large numbers where the mean is large, and is no faster for a row that is on the chip.

    Example:
      >>> layer = LayerNorm()
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'bias': (4,), 'scale': (4,)}}
      >>> layer.apply(variables, jnp.array([1.0, 1.0, 3.0, 3.0])).round(3).tolist()
      [-1.0, -1.0, 1.0, 1.0]
    """

    @nn.compact
    def __call__(self, x: Any, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalises x's last axis; `mask` as in the parent."""
        x = jnp.asarray(x)
        if mask is not None or not self._served(x):
            return super().__call__(x, mask=mask)
        shape = x.shape[-1:]
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        dtype = dtypes.canonicalize_dtype(x, *(w for w in (scale, bias) if w is not None), dtype=self.dtype)
        # As Flax: what comes in is not rounded to the result's dtype first.
        x = x.astype(jnp.promote_types(x.dtype, dtype))
        y = layer_norm(x, scale, bias, epsilon=self.epsilon, implementation=meshes.kernel_implementation())
        return y.astype(dtype)

    def _served(self, x: jax.Array) -> bool:
        last = (-1, (-1,), [-1], x.ndim - 1, (x.ndim - 1,))
        kinds = (x.dtype, self.param_dtype, self.dtype or x.dtype)
        return (
            x.size > 0
            and x.ndim > 0
            and self.reduction_axes in last
            and self.feature_axes in last
            and self.axis_name is None
            and self.force_float32_reductions
            and all(jnp.dtype(kind) in (jnp.float32, jnp.bfloat16, jnp.float16) for kind in kinds)
        )
