"""Checkpoints: any plan restores them bit for bit, training goes on from them bit for bit, and damage is named."""

import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
import resume
from jax.sharding import PartitionSpec as P

import zerojax
from zerojax import __main__ as commands
from zerojax import checkpoint, host, logical, manifest

BUCKETS = zerojax.Offload(bucket_bytes=2**12)


def adamw():
    """`models.clipped_adamw`, fused, so that its state can be streamed."""
    schedule = optax.linear_schedule(1e-2, 1e-3, 10)
    return zerojax.chain(optax.clip_by_global_norm(0.5), zerojax.fused_adamw(schedule, weight_decay=0.1))


def plan_of(*sizes, stage, names=("data",), axis_type=models.AUTO, **options):
    mesh = models.mesh_of(*sizes, names=names, axis_type=axis_type)
    return zerojax.make_plan(models.mlp_params(), mesh, stage=stage, min_size=1, **options)


def tensor_parallel():
    specs = jax.tree.map(lambda x: P(), models.mlp_params())
    specs["inner"]["kernel"], specs["head"][0] = P(None, "model"), P("model", None)
    return plan_of(4, 2, stage=1, names=("data", "model"), param_specs=specs)


LAYOUTS = {
    "8 devices, stage 3": lambda: plan_of(8, stage=3),
    "4, stage 1, offload": lambda: plan_of(4, stage=1, offload=BUCKETS),
    "1, stage 0": lambda: plan_of(1, stage=0),
    "8, stage 2": lambda: plan_of(8, stage=2),
    "tensor-parallel": tensor_parallel,
    "explicit mesh": lambda: plan_of(4, stage=3, axis_type=models.EXPLICIT),
    "half of it offloaded": lambda: plan_of(2, stage=2, offload=zerojax.Offload(fraction=0.5)),
    "two axes": lambda: plan_of(2, 4, stage=3, names=("a", "b"), axis=("a", "b")),
    "nu offloaded": lambda: plan_of(8, stage=3, offload=zerojax.Offload(pattern="nu")),
}


def whole(tx, plan, state):
    """All numbers of a state, its leaves whole, as on one device."""
    opt_state = zerojax.zero(tx, plan).in_use(state.opt_state)
    return jax.tree.map(np.asarray, jax.device_get(state._replace(opt_state=opt_state)))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def assert_laid_out(state, tx, plan, params=None):
    """As the plan keeps a state that is created."""
    created = zerojax.create_train_state(models.mlp_params() if params is None else params, tx, plan)
    assert jax.tree.structure(state) == jax.tree.structure(created)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(created), strict=True):
        assert x.sharding == y.sharding and x.dtype == y.dtype and x.shape == y.shape


def test_training_goes_on_through_a_chain_of_plans(tmp_path):
    tx, losses, state, before = adamw(), [], None, None
    for step, (batch, layout) in enumerate(zip(models.mlp_batches(), list(LAYOUTS.values())[:4], strict=True)):
        plan = layout()
        if state is None:
            state = zerojax.create_train_state(models.mlp_params(), tx, plan)
        else:
            state, _ = zerojax.restore_checkpoint(tmp_path, tx, plan)
            assert_same(whole(tx, plan, state), before)
            assert_laid_out(state, tx, plan)
        state, metrics = zerojax.make_train_step(models.mlp_loss, tx, plan)(state, batch)
        losses.append(float(metrics["loss"]))
        before = whole(tx, plan, state)
        zerojax.save_checkpoint(tmp_path, state)
        assert zerojax.latest_step(tmp_path) == step + 1
    plan, without = LAYOUTS["1, stage 0"](), []
    state, step = (
        zerojax.create_train_state(models.mlp_params(), tx, plan),
        zerojax.make_train_step(models.mlp_loss, tx, plan),
    )
    for batch in models.mlp_batches():
        state, metrics = step(state, batch)
        without.append(float(metrics["loss"]))
    # Sums over other numbers of devices are made in another order, a last bit or two of float32.
    np.testing.assert_allclose(losses, without, rtol=5e-7)
    assert losses[-1] < losses[0] / 2


def test_every_layout_restores_what_another_saved(tmp_path):
    tx, plan = adamw(), LAYOUTS["nu offloaded"]()
    numbers = np.random.default_rng(0)
    state = zerojax.create_train_state(models.mlp_params(), tx, plan)
    noise = lambda x: jax.device_put(numbers.normal(size=x.shape).astype(x.dtype), x.sharding) if x.ndim else x
    state = jax.tree.map(noise, state)
    want = whole(tx, plan, state)
    for step, layout in enumerate(LAYOUTS.values()):
        zerojax.save_checkpoint(tmp_path, state, step=step, max_to_keep=1)
        plan = layout()
        state, _ = zerojax.restore_checkpoint(tmp_path, tx, plan)
        assert_same(whole(tx, plan, state), want)
        assert_laid_out(state, tx, plan)


def test_a_leaf_in_pieces_restores_in_other_pieces_and_whole(tmp_path):
    # A piece has a megabyte at least, and this leaf is 4.5 MB.
    params = {"big": np.zeros((8, 256, 576), np.float32), "small": np.zeros((96, 40), np.float32)}
    offload = zerojax.Offload(bucket_bytes=2**18)
    layouts = [(1, 1, offload), (4, 3, offload), (2, 2, None), (2, 1, offload), (8, 3, None)]
    plans = [
        zerojax.make_plan(params, models.mesh_of(devices), stage=stage, min_size=16, offload=offload)
        for devices, stage, offload in layouts
    ]
    tx, draw = adamw(), np.random.default_rng(0)
    state = zerojax.create_train_state(params, tx, plans[0])
    noise = lambda x: jax.device_put(draw.normal(size=x.shape).astype(x.dtype), x.sharding) if x.ndim else x
    state, grids = jax.tree.map(noise, state), []
    want = whole(tx, plans[0], state)
    for step, plan in enumerate(plans):
        zerojax.save_checkpoint(tmp_path, state, step=step, max_to_keep=1)
        state, _ = zerojax.restore_checkpoint(tmp_path, tx, plan)
        assert_same(whole(tx, plan, state), want)
        assert_laid_out(state, tx, plan, params)
        pieces = [x for x in jax.tree.leaves(state, is_leaf=host.is_pieces) if host.is_pieces(x)]
        grids.append({x.grid for x in pieces})
    assert [len(g) for g in grids] == [1, 1, 0, 1, 0] and grids[0] != grids[1] != grids[3]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Runs of `resume.CASES` in this process, and their second halves in another one."""
    folder = tmp_path_factory.mktemp("runs")
    first = {name: resume.first_half(name, folder / name) for name in resume.CASES}
    command = [sys.executable, str(pathlib.Path(resume.__file__)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return first, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", resume.CASES)
def test_a_new_process_goes_on_bit_for_bit(resumed, case):
    # What was saved while the steps went on: state that they donate is copied first.
    first, second = resumed
    assert first[case] == second[case]
    assert len(set(first[case]["losses"])) == resume.STEPS
    assert (first[case]["skipped"] > 0) == (case == "float16")  # its first scale overflows


# The rest is on a small state.

TX = optax.adam(1e-3)
PARAMS = {"w": np.arange(32, dtype=np.float32).reshape(8, 4), "b": np.ones(4, np.float32)}


def small_plan(params=PARAMS, **options):
    options = {"stage": 1, "min_size": 1} | options
    return zerojax.make_plan(params, models.mesh_of(2), **options)


def small_state(params=PARAMS, tx=TX, **options):
    return zerojax.create_train_state(params, tx, small_plan(params, **options))


def test_restoring_holds_no_more_than_a_devices_share(tmp_path, monkeypatch):
    params = {f"w{i}": np.full((64, 64), i, np.float32) for i in range(8)}
    plan = zerojax.make_plan(params, models.mesh_of(8), stage=3, min_size=1)
    zerojax.save_checkpoint(tmp_path, zerojax.create_train_state(params, TX, plan))
    device, read, held = jax.devices()[0], checkpoint._read, []

    def in_use():
        here = [x for x in jax.live_arrays() if device in x.sharding.device_set]
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in here)

    def watched(*args):
        result = read(*args)
        held.append(in_use() - before)
        return result

    monkeypatch.setattr(checkpoint, "_read", watched)
    monkeypatch.setattr(host, "PART_BYTES", 20_000)
    before = in_use()
    state, _ = zerojax.restore_checkpoint(tmp_path, TX, plan)
    share = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert len(held) > 8 and share >= 3 * 8 * 64 * 64 * 4 // 8
    assert max(held) <= share + 1000  # of scalars and the like
    assert held[0] < share / 4  # by groups: files are not read at once


EXTRA = {
    "nested": [{"a": None, "b": True, "c": [1, 2.5, "text"]}, {}],
    "array": np.arange(6, dtype=np.int16).reshape(2, 3),
    "half": np.asarray(jnp.full((2,), 1.5, "bfloat16")),
    "big-endian": np.arange(3, dtype=">f4"),
    "by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "without elements": np.zeros((0, 3), np.float64),
    "dates": np.array(["2026-01-31"], "datetime64[D]"),
    "flag": np.bool_(True),
    "scalar": np.float32(0.1),
    "jax": jnp.arange(3.0),
    "key": jax.random.key(3),
    "keys": jax.random.split(jax.random.key(3, impl="rbg"), 2),
    "tuple": (1, 2),
}


def test_extra_comes_back(tmp_path):
    zerojax.save_checkpoint(tmp_path, small_state(), extra=EXTRA)
    _, extra = zerojax.restore_checkpoint(tmp_path, TX, small_plan())
    assert extra["nested"] == EXTRA["nested"] and extra["tuple"] == [1, 2]
    for name in EXTRA.keys() - {"nested", "tuple", "key", "keys"}:
        assert extra[name].dtype == EXTRA[name].dtype.newbyteorder("=") and extra[name].shape == EXTRA[name].shape
        np.testing.assert_array_equal(extra[name], EXTRA[name])
    assert jax.random.normal(extra["key"]) == jax.random.normal(EXTRA["key"])
    assert extra["keys"].dtype == EXTRA["keys"].dtype
    np.testing.assert_array_equal(jax.random.key_data(extra["keys"]), jax.random.key_data(EXTRA["keys"]))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"f": print}, r"extra\['f'\] is <built-in function print>.*JSON"),
        ([{"x": {1, 2}}], r"extra\[0\]\['x'\] is \{1, 2\} of type set"),
        ({1: 2}, "extra has the key 1: keys must be strings"),
        ({"a": np.array(["text"])}, r"extra\['a'\] is array.*arrays of numbers"),
        (np.array([(1, 2.0)], "i4,f8"), r"extra is array\(\[\(1, 2\.\)\].*arrays of numbers"),
        (np.array([None]), r"extra is array\(\[None\].*arrays of numbers"),
    ],
)
def test_extra_that_cannot_be_kept_is_refused(tmp_path, extra, message):
    with pytest.raises(TypeError, match=message):
        zerojax.save_checkpoint(tmp_path, small_state(), extra=extra)
    assert zerojax.latest_step(tmp_path) is None


def test_the_latest_are_kept(tmp_path):
    state = small_state()
    assert zerojax.latest_step(tmp_path / "nothing") is None and zerojax.latest_step(tmp_path) is None
    for step in (1, 2, 10, 4):
        zerojax.save_checkpoint(tmp_path, state, step=step, wait=False, max_to_keep=2)
    zerojax.wait_until_finished()
    zerojax.wait_until_finished()
    # The one just saved always stays, and beside it the latest.
    assert manifest.steps_in(tmp_path) == [4, 10] and zerojax.latest_step(tmp_path) == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "4"]


def test_what_a_killed_save_left_is_no_checkpoint_and_goes_with_the_next(tmp_path):
    zerojax.save_checkpoint(tmp_path, small_state(), step=1)
    for name in ("2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-17", "0.deleted"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    (tmp_path / "mine").mkdir()
    assert zerojax.latest_step(tmp_path) == 1
    zerojax.save_checkpoint(tmp_path, small_state(), step=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "mine"]


def numbers(tree):
    """NumPy's arrays of a tree, of random keys their numbers."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)


def test_leaves_of_every_kind(tmp_path):
    params = {"empty": np.zeros((0, 8), np.float32), "scalar": np.float32(2), "half": np.ones((8, 2), "float16")}
    tx = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(7)), optax.adam(1e-2))
    plan = zerojax.make_plan(params, models.mesh_of(4), stage=3, min_size=1)
    state = zerojax.create_train_state(params, tx, plan)
    zerojax.save_checkpoint(tmp_path, state)
    restored, _ = zerojax.restore_checkpoint(tmp_path, tx, plan)
    assert_same(numbers(restored), numbers(state))
    assert [x.dtype for x in jax.tree.leaves(restored)] == [x.dtype for x in jax.tree.leaves(state)]


@pytest.mark.parametrize(
    "params",
    [
        np.arange(8, dtype=np.float32),  # no tree at all
        {key: np.full((4,), i, np.float32) for i, key in enumerate(["", "a.b", "%2F", "a b", "\u00e9", "..", "0"])},
    ],
    ids=["one array", "odd keys"],
)
def test_params_of_any_name(tmp_path, params):
    state, plan = small_state(params), small_plan(params)
    zerojax.save_checkpoint(tmp_path, state)
    restored, _ = zerojax.restore_checkpoint(tmp_path, TX, plan)
    assert_same(jax.device_get(restored), jax.device_get(state))


def test_leaves_of_one_name_are_refused(tmp_path):
    params = {"a/b": np.ones(4, np.float32), "a": {"b": np.zeros(4, np.float32)}}
    with pytest.raises(ValueError, match=r"two leaves of this state are named 'params/a/b'.*rename the key"):
        zerojax.save_checkpoint(tmp_path, small_state(params))
    assert list(tmp_path.iterdir()) == []


WRAPPED = {
    "flags": optax.apply_if_finite(TX, 3),
    "rates": optax.inject_hyperparams(optax.adam)(1e-3),
    "holes": optax.masked(TX, {"w": True, "b": False}),
    "by label": optax.partition({"x": TX, "y": optax.sgd(0.1, 0.9)}, {"w": "x", "b": "y"}),
    "rbg key": optax.add_noise(0.1, 0.5, jax.random.key(7, impl="rbg")),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_optimizers_of_many_kinds(tmp_path, case):
    tx, state = WRAPPED[case], small_state(tx=WRAPPED[case])
    zerojax.save_checkpoint(tmp_path, state)
    restored, _ = zerojax.restore_checkpoint(tmp_path, tx, small_plan())
    assert_same(numbers(restored), numbers(state))
    assert [x.sharding for x in jax.tree.leaves(restored)] == [x.sharding for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("step", [np.int64(3), jnp.int32(3)])
def test_steps_of_any_type_of_integer(tmp_path, step):
    zerojax.save_checkpoint(tmp_path, small_state(), step=step)
    (tmp_path / "007").mkdir()  # somebody else's: no step is written so
    assert zerojax.latest_step(tmp_path) == 3
    zerojax.restore_checkpoint(tmp_path, TX, small_plan(), step=step)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.0, TypeError), ("7", TypeError)])
def test_other_steps_are_refused(saved, tmp_path, step, error):
    with pytest.raises(error, match=f"step must be .*{step}"):
        zerojax.save_checkpoint(tmp_path, small_state(), step=step)
    with pytest.raises(error, match=f"step must be .*{step}"):
        zerojax.restore_checkpoint(saved, TX, small_plan(), step=step)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 3 and 5 of the small state."""
    folder = tmp_path_factory.mktemp("saved")
    for step in (3, 5):
        zerojax.save_checkpoint(folder, small_state(), step=step, extra={"note": "here"})
    return folder


WITH_MORE = PARAMS | {"more": np.ones(3, np.float32)}
OTHERS = {
    "a model with one leaf more": (WITH_MORE, TX, r"lacks 'params/more', float32 \[3\] of this model.*model that was"),
    "with one less": ({"w": PARAMS["w"]}, TX, r"holds 'params/b', float32 \[4\], which this model lacks"),
    "of another shape": (PARAMS | {"b": np.ones(5, np.float32)}, TX, r"'params/b' as float32 \[4\].*has float32 \[5\]"),
    "of another dtype": (PARAMS | {"b": np.ones(4, "float16")}, TX, r"'params/b' as float32 \[4\].*has float16 \[4\]"),
    "another optimizer": (PARAMS, optax.sgd(0.1, 0.9), r"opt_state/.*optimizer.*dtypes of its moments"),
    "other moments": (
        PARAMS,
        optax.adam(1e-3, mu_dtype="bfloat16"),
        r"'opt_state/0/mu/b' as float32.*has bfloat16 \[4\]",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_was_saved_for_another_is_refused_by_name(saved, case):
    params, tx, message = OTHERS[case]
    with pytest.raises(ValueError, match=message):
        zerojax.restore_checkpoint(saved, tx, small_plan(params))


def test_errors_say_what_is_there(saved, tmp_path):
    restore = lambda directory, **options: zerojax.restore_checkpoint(directory, TX, small_plan(), **options)
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        restore(tmp_path / "typo")
    with pytest.raises(FileNotFoundError, match="it holds none"):
        restore(tmp_path)
    with pytest.raises(FileNotFoundError, match="of step 4: it holds the steps 3, 5"):
        restore(saved, step=4)
    with pytest.raises(FileExistsError, match=r"5 is there.*nothing was overwritten"):
        zerojax.save_checkpoint(saved, small_state(), step=5)
    with pytest.raises(ValueError, match="max_to_keep must be at least 1, got 0"):
        zerojax.save_checkpoint(tmp_path, small_state(), max_to_keep=0)
    with pytest.raises(TypeError, match=r"saves a zerojax.TrainState, got dict"):
        zerojax.save_checkpoint(tmp_path, {"params": PARAMS})
    with pytest.raises(ValueError, match="file system"):
        zerojax.save_checkpoint("gs://bucket/run", small_state())
    (tmp_path / "7").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no zerojax.json: it is no checkpoint"):
        restore(tmp_path)


def test_a_state_that_a_step_took_is_refused(tmp_path):
    state = small_state()
    for x in jax.tree.leaves(state.params):
        x.delete()
    with pytest.raises(ValueError, match=r"params/.*(deleted|donated)"):
        zerojax.save_checkpoint(tmp_path, state)
    assert zerojax.latest_step(tmp_path) is None


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


HARMS = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "deleted": pathlib.Path.unlink,
}


@pytest.mark.parametrize("offload", [None, "pinned_host"])
def test_a_state_may_be_deleted_while_it_is_saved(tmp_path, offload):
    params = {"w": np.arange(2**20, dtype=np.float32).reshape(1024, 1024)}
    plan, tx = small_plan(params, offload=offload), zerojax.fused_adam(1e-3)
    state = zerojax.create_train_state(params, tx, plan)
    state = jax.tree.map(lambda x: jax.device_put(np.asarray(x) + 1, x.sharding), state)
    want = whole(tx, plan, state)
    zerojax.save_checkpoint(tmp_path, state, wait=False)
    for x in jax.tree.leaves(state):  # as a step does that takes them over
        x.delete()
    zerojax.wait_until_finished()
    restored, _ = zerojax.restore_checkpoint(tmp_path, tx, plan)
    assert_same(whole(tx, plan, restored), want)


def test_state_in_host_memory_is_copied_before_it_is_saved():
    # Orbax writes host memory from where it is, and the next step works there.
    state = zerojax.create_train_state(PARAMS, zerojax.fused_adam(1e-3), small_plan(offload="pinned_host"))
    on_host = [x for x in logical.named(state).values() if x.sharding.memory_kind == host.HOST]
    where = lambda x: {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}
    assert len(on_host) == 4
    for x in on_host:
        assert not where(x) & where(logical.snapshot(x))


UNSEALED = {"_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.mark.parametrize("harm", HARMS)
def test_damage_to_any_file_is_named(saved, tmp_path, harm):
    """All but what Orbax writes of its own after the checksums, which nothing that is restored comes from."""
    files = sorted(p.relative_to(saved / "5") for p in (saved / "5").rglob("*") if p.is_file())
    assert len(files) > 5 and {"zerojax.json", "extra.json"} <= set(map(str, files))
    for i, file in enumerate(f for f in files if f.name not in UNSEALED):
        copy = tmp_path / str(i)
        shutil.copytree(saved, copy)
        HARMS[harm](copy / "5" / file)
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(file.name)) as error:
            zerojax.restore_checkpoint(copy, TX, small_plan())
        assert "step=3" in str(error.value)
        if i % 4 == 0:
            state, extra = zerojax.restore_checkpoint(copy, TX, small_plan(), step=3)
            np.testing.assert_array_equal(state.params["w"], PARAMS["w"])
            assert extra == {"note": "here"}


@pytest.mark.parametrize("harm", HARMS)
def test_what_orbax_adds_after_the_checksums_does_not_matter(saved, tmp_path, harm):
    shutil.copytree(saved / "5", tmp_path / "5")
    for name in UNSEALED:
        HARMS[harm](tmp_path / "5" / name)
    state, _ = zerojax.restore_checkpoint(tmp_path, TX, small_plan())
    np.testing.assert_array_equal(state.params["w"], PARAMS["w"])


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(OSError, match=r"takes .* B, 100 B are left; nothing was written.*max_to_keep"):
        zerojax.save_checkpoint(tmp_path, small_state())
    assert list(tmp_path.iterdir()) == []


def test_a_host_without_room_is_seen_before_anything_is_read(saved, monkeypatch):
    def full(wanted, mesh, what):
        raise MemoryError("no room")

    monkeypatch.setattr(host, "check_room", full)
    with pytest.raises(MemoryError, match="no room"):
        zerojax.restore_checkpoint(saved, TX, small_plan(offload="pinned_host"))


def test_the_command_shows_what_is_there(saved, tmp_path, capsys):
    show = lambda *argv: (commands.main(["checkpoint", *map(str, argv)]), capsys.readouterr())
    status, (out, _) = show(saved, "--step=3", "--leaves", "--verify")
    assert status == 0 and len(re.findall(r"^\d+ .*as written$", out, re.M)) == 2
    for part in (
        r"^step 3, saved .* from data 2; processes: 1$",
        r"^  params: 36 in 2 arrays, 144 B: float32 144 B$",
        r"^  optimizer state: 292 B: int32 4 B, float32 288 B$",
        r"^  extra: note = 'here'$",
        r"^opt_state/0/mu/w +float32 +8x4 +P\('data', None\) +device$",
    ):
        assert re.search(part, out, re.M), part
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    flip(copy / "5" / "manifest.ocdbt")
    assert show(copy)[0] == 0  # without --verify only names are looked at
    status, (out, _) = show(copy, "--verify")
    assert status == 1 and re.search(r"^5 .*damaged: manifest.ocdbt$", out, re.M)
    status, (_, err) = show(copy, "--step=4")
    assert status == 1 and "of step 4: it holds the steps 3, 5." in err
    assert show(tmp_path / "nothing")[0] == 1
    (copy / "5" / "zerojax.json").unlink()
    status, (out, err) = show(copy)
    assert status == 1 and "no zerojax.json" in out and "step=3" in err


def test_the_command_shows_keys_among_the_state(tmp_path, capsys):
    tx = optax.add_noise(0.1, 0.5, jax.random.key(7))
    zerojax.save_checkpoint(tmp_path, small_state(tx=tx))
    assert commands.main(["checkpoint", str(tmp_path)]) == 0
    assert "key<fry>" in capsys.readouterr().out
