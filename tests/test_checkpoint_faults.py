"""Nothing that was reported as saved is lost: runs killed at random moments, disks that fill up, programs that end."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import crashes
import models
import numpy as np
import optax
import pytest

import zerojax
from zerojax import manifest

TX = optax.adam(1e-3)


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_what_was_reported_as_saved_survives_kills(tmp_path, kills):
    command = [sys.executable, crashes.__file__, str(tmp_path / "run"), str(kills), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 10 * kills)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    durable, inside, restored = 0, 0, 0
    for result in answer["results"]:
        said = result["said"]
        assert result["status"] == signal.SIGKILL, f"a run ended by itself: {done.stderr[-3000:]}"
        for words in said:
            if words[0] == "restored":
                restored += 1
                assert int(words[1]) >= durable
                assert words[2] == answer["reference"][words[1]]  # bit for bit as without kills
            if words[0] == "saved":
                durable = int(words[1])
        saving = [int(words[1]) for words in said if words[0] == "saving"]
        inside += bool(saving) and saving[-1] not in (result["latest"] or [])  # on disk after the kill
        assert (result["latest"] or [0])[0] >= durable
    print(f"{kills} kills, {inside} of them inside a save, {restored} restored")
    assert restored >= kills // 2 and durable > 0
    if kills >= 30:
        assert inside >= kills // 4


def small_state(size=2**16):
    params = {"w": np.random.default_rng(0).normal(size=size).astype(np.float32)}
    plan = zerojax.make_plan(params, models.mesh_of(2), stage=1, min_size=1)
    return zerojax.create_train_state(params, TX, plan), plan


# Orbax gives up at the first array that fails; tensorstore tells of the others when nobody listens any more.
unheard = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def full_disk():
    """A function after which no file grows beyond so many bytes: writing more fails, in any thread."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@unheard
@pytest.mark.parametrize("wait", [True, False])
def test_a_disk_that_fills_up_meanwhile(tmp_path, full_disk, wait):
    state, plan = small_state()
    zerojax.save_checkpoint(tmp_path, state, step=1, extra={"note": "first"})
    full_disk(2**15)
    with pytest.raises(OSError, match=r"checkpoint .*2 was not saved.*before it are as they were.*save again"):
        zerojax.save_checkpoint(tmp_path, state, step=2, wait=wait)
        zerojax.wait_until_finished()
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    full_disk(resource.RLIM_INFINITY)
    _, extra = zerojax.restore_checkpoint(tmp_path, TX, plan)
    assert extra == {"note": "first"}
    zerojax.save_checkpoint(tmp_path, state, step=2)
    assert manifest.steps_in(tmp_path) == [1, 2]


@unheard
def test_a_failed_save_is_told_at_the_next_at_the_latest(tmp_path, full_disk):
    state, _ = small_state()
    full_disk(2**15)
    zerojax.save_checkpoint(tmp_path, state, step=1, wait=False)
    with pytest.raises(OSError, match=r"checkpoint .*1 was not saved"):
        zerojax.save_checkpoint(tmp_path, state, step=2)
    full_disk(resource.RLIM_INFINITY)
    zerojax.save_checkpoint(tmp_path, state, step=2)
    assert manifest.steps_in(tmp_path) == [2]


def test_a_directory_that_cannot_be_written(tmp_path):
    state, _ = small_state(16)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        zerojax.save_checkpoint(tmp_path / "file" / "run", state)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path):
    state, _ = small_state(16)
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        zerojax.save_checkpoint(tmp_path / "run", state)


ENDS = """
import sys
import jax, numpy as np, optax, zerojax

params = {{f"w{{i}}": np.full((256, 1024), i, np.float32) for i in range(8)}}
mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
plan = zerojax.make_plan(params, mesh, stage=1)
state = zerojax.create_train_state(params, optax.adam(1e-3), plan)
zerojax.save_checkpoint(sys.argv[1], state, step=5, wait=False)
{end}
"""


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="Python 3.12 starts no threads while it ends")
@pytest.mark.parametrize(("end", "status"), [("", 0), ("raise RuntimeError('mine')", 1)])
def test_a_program_that_ends_finishes_its_save(tmp_path, end, status):
    command = [sys.executable, "-c", ENDS.format(end=end), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(zerojax.__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == status, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["5"]
    assert not manifest.damage(tmp_path / "5", manifest.read_manifest(tmp_path / "5").files)


@pytest.mark.skipif(sys.version_info[:2] != (3, 12), reason="other versions finish the save")
def test_a_program_that_ends_says_that_its_save_is_lost(tmp_path):
    command = [sys.executable, "-c", ENDS.format(end=""), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(zerojax.__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert "5 was not saved" in done.stderr
    assert manifest.steps_in(tmp_path) == []
