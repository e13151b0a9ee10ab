"""Proof that a loss function uses shards by gathering them, and not as if they were whole.

A `Shard` is a pytree, so that scans go through it; but so does `jax.tree.leaves(params)`, and a weight penalty summed
over its leaves would silently sum one device's shards. So the traced loss function is read, from each shard onwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Var

# What makes another shard of a shard: picking a layer, or laying it out anew.
_MOVES = frozenset("convert_element_type copy dynamic_slice gather reshape slice squeeze".split())


def first_misuse(jaxpr: Jaxpr, shards: dict[Var, str]) -> tuple[str, str] | None:
    """Where a traced function computes with a shard.

    Args:
      jaxpr: The function.
      shards: Those of its arguments that are shards, with their names.

    Returns:
      The name of a shard and the operation that takes it, or None where all are gathered.
    """
    misuses, results = _follow(jaxpr, shards)
    misuses += [(name, "return") for name in results if name]
    return misuses[0] if misuses else None


def gathers(name: str, params: dict[str, Any]) -> bool:
    """Whether an operation is `zerojax.gather`'s: an all-gather, or the custom_vjp call around one."""
    if name.startswith("custom_vjp"):
        return any(eqn.primitive.name == "all_gather" for eqn in params["call_jaxpr"].jaxpr.eqns)
    return name == "all_gather"


def launches(name: str, params: dict[str, Any]) -> bool:
    """Whether an operation is a kernel of `pallas_kernels`, or the batching rule around one."""
    if name == "custom_vmap_call":
        return any(launches(eqn.primitive.name, eqn.params) for eqn in params["call"].jaxpr.eqns)
    return str(params.get("name", "")).startswith("zerojax_")


def _follow(jaxpr: Jaxpr, shards: dict[Var, str]) -> tuple[list[tuple[str, str]], list[str | None]]:
    """Misuses in a function, and for each of its results the shard that it is, if it is one."""
    shards, misuses = dict(shards), []
    for eqn in jaxpr.eqns:
        taken = [shards.get(v) if isinstance(v, Var) else None for v in eqn.invars]
        name = eqn.primitive.name
        if not any(taken) or gathers(name, eqn.params):
            continue
        results: Sequence[str | None] = [next(filter(None, taken))] * len(eqn.outvars)
        if name not in _MOVES:
            bodies = list(_bodies(eqn.params, taken))
            if not bodies:
                misuses.append((results[0] or "", name))
                continue
            for body, entering in bodies:
                found, results = _follow(body, {v: s for v, s in zip(body.invars, entering, strict=True) if s})
                misuses += found
        shards |= {v: s for v, s in zip(eqn.outvars, results, strict=False) if s}
    return misuses, [shards.get(v) if isinstance(v, Var) else None for v in jaxpr.outvars]


def _bodies(params: dict[str, Any], taken: list[str | None]) -> Iterator[tuple[Jaxpr, list[str | None]]]:
    """The functions that an operation calls (a scan's body, a cond's branches), each with what enters it."""
    for value in params.values():
        for inner in value if isinstance(value, tuple) else (value,):
            body = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            if isinstance(body, Jaxpr) and len(body.invars) <= len(taken):
                yield body, taken[len(taken) - len(body.invars) :]  # a cond's first argument says which branch
