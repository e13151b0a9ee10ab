"""`initialize` end to end: DeepSpeed's own numbers at every stage, Linen and NNX, precision, errors."""

import functools
import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from torch_random import TorchGenerator

import zerojax

# Two ranks of DeepSpeed 0.19.8: an MLP of 7-13-3, six steps of two micro-batches of four rows on each rank.
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-2, "warmup_num_steps": 5},
    },
}
NORMS = [0.77381, 0.794515, 0.609279, 0.893244, 0.928561, 0.479979]
LAST_LOSSES = [(1.715376 + 0.959408) / 2, (0.703803 + 0.485347) / 2]  # each the mean of its two micro-batches


class MLP(nn.Module):
    """x [B, 7] -> [B, 3]."""

    @nn.compact
    def __call__(self, x):
        hidden = jnp.tanh(nn.Dense(13)(x))
        return nn.Dense(3)(hidden)


class MLPLoss(nn.Module):
    """{"x": [B, 7], "y": [B, 3]} -> mean squared error."""

    @nn.compact
    def __call__(self, batch):
        return jnp.mean((MLP(name="mlp")(batch["x"]) - batch["y"]) ** 2)


class NnxMLP(nnx.Module):
    """x [B, 7] -> [B, 3]; of a whole batch its loss."""

    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(7, 13, rngs=rngs), nnx.Linear(13, 3, rngs=rngs)

    def __call__(self, batch):
        return jnp.mean((self.second(jnp.tanh(self.first(batch["x"]))) - batch["y"]) ** 2)


def mse(model, params, batch):
    return jnp.mean((model.apply({"params": params}, batch["x"]) - batch["y"]) ** 2)


def torch_params():
    generator = TorchGenerator(0)
    return {"Dense_0": generator.linear(7, 13), "Dense_1": generator.linear(13, 3)}


def torch_batches():
    """Six batches of 16 rows: rank by rank, each one's micro-batches behind one another."""
    generator, batches = TorchGenerator(5), []
    for _ in range(6):
        micro = [(generator.randn(8, 7), generator.randn(8, 3)) for _ in range(2)]
        x, y = (
            np.concatenate([m[k][4 * r : 4 * r + 4] for r in range(2) for m in micro]).astype(np.float32)
            for k in range(2)
        )
        batches.append({"x": x, "y": y})
    return batches


def small(**config):
    """A config of 16 rows that shards small leaves."""
    return {"batch": {"rows": 16}, "zero": {"min_size": 1}} | config


def data(rows=64):
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(rows, 7)).astype(np.float32), "y": rng.normal(size=(rows, 3)).astype(np.float32)}


@pytest.mark.parametrize(("stage", "device"), [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "cpu")])
def test_losses_and_norms_are_deepspeeds_at_every_stage(stage, device):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "offload_optimizer": {"device": device}}
    raw = CONFIG | {"zero_optimization": zero}
    config = zerojax.config.from_deepspeed(raw)
    config.zero.min_size = 1
    model, batches = MLP(), torch_batches()
    engine, *_ = zerojax.initialize(
        config,
        model=model,
        loss_fn=functools.partial(mse, model),
        sample_batch=batches[0],
        mesh=models.mesh_of(2),
    )
    params = jax.device_put(torch_params(), engine.plan.params)
    engine.state = zerojax.create_train_state(params, engine.optimizer, engine.plan)
    losses, norms = [], []
    for n, batch in enumerate(batches):
        assert engine.get_lr()[0] == pytest.approx(max(0, min(1, np.log(max(n, 1)) / np.log(5))) * 1e-2)
        losses.append(float(engine.train_batch(batch)["loss"]))
        norms.append(engine.get_global_grad_norm())
    # Torch's float32 kernels round in another order; the golden values have six digits.
    np.testing.assert_allclose(norms, NORMS, rtol=1e-5)
    np.testing.assert_allclose(losses[-2:], LAST_LOSSES, rtol=1e-5)
    assert engine.global_steps == 6 and engine.skipped_steps == 0


def test_four_ways_to_give_a_linen_model():
    """The loss outside with a dict or a tuple as batch, or with what the model takes; and inside the model."""
    batch = data(16)
    pair = (batch["x"], batch["y"])
    model = MLP()
    tuple_loss = lambda params, rows: mse(model, params, {"x": rows[0], "y": rows[1]})
    dict_loss = functools.partial(mse, model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    losses = []
    for loss_fn, sample, rows in (
        (dict_loss, batch, batch),
        (dict_loss, shapes, batch),
        (dict_loss, batch["x"], batch),
        (tuple_loss, pair, pair),
    ):
        engine, *_ = zerojax.initialize(small(), model=model, loss_fn=loss_fn, sample_batch=sample)
        losses.append(float(engine.eval_batch(rows)["loss"]))
    assert len(set(losses)) == 1
    engine, *_ = zerojax.initialize(small(zero={"stage": 3, "min_size": 1}), model=MLPLoss(), sample_batch=batch)
    assert engine.plan.leaves[0].name.startswith("mlp/")
    first = float(engine.train_batch(batch)["loss"])
    assert float(engine.eval_batch(batch)["loss"]) < first


def test_a_model_that_takes_less_than_a_batch_gets_what_its_arguments_name_or_the_first_entry():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, tokens, mask=None):
            return nn.Dense(2 if mask is None else 3)(tokens)

    floats = lambda width: np.ones((16, width), np.float32)
    kernel = lambda model, batch: (
        zerojax.initialize(small(), model=model, loss_fn=lambda params, batch: 0.0, sample_batch=batch)[0]
        .state.params["Dense_0"]["kernel"].shape
    )  # fmt: skip
    assert kernel(Named(), {"labels": floats(4), "tokens": floats(5)}) == (5, 2)
    assert kernel(Named(), {"mask": floats(4), "tokens": floats(5)}) == (5, 3)
    assert kernel(MLP(), {"x": floats(7), "a": floats(4)}) == (7, 13)  # the first as it was given, not by the alphabet


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("way", ["module", "class", "loss_fn"])
def test_nnx(way, stage):
    batch, config = data(16), small(zero={"stage": stage, "min_size": 1})
    made = NnxMLP(nnx.Rngs(0))
    graph, _ = nnx.split(made)
    loss_fn = (lambda params, rows: nnx.merge(graph, params)(rows)) if way == "loss_fn" else None
    engine, *_ = zerojax.initialize(config, model=NnxMLP if way == "class" else made, loss_fn=loss_fn)
    assert [leaf.name for leaf in engine.plan.leaves][:2] == ["first/bias", "first/kernel"]
    if way != "class":
        assert float(engine.eval_batch(batch)["loss"]) == pytest.approx(float(made(batch)), rel=1e-6)
    losses = [float(engine.train_batch(batch)["loss"]) for _ in range(3)]
    assert losses[2] < losses[0]
    nnx.update(made, jax.device_get(engine.state.params))
    assert float(made(batch)) == pytest.approx(float(engine.eval_batch(batch)["loss"]), rel=1e-6)


def test_training_data_makes_a_dataloader():
    engine, optimizer, loader, schedule = zerojax.initialize(
        small(), model=MLP(), loss_fn=functools.partial(mse, MLP()), training_data=data(64), seed=3
    )
    assert engine.optimizer is optimizer and engine.dataloader is loader and engine.schedule is schedule
    assert len(loader) == 4 and float(schedule(7)) == pytest.approx(1e-3)
    for batch in loader:
        engine.train_batch(batch)
    for _ in range(3):
        engine.train_batch()
    assert engine.global_steps == loader.step == 7


def test_same_seed_same_params_other_seed_other_params():
    make = lambda seed: zerojax.initialize(small(), model=MLPLoss(), sample_batch=data(16), seed=seed)[0].state.params
    jax.tree.map(np.testing.assert_array_equal, make(0), make(0))
    assert not np.array_equal(make(0)["mlp"]["Dense_0"]["kernel"], make(1)["mlp"]["Dense_0"]["kernel"])


def test_bf16_trains_as_float32_from_the_same_weights():
    batch = data(16)
    half = {"train_batch_size": 16, "bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
    engine, *_ = zerojax.initialize(half, model=MLPLoss(), sample_batch=batch)
    assert {x.dtype.name for x in jax.tree.leaves(engine.state.params)} == {"bfloat16"}
    full = zerojax.full_precision(engine.state.params, engine.state.opt_state)
    plain, *_ = zerojax.initialize(half | {"bf16": {}}, model=MLPLoss(), sample_batch=batch)
    plain.state = zerojax.create_train_state(jax.device_get(full), plain.optimizer, plain.plan)
    for _ in range(5):
        losses = [float(e.train_batch(batch)["loss"]) for e in (engine, plain)]
    # bfloat16 params have eight bits; the loss is about 1.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    full = zerojax.full_precision(engine.state.params, engine.state.opt_state)
    close = functools.partial(np.testing.assert_allclose, atol=5e-3)  # five steps of 1e-2, of gradients off by 1 %
    jax.tree.map(close, full, plain.state.params)


def test_fp16_skips_what_overflows_and_keeps_schedule_and_params():
    batch = data(16)
    config = {
        "train_batch_size": 16,
        "fp16": {"enabled": True, "auto_cast": True, "initial_scale_power": 40, "hysteresis": 1},
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}},
    }
    engine, *_ = zerojax.initialize(config, model=MLPLoss(), sample_batch=batch)
    before = jax.device_get(engine.state.params)
    metrics = engine.train_batch(batch)
    assert not metrics["finite"] and float(metrics["loss_scale"]) == 2.0**40
    assert engine.skipped_steps == engine.global_steps == 1 and engine.get_lr() == [0.0]
    jax.tree.map(np.testing.assert_array_equal, before, engine.state.params)
    for _ in range(30):
        metrics = engine.train_batch(batch)
    done = engine.global_steps - engine.skipped_steps
    assert 5 < done < 30 and np.isfinite(engine.get_global_grad_norm())
    assert engine.get_lr()[0] == pytest.approx(1e-3) and {x.dtype.name for x in jax.tree.leaves(before)} == {"float16"}


def test_bf16_skips_a_nan_as_deepspeed_does():
    batch = data(16)
    half = {"train_batch_size": 16, "bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}}
    engine, *_ = zerojax.initialize(half, model=MLPLoss(), sample_batch=batch)
    before = jax.device_get(engine.state.params)
    engine.train_batch({"x": np.full_like(batch["x"], np.nan), "y": batch["y"]})
    assert engine.skipped_steps == 1
    jax.tree.map(np.testing.assert_array_equal, before, engine.state.params)


def test_sum_over_devices():
    batch = data(16)
    norms = []
    for op in ("mean", "sum"):
        raw = {"train_batch_size": 16, "gradient_allreduce_op": op, "optimizer": {"type": "SGD", "params": {"lr": 0.0}}}
        engine, *_ = zerojax.initialize(raw, model=MLPLoss(), sample_batch=batch, mesh=models.mesh_of(4))
        engine.train_batch(batch)
        norms.append(engine.get_global_grad_norm())
    assert norms[1] == pytest.approx(4 * norms[0], rel=1e-5)
    with pytest.raises(ValueError, match="sum over devices of a mean over micro-batches"):
        zerojax.config.from_deepspeed(raw | {"gradient_accumulation_steps": 2})


def test_annotations_of_a_model_are_specs():
    class Cut(nn.Module):
        @nn.compact
        def __call__(self, batch):
            init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
            return jnp.mean(nn.Dense(16, kernel_init=init)(batch["x"]) ** 2)

    mesh = models.mesh_of(4, 2, names=("data", "model"))
    engine, *_ = zerojax.initialize(
        small(zero={"stage": 3, "min_size": 1}),
        model=Cut(),
        sample_batch={"x": np.ones((16, 8), np.float32)},
        mesh=mesh,
    )
    assert engine.plan.params["Dense_0"]["kernel"].spec == jax.P("data", "model")
    assert engine.train_batch({"x": np.ones((16, 8), np.float32)})["finite"]


def test_the_axis_is_the_meshs_only_one_or_the_configs():
    batch = data(16)
    engine, *_ = zerojax.initialize(
        small(), model=MLPLoss(), sample_batch=batch, mesh=models.mesh_of(8, names=("fsdp",))
    )
    assert engine.plan.axes == ("fsdp",)
    mesh = models.mesh_of(4, 2, names=("fsdp", "model"))
    with pytest.raises(ValueError, match=r"zero.axis=\('data',\) names no axes of the mesh"):
        zerojax.initialize(small(), model=MLPLoss(), training_data=batch, mesh=mesh)
    both = small(zero={"stage": 1, "min_size": 1, "axis": ["fsdp", "model"]})
    engine, *_ = zerojax.initialize(both, model=MLPLoss(), training_data=batch, mesh=mesh)
    assert engine.plan.num_shards == 8 and engine.train_batch()["finite"]


def test_a_checkpoint_goes_on_where_it_was(tmp_path):
    make = lambda stage, devices: zerojax.initialize(
        small(zero={"stage": stage, "min_size": 1}, schedule={"name": "WarmupLR", "warmup_num_steps": 4}),
        model=MLP(),
        loss_fn=functools.partial(mse, MLP()),
        training_data=data(64),
        mesh=models.mesh_of(devices),
    )[0]
    engine = make(3, 8)
    for _ in range(3):
        engine.train_batch()
    engine.save_checkpoint(tmp_path, extra={"note": "half way"})
    want = [float(engine.train_batch()["loss"]) for _ in range(3)]
    for stage, devices in ((3, 8), (1, 4)):
        other = make(stage, devices)
        other.train_batch()
        assert other.load_checkpoint(tmp_path) == {"note": "half way"}
        assert other.global_steps == other.dataloader.step == 3 and other.get_lr()[0] > 0
        got = [float(other.train_batch()["loss"]) for _ in range(3)]
        assert got == want if devices == 8 else got == pytest.approx(want, rel=1e-5)


def test_lines_are_printed_every_so_often(capsys):
    engine, *_ = zerojax.initialize(small(logging={"every": 2}), model=MLPLoss(), sample_batch=data(16))
    for _ in range(3):
        engine.train_batch(data(16))
    assert capsys.readouterr().out.startswith("step 2: loss ") and engine.get_global_grad_norm() > 0


def test_nothing_is_known_before_the_first_step():
    engine, *_ = zerojax.initialize(small(), model=MLPLoss(), sample_batch=data(16))
    assert engine.get_global_grad_norm() is None and engine.global_steps == 0


class WithBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, batch):
        return jnp.mean(nn.BatchNorm(use_running_average=False)(batch["x"]))


class NnxDropout(nnx.Module):
    def __init__(self, rngs):
        self.drop, self.linear = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, batch):
        return jnp.mean(self.linear(self.drop(batch["x"])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": WithBatchNorm()}, "has the collections batch_stats beside 'params'"),
        ({"model": NnxDropout}, "has RngCount, RngKey beside its params"),
        ({"model": MLP(), "sample_batch": None, "loss_fn": mse}, "pass sample_batch= or training_data="),
        ({"model": MLP()}, "could not be initialised from a batch of"),
        ({"model": 3}, "model must be a Flax module"),
        ({"model": dict}, "a function that takes nnx.Rngs|it made a dict"),
        ({"config": {"batch": {"rows": 9}}, "training_data": data(16)}, "9 is not 1 x 1 x 8"),
        ({"config": {}, "training_data": data(16)}, "set batch.rows or batch.micro_rows"),
        (
            {"config": {"zero": {"stage": 2, "offload": {"device": "pinned_host", "params": True}}}},
            r"config: zero.offload.params is True and zero.stage 2: it wants stage 3",
        ),
        ({"config": {"zero": {"offload": {"params": True}}}}, "set the device to 'pinned_host'"),
        ({"config": {"batch": {"rws": 9}}}, "no key 'batch.rws'; the nearest is 'batch.rows'"),
        ({"config": "run.py"}, "get_config"),
    ],
)
def test_errors_say_what_to_do(options, message):
    options = {"config": small(), "model": MLPLoss(), "sample_batch": data(16)} | options
    with pytest.raises((ValueError, TypeError), match=message):
        zerojax.initialize(options.pop("config"), **options)


def test_a_batch_of_other_rows_is_refused():
    engine, *_ = zerojax.initialize(small(), model=MLPLoss(), sample_batch=data(16))
    with pytest.raises(ValueError, match="got 32 rows; the config says 16: 2 x 1 micro-batches x 8 devices"):
        engine.train_batch(data(32))
    with pytest.raises(ValueError, match="needs training_data="):
        engine.train_batch()


FILES = sorted((pathlib.Path(__file__).parent / "deepspeed").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_of_deepspeed_users_train_two_steps(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of keys without a meaning here; tests/test_deepspeed.py has them
        config = zerojax.config.from_deepspeed(path, auto={"scheduler.params.total_num_steps": 1000})
    config.logging.every = 0
    model = NnxMLP if path.stem.startswith("hf_") else MLPLoss()
    engine, _, loader, _ = zerojax.initialize(config, model=model, training_data=data(128))
    raw = json.loads(path.read_text())
    rows = raw.get("train_batch_size", "auto")
    assert rows == "auto" or len(loader) == -(-128 // rows)
    assert engine.plan.stage == raw.get("zero_optimization", {}).get("stage", 0)
    offloaded = raw.get("zero_optimization", {}).get("offload_optimizer", {}).get("device") == "cpu"
    assert ("pinned_host" in {x.sharding.memory_kind for x in jax.tree.leaves(engine.state.opt_state)}) == offloaded
    losses = [float(engine.train_batch()["loss"]) for _ in range(2)]
    assert np.all(np.isfinite(losses)) and engine.global_steps == 2 and engine.skipped_steps <= 2


def test_a_path_and_a_dict_of_deepspeed_are_configs():
    path = next(path for path in FILES if path.stem == "sgd_range_test")
    for config in (path, str(path), json.loads(path.read_text())):
        with pytest.warns(UserWarning, match="activation_checkpointing"):
            engine, *_ = zerojax.initialize(config, model=MLPLoss(), sample_batch=data(8))
        assert engine.config.optimizer.name == "sgd"
