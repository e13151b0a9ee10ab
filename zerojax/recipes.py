"""Optimizers and schedules by the names that configs use.

Each is a function whose keyword arguments are the config's keys: what it does not take, a config may not set. Weight
decay is 0 unless given, whatever Optax's own default is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from zerojax import optimizers, schedules

Mask = Callable[[Any], Any] | None


def adam(learning_rate: optax.Schedule, *, weight_decay: float = 0.0, mask: Mask = None, **rest: Any) -> list[Any]:
    """Adam; weight decay is added to the gradient (L2)."""
    links = [optax.add_decayed_weights(weight_decay, mask)] if weight_decay else []
    return [*links, optimizers.fused_adam(learning_rate, **rest)]


def adamw(learning_rate: optax.Schedule, *, weight_decay: float = 0.0, mask: Mask = None, **rest: Any) -> list[Any]:
    """AdamW."""
    return [optimizers.fused_adamw(learning_rate, weight_decay=weight_decay, mask=mask, **rest)]


def lamb(learning_rate: optax.Schedule, *, weight_decay: float = 0.0, mask: Mask = None, **rest: Any) -> list[Any]:
    """LAMB, Optax's form or DeepSpeed's."""
    return [optimizers.fused_lamb(learning_rate, weight_decay=weight_decay, mask=mask, **rest)]


def lion(learning_rate: optax.Schedule, *, weight_decay: float = 0.0, mask: Mask = None, **rest: Any) -> list[Any]:
    """Lion, `optax.lion`."""
    return [optax.lion(learning_rate, weight_decay=weight_decay, mask=mask, **rest)]


def adagrad(
    learning_rate: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    mask: Mask = None,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
) -> list[Any]:
    """Adagrad, `optax.adagrad`; weight decay is added to the gradient (L2)."""
    links = [optax.add_decayed_weights(weight_decay, mask)] if weight_decay else []
    # Optax adds eps inside the root, torch outside of it: equal where it matters, at a sum of zero.
    return [*links, optax.adagrad(learning_rate, initial_accumulator_value, max(eps * eps, 1e-37))]


def sgd(
    learning_rate: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    mask: Mask = None,
    momentum: float | None = None,
    nesterov: bool = False,
) -> list[Any]:
    """SGD, `optax.sgd`; weight decay is added to the gradient (L2)."""
    links = [optax.add_decayed_weights(weight_decay, mask)] if weight_decay else []
    return [*links, optax.sgd(learning_rate, momentum or None, nesterov)]


def muon(
    learning_rate: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    nesterov: bool = True,
    b1: float = 0.9,
    b2: float = 0.95,
    adam_learning_rate: optax.Schedule | None = None,
) -> list[Any]:
    """Muon for matrices, Adam for all else: `optax.contrib.muon`."""
    options: Any = {"beta": momentum, "nesterov": nesterov, "adam_b1": b1, "adam_b2": b2}
    decay = {"weight_decay": weight_decay, "adam_weight_decay": weight_decay}
    return [optax.contrib.muon(learning_rate, adam_learning_rate=adam_learning_rate, **options, **decay)]


def adafactor(
    learning_rate: optax.Schedule, *, weight_decay: float = 0.0, mask: Mask = None, momentum: float | None = None
) -> list[Any]:
    """Adafactor, `optax.adafactor`; weight decay is times the rate, as elsewhere."""
    rate: Any = (lambda count: weight_decay * learning_rate(count)) if weight_decay else None
    return [optax.adafactor(learning_rate, momentum=momentum or None, weight_decay_rate=rate, weight_decay_mask=mask)]


_ADAM_KEYS = ("b1", "b2", "eps", "eps_root", "bias_correction", "mu_dtype", "nu_dtype")
_DECAY_KEYS = ("weight_decay", "decay_only")

OPTIMIZERS: dict[str, tuple[Callable[..., list[Any]], tuple[str, ...]]] = {
    "adam": (adam, (*_DECAY_KEYS, *_ADAM_KEYS, "nesterov")),
    "adamw": (adamw, (*_DECAY_KEYS, *_ADAM_KEYS, "nesterov")),
    "lamb": (lamb, (*_DECAY_KEYS, *_ADAM_KEYS, "variant", "min_trust_ratio", "max_trust_ratio")),
    "lion": (lion, (*_DECAY_KEYS, "b1", "b2", "mu_dtype")),
    "adagrad": (adagrad, (*_DECAY_KEYS, "eps", "initial_accumulator_value")),
    "sgd": (sgd, (*_DECAY_KEYS, "momentum", "nesterov")),
    "muon": (muon, ("weight_decay", "momentum", "nesterov", "b1", "b2", "adam_learning_rate")),
    "adafactor": (adafactor, (*_DECAY_KEYS, "momentum")),
}
"""By name: what makes an optimizer's links, and the keys that it takes beside `learning_rate` and `clip_norm`."""
BETAS = ("adam", "adamw", "lamb", "lion")
"""Those whose betas DeepSpeed's OneCycle sets."""


def cosine(
    *, learning_rate: float, total_num_steps: int, warmup_num_steps: int = 0, cos_min_ratio: float = 0.0
) -> optax.Schedule:
    """`optax.warmup_cosine_decay_schedule`: a line up from 0, then half a cosine."""
    end = learning_rate * cos_min_ratio
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_num_steps, total_num_steps, end)


_WARMUP_KEYS = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type")
_CYCLE_KEYS = (
    "cycle_first_step_size",
    "cycle_second_step_size",
    "cycle_first_stair_count",
    "cycle_second_stair_count",
    "decay_step_size",
)
MOMENTUM_KEYS = ("cycle_min_mom", "cycle_max_mom", "decay_mom_rate")

SCHEDULES: dict[str, tuple[Callable[..., optax.Schedule], tuple[str, ...]]] = {
    "constant": (lambda learning_rate: optax.constant_schedule(learning_rate), ("learning_rate",)),
    "cosine": (cosine, ("learning_rate", "total_num_steps", "warmup_num_steps", "cos_min_ratio")),
    "WarmupLR": (schedules.warmup_lr, _WARMUP_KEYS),
    "WarmupDecayLR": (schedules.warmup_decay_lr, (*_WARMUP_KEYS, "total_num_steps")),
    "WarmupCosineLR": (
        schedules.warmup_cosine_lr,
        ("learning_rate", "total_num_steps", "warmup_min_ratio", "warmup_num_steps", "cos_min_ratio", "warmup_type"),
    ),
    "OneCycle": (schedules.one_cycle, ("cycle_min_lr", "cycle_max_lr", "decay_lr_rate", *_CYCLE_KEYS)),
    "LRRangeTest": (
        schedules.lr_range_test,
        (
            "lr_range_test_min_lr",
            "lr_range_test_step_size",
            "lr_range_test_step_rate",
            "lr_range_test_staircase",
        ),
    ),
}
"""By name: a schedule, and the config's keys that it takes; `learning_rate` is the optimizer's."""
CYCLE_KEYS = (*_CYCLE_KEYS, *MOMENTUM_KEYS)
"""What `schedules.one_cycle_momentum` takes."""
