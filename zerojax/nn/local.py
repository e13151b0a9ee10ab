"""Whether a layer's arrays are whole on each device, so that a kernel may run on them."""

from __future__ import annotations

import jax
from jax.sharding import AxisType


def implementation() -> str | None:
    """What a layer passes to `pallas_kernels` as `implementation`: None where a kernel may run, else "xla".

    A kernel knows the arrays of one device. Called on an array that is sharded over a mesh it would make XLA gather
    that array, in silence. It may run where that cannot be: with one device, and inside a `jax.shard_map` over all of
    the mesh's axes. XLA's form runs on shards anywhere.

    Example:
      >>> implementation() in (None, "xla")
      True
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = not mesh.empty and all(kind == AxisType.Manual for kind in mesh.axis_types)
    return None if manual or jax.device_count() == 1 else "xla"
