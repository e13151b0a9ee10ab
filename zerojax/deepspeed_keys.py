"""Every key of DeepSpeed's training config (0.19), and what becomes of it here: data alone, which
docs/from-deepspeed.md prints.

A key is `HONOURED`: it does what it does in DeepSpeed. Or it is `NOTED`: accepted with a word, because what it tunes is
not there or done by the compiler, and no number depends on it. Or it is `REFUSED`, unless its value turns it off:
training without what it asks for would be another training than was asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

HONOURED, NOTED, REFUSED = "honoured", "noted", "refused"


class Row(NamedTuple):
    """A key: its verdict, what becomes of it, and the value beside the usual ones that turns it off."""

    verdict: str
    text: str
    off: Any = None


def _rows(verdict: str, keys: str, text: str, off: Any = None) -> dict[str, Row]:
    """The same row for several keys."""
    return {key: Row(verdict, text, off) for key in keys.split()}


def _within(section: str, *rows: dict[str, Row]) -> dict[str, Row]:
    """Rows of the keys of a section."""
    return {f"{section}.{key}": row for some in rows for key, row in some.items()}


_BUCKETS = "buckets and streams are the compiler's"
_MODEL = "the model's own: jax.checkpoint, flax.linen.remat"
_WHOLE = "a checkpoint holds whole arrays, which any stage and device count restores"
_NVME = "of nvme, which is refused"
_PINNED = "host memory is always pinned"

_BATCH = {
    **_rows(HONOURED, "train_batch_size", "`batch.rows`; of the three, those left out are solved as DeepSpeed does"),
    **_rows(HONOURED, "train_micro_batch_size_per_gpu", "`batch.micro_rows`"),
    **_rows(HONOURED, "gradient_accumulation_steps", "`batch.accumulate`; all of it inside one `train_batch`"),
    **_rows(
        REFUSED,
        "managed_gradient_accumulation",
        "`train_batch` takes all micro-batches; for a loop of your own: zerojax.value_and_grad",
        off=True,
    ),
    **_rows(HONOURED, "dataloader_drop_last", "`data.drop_last`"),
    **_rows(HONOURED, "gradient_clipping", "`optimizer.clip_norm`; 1.0 where absent, as in DeepSpeed; 0 for none"),
    **_rows(HONOURED, "gradient_allreduce_op", "`batch.reduce`"),
    **_rows(
        NOTED,
        "prescale_gradients gradient_predivide_factor",
        "the loss is divided by devices x micro-batches before its gradient is taken: no sum overflows",
    ),
    **_rows(NOTED, "sparse_gradients", "gradients of embeddings are dense"),
}

_OPTIMIZER = {
    "optimizer.type": Row(
        HONOURED,
        "`optimizer.name`: Adam (AdamW unless adam_w_mode is false), AdamW, Lamb, Lion, Adagrad, SGD, Muon, Adafactor; "
        "others are refused",
    ),
    "optimizer.legacy_fusion": Row(NOTED, "one kernel serves all leaves"),
    **_within(
        "optimizer.params",
        _rows(HONOURED, "lr", "`optimizer.learning_rate`; each optimizer's own default where absent"),
        _rows(HONOURED, "betas", "`optimizer.b1`, `optimizer.b2`"),
        _rows(HONOURED, "eps", "`optimizer.eps`"),
        _rows(HONOURED, "weight_decay", "`optimizer.weight_decay`; torch_adam with AdamW: 0.01 where absent"),
        _rows(HONOURED, "bias_correction", "`optimizer.bias_correction`"),
        _rows(HONOURED, "adam_w_mode", "false: Adam's weight decay is added to the gradient"),
        _rows(HONOURED, "torch_adam", "sets torch's default weight decay; the arithmetic is the same"),
        _rows(HONOURED, "max_coeff min_coeff", "Lamb: `optimizer.max_trust_ratio`, `min_trust_ratio`"),
        _rows(HONOURED, "eps_inside_sqrt", "Lamb: eps becomes `optimizer.eps_root`"),
        _rows(HONOURED, "momentum", "SGD and Muon: `optimizer.momentum`"),
        _rows(HONOURED, "nesterov", "SGD: `optimizer.nesterov`"),
        _rows(HONOURED, "initial_accumulator_value", "Adagrad: `optimizer.initial_accumulator_value`"),
        _rows(
            HONOURED, "muon_lr adam_lr", "Muon: rates of leaves of two dims, and of all others (DeepSpeed: use_muon)"
        ),
        _rows(
            HONOURED,
            "fp32_optimizer_states",
            "false: bfloat16 moments under bf16, rounded stochastically; under fp16 they stay float32",
        ),
        _rows(NOTED, "ns_method", "Muon: Optax's five Newton-Schulz steps"),
        _rows(NOTED, "fused foreach set_grad_none differentiable capturable", "how torch launches an optimizer"),
        _rows(REFUSED, "amsgrad", "no optimizer here keeps a maximum of moments"),
        _rows(REFUSED, "maximize dampening lr_decay", "torch's own, not served"),
        _rows(REFUSED, "max_grad_norm", "set gradient_clipping: DeepSpeed refuses it, too"),
    ),
    "scheduler.type": Row(
        HONOURED, "`schedule.name`: WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest; torch's are refused"
    ),
    **_within(
        "scheduler.params",
        _rows(
            HONOURED,
            "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps warmup_min_ratio cos_min_ratio "
            "cycle_min_lr cycle_max_lr cycle_first_step_size cycle_second_step_size cycle_first_stair_count "
            "cycle_second_stair_count decay_step_size decay_lr_rate cycle_momentum cycle_min_mom cycle_max_mom "
            "decay_mom_rate lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate "
            "lr_range_test_staircase",
            "in `schedule`, with the same name; exact values, the repeated first rate included",
        ),
        _rows(REFUSED, "last_batch_iteration", "load a checkpoint: the count is in it", off=-1),
    ),
}

_BF16 = {
    **_rows(HONOURED, "enabled", "`precision.params=bfloat16`, exact float32 weights behind them in 2 bytes each"),
    **_rows(HONOURED, "check_grad_overflow", "`precision.skip_nonfinite`; true where absent"),
    **_rows(HONOURED, "bf16_master_weights_and_grads", "`precision.master=none`"),
    **_rows(HONOURED, "bf16_optimizer_states", "`optimizer.mu_dtype` and `nu_dtype`, rounded stochastically"),
    **_rows(NOTED, "immediate_grad_update", "micro-batches are summed in float32 at once"),
}

_PRECISION = {
    **_within("bf16", _BF16),
    **_within("bfloat16", _BF16),
    **_within(
        "fp16",
        _rows(HONOURED, "enabled", "`precision.params=float16`, float32 weights behind them, a loss scale"),
        _rows(HONOURED, "auto_cast", "`precision.cast_batch`"),
        _rows(HONOURED, "loss_scale", "`loss_scale.kind`: 0 is dynamic, another one static"),
        _rows(HONOURED, "initial_scale_power", "`loss_scale.initial`, a power of two"),
        _rows(HONOURED, "loss_scale_window", "`loss_scale.window`"),
        _rows(HONOURED, "hysteresis consecutive_hysteresis", "`loss_scale`, the same names"),
        _rows(HONOURED, "min_loss_scale", "`loss_scale.minimum`, where the scale holds; DeepSpeed raises"),
        _rows(HONOURED, "fp16_master_weights_and_grads", "`precision.master=none`"),
    ),
    **_rows(REFUSED, "amp", "use bf16 or fp16: Apex patches torch"),
    **_rows(REFUSED, "torch_autocast", "use bf16, or the dtype of your Flax modules"),
    **_rows(HONOURED, "communication_data_type", "`precision.grad_dtype`"),
    **_rows(NOTED, "seq_parallel_communication_data_type", "sequence parallelism is said by mesh axes, in the model"),
    **_rows(HONOURED, "data_types.param_dtype", "must agree with fp16 and bf16, as in DeepSpeed"),
    **_rows(NOTED, "data_types.grad_accum_dtype", "micro-batches are summed in float32"),
    **_rows(NOTED, "data_types.buffer_dtype", "Flax modules say their own"),
}

_ZERO = _within(
    "zero_optimization",
    _rows(HONOURED, "stage", "`zero.stage`"),
    _rows(
        HONOURED,
        "stage3_param_persistence_threshold param_persistence_threshold",
        "`zero.min_size` at stage 3; without effect below, as in DeepSpeed",
    ),
    _rows(
        NOTED,
        "allgather_partitions allgather_bucket_size allgather_size overlap_comm reduce_scatter reduce_bucket_size "
        "contiguous_gradients use_multi_rank_bucket_allreduce round_robin_gradients stage3_max_live_parameters "
        "stage3_max_reuse_distance stage3_prefetch_bucket_size stage3_model_persistence_threshold "
        "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
        "sub_group_size max_live_parameters max_reuse_distance prefetch_bucket_size model_persistence_threshold "
        "module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential memory_efficient_linear "
        "override_module_apply log_trace_cache_warnings enable_sanity_checks leaf_module legacy_stage1 "
        "ignore_unused_parameters save_muon_momentum_buffer_in_memory",
        _BUCKETS,
    ),
    _rows(
        NOTED,
        "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
        "gather_16bit_weights_on_model_save load_from_fp32_weights elastic_checkpoint pipeline_loading_checkpoint",
        _WHOLE,
    ),
    _within(
        "offload_optimizer",
        _rows(
            HONOURED,
            "device",
            "`zero.offload.device`: cpu is pinned_host, updated on the GPU in buckets; nvme is refused",
        ),
        _rows(HONOURED, "ratio", "`zero.offload.fraction`"),
        _rows(NOTED, "pin_memory", _PINNED),
        _rows(NOTED, "buffer_count buffer_size fast_init pipeline pipeline_read pipeline_write", _BUCKETS),
        _rows(NOTED, "nvme_path", _NVME),
        _rows(NOTED, "cpuadam_cores_perc", "the update runs on the GPU"),
        _rows(REFUSED, "super_offload", "not served: take `device: cpu` alone"),
    ),
    _within(
        "offload_param",
        _rows(
            HONOURED,
            "device",
            "`zero.offload.params`: in host memory what is sharded at stage 3; nvme is refused",
        ),
        _rows(NOTED, "pin_memory", _PINNED),
        _rows(NOTED, "buffer_count buffer_size max_in_cpu", _BUCKETS),
        _rows(NOTED, "nvme_path", _NVME),
    ),
    _rows(HONOURED, "cpu_offload", "the old name of offload_optimizer"),
    _rows(HONOURED, "cpu_offload_param cpu_offload_params", "old names of offload_param"),
    _rows(NOTED, "cpu_offload_use_pin_memory", _PINNED),
    _rows(REFUSED, "zero_hpz_partition_size", "ZeRO++ is not served", off=1),
    _rows(
        REFUSED,
        "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients zeropp_loco_param",
        "ZeRO++ is not served; communication_data_type halves what gradients send",
    ),
    _rows(REFUSED, "mics_shard_size", "not served: shard over all devices", off=-1),
    _rows(REFUSED, "mics_hierarchical_params_gather", "not served: shard over all devices"),
    _rows(REFUSED, "zenflow", "not served: take `offload_optimizer`"),
)

_OTHERS = {
    **_rows(NOTED, "zero_allow_untested_optimizer", "any Optax transformation is right at any stage"),
    **_rows(NOTED, "zero_force_ds_cpu_optimizer", "the update runs on the GPU"),
    **_rows(NOTED, "disable_allgather", _BUCKETS),
    **_rows(NOTED, "aio", _NVME),
    **_rows(NOTED, "activation_checkpointing", _MODEL),
    **_rows(REFUSED, "sparse_attention progressive_layer_drop", "not served: the model's own"),
    **_rows(REFUSED, "compression_training weight_quantization quantize_training eigenvalue", "not served"),
    **_rows(
        REFUSED,
        "tensor_parallel",
        "say it by a mesh axis and make_plan(param_specs=...), with make_train_step in place of initialize",
    ),
    **_rows(REFUSED, "sequence_parallel_size", "say it by a mesh axis, in the model", off=1),
    **_rows(REFUSED, "pipeline expert_parallel use_data_before_expert_parallelism hybrid_engine", "not served"),
    **_rows(REFUSED, "data_efficiency curriculum_learning", "not served: order the data before it is loaded"),
    **_rows(REFUSED, "elasticity", "set the batch sizes; a checkpoint restores on any device count"),
    **_rows(REFUSED, "autotuning", "`python -m zerojax plan` finds what fits without running"),
    **_rows(HONOURED, "steps_per_print", "`logging.every`"),
    **_rows(NOTED, "tensorboard wandb comet csv_monitor", "write what train_batch returns where you like"),
    **_rows(NOTED, "wall_clock_breakdown memory_breakdown timers flops_profiler", "jax.profiler tells the times"),
    **_rows(NOTED, "comms_logger", "zerojax.report.collectives reads them from the compiled program"),
    **_rows(NOTED, "dump_state log_level", "print(engine.plan.table(optimizer))"),
    **_rows(NOTED, "compile graph_harvesting vocabulary_size", "every step is compiled whole"),
    **_within("checkpoint", _rows(NOTED, "tag_validation load_universal parallel_write writer", _WHOLE)),
    **_rows(REFUSED, "checkpoint.use_node_local_storage", "save to a folder that all processes see"),
    **_rows(REFUSED, "nebula datastates_ckpt", "checkpoints are Orbax's"),
}

KEYS: dict[str, Row] = {**_BATCH, **_OPTIMIZER, **_PRECISION, **_ZERO, **_OTHERS}
"""By dotted name. Where a key's value is a dict, its row stands for all of it."""

AUTO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "optimizer.params.lr": 5e-5,
    "optimizer.params.betas": (0.9, 0.999),
    "optimizer.params.eps": 1e-8,
    "optimizer.params.weight_decay": 0.0,
    "scheduler.params.warmup_min_lr": 0.0,
    "scheduler.params.warmup_num_steps": 1,
    "fp16.enabled": False,
    "bf16.enabled": False,
}
"""What "auto" means: the defaults of Hugging Face's TrainingArguments, which fills these in."""

AUTO_OPEN: dict[str, str] = {
    "train_batch_size": "what the other two make",
    "scheduler.params.warmup_max_lr": "the optimizer's rate",
    "scheduler.params.total_num_steps": "open: set config.schedule.total_num_steps",
}
"""What it means where no number stands for it."""

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "lamb": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "max_coeff": 10.0, "min_coeff": 0.01},
    "lion": {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0},
    "adagrad": {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.0, "initial_accumulator_value": 0.0},
    "sgd": {"lr": 1e-3, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False},
    "muon": {"lr": None, "betas": (0.9, 0.95), "momentum": 0.95, "weight_decay": 0.0, "muon_lr": 0.02, "adam_lr": 3e-4},
    "adafactor": {"lr": 1e-2, "weight_decay": 0.0},
}
"""The params of each optimizer that change numbers, with DeepSpeed's (or torch's) defaults."""

FURTHER_PARAMS: dict[str, tuple[str, ...]] = {
    "adam": ("bias_correction", "adam_w_mode", "torch_adam", "fp32_optimizer_states"),
    "adamw": ("bias_correction", "adam_w_mode", "torch_adam", "fp32_optimizer_states"),
    "lamb": ("bias_correction", "eps_inside_sqrt"),
    "adagrad": ("fp32_optimizer_states",),
    "lion": ("fp32_optimizer_states",),
    "muon": ("eps", "ns_method"),
}
"""Params that are switches, or have no default of their own."""


def markdown() -> str:
    """The table as docs/from-deepspeed.md has it: keys that share a verdict and a text share a line.

    Example:
      >>> markdown().splitlines()[0]
      '| DeepSpeed | here | what becomes of it |'
    """
    lines: dict[tuple[str, str, str], list[str]] = {}
    for key, row in KEYS.items():
        section, _, last = key.rpartition(".")
        lines.setdefault((section, row.verdict, row.text), []).append(last)
    table = ["| DeepSpeed | here | what becomes of it |", "|---|---|---|"]
    for (section, verdict, text), names in lines.items():
        prefix = f"{section}." if section else ""
        table.append(f"| {', '.join(f'`{prefix}{name}`' for name in names)} | {verdict} | {text} |")
    return "\n".join(table)
