"""Flax Linen: layers whose params are gathered where they are used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from flax import linen as nn

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
