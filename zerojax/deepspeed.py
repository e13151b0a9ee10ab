"""DeepSpeed's JSON as a zerojax config: no key is dropped in silence."""

from __future__ import annotations

import json
import math
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from zerojax import deepspeed_keys as keys
from zerojax import recipes, schema
from zerojax.schema import nearest

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_SCHEDULES = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest")
_REFUSED_OPTIMIZERS = {
    "onebitadam": "gradients travel uncompressed here: take Adam",
    "zerooneadam": "gradients travel uncompressed here: take Adam",
    "onebitlamb": "gradients travel uncompressed here: take Lamb",
    "muadam": "muP's rates are not served",
    "muadamw": "muP's rates are not served",
    "musgd": "muP's rates are not served",
}


def from_deepspeed(
    source: Mapping[str, Any] | str | os.PathLike[str], *, auto: Mapping[str, Any] | None = None
) -> ConfigDict:
    """The config that a DeepSpeed JSON means.

    Every key is honoured, or raises, or is named in one warning because it has no meaning here; `deepspeed_keys.KEYS`
    is the table, docs/from-deepspeed.md its print. What DeepSpeed does without a word is kept where it changes numbers:
    "Adam" is AdamW, gradients are clipped to 1.0, a warm-up repeats its first rate, Lamb is DeepSpeed's own.

    Args:
      source: A dict, or the path of a JSON file.
      auto: Values for keys that say "auto", by dotted name as in `{"optimizer.params.lr": 1e-4}`; others take what
        Hugging Face's TrainingArguments have by default, or DeepSpeed.

    Returns:
      A config for `initialize`, `make_optimizer` and others. Batch sizes that need the number of devices are solved
      there.

    Raises:
      ValueError: an unknown key, with its place and the nearest known one; one that is refused, with the way out; or
        values that contradict one another.

    Example:
      >>> c = from_deepspeed({"train_batch_size": 32, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True},
      ...                     "optimizer": {"type": "Adam", "params": {"lr": 3e-4}}})
      >>> c.batch.rows, c.zero.stage, c.precision.params, c.optimizer.name, c.optimizer.clip_norm
      (32, 2, 'bfloat16', 'adamw', 1.0)
    """
    read = _Reader(_load(source), dict(auto or {}))
    c = schema.default()
    _batch(c, read)
    _precision(c, read)
    _zero(c, read)
    _optimizer(c, read)
    _schedule(c, read)
    if read.small_moments:
        _small_moments(c, read)
    read.tell()
    return c


def looks_like_deepspeed(config: Mapping[str, Any]) -> bool:
    """Whether a dict has DeepSpeed's keys rather than the schema's.

    Example:
      >>> looks_like_deepspeed({"train_batch_size": 8}), looks_like_deepspeed({"zero": {"stage": 1}})
      (True, False)
    """
    if isinstance(config, ConfigDict):
        return False
    sections = {key.split(".")[0] for key in keys.KEYS} - set(schema.SECTIONS)
    optimizer = config.get("optimizer")
    return not sections.isdisjoint(config) or (isinstance(optimizer, Mapping) and "type" in optimizer)


class _Reader:
    """The honoured keys of a file, by dotted name; and what is to be said of the others."""

    def __init__(self, raw: dict[str, Any], auto: dict[str, Any]) -> None:
        self.values: dict[str, Any] = {}
        self.notes: dict[str, list[str]] = {}
        self.small_moments = False
        self._auto = auto
        for name in auto:
            if name not in keys.KEYS:
                raise ValueError(_unknown(name))
        self._read(raw, "")

    def get(self, name: str, default: Any = None) -> Any:
        """The value of an honoured key; its default where it is absent, or null."""
        value = self.values.get(name)
        return default if value is None else value

    def flag(self, name: str, default: bool = False) -> bool:
        """The value of a switch."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"DeepSpeed config: {name!r} must be true or false, got {value!r}.")
        return value

    def number(self, name: str, default: Any = None) -> Any:
        """The value of a number, or the default."""
        value = self.get(name, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"DeepSpeed config: {name!r} must be a number, got {value!r}.")
        return value

    def note(self, name: str, text: str) -> None:
        """Remembers to say something of a key."""
        self.notes.setdefault(text, []).append(name)

    def tell(self) -> None:
        """One warning for all notes."""
        if self.notes:
            said = "; ".join(f"{', '.join(names)}: {text}" for text, names in self.notes.items())
            warnings.warn(f"DeepSpeed config, read with these notes: {said}.", UserWarning, stacklevel=3)

    def _read(self, node: Mapping[str, Any], place: str) -> None:
        for key, value in node.items():
            name = f"{place}{key}"
            row = keys.KEYS.get(name)
            if row is None and any(known.startswith(f"{name}.") for known in keys.KEYS):
                if name == "zero_optimization" and isinstance(value, bool):
                    value = {"stage": int(value)}  # the old form
                if value is None:
                    continue
                if not isinstance(value, Mapping):
                    raise ValueError(f"DeepSpeed config: {name!r} must be an object, got {value!r}.")
                self._read(value, f"{name}.")
            elif row is None:
                raise ValueError(_unknown(name))
            elif row.verdict == keys.HONOURED:
                self._honour(name, value)
            elif row.verdict == keys.NOTED:
                if not _is_off(value):
                    self.note(name, row.text)
            elif not (_is_off(value) if row.off is None else value == row.off):
                raise ValueError(f"DeepSpeed config: {name!r} is {_short(value)}, which zerojax refuses: {row.text}.")

    def _honour(self, name: str, value: Any) -> None:
        if isinstance(value, list) and name.startswith("scheduler.params.") and len(value) == 1:
            value = value[0]  # one for each group of params, of which there is one
        if value == "auto":
            value = self._auto[name] if name in self._auto else keys.AUTO.get(name)
            if name not in self._auto:
                known = keys.AUTO_OPEN.get(name, "DeepSpeed's default") if value is None else repr(value)
                self.note(name, f'"auto" is {known}')
        self.values[name] = value


def _batch(c: ConfigDict, read: _Reader) -> None:
    for name, key in (
        ("rows", "train_batch_size"),
        ("micro_rows", "train_micro_batch_size_per_gpu"),
        ("accumulate", "gradient_accumulation_steps"),
    ):
        c.batch[name] = schema.checked(f"batch.{name}", read.number(key))
    if c.batch.rows is None and c.batch.micro_rows is None:
        raise ValueError(
            "DeepSpeed config: neither 'train_batch_size' nor 'train_micro_batch_size_per_gpu' is given; one has to be."
        )
    c.batch.reduce = schema.checked("batch.reduce", str(read.get("gradient_allreduce_op", "mean")).lower())
    inferred = None if c.batch.rows and c.batch.micro_rows else 1
    if c.batch.reduce == "sum" and (c.batch.accumulate or inferred) != 1:
        raise ValueError(
            "DeepSpeed config: 'gradient_allreduce_op' sum is a sum over devices of a mean over micro-batches; here "
            "it is served with 'gradient_accumulation_steps' 1, given or by leaving out one of the batch sizes."
        )
    c.data.drop_last = read.flag("dataloader_drop_last")
    every = read.number("steps_per_print", 0)
    c.logging.every = 0 if math.isinf(every) else int(every)


def _precision(c: ConfigDict, read: _Reader) -> None:
    bf16 = "bf16" if any(name.startswith("bf16.") for name in read.values) else "bfloat16"
    is_bf16, is_fp16 = read.flag(f"{bf16}.enabled"), read.flag("fp16.enabled")
    if is_bf16 and is_fp16:
        raise ValueError("DeepSpeed config: bf16 and fp16 are both enabled; disable one.")
    c.precision.params = "bfloat16" if is_bf16 else "float16" if is_fp16 else "float32"
    if is_bf16:
        c.precision.skip_nonfinite = read.flag(f"{bf16}.check_grad_overflow", True)
        if read.flag(f"{bf16}.bf16_master_weights_and_grads"):
            c.precision.master = "none"
        if read.flag(f"{bf16}.bf16_optimizer_states"):
            if c.precision.master != "none":
                raise ValueError(
                    "DeepSpeed config: bf16_optimizer_states needs bf16_master_weights_and_grads. For small moments of "
                    "exact weights set optimizer.mu_dtype and nu_dtype of the config that from_deepspeed returns."
                )
            read.small_moments = True
    if is_fp16:
        _loss_scale(c, read)
        c.precision.cast_batch = read.flag("fp16.auto_cast")
        if read.flag("fp16.fp16_master_weights_and_grads"):
            c.precision.master = "none"
    for key, name in (("communication_data_type", "grad_dtype"), ("data_types.param_dtype", "params")):
        if (dtype := read.get(key)) is None:
            continue
        if str(dtype).lower() not in DTYPES:
            raise ValueError(f"DeepSpeed config: {key!r} must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        dtype = DTYPES[str(dtype).lower()]
        if name == "params" and dtype != c.precision.params:
            raise ValueError(
                f"DeepSpeed config: {key!r} is {dtype}, but fp16 and bf16 make the params {c.precision.params}."
            )
        c.precision[name] = dtype


def _loss_scale(c: ConfigDict, read: _Reader) -> None:
    scale = read.number("fp16.loss_scale", 0)
    c.loss_scale.kind = "static" if scale else "dynamic"
    c.loss_scale.initial = float(scale or 2.0 ** read.number("fp16.initial_scale_power", 16))
    c.loss_scale.window = schema.checked("loss_scale.window", read.number("fp16.loss_scale_window", 1000))
    c.loss_scale.hysteresis = schema.checked("loss_scale.hysteresis", read.number("fp16.hysteresis", 2))
    c.loss_scale.consecutive_hysteresis = read.flag("fp16.consecutive_hysteresis")
    c.loss_scale.minimum = float(read.number("fp16.min_loss_scale", 1))


def _zero(c: ConfigDict, read: _Reader) -> None:
    within = lambda key: f"zero_optimization.{key}"
    c.zero.stage = schema.checked("zero.stage", read.number(within("stage"), 0))
    threshold = read.number(within("stage3_param_persistence_threshold"))
    threshold = read.number(within("param_persistence_threshold")) if threshold is None else threshold
    if threshold is not None and c.zero.stage == 3:
        c.zero.min_size = int(threshold)
    optimizer = read.get(within("offload_optimizer.device"), "none")
    if read.flag(within("cpu_offload")):
        optimizer = "cpu"
    params = read.get(within("offload_param.device"), "none")
    if read.flag(within("cpu_offload_param")) or read.flag(within("cpu_offload_params")):
        params = "cpu"
    for name, device in (("offload_optimizer", optimizer), ("offload_param", params)):
        if device not in ("none", "cpu"):
            known = "nvme is not served: take cpu" if device == "nvme" else "it must be none or cpu"
            raise ValueError(f"DeepSpeed config: '{within(name)}.device' is {device!r}; {known}.")
    if params == "cpu" and c.zero.stage < 3:
        raise ValueError(f"DeepSpeed config: offload_param needs stage 3, got stage {c.zero.stage}.")
    if "cpu" in (optimizer, params):
        c.zero.offload.device = "pinned_host"
        c.zero.offload.params = params == "cpu"
        c.zero.offload.fraction = (
            float(read.number(within("offload_optimizer.ratio"), 1)) if optimizer == "cpu" else 0.0
        )


def _optimizer(c: ConfigDict, read: _Reader) -> None:
    c.optimizer.clip_norm = float(read.number("gradient_clipping", 1.0))
    given = {name.split(".")[-1]: v for name, v in read.values.items() if name.startswith("optimizer.params.")}
    kind = read.get("optimizer.type")
    if kind is None:
        if given:
            raise ValueError("DeepSpeed config: 'optimizer' has params but no type.")
        read.note("optimizer", f"absent, so AdamW with rate {c.optimizer.learning_rate:g}; set config.optimizer")
        return
    name = str(kind).lower()
    if name in _REFUSED_OPTIMIZERS:
        raise ValueError(f"DeepSpeed config: 'optimizer.type' is {kind!r}, refused: {_REFUSED_OPTIMIZERS[name]}.")
    if name not in keys.OPTIMIZERS:
        close = nearest(name, keys.OPTIMIZERS)
        hint = f"; the nearest is {close!r}" if close else ""
        raise ValueError(
            f"DeepSpeed config: 'optimizer.type' is {kind!r}, which is not served{hint}. Known are "
            f"{', '.join(keys.OPTIMIZERS)}; with any Optax optimizer use make_train_step."
        )
    defaults = dict(keys.OPTIMIZERS[name])
    for key in given:
        if key not in (*defaults, *keys.FURTHER_PARAMS.get(name, ())):
            raise ValueError(f"DeepSpeed config: 'optimizer.params.{key}' is no parameter of {kind}.")
    if name in ("adam", "adamw"):
        name = "adamw" if name == "adamw" or read.flag("optimizer.params.adam_w_mode", True) else "adam"
        if name == "adamw" and read.flag("optimizer.params.torch_adam"):
            defaults["weight_decay"] = 0.01
    params = defaults | {key: value for key, value in given.items() if value is not None}
    _set_optimizer(c, read, name, params)


def _set_optimizer(c: ConfigDict, read: _Reader, name: str, params: dict[str, Any]) -> None:
    o, number = c.optimizer, lambda key: float(_number(f"optimizer.params.{key}", params[key]))
    o.name = name
    if name == "muon":
        for key in ("muon_lr", "adam_lr"):  # each of the two, then lr, then a default of its own
            params[key] = params[key] if read.get(f"optimizer.params.{key}") or not params["lr"] else params["lr"]
        o.learning_rate, o.adam_learning_rate = number("muon_lr"), number("adam_lr")
    else:
        o.learning_rate = number("lr")
    if "betas" in params:
        betas = params["betas"]
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise ValueError(f"DeepSpeed config: 'optimizer.params.betas' must be two numbers, got {betas!r}.")
        o.b1, o.b2 = map(float, betas)
    same = {"weight_decay": "weight_decay", "momentum": "momentum", "max_coeff": "max_trust_ratio"}
    same |= {"min_coeff": "min_trust_ratio", "initial_accumulator_value": "initial_accumulator_value"}
    same |= {"eps": "eps"} if name != "muon" else {}
    for key, ours in same.items():
        if key in params:
            o[ours] = number(key)
    if name == "sgd":
        o.nesterov = read.flag("optimizer.params.nesterov")
    if name == "lamb":
        o.variant = "deepspeed"
        if read.flag("optimizer.params.eps_inside_sqrt"):
            o.eps, o.eps_root = 0.0, o.eps
    if not read.flag("optimizer.params.bias_correction", True):
        o.bias_correction = False
    if not read.flag("optimizer.params.fp32_optimizer_states", True) and c.precision.params == "bfloat16":
        read.small_moments = True


def _small_moments(c: ConfigDict, read: _Reader) -> None:
    """bfloat16 for the moments of which the optimizer lets one choose the dtype."""
    _, takes = recipes.OPTIMIZERS[c.optimizer.name]
    chosen = [name for name in ("mu_dtype", "nu_dtype") if name in takes]
    for name in chosen:
        c.optimizer[name] = "bfloat16"
    if not chosen:
        read.note("bfloat16 optimizer states", f"those of {c.optimizer.name} stay as they are")


def _schedule(c: ConfigDict, read: _Reader) -> None:
    kind = read.get("scheduler.type")
    given = {name.split(".")[-1]: v for name, v in read.values.items() if name.startswith("scheduler.params.")}
    if kind is None:
        if given:
            raise ValueError("DeepSpeed config: 'scheduler' has params but no type.")
        return
    if kind not in _SCHEDULES:
        close = nearest(str(kind), _SCHEDULES)
        hint = f"the nearest is {close!r}" if close else f"known are {', '.join(_SCHEDULES)}"
        raise ValueError(f"DeepSpeed config: 'scheduler.type' is {kind!r}, which is not served; {hint}.")
    c.schedule.name = kind
    for name, value in given.items():
        c.schedule[name] = schema.checked(f"schedule.{name}", value)
    if kind == "WarmupDecayLR" and "warmup_max_lr" not in given:
        c.schedule.warmup_max_lr = 1e-3  # the class's default; WarmupLR takes the optimizer's
    own_rates = kind == "WarmupCosineLR" or (kind == "WarmupLR" and c.schedule.warmup_max_lr is None)
    if c.optimizer.name == "muon" and not own_rates and c.optimizer.adam_learning_rate != c.optimizer.learning_rate:
        read.note("optimizer.params.adam_lr", f"{kind} gives all leaves one rate, as in DeepSpeed")
        c.optimizer.adam_learning_rate = c.optimizer.learning_rate
    if kind in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR") and c.schedule.warmup_num_steps == 0:
        raise ValueError("DeepSpeed config: 'scheduler.params.warmup_num_steps' must be at least 1, got 0.")


def _load(source: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    text = pathlib.Path(source).read_text()
    try:
        raw = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as e:
        raise ValueError(f"{os.fspath(source)} is no JSON: {e}. Comments, which hjson allows, have to go.") from e
    if not isinstance(raw, dict):
        raise ValueError(f"{os.fspath(source)} holds no JSON object but {_short(raw)}.")
    return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"DeepSpeed config: keys stand there twice: {', '.join(twice)}.")
    return dict(pairs)


def _is_off(value: Any) -> bool:
    """Whether a value asks for nothing."""
    if isinstance(value, Mapping):
        return not value or value.get("enabled", True) in (False, "auto")
    return value is None or value is False or value in (0, "none", "", "auto") or value == []


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"DeepSpeed config: {name!r} must be a number, got {value!r}.")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(name: str) -> str:
    close = nearest(name, keys.KEYS)
    if close is None or close.rpartition(".")[0] != name.rpartition(".")[0]:
        last = name.rpartition(".")[2]
        elsewhere = [known for known in keys.KEYS if known.rpartition(".")[2] == last]
        close = elsewhere[0] if elsewhere else close
    hint = f"the nearest is {close!r}" if close else "see docs/from-deepspeed.md for all that are known"
    return f"DeepSpeed config has an unknown key {name!r}, which DeepSpeed may ignore in silence; {hint}."
