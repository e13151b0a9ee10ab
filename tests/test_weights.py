"""Weights as safetensors: read back by the `safetensors` package itself, and from files that it wrote."""

import json

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from safetensors import numpy as safetensors

import zerojax
from zerojax import weights

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

    def watched(source, dtype, index):
        part = real(source, dtype, index)
        read.append((tuple(source.get_shape()), part.size))
        return part

    monkeypatch.setattr(weights, "_slice", watched)
    zerojax.import_params(exported / "model.safetensors", plan_of())
    assert {size for shape, size in read if shape == (32, 8)} == {32 * 8 // 8}


def test_files_are_of_bounded_size(tmp_path, monkeypatch):
    held, real = [], weights.save_file

    def watched(arrays, *args, **options):
        held.append(sum(x.nbytes for x in arrays.values()))
        real(arrays, *args, **options)

    monkeypatch.setattr(weights, "save_file", watched)
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


def test_nothing_is_overwritten_and_nothing_half_written_stays(exported, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        zerojax.export_params(exported, PARAMS)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="were not written"):
        zerojax.export_params(tmp_path / "file" / "out", PARAMS)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*Nothing is left"):
        zerojax.export_params(tmp_path / "out", PARAMS)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
