"""What training needs of a Flax model, Linen or NNX: how its params begin, and its loss as a function of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

PyTree = Any
LossFn = Callable[[PyTree, PyTree], Any]


class Model(NamedTuple):
    """A model as pure functions.

    Attributes:
      start: Params to begin with, or `init(key) -> params`, traceable.
      loss_fn: `loss_fn(params, batch) -> loss`.
      param_specs: `PartitionSpec`s that the model's own annotations say, or None.
    """

    start: PyTree | Callable[[jax.Array], PyTree]
    loss_fn: LossFn
    param_specs: PyTree | None


def as_functions(model: Any, loss_fn: LossFn | None, sample_batch: PyTree) -> Model:
    """A Flax model as pure functions of its params.

    Args:
      model: A Linen module; an NNX module; or a function of `nnx.Rngs` that makes one (its class, say), which is run
        sharded, so that no device holds the whole model.
      loss_fn: `loss_fn(params, batch)`; None where the model maps a batch to its scalar loss.
      sample_batch: A batch, arrays or `ShapeDtypeStruct`s, for Linen's init.

    Raises:
      TypeError: no Flax model; or one that Linen's init cannot be called for.
      ValueError: the model has variables beside its params, which would be lost.
    """
    if isinstance(model, linen.Module):
        return _linen(model, loss_fn, sample_batch)
    if isinstance(model, nnx.Module) or callable(model):
        return _nnx(model, loss_fn)
    raise TypeError(
        f"model must be a Flax module, Linen or NNX, or a function from nnx.Rngs to one; got {type(model).__name__}. "
        "For other models: make_plan, create_train_state and make_train_step."
    )


def _linen(model: linen.Module, loss_fn: LossFn | None, sample_batch: PyTree) -> Model:
    if sample_batch is None:
        raise TypeError("a Linen model begins with a call on a batch: pass sample_batch= or training_data=.")
    shapes = jax.eval_shape(lambda x: x, sample_batch)
    if isinstance(sample_batch, Mapping):
        shapes = {name: shapes[name] for name in sample_batch}  # JAX sorts them
    inputs, variables = _inputs(model, shapes, whole=loss_fn is None)
    if other := sorted(set(variables) - {"params"}):
        raise ValueError(
            f"{type(model).__name__} has the collections {', '.join(other)} beside 'params', which initialize would "
            "not carry from step to step. Use layers without running state (LayerNorm for BatchNorm), or "
            "make_train_step(has_aux=True) with that state in a loop of your own."
        )

    def init(key: jax.Array) -> PyTree:
        args, kwargs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
        return linen.meta.unbox(model.init(key, *args, **kwargs)["params"])

    specs = linen.get_partition_spec(variables)["params"]
    annotated = any(any(spec) for spec in jax.tree.leaves(specs, is_leaf=lambda x: x is None) if spec is not None)
    loss = loss_fn or (lambda params, batch: model.apply({"params": params}, batch))
    return Model(init, loss, specs if annotated else None)


def _inputs(model: linen.Module, shapes: PyTree, *, whole: bool) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Any]:
    """What to call a Linen model with, of a batch: all of it, the entries it names, or the first; and its variables."""
    tries: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((shapes,), {})]
    if not whole and isinstance(shapes, Mapping):
        names = inspect.signature(type(model).__call__).parameters
        if named := {name: x for name, x in shapes.items() if name in names}:
            tries.insert(0, ((), named))
        tries.append(((next(iter(shapes.values())),), {}))
    elif not whole and isinstance(shapes, tuple | list):
        tries.append(((shapes[0],), {}))
    errors = []
    for args, kwargs in tries:
        try:
            return (args, kwargs), jax.eval_shape(model.init, jax.random.key(0), *args, **kwargs)
        except Exception as e:  # whatever a model may raise on what it does not take
            errors.append(e)
    came = jax.tree.map(lambda x: x.shape, shapes)
    raise TypeError(
        f"{type(model).__name__} could not be initialised from a batch of {came}; of {len(tries)} ways the first "
        f"gave: {errors[0]}. Pass as sample_batch what the model is called with."
    ) from errors[0]


def _nnx(model: Any, loss_fn: LossFn | None) -> Model:
    made = isinstance(model, nnx.Module)

    try:
        abstract = nnx.eval_shape(lambda: model if made else model(nnx.Rngs(0)))
    except TypeError as e:
        raise TypeError(f"model(nnx.Rngs(...)) failed; pass a module, or a function that takes nnx.Rngs: {e}") from e
    if not isinstance(abstract, nnx.Module):
        raise TypeError(f"model must make a Flax module of nnx.Rngs, it made a {type(abstract).__name__}.")
    split: Any = nnx.split(abstract, nnx.Param, ...)
    graph, _, rest = split
    if loss_fn is None and (kinds := {type(x).__name__ for _, x in nnx.to_flat_state(rest)}):
        raise ValueError(
            f"{type(abstract).__name__} has {', '.join(sorted(kinds))} beside its params, which initialize would not "
            "carry from step to step: dropout would repeat itself. Pass loss_fn(params, batch), which merges them as "
            "it wants, with a random key in the batch for instance."
        )

    def params_of(module: Any) -> PyTree:
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    start = params_of(model) if made else (lambda key: params_of(model(nnx.Rngs(key))))
    return Model(start, loss_fn or (lambda params, batch: nnx.merge(graph, params)(batch)), None)
