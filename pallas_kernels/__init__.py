"""Pallas kernels for NVIDIA GPUs; each works on the arrays of one device and knows no mesh."""

from collections.abc import Callable
from typing import Any

from pallas_kernels.adam import adam as adam
from pallas_kernels.adam import adam_choice
from pallas_kernels.adam import adam_reference as adam_reference
from pallas_kernels.adam import adam_scalars as adam_scalars
from pallas_kernels.dispatch import Choice
from pallas_kernels.lamb import lamb as lamb
from pallas_kernels.lamb import lamb_choice
from pallas_kernels.lamb import lamb_reference as lamb_reference
from pallas_kernels.lamb import lamb_scalars as lamb_scalars
from pallas_kernels.layer_norm import layer_norm as layer_norm
from pallas_kernels.layer_norm import layer_norm_choice
from pallas_kernels.layer_norm import layer_norm_reference as layer_norm_reference
from pallas_kernels.softmax import softmax as softmax
from pallas_kernels.softmax import softmax_choice
from pallas_kernels.softmax import softmax_reference as softmax_reference
from pallas_kernels.squares import squares as squares
from pallas_kernels.squares import squares_choice
from pallas_kernels.squares import squares_reference as squares_reference

_CHOICES: dict[str, Callable[..., Choice]] = {
    "adam": adam_choice,
    "lamb": lamb_choice,
    "layer_norm": layer_norm_choice,
    "softmax": softmax_choice,
    "squares": squares_choice,
}


def explain(op: Any, *args: Any, **kwargs: Any) -> str:
    """Which implementation of an op would run here, and why.

    Args:
      op: The op, or its name.
      *args: What the op would get; `jax.ShapeDtypeStruct`s will do for arrays.
      **kwargs: Likewise.

    Raises:
      ValueError: there is no such op.

    Example:
      >>> import jax
      >>> leaf = [jax.ShapeDtypeStruct((4,), "float32")]
      >>> explain("adam", leaf, leaf, leaf, leaf, implementation="xla")
      'adam runs xla: it was asked for'
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _CHOICES:
        raise ValueError(f"explain: op must be one of {', '.join(_CHOICES)}, got {name!r}.")
    choice = _CHOICES[name](*args, **kwargs)
    return f"{name} runs {choice.implementation}: {choice.why}"
