"""DeepSpeed's JSON: each key honoured, noted or refused; none dropped in silence."""

import json
import pathlib
import warnings

import pytest

from zerojax import config, deepspeed_keys
from zerojax.deepspeed import looks_like_deepspeed
from zerojax.deepspeed_keys import HONOURED, KEYS, NOTED, REFUSED

BASE = {
    "train_batch_size": 32,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
}


def read(raw, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return config.from_deepspeed(raw, **options)


def nested(name, value):
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def merged(*trees):
    out = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(out.get(key), dict)
            out[key] = merged(out[key], value) if both else value
    return out


# A value that is not DeepSpeed's default, and what else the file has to say for it to count.
SGD = {"optimizer": {"type": "SGD"}}
MUON = {"optimizer": {"type": "Muon"}}
LAMB = {"optimizer": {"type": "Lamb"}}
FP16, BF16 = {"fp16": {"enabled": True}}, {"bf16": {"enabled": True}}
STAGE3 = {"zero_optimization": {"stage": 3}}
EXAMPLES = {
    "train_batch_size": (64, {}),
    "train_micro_batch_size_per_gpu": (4, {}),
    "gradient_accumulation_steps": (2, {}),
    "gradient_clipping": (0.5, {}),
    "steps_per_print": (10, {}),
    "dataloader_drop_last": (True, {}),
    "gradient_allreduce_op": ("sum", {}),
    "communication_data_type": ("bf16", {}),
    "data_types.param_dtype": ("bf16", None),  # it may only repeat what is so: see below
    "optimizer.type": ("Lion", {}),
    "optimizer.params.lr": (0.5, {}),
    "optimizer.params.betas": ([0.5, 0.6], {}),
    "optimizer.params.eps": (1e-3, {}),
    "optimizer.params.weight_decay": (0.3, {}),
    "optimizer.params.bias_correction": (False, {}),
    "optimizer.params.adam_w_mode": (False, {"optimizer": {"type": "Adam"}}),
    "optimizer.params.torch_adam": (True, {}),
    "optimizer.params.max_coeff": (0.3, LAMB),
    "optimizer.params.min_coeff": (0.3, LAMB),
    "optimizer.params.eps_inside_sqrt": (True, LAMB),
    "optimizer.params.momentum": (0.3, SGD),
    "optimizer.params.nesterov": (True, SGD),
    "optimizer.params.initial_accumulator_value": (0.3, {"optimizer": {"type": "Adagrad"}}),
    "optimizer.params.muon_lr": (0.3, MUON),
    "optimizer.params.adam_lr": (0.3, MUON),
    "optimizer.params.fp32_optimizer_states": (False, BF16),
    "scheduler.type": ("WarmupLR", {}),
    "bf16.enabled": (True, {}),
    "bf16.check_grad_overflow": (False, BF16),
    "bf16.bf16_master_weights_and_grads": (True, BF16),
    "bf16.bf16_optimizer_states": (True, merged(BF16, {"bf16": {"bf16_master_weights_and_grads": True}})),
    "fp16.enabled": (True, {}),
    "fp16.auto_cast": (True, FP16),
    "fp16.loss_scale": (128, FP16),
    "fp16.initial_scale_power": (8, FP16),
    "fp16.loss_scale_window": (8, FP16),
    "fp16.hysteresis": (8, FP16),
    "fp16.consecutive_hysteresis": (True, FP16),
    "fp16.min_loss_scale": (8, FP16),
    "fp16.fp16_master_weights_and_grads": (True, FP16),
    "zero_optimization.stage": (2, {}),
    "zero_optimization.stage3_param_persistence_threshold": (7, STAGE3),
    "zero_optimization.param_persistence_threshold": (7, STAGE3),
    "zero_optimization.offload_optimizer.device": ("cpu", {}),
    "zero_optimization.offload_optimizer.ratio": (
        0.5,
        merged(STAGE3, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    ),
    "zero_optimization.offload_param.device": ("cpu", STAGE3),
    "zero_optimization.cpu_offload": (True, {}),
    "zero_optimization.cpu_offload_param": (True, STAGE3),
    "zero_optimization.cpu_offload_params": (True, STAGE3),
}
EXAMPLES |= {
    name.replace("bf16.", "bfloat16.", 1): (v, {}) for name, (v, _) in EXAMPLES.items() if name == "bf16.enabled"
}
for _name in ("check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states"):
    _value, _extra = EXAMPLES[f"bf16.{_name}"]
    EXAMPLES[f"bfloat16.{_name}"] = (_value, {"bfloat16": _extra["bf16"]})
SCHEDULER = {"warmup_type": "linear", "cycle_momentum": False, "lr_range_test_staircase": True}
EXAMPLES |= {
    name: (SCHEDULER.get(name.split(".")[-1], 7), {"scheduler": {"type": "WarmupLR"}})
    for name in KEYS
    if name.startswith("scheduler.params.") and KEYS[name].verdict == HONOURED
}


def of(verdict):
    return [name for name, row in KEYS.items() if row.verdict == verdict]


@pytest.mark.parametrize("name", of(HONOURED))
def test_an_honoured_key_has_an_effect(name):
    value, extra = EXAMPLES[name]
    if extra is None:
        with pytest.raises(ValueError, match=r"param_dtype.*but fp16 and bf16"):
            read(merged(BASE, nested(name, value)))
        assert read(merged(BASE, BF16, nested(name, value))) == read(merged(BASE, BF16))
        return
    base = merged(BASE, extra)
    assert read(base) != read(merged(base, nested(name, value)))


@pytest.mark.parametrize("name", of(NOTED))
def test_a_noted_key_is_named_in_a_warning_and_has_no_effect(name):
    extra = MUON if name.endswith("ns_method") else {}
    raw = merged(BASE, extra, nested(name, 5))
    if name.startswith("optimizer.params.") and not extra:
        raw = merged(BASE, nested(name, True))
    with pytest.warns(UserWarning, match=name.replace(".", r"\.")):
        got = config.from_deepspeed(raw)
    assert got == read(merged(BASE, extra))


@pytest.mark.parametrize("name", of(REFUSED))
def test_a_refused_key_raises_with_the_way_out_unless_off(name):
    row = KEYS[name]
    value = {None: {"enabled": True}, True: False}.get(row.off, 5)
    with pytest.raises(ValueError) as caught:
        read(merged(BASE, nested(name, value)))
    assert repr(name) in str(caught.value) and row.text in str(caught.value)
    off = {"enabled": False} if row.off is None else row.off
    assert read(merged(BASE, nested(name, off))) == read(BASE)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"gradient_cliping": 2.0}, "unknown key 'gradient_cliping'.*nearest is 'gradient_clipping'"),
        ({"zero_optimization": {"stge": 2}}, "'zero_optimization.stge'.*nearest is 'zero_optimization.stage'"),
        ({"torch_adam": True}, "unknown key 'torch_adam'.*nearest is 'optimizer.params.torch_adam'"),
        ({"optimizer": {"torch_adam": True}}, "'optimizer.torch_adam'.*nearest is 'optimizer.params.torch_adam'"),
        ({"foo_bar": 1}, "unknown key 'foo_bar'.*docs/from-deepspeed.md"),
        ({"optimizer": {"type": "AdamWW"}}, "'AdamWW', which is not served; the nearest is 'adamw'"),
        ({"optimizer": {"type": "OneBitAdam"}}, "gradients travel uncompressed"),
        ({"optimizer": {"params": {"max_coeff": 1}}}, "'optimizer.params.max_coeff' is no parameter of AdamW"),
        ({"optimizer": {"params": {"lr": "fast"}}}, "'optimizer.params.lr' must be a number"),
        ({"scheduler": {"type": "StepLR"}}, "'StepLR', which is not served"),
        ({"scheduler": {"type": "WarmUpLR"}}, "nearest is 'WarmupLR'"),
        ({"scheduler": {"params": {"warmup_num_steps": 1}}}, "has params but no type"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}, "at least 1, got 0"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "both enabled"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "needs bf16_master_weights_and_grads"),
        ({"fp16": {"enabled": "yes"}}, "'fp16.enabled' must be true or false"),
        ({"fp16": True}, "'fp16' must be an object"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "nvme is not served: take cpu"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
        ({"communication_data_type": "int8"}, "must be one of fp32, fp16, bf16"),
        ({"train_batch_size": None}, "neither 'train_batch_size' nor"),
    ],
)
def test_errors_name_key_place_and_way_out(raw, message):
    with pytest.raises(ValueError, match=message):
        read(merged(BASE, raw))


def test_hidden_defaults_are_deepspeeds():
    c = read(merged(BASE, {"optimizer": {"type": "Adam"}}, BF16))
    assert c.optimizer.name == "adamw" and c.optimizer.weight_decay == 0 and c.optimizer.clip_norm == 1
    assert c.precision.skip_nonfinite and c.zero.stage == 0
    assert read(merged(BASE, {"optimizer": {"params": {"torch_adam": True}}})).optimizer.weight_decay == 0.01
    lamb = read({"train_batch_size": 8, "optimizer": {"type": "Lamb"}}).optimizer
    assert (lamb.variant, lamb.min_trust_ratio, lamb.max_trust_ratio, lamb.eps) == ("deepspeed", 0.01, 10, 1e-8)
    decay = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 10, "warmup_num_steps": 2}}}
    assert read(merged(BASE, decay)).schedule.warmup_max_lr == 1e-3
    assert float(config.make_schedule(read(merged(BASE, {"scheduler": {"type": "WarmupLR"}})))(2000)) == pytest.approx(
        1e-3
    )
    assert read(merged(BASE, {"zero_optimization": True})).zero.stage == 1
    with pytest.warns(UserWarning, match="AdamW with rate 0.001"):
        assert config.from_deepspeed({"train_batch_size": 8}).optimizer.learning_rate == 1e-3


def test_small_moments_of_every_optimizer():
    half = merged(BF16, {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}})
    dtypes = lambda c: (c.optimizer.mu_dtype, c.optimizer.nu_dtype)
    assert dtypes(read(merged(BASE, half))) == ("bfloat16", "bfloat16")
    assert dtypes(read(merged(BASE, half, {"optimizer": {"type": "Lion"}}))) == ("bfloat16", None)
    with pytest.warns(UserWarning, match="those of sgd stay as they are"):
        c = config.from_deepspeed(merged(BASE, half, SGD))
    config.make_optimizer(c)


def test_loss_scale_grows_and_shrinks_as_deepspeeds():
    """DeepSpeed 0.19: with a window of 2 the scale doubles after steps 3, 5 and 7; two overflows halve it."""
    fp16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 2, "min_loss_scale": 16}
    rule = config.make_loss_scale(read(merged(BASE, {"fp16": fp16})))
    state, scales = rule.init(), []
    for finite in [True] * 7 + [False] * 4:
        state = rule.update(state, finite)
        scales.append(float(state.scale))
    assert scales == [16, 16, 32, 32, 64, 64, 128, 128, 64, 32, 16]


def test_muons_two_rates():
    rates = lambda c: (c.optimizer.learning_rate, c.optimizer.adam_learning_rate)
    muon = lambda **params: {"train_batch_size": 8, "optimizer": {"type": "Muon", "params": params}}
    assert rates(read(muon())) == (0.02, 3e-4)
    assert rates(read(muon(lr=0.5))) == (0.5, 0.5)
    assert rates(read(muon(lr=0.5, muon_lr=0.25))) == (0.25, 0.5)
    assert rates(read(muon(adam_lr=0.125) | {"scheduler": {"type": "WarmupLR"}})) == (0.02, 0.125)
    absolute = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}}
    with pytest.warns(UserWarning, match="one rate, as in DeepSpeed"):
        assert rates(config.from_deepspeed(muon(adam_lr=0.125) | absolute)) == (0.02, 0.02)


def test_auto_is_hugging_faces_default_and_can_be_given():
    raw = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_max_lr": "auto"}},
    }
    with pytest.warns(UserWarning, match='train_micro_batch_size_per_gpu.*"auto" is 8'):
        c = config.from_deepspeed(raw)
    assert c.optimizer.learning_rate == 5e-5 and c.precision.params == "float32"
    assert tuple(config.solve_batch(c, 4)) == (32, 8, 1)
    with pytest.raises(ValueError, match=r"needs schedule\.total_num_steps"):
        config.make_schedule(c)
    given = {"optimizer.params.lr": 1e-3, "bf16.enabled": True, "scheduler.params.total_num_steps": 2000}
    with pytest.warns(UserWarning):
        c = config.from_deepspeed(raw, auto=given)
    assert c.optimizer.learning_rate == 1e-3 and c.precision.params == "bfloat16"
    assert float(config.make_schedule(c)(1001)) == pytest.approx(1e-3)  # the rate, not the class's default
    with pytest.warns(UserWarning, match='stage: "auto" is DeepSpeed\'s default'):
        assert config.from_deepspeed(merged(BASE, {"zero_optimization": {"stage": "auto"}})).zero.stage == 0
    assert read(merged(BASE, {"amp": {"enabled": "auto", "opt_level": "auto"}})) == read(BASE)
    with pytest.raises(ValueError, match=r"unknown key 'optimizer\.params\.lrr'"):
        config.from_deepspeed(raw, auto={"optimizer.params.lrr": 1e-3})


def test_files(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(BASE))
    assert read(path) == read(str(path)) == read(BASE)
    for text, message in (
        ('{"train_batch_size": 8, "train_batch_size": 16}', "stand there twice: train_batch_size"),
        ("{// comment\n}", "is no JSON"),
        ("[]", "holds no JSON object"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(path)


def test_a_dict_is_told_apart_from_the_schemas():
    assert looks_like_deepspeed(BASE) and looks_like_deepspeed({"optimizer": {"type": "Adam"}})
    assert not looks_like_deepspeed(config.default()) and not looks_like_deepspeed({"optimizer": {"name": "adam"}})


def test_table_has_every_key_once():
    table = deepspeed_keys.markdown()
    assert all(f"`{name}`" in table for name in KEYS)
    assert {row.verdict for row in KEYS.values()} == {HONOURED, NOTED, REFUSED}


def test_docs_print_the_table():
    docs = pathlib.Path(__file__).resolve().parent.parent / "docs" / "from-deepspeed.md"
    printed = docs.read_text().split("checks it -->\n")[1]
    assert printed.strip() == deepspeed_keys.markdown(), "run: python -m zerojax keys --deepspeed"
