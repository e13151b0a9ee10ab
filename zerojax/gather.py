"""Params gathered where a layer uses them: what `layerwise` leaves are inside a loss function at stage 3.

A leaf that the model gathers itself enters the loss function as a `Shard`: the device's part of the array, and which
dim it is a part of. `jax.lax.scan`, `nn.scan` and indexing go through it to the array inside, so a stack of layers
scans as ever, and `gather` in the scan's body makes one layer whole. The transpose of the gather is a reduce-scatter,
so gradients come back as shards, by construction.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zerojax.flow import gathers, launches

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "source"],
    meta_fields=["name", "tail", "axes", "wire_dtype", "combine"],
)
@dataclasses.dataclass(frozen=True)
class Shard:
    """One device's shard of a param, inside a loss function; `gather` makes it whole.

    Attributes:
      value: The shard; where `source` is given only what a gradient is taken by.
      name: Path of the param, for messages.
      tail: Shape of the shard from the dim that is cut to its last. It survives the slicing of leading dims by a scan,
        and so says where that dim is.
      axes: The mesh axes that it is cut over.
      wire_dtype: Dtype in which its gradient is reduced; None for the param's own.
      combine: Whether shards that `gather` gets together travel in one collective. XLA does so by itself on a GPU.
      source: The shard in host memory, where params are there. It has no gradient: that would be in host memory, too.
    """

    value: jax.Array
    name: str
    tail: tuple[int, ...]
    axes: tuple[str, ...]
    wire_dtype: Any = None
    combine: bool = False
    source: jax.Array | None = None

    @property
    def dim(self) -> int:
        """Which dim is cut, now that a scan may have sliced leading ones."""
        dim = self.value.ndim - len(self.tail)
        if dim < 0:
            raise ValueError(
                f"param {self.name!r} is sharded over its leading dim, which a scan slices: its layers are on "
                "different devices. Make that dim smaller than another, or raise make_plan's min_size above the "
                "number of its elements, or leave it out of layerwise."
            )
        if self.value.shape[dim:] != self.tail:
            raise ValueError(
                f"param {self.name!r} was reshaped, to {self.value.shape} on each device, before it was gathered: "
                f"gather it first. Only dims before the last {len(self.tail)} may be sliced."
            )
        return dim

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

    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Shard))
    together: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        if isinstance(x, Shard):
            travels = dtype if dtype is not None and x.value.ndim >= 2 else x.value.dtype
            how = x.axes, jnp.dtype(travels), x.wire_dtype
            together.setdefault((how, None if x.combine else i), []).append(i)
    for (how, _), members in together.items():
        shards = [leaves[i] for i in members]
        whole = _gather([x.value for x in shards], [x.source for x in shards], tuple(x.dim for x in shards), *how)
        for i, x in zip(members, whole, strict=True):
            leaves[i] = x
    return jax.tree.unflatten(treedef, leaves)


# Elementwise arithmetic, sums, and moves of data: cheaper to do again than to write and read. Comparisons are not among
# them: the mask of a dropout is a byte an element, the random bits behind it are four.
_CHEAP = frozenset(
    "abs add add_any broadcast_in_dim clamp convert_element_type copy div erf exp exp2 expand_dims expm1 "
    "integer_pow log log1p logistic max min mul neg one_minus_square pow reduce_max reduce_sum reshape rsqrt "
    "select_n sign slice split sqrt square squeeze stop_gradient sub tanh transpose".split()
)


def keep_expensive(prim: Any, *_: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint`: the backward pass gathers params again, and redoes what is cheaper than to keep.

    Kept are the results of matrix products, convolutions, attention kernels and whatever else is not known to be cheap;
    LayerNorm and softmax are, by kernels too. It is the default of `zerojax.nn.gathered`; a layer of plain JAX says it
    itself.

    Example:
      >>> layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ gather(w)), policy=keep_expensive)
      >>> jax.grad(lambda x: layer(x, jnp.eye(2)).sum())(jnp.zeros(2)).tolist()
      [1.0, 1.0]
    """
    return prim.name not in _CHEAP and not gathers(prim.name, params) and not launches(prim.name, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _gather(
    shards: list[jax.Array],
    sources: list[jax.Array | None],
    dims: tuple[int, ...],
    axes: tuple[str, ...],
    dtype: Any,
    wire_dtype: Any,
) -> list[jax.Array]:
    pairs = zip(shards, sources, strict=True)
    here = [x if source is None else jax.device_put(source, jax.memory.Space.Device) for x, source in pairs]
    return _all_gather([x.astype(dtype) for x in here], dims, axes)


def _gather_fwd(
    shards: list[jax.Array], sources: list[jax.Array | None], *static: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
    return _gather(shards, sources, *static), [jnp.zeros((), x.dtype) for x in shards]


def _gather_bwd(
    dims: tuple[int, ...],
    axes: tuple[str, ...],
    dtype: Any,
    wire_dtype: Any,
    likes: list[jax.Array],
    cts: list[jax.Array],
) -> tuple[list[jax.Array], None]:
    # Not the transpose of the cast: devices are summed in the param's precision even where bfloat16 travelled forth.
    wires = [ct.astype(wire_dtype or like.dtype) for ct, like in zip(cts, likes, strict=True)]
    return [x.astype(like.dtype) for x, like in zip(_psum_scatter(wires, dims, axes), likes, strict=True)], None


_gather.defvjp(_gather_fwd, _gather_bwd)


def _all_gather(shards: Sequence[jax.Array], dims: Sequence[int], axes: tuple[str, ...]) -> list[jax.Array]:
    """Whole arrays from shards of one dtype, in one collective."""
    if len(shards) == 1:
        return [jax.lax.all_gather(shards[0], axes, axis=dims[0], tiled=True)]
    parts = jax.lax.all_gather(jnp.concatenate([x.ravel() for x in shards]), axes)  # [devices, elements of all]
    cuts = np.cumsum([x.size for x in shards])[:-1]
    return [
        _joined(part.reshape(-1, *x.shape), dim)
        for part, x, dim in zip(jnp.split(parts, cuts, axis=1), shards, dims, strict=True)
    ]


def _psum_scatter(xs: Sequence[jax.Array], dims: Sequence[int], axes: tuple[str, ...]) -> list[jax.Array]:
    """Sums over devices, each device its shard, of arrays of one dtype, in one collective."""
    if len(xs) == 1:
        return [jax.lax.psum_scatter(xs[0], axes, scatter_dimension=dims[0], tiled=True)]
    devices = jax.lax.axis_size(axes)
    parts = [_parted(x, dim, devices) for x, dim in zip(xs, dims, strict=True)]
    flat = jnp.concatenate([x.reshape(devices, -1) for x in parts], axis=1)
    sums = jnp.split(jax.lax.psum_scatter(flat, axes), np.cumsum([x[0].size for x in parts])[:-1])
    return [x.reshape(part.shape[1:]) for x, part in zip(sums, parts, strict=True)]


def _joined(parts: jax.Array, dim: int) -> jax.Array:
    """[devices, *shard] -> whole, joined along `dim`."""
    moved = jnp.moveaxis(parts, 0, dim)
    return moved.reshape(*moved.shape[:dim], -1, *moved.shape[dim + 2 :])


def _parted(x: jax.Array, dim: int, devices: int) -> jax.Array:
    """Whole -> [devices, *shard], cut along `dim`."""
    return jnp.moveaxis(x.reshape(*x.shape[:dim], devices, -1, *x.shape[dim + 1 :]), dim, 0)
