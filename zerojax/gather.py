"""Params gathered where a layer uses them: what `layerwise` leaves are inside a loss function at stage 3.

A leaf that the model gathers itself enters the loss function as a `Shard`: the device's part of the array, and which
dim it is a part of. `jax.lax.scan`, `nn.scan` and indexing go through it to the array inside, so a stack of layers
scans as ever, and `gather` in the scan's body makes one layer whole. The transpose of the gather is a reduce-scatter,
so gradients come back as shards, by construction.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from zerojax.flow import gathers

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["name", "tail", "axes", "wire_dtype"]
)
@dataclasses.dataclass(frozen=True)
class Shard:
    """One device's shard of a param, inside a loss function; `gather` makes it whole.

    Attributes:
      value: The shard.
      name: Path of the param, for messages.
      tail: Shape of the shard from the dim that is cut to its last. It survives the slicing of leading dims by a scan,
        and so says where that dim is.
      axes: The mesh axes that it is cut over.
      wire_dtype: Dtype in which its gradient is reduced; None for the param's own.
    """

    value: jax.Array
    name: str
    tail: tuple[int, ...]
    axes: tuple[str, ...]
    wire_dtype: Any = None

    def __jax_array__(self) -> jax.Array:
        raise TypeError(
            f"param {self.name!r} is named by layerwise, so the model has to gather it where it is used: "
            "zerojax.gather(params), or zerojax.nn.gathered(Layer) for a Flax layer; or leave it out of layerwise."
        )


def gather(tree: PyTree, *, dtype: Any = None) -> PyTree:
    """Makes params whole, for use here only; inside a loss function that `make_train_step` calls.

    Call it in the body of a scan over layers, under `jax.checkpoint`, with `policy=keep_expensive` for instance; or the
    gathered weights of all layers are saved for the backward pass.

    Args:
      tree: Params, or the part of them that one layer uses. A leaf that is whole already is returned as it is, so the
        same model runs at every stage, without a mesh, and in evaluation.
      dtype: Shards of two and more dims are cast to it before they travel: `bfloat16` halves the bytes where the layer
        casts its weights to that dtype anyway. Those of one dim, norms among them, keep theirs.

    Returns:
      The tree with every leaf whole.

    Communication:
      An all-gather of each leaf here, a reduce-scatter of its gradient in the backward pass, in the param's dtype (or
      the step's `grad_dtype`). Under `jax.checkpoint` the all-gather runs again in the backward pass.

    Example:
      >>> gather({"kernel": jnp.ones((2, 2))})["kernel"].shape
      (2, 2)
    """

    def one(x: Any) -> Any:
        if not isinstance(x, Shard):
            return x
        dim = x.value.ndim - len(x.tail)
        if dim < 0:
            raise ValueError(
                f"param {x.name!r} is sharded over its leading dim, which a scan slices: its layers are on different "
                "devices. Make that dim smaller than another, or raise make_plan's min_size above the number of its "
                "elements, or leave it out of layerwise."
            )
        if x.value.shape[dim:] != x.tail:
            raise ValueError(
                f"param {x.name!r} was reshaped, to {x.value.shape} on each device, before it was gathered: gather it "
                f"first. Only dims before the last {len(x.tail)} may be sliced."
            )
        travels = dtype if dtype is not None and x.value.ndim >= 2 else x.value.dtype
        return _all_gather(x.value, dim, x.axes, travels, x.wire_dtype)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Shard))


# Elementwise arithmetic, sums, and moves of data: cheaper to do again than to write and read. Comparisons are not among
# them: the mask of a dropout is a byte an element, the random bits behind it are four.
_CHEAP = frozenset(
    "abs add add_any broadcast_in_dim clamp convert_element_type copy div erf exp exp2 expand_dims expm1 "
    "integer_pow log log1p logistic max min mul neg one_minus_square pow reduce_max reduce_sum reshape rsqrt "
    "select_n sign slice split sqrt square squeeze stop_gradient sub tanh transpose".split()
)


def keep_expensive(prim: Any, *_: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint`: the backward pass gathers params again, and redoes what is cheaper than to keep.

    Kept are the results of matrix products, convolutions, attention kernels and whatever else is not known to be cheap.
    It is the default of `zerojax.nn.gathered`; a layer of plain JAX says it itself.

    Example:
      >>> layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ gather(w)), policy=keep_expensive)
      >>> jax.grad(lambda x: layer(x, jnp.eye(2)).sum())(jnp.zeros(2)).tolist()
      [1.0, 1.0]
    """
    return not gathers(prim.name, params) and prim.name not in _CHEAP


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _all_gather(x: jax.Array, dim: int, axes: tuple[str, ...], dtype: Any, wire_dtype: Any) -> jax.Array:
    return jax.lax.all_gather(x.astype(dtype), axes, axis=dim, tiled=True)


def _all_gather_fwd(x: jax.Array, *static: Any) -> tuple[jax.Array, jax.Array]:
    return _all_gather(x, *static), jnp.zeros((), x.dtype)


def _all_gather_bwd(
    dim: int, axes: tuple[str, ...], dtype: Any, wire_dtype: Any, like: jax.Array, ct: jax.Array
) -> tuple[jax.Array]:
    # Not the transpose of the cast: devices are summed in the param's precision even where bfloat16 travelled forth.
    ct = ct.astype(wire_dtype or like.dtype)
    return (jax.lax.psum_scatter(ct, axes, scatter_dimension=dim, tiled=True).astype(like.dtype),)


_all_gather.defvjp(_all_gather_fwd, _all_gather_bwd)
