"""Weights as safetensors: read back by the `safetensors` package itself, and from files that it wrote."""

import json
import os
import socket
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from safetensors import numpy as safetensors
from safetensors import safe_open

import zerojax
from zerojax import tensor_files, weights

PARAMS = {
    "blocks": {"kernel": np.arange(256, dtype=np.float32).reshape(32, 8) / 7, "steps": np.arange(8, dtype=np.int32)},
    "head": [np.linspace(-1, 1, 24).reshape(8, 3).astype("float16"), np.asarray(jnp.full((16,), 0.3, "bfloat16"))],
    "gain": np.float32(1.5),
    "empty": np.zeros((0, 4), np.float32),
    "odd": np.ones((5, 7), np.float32),
}
NAMES = {"blocks.kernel", "blocks.steps", "head.0", "head.1", "gain", "empty", "odd"}


def plan_of(params=PARAMS, devices=8, stage=3, **options):
    return zerojax.make_plan(params, models.mesh_of(devices), stage=stage, min_size=1, **options)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(map(np.asarray, jax.tree.leaves(got)), map(np.asarray, jax.tree.leaves(want)), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "weights"
    zerojax.export_params(folder, jax.device_put(PARAMS, plan_of().params))
    return folder


def test_safetensors_reads_what_was_exported(exported):
    assert [p.name for p in exported.iterdir()] == ["model.safetensors"]
    arrays = safetensors.load_file(exported / "model.safetensors")
    assert set(arrays) == NAMES
    blocks = {"kernel": arrays["blocks.kernel"], "steps": arrays["blocks.steps"]}
    head = [arrays["head.0"], arrays["head.1"]]
    assert_same({"blocks": blocks, "head": head} | {k: arrays[k] for k in ("gain", "empty", "odd")}, PARAMS)


@pytest.mark.parametrize(("devices", "stage"), [(8, 3), (2, 3), (4, 1)])
def test_another_plan_imports_it(exported, devices, stage):
    plan = plan_of(devices=devices, stage=stage)
    params = zerojax.import_params(exported, plan)
    assert_same(params, PARAMS)
    assert jax.tree.map(lambda x: x.sharding, params) == plan.params


def test_each_device_reads_its_own_slices(exported, monkeypatch):
    read, real = [], weights._slice

    def watched(source, leaf, index):
        part = real(source, leaf, index)
        read.append((tuple(source.get_shape()), part.size))
        return part

    monkeypatch.setattr(weights, "_slice", watched)
    zerojax.import_params(exported / "model.safetensors", plan_of())
    assert {size for shape, size in read if shape == (32, 8)} == {32 * 8 // 8}


def test_files_are_of_bounded_size(tmp_path, monkeypatch):
    held, real = [], tensor_files.save_file

    def watched(arrays, *args, **options):
        held.append(sum(x.nbytes for x in arrays.values()))
        real(arrays, *args, **options)

    monkeypatch.setattr(tensor_files, "save_file", watched)
    params = {f"w{i}": np.full((16, 16), i, np.float32) for i in range(5)}
    zerojax.export_params(tmp_path / "out", params, max_shard_bytes=2500)
    files = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*files, "model.safetensors.index.json"]
    assert max(held) <= 2500 and sum(held) == 5 * 1024
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 1024}
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(safetensors.load_file(tmp_path / "out" / file)[name], params[name])
    assert_same(zerojax.import_params(tmp_path / "out", plan_of(params)), params)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_arrays_of_one_file_are_in_memory(tmp_path, dtype):
    leaf = 2**18  # bytes
    file = 8 * leaf if dtype is None else 4 * leaf
    params = {f"w{i}": jnp.full((leaf // 4,), i, jnp.float32) for i in range(24)}
    tracemalloc.start()  # NumPy tells it of its arrays
    zerojax.export_params(tmp_path / "out", params, dtype=dtype, max_shard_bytes=file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Rounding takes a leaf, its copy, and a byte for each element of three masks: less than three leaves.
    assert file <= peak < file + 3 * leaf < 2 * file


def test_loaders_of_hugging_face_take_the_files(exported):
    # transformers and accelerate refuse "np" (modeling_utils.load_state_dict).
    with safe_open(exported / "model.safetensors", framework="np") as f:
        assert f.metadata() == {"format": "pt"}


def test_a_dtype_is_rounded_to_and_integers_stay(tmp_path):
    zerojax.export_params(tmp_path / "out", PARAMS, dtype="bfloat16")
    arrays = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert {name: x.dtype.name for name, x in arrays.items()} == dict.fromkeys(NAMES, "bfloat16") | {
        "blocks.steps": "int32"
    }
    np.testing.assert_array_equal(arrays["blocks.kernel"], jnp.asarray(PARAMS["blocks"]["kernel"], "bfloat16"))


def test_float32_files_go_into_a_16_bit_model(exported):
    params = jax.tree.map(lambda x: x.astype("bfloat16") if x.dtype == "float32" else x, PARAMS)
    assert_same(zerojax.import_params(exported, plan_of(params)), params)


@pytest.mark.parametrize(
    ("kind", "offload"), [("split", None), ("float32", None), ("split", zerojax.Offload(bucket_bytes=2**18))]
)
def test_masters_are_exported_in_full(tmp_path, kind, offload):
    rng = np.random.default_rng(0)
    params = {"big": rng.normal(size=(64, 8, 128)).astype("bfloat16"), "small": rng.normal(size=5).astype("bfloat16")}
    plan = plan_of(params, devices=2, stage=1, offload=offload)
    tx = zerojax.zero(zerojax.master_weights(zerojax.fused_adamw(1e-3), kind=kind), plan)
    state = zerojax.create_train_state(params, tx, plan)
    loss = lambda p, batch: sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(p)) * batch.mean()
    state, _ = zerojax.make_train_step(loss, tx, plan)(state, np.ones(4, np.float32))
    zerojax.export_params(tmp_path / "out", state)
    want = zerojax.full_precision(state.params, tx.in_use(state.opt_state))
    assert any(np.any(np.asarray(x.astype("bfloat16")) != np.asarray(x)) for x in jax.tree.leaves(want))
    assert_same(safetensors.load_file(tmp_path / "out" / "model.safetensors"), want)


def test_each_part_of_an_optimizer_has_its_masters(tmp_path):
    params = {"a": jnp.ones((4, 2), "bfloat16"), "b": jnp.ones(4, "bfloat16"), "c": jnp.ones(4, "bfloat16")}
    plan = plan_of(params, devices=2, stage=1)
    slow, fast = (zerojax.master_weights(optax.sgd(rate)) for rate in (1e-4, 1e-3))
    parts = {"slow": slow, "fast": fast, "frozen": optax.set_to_zero()}
    tx = zerojax.zero(optax.partition(parts, {"a": "slow", "b": "fast", "c": "frozen"}), plan)
    state = zerojax.create_train_state(params, tx, plan)
    loss = lambda p, batch: sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(p)) * batch.mean()
    state, _ = zerojax.make_train_step(loss, tx, plan)(state, np.ones(2, np.float32))
    zerojax.export_params(tmp_path / "out", state)
    one = np.float32(1)
    want = {
        "a": np.full((4, 2), one - np.float32(1e-4)),
        "b": np.full(4, one - np.float32(1e-3)),
        "c": np.asarray(params["c"]),
    }
    assert_same(safetensors.load_file(tmp_path / "out" / "model.safetensors"), want)


def test_a_state_without_masters_is_its_params(tmp_path):
    params = {k: v for k, v in PARAMS.items() if k in ("odd", "gain")}
    plan = plan_of(params, devices=2)
    zerojax.export_params(tmp_path / "out", zerojax.create_train_state(params, optax.adam(1e-3), plan))
    assert_same(safetensors.load_file(tmp_path / "out" / "model.safetensors"), params)


def test_names_of_others_are_mapped(tmp_path):
    theirs = {"dense.weight": np.ones((8, 4), np.float32), "b": np.zeros(4, np.float32), "lm_head": np.ones(1)}
    safetensors.save_file(theirs, tmp_path / "model.safetensors")
    plan = plan_of({"dense": {"kernel": theirs["dense.weight"]}, "b": theirs["b"]})
    for rename in (
        {"dense/kernel": "dense.weight"},
        lambda name: name.replace("kernel", "weight").replace("/", "."),
    ):
        params = zerojax.import_params(tmp_path, plan, rename=rename, strict=False)
        np.testing.assert_array_equal(params["dense"]["kernel"], theirs["dense.weight"])
    with pytest.raises(ValueError, match="holds 'lm_head', which this model lacks; strict=False"):
        zerojax.import_params(tmp_path, plan, rename=rename)
    with pytest.raises(ValueError, match=r"lacks 'dense.kernel', wanted for 'dense/kernel'; it has .*rename="):
        zerojax.import_params(tmp_path, plan)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.ones((8, 32), np.float32), r"'blocks.kernel' as F32 \[32, 8\], leaf 'blocks/kernel' is float32 \[8, 32\]"),
        (np.ones((32, 8), np.int32), r"as F32 \[32, 8\], leaf 'blocks/kernel' is int32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(exported, leaf, message):
    params = PARAMS | {"blocks": PARAMS["blocks"] | {"kernel": leaf}}
    with pytest.raises(ValueError, match=message):
        zerojax.import_params(exported, plan_of(params))


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        ({"a.b": np.ones(2), "a": {"b": np.zeros(2)}}, {}, ValueError, r"two leaves have the name 'a\.b'"),
        ({"key": jax.random.key(0)}, {}, TypeError, "'key' has dtype key<fry>, safetensors takes"),
        ({"name": "gpt"}, {}, TypeError, "'name' is no array"),
        ({"a": np.float32([1, 1e6])}, {"dtype": "float16"}, ValueError, "'a' has numbers beyond 65504.*bfloat16"),
        ({"a": np.ones(2)}, {"dtype": "int8"}, ValueError, "dtype must be one of .*'int8'"),
        ({"a": np.ones(2)}, {"max_shard_bytes": 0}, ValueError, "at least 1, got 0"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(tmp_path, params, options, error, message):
    with pytest.raises(error, match=message):
        zerojax.export_params(tmp_path / "out", params, **options)
    assert not list(tmp_path.iterdir())


def test_arrays_of_numpy_keep_their_64_bits_and_what_is_infinite_may_be(tmp_path):
    params = {"a": np.arange(3) + 2**40, "b": np.float64([1 / 3, np.inf])}
    zerojax.export_params(tmp_path / "out", params)
    assert_same(safetensors.load_file(tmp_path / "out" / "model.safetensors"), params)
    zerojax.export_params(tmp_path / "half", params, dtype="float16")
    half = safetensors.load_file(tmp_path / "half" / "model.safetensors")["b"]
    np.testing.assert_array_equal(half, np.float16([1 / 3, np.inf]))


def test_what_cannot_be_imported_is_refused_by_name(tmp_path):
    array = np.full((8, 4), 1e6, np.float32)
    safetensors.save_file({"a": array}, tmp_path / "model.safetensors")
    plan = plan_of({"a": array})
    with pytest.raises(ValueError, match="rename has 'b', which the plan lacks; its leaves are 'a'"):
        zerojax.import_params(tmp_path, plan, rename={"b": "a"})
    with pytest.raises(ValueError, match="'a' has numbers beyond 65504"):
        zerojax.import_params(tmp_path, plan_of({"a": np.zeros_like(array, "float16")}))
    abstract = zerojax.make_plan({"a": array}, jax.sharding.AbstractMesh((8,), ("data",)), stage=3)
    with pytest.raises(ValueError, match="wants a plan of devices"):
        zerojax.import_params(tmp_path, abstract)
    safetensors.save_file({"a": array}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"'a' is in model\.safetensors and in .*other\.safetensors"):
        zerojax.import_params(tmp_path, plan)
    for harm in ("{", "{}", '{"weight_map": []}'):
        (tmp_path / "model.safetensors.index.json").write_text(harm)
        with pytest.raises(ValueError, match=r"index\.json is damaged, or no index: .*again"):
            zerojax.import_params(tmp_path, plan)


def test_damage_and_absence_are_named(exported, tmp_path):
    content = (exported / "model.safetensors").read_bytes()
    for harm in (content[:-1], content[:30], b"", content[:9] + b"}" + content[10:]):
        (tmp_path / "model.safetensors").write_bytes(harm)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged or no safetensors file.*again"):
            zerojax.import_params(tmp_path, plan_of())
    with pytest.raises(FileNotFoundError, match=r"typo.safetensors is missing"):
        zerojax.import_params(tmp_path / "typo.safetensors", plan_of())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no .safetensors file"):
        zerojax.import_params(tmp_path / "empty", plan_of())


def test_what_a_killed_export_left_is_no_hindrance(tmp_path):
    partial = tmp_path / "out.zerojax-partial"
    partial.mkdir()
    (partial / "model.safetensors").write_text("half")
    zerojax.export_params(tmp_path / "out", {"a": np.ones(2, np.float32)})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


PROCESS = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:{port}", 2, int(sys.argv[1]))
import jax.numpy as jnp, numpy as np, zerojax
folder, main = sys.argv[2], jax.process_index() == 0
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
start = lambda: {"a": jnp.arange(512.0, dtype="bfloat16").reshape(64, 8), "b": jnp.ones(8, "bfloat16")}
plan = zerojax.make_plan(jax.eval_shape(start), mesh, stage=3, min_size=1)
tx = zerojax.zero(zerojax.master_weights(zerojax.fused_adamw(1e-3)), plan)
state = zerojax.create_train_state(start, tx, plan)
zerojax.export_params(folder + "/out", state)
params = zerojax.import_params(folder + "/out", plan)
shards = lambda x: [np.asarray(s.data, np.float32).tolist() for s in x.addressable_shards]
print(all(shards(params[k]) == shards(state.params[k]) for k in params))
# Only process 0 sees that a folder is there, or that a number is too large: no process waits for ever.
try:
    zerojax.export_params(folder + ("/out" if main else "/elsewhere"), state)
except FileExistsError as e:
    print("there")
try:
    zerojax.export_params(folder + "/half", {"w": np.float32([1e6 if main else 1])}, dtype="float16")
except (ValueError, OSError) as e:
    print(type(e).__name__)
"""


@pytest.mark.slow
def test_two_processes_export_and_import_and_fail_together(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        code = PROCESS.replace("{port}", str(s.getsockname()[1]))
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    start = lambda k: subprocess.Popen(
        [sys.executable, "-c", code, str(k), str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    outs = [p.communicate(timeout=120) for p in [start(0), start(1)]]
    for (out, err), last in zip(outs, ("ValueError", "OSError"), strict=True):
        assert out.splitlines()[-3:] == ["True", "there", last], err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    arrays = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert_same(
        arrays, {"a": np.arange(512).astype("bfloat16").astype("float32").reshape(64, 8), "b": np.ones(8, "f4")}
    )


def test_nothing_is_overwritten_and_nothing_half_written_stays(exported, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        zerojax.export_params(exported, PARAMS)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="were not written"):
        zerojax.export_params(tmp_path / "file" / "out", PARAMS)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*Nothing is left"):
        zerojax.export_params(tmp_path / "out", PARAMS)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
