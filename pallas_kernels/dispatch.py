"""Which implementation of an op runs for given arrays, and why.

An op has up to three: "mosaic", its Mosaic GPU kernel; "interpret", the same kernel simulated on a CPU, for tests;
"xla", its reference in jnp, which runs anywhere. Where none is asked for, the kernel runs where it can and where it was
measured to be ahead of XLA, and `explain` says which and why.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # untyped: its names differ between versions of JAX
IMPLEMENTATIONS = ("mosaic", "xla", "interpret")
MIN_JAX = (0, 11)
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation, and the reason for it in words."""

    implementation: str
    why: str


def choose(
    op: str,
    implementation: str | None,
    arrays: Any,
    *,
    empty: bool = False,
    unserved: str | None = None,
    slower: str | None = None,
) -> Choice:
    """Picks an implementation.

    Args:
      op: Name of the op, for messages.
      implementation: What the caller asked for, or None.
      arrays: Pytree of the op's arrays, or of their `ShapeDtypeStruct`s.
      empty: Whether there is nothing to compute; no kernel runs for that, whatever was asked for.
      unserved: Why the kernel cannot take these arrays; None where it can.
      slower: Why XLA is as fast for them, or faster; None where the kernel is ahead.

    Raises:
      ValueError: `implementation` is none of `IMPLEMENTATIONS`, or asks for a kernel that cannot run here.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"{op}: implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}.")
    if empty:
        return Choice("xla", "there is nothing to compute")
    if implementation is None:
        if why := unserved or unavailable() or slower:
            _say_once(op, why)
            return Choice("xla", why)
        return Choice("mosaic", f"the kernel serves these arrays on {device_kind()}")
    if implementation == "xla":
        return Choice("xla", "it was asked for")
    # What is traced may be lowered for another platform than this process's own.
    tracing = any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in jax.tree.leaves(arrays))
    here = None if tracing or implementation == "interpret" else unavailable()
    if why := too_old() or unserved or here:
        raise ValueError(f"{op}: implementation={implementation!r} cannot run: {why}. implementation=None runs XLA's.")
    return Choice(implementation, "it was asked for")


def too_old() -> str | None:
    """Why this version of JAX has no kernels, or None."""
    if jax.__version_info__ < MIN_JAX:
        return f"kernels need jax {'.'.join(map(str, MIN_JAX))} or newer, this is {jax.__version__}"
    return None


def unavailable() -> str | None:
    """Why kernels cannot run on the device that is traced for, or None."""
    if why := too_old():
        return why
    device = _device()
    if device.platform not in ("gpu", "cuda"):
        return f"kernels need an NVIDIA GPU of Hopper or newer, this is a {device.platform}"
    capability = getattr(device, "compute_capability", None)  # unknown of an abstract device
    if capability is not None and float(capability) < 9.0:
        return (
            f"kernels need an NVIDIA GPU of Hopper or newer, {device.device_kind} has compute capability {capability}"
        )
    return None


def interpret_params(implementation: str) -> Any:
    """`plgpu.kernel`'s `interpret` for an implementation."""
    return plgpu.InterpretGPUParams() if implementation == "interpret" else None


def _device() -> Any:
    """The device that is traced for: the ambient mesh's, or this process's default."""
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.sharding.get_abstract_mesh().abstract_device or default or jax.devices()[0]


def device_kind() -> str:
    """Of the device that is traced for, as JAX names it."""
    return _device().device_kind


@functools.cache
def _say_once(op: str, why: str) -> None:
    _logger.info("%s runs XLA's form: %s", op, why)
