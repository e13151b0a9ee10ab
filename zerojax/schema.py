"""The keys of a config: names, types, defaults and meanings, in one table; and the check of a config against it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict


class Key(NamedTuple):
    """A key of the schema. `default`: its default, or a type where the default is None. `choices`: all it may be."""

    default: Any
    doc: str
    choices: tuple[Any, ...] = ()

    @property
    def type(self) -> type:
        """The type that a value has."""
        return self.default if isinstance(self.default, type) else type(self.default)


KEYS: dict[str, Key] = {
    "mesh.axes": Key(("data",), "Names of the mesh axes."),
    "mesh.shape": Key((-1,), "Devices along each; -1 for all that the others leave."),
    "zero.stage": Key(0, "ZeRO stage: 1 shards optimizer state, 2 also gradients, 3 also params.", (0, 1, 2, 3)),
    "zero.axis": Key(("data",), "Mesh axes that ZeRO shards over, and a batch's rows."),
    "zero.min_size": Key(2**14, "Leaves with fewer elements stay whole."),
    "zero.strict": Key(False, "Whether a larger leaf that no dim divides is an error."),
    "zero.layerwise": Key(str, "Regex of leaf paths that the model gathers itself, at stage 3."),
    "zero.offload.device": Key("none", "Where optimizer state lives between steps.", ("none", "pinned_host")),
    "zero.offload.fraction": Key(1.0, "Share of it that is offloaded."),
    "zero.offload.hbm_budget_bytes": Key(int, "Bytes that all at rest may take on each device, instead of a fraction."),
    "zero.offload.pattern": Key(str, "Regex of leaf paths that are offloaded."),
    "zero.offload.bucket_bytes": Key(2**25, "Bytes that travel at a time."),
    "zero.offload.params": Key(False, "Whether params are offloaded too, at stage 3."),
    "batch.rows": Key(int, "Rows of one optimizer step, over devices and micro-batches."),
    "batch.micro_rows": Key(int, "Rows of a micro-batch on one device; rows = micro_rows x accumulate x devices."),
    "batch.accumulate": Key(int, "Micro-batches of one step."),
    "batch.reduce": Key("mean", "How losses of devices and micro-batches are joined.", ("mean", "sum")),
    "data.shuffle": Key(True, "Whether rows are drawn in another order in each epoch."),
    "data.drop_last": Key(False, "Whether rows too few for a batch are dropped; if not, an epoch's first complete it."),
    "data.prefetch": Key(2, "Batches made ready ahead."),
    "optimizer.name": Key("adamw", "Which optimizer; the table OPTIMIZERS in config.py says which keys it takes."),
    "optimizer.learning_rate": Key(1e-3, "Step size, where no schedule sets it."),
    "optimizer.clip_norm": Key(1.0, "Global norm that gradients are clipped to; 0 for no clipping."),
    "optimizer.weight_decay": Key(float, "Weight decay."),
    "optimizer.decay_only": Key(str, "Regex of leaf paths that decay; all do by default."),
    "optimizer.b1": Key(float, "Decay rate of the first moment."),
    "optimizer.b2": Key(float, "Decay rate of the second moment."),
    "optimizer.eps": Key(float, "Added to the square root."),
    "optimizer.eps_root": Key(float, "Added inside it."),
    "optimizer.bias_correction": Key(bool, "Whether moments are divided by 1 - b**t."),
    "optimizer.nesterov": Key(bool, "Nesterov momentum."),
    "optimizer.momentum": Key(float, "Momentum of SGD, Muon and Adafactor."),
    "optimizer.mu_dtype": Key(str, "Dtype of the first moment: float32, bfloat16 or int8."),
    "optimizer.nu_dtype": Key(str, "Dtype of the second moment, likewise."),
    "optimizer.variant": Key(str, "LAMB's form.", ("optax", "deepspeed")),
    "optimizer.min_trust_ratio": Key(float, "Lower limit of LAMB's ratio."),
    "optimizer.max_trust_ratio": Key(float, "Upper limit of it."),
    "optimizer.initial_accumulator_value": Key(float, "What Adagrad's sum of squares begins with."),
    "optimizer.adam_learning_rate": Key(float, "Rate of the leaves that Muon leaves to Adam."),
    "schedule.name": Key("constant", "Which schedule; the table SCHEDULES in config.py says which keys it takes."),
    "schedule.total_num_steps": Key(int, "Updates until a decay ends."),
    "schedule.warmup_num_steps": Key(int, "Updates of warm-up."),
    "schedule.warmup_type": Key(str, "Its curve.", ("log", "linear")),
    "schedule.warmup_min_lr": Key(float, "Rate at its beginning."),
    "schedule.warmup_max_lr": Key(float, "Rate at its end; the optimizer's by default."),
    "schedule.warmup_min_ratio": Key(float, "WarmupCosineLR: share of the rate that warm-up begins with."),
    "schedule.cos_min_ratio": Key(float, "Share of the rate that a cosine ends with."),
    "schedule.cycle_min_lr": Key(float, "OneCycle: rate where the cycle begins and ends."),
    "schedule.cycle_max_lr": Key(float, "OneCycle: rate at its top."),
    "schedule.cycle_first_step_size": Key(int, "OneCycle: updates on the way up."),
    "schedule.cycle_second_step_size": Key(int, "OneCycle: updates on the way down."),
    "schedule.cycle_first_stair_count": Key(int, "OneCycle: stairs on the way up."),
    "schedule.cycle_second_stair_count": Key(int, "OneCycle: stairs on the way down."),
    "schedule.decay_step_size": Key(int, "OneCycle: unit of the decay after the cycle."),
    "schedule.decay_lr_rate": Key(float, "OneCycle: decay of the rate after the cycle."),
    "schedule.cycle_momentum": Key(
        bool, "OneCycle: whether b1 cycles too, with b2 at 0.99, for optimizers that have it."
    ),
    "schedule.cycle_min_mom": Key(float, "OneCycle: b1 at the cycle's top."),
    "schedule.cycle_max_mom": Key(float, "OneCycle: b1 where it begins and ends."),
    "schedule.decay_mom_rate": Key(float, "OneCycle: growth of b1 after the cycle."),
    "schedule.lr_range_test_min_lr": Key(float, "LRRangeTest: the first rate."),
    "schedule.lr_range_test_step_size": Key(int, "LRRangeTest: updates in which it grows by the rate's slope."),
    "schedule.lr_range_test_step_rate": Key(float, "LRRangeTest: slope."),
    "schedule.lr_range_test_staircase": Key(bool, "LRRangeTest: whether it grows in stairs."),
    "precision.params": Key("float32", "Dtype of the params.", ("float32", "bfloat16", "float16")),
    "precision.master": Key(
        "auto",
        "Exact weights behind 16-bit params: auto is split for bfloat16, float32 for float16.",
        ("auto", "split", "float32", "none"),
    ),
    "precision.grad_dtype": Key(str, "Dtype in which gradients travel; the params' by default."),
    "precision.cast_batch": Key(False, "Whether floating arrays of a batch are cast to the params' dtype."),
    "precision.skip_nonfinite": Key(False, "Whether a step with an infinite or NaN gradient changes nothing."),
    "loss_scale.kind": Key("none", "Loss scale, for float16.", ("none", "dynamic", "static")),
    "loss_scale.initial": Key(2.0**16, "The scale, or the first one."),
    "loss_scale.window": Key(1000, "Finite steps after which it doubles."),
    "loss_scale.hysteresis": Key(2, "Overflows it takes to halve it."),
    "loss_scale.consecutive_hysteresis": Key(False, "Whether a finite step refills that count."),
    "loss_scale.minimum": Key(1.0, "The least scale."),
    "checkpoint.every": Key(0, "Steps between checkpoints that a training program saves; 0 for none."),
    "checkpoint.max_to_keep": Key(int, "How many are kept; all by default."),
    "logging.every": Key(0, "Steps between lines that the engine prints; 0 for none."),
}
"""The schema: dotted names of all keys."""

SECTIONS = tuple(dict.fromkeys(name.split(".")[0] for name in KEYS))


def default() -> ConfigDict:
    """A config with every key at its default, locked: an assignment to an unknown key raises.

    Values are typed, so `--config.zero.stage=two` is refused; keys without a default are None until they get a value.
    A program adds keys of its own in `with c.unlocked():`.

    Example:
      >>> c = default()
      >>> c.zero.stage = 2
      >>> c.zero.stage, c.batch.rows, c.optimizer.name
      (2, None, 'adamw')
    """
    tree: dict[str, Any] = {}
    for name, key in KEYS.items():
        *sections, last = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = config_dict.placeholder(key.default) if isinstance(key.default, type) else key.default
    c = ConfigDict(tree)
    c.lock()
    return c


def check(config: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """The whole config that a partial one means: its values over the defaults.

    Args:
      config: A ConfigDict or nested dict; what it lacks has its default. A ConfigDict may have further sections, of the
        program that it configures; one whose name is nearly one of the schema's is taken for a slip.

    Raises:
      ValueError: a key that the schema lacks, with the nearest that it has; or a value that the key cannot have.
      TypeError: a value of another type, or no config.

    Example:
      >>> check({"zero": {"stage": 3}}).zero.stage
      3
      >>> check({"zero": {"stge": 3}})
      Traceback (most recent call last):
      ...
      ValueError: config has no key 'zero.stge'; the nearest is 'zero.stage'.
    """
    if not isinstance(config, Mapping | ConfigDict):
        raise TypeError(f"config must be a ConfigDict or a dict, got {type(config).__name__}.")
    own = isinstance(config, ConfigDict)
    c = default()
    for name, value in config.items():
        if name in SECTIONS:
            _fill(c[name], value, name)
        elif not own or nearest(name, SECTIONS):
            raise ValueError(_unknown(name))
    return c


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that `name` is most likely a slip of.

    Example:
      >>> nearest("gradient_cliping", ["gradient_clipping", "optimizer"])
      'gradient_clipping'
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return close[0] if close else None


def _fill(node: ConfigDict, value: Any, name: str) -> None:
    if not isinstance(value, Mapping | ConfigDict):
        raise TypeError(f"config: {name!r} is a section with the keys {', '.join(node)}, got {value!r}.")
    for key, inner in value.items():
        full = f"{name}.{key}"
        if key not in node:
            raise ValueError(_unknown(full))
        if isinstance(node[key], ConfigDict):
            _fill(node[key], inner, full)
        else:
            node[key] = checked(full, inner)


def checked(name: str, value: Any) -> Any:
    """A value as the schema's key `name` holds it.

    Example:
      >>> checked("optimizer.learning_rate", 1)
      1.0
    """
    key = KEYS[name]
    if value is None and isinstance(key.default, type):
        return None
    if key.type is tuple and isinstance(value, str | list):
        value = (value,) if isinstance(value, str) else tuple(value)
    if key.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if key.type is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # as JSON has 5e8
    if not isinstance(value, key.type) or (isinstance(value, bool) and key.type is not bool):
        raise TypeError(f"config: {name!r} wants {key.type.__name__}, got {value!r} of type {type(value).__name__}.")
    if key.choices and value not in key.choices:
        raise ValueError(f"config: {name!r} must be one of {key.choices}, got {value!r}.")
    return value


def _unknown(name: str) -> str:
    close = nearest(name, [*KEYS, *SECTIONS])
    if close is None:  # right name, wrong place
        close = next((known for known in KEYS if known.split(".")[-1] == name.split(".")[-1]), None)
    hint = f"the nearest is {close!r}." if close else f"its sections are {', '.join(SECTIONS)}."
    return f"config has no key {name!r}; {hint}"
