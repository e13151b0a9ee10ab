"""Every config builds, every example runs, as a user runs them."""

import importlib
import json
import pathlib
import subprocess
import sys

import jax
import ml_collections
import optax
import pytest

import zerojax

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
TINY = ["model.layers=2", "model.width=16", "model.heads=2", "model.context=16", "model.unroll=1", "batch.rows=16"]


def run(*args):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_and_trains_two_steps(name, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert isinstance(config, ml_collections.ConfigDict) and config.steps > 0
    overrides = [
        *TINY,
        "steps=2",
        "eval_every=2",
        "cpu_devices=4",
        "zero.stage=3",
        "zero.min_size=64",
        "sample_bytes=8",
    ]
    flags = [f"--config.{override}" for override in overrides]
    out = run("examples/train_gpt.py", f"--config=configs/{name}.py", f"--workdir={tmp_path}", *flags)
    assert "ZeRO stage 3 over 4 devices" in out and "held-out loss" in out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert (
        4 < lines[-1]["loss"] < 12
    )  # a new model guesses among 256, or 50304, bytes: their logarithms are 5.5 and 10.8
    assert (tmp_path / "loss.png").stat().st_size > 5000
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_unknown_config_key_is_refused(tmp_path):
    command = ["examples/train_gpt.py", "--config=configs/char_gpt.py", f"--workdir={tmp_path}", "--config.zero.stge=3"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "stge" in done.stderr


@pytest.mark.parametrize("name", ["bert_lamb", "nnx_bytes", "own_loop"])
def test_example_trains_two_steps(name):
    out = run(f"examples/{name}.py", "--steps=2", "--cpu-devices=4")
    assert "step 2: loss" in out
    loss = float(out.split("step 2: loss ")[1].split()[0].rstrip(","))
    assert 4 < loss < 8  # a new model guesses among 256 bytes: their logarithm is 5.5


def test_demo(tmp_path):
    out = run("examples/demo.py", "--steps=3", "--devices=4", f"--out={tmp_path}")
    assert "Measured" in out and "Planned" in out
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("loss.png", "memory.png"))


def test_demo_fails_where_a_loss_differs(tmp_path):
    broken = "import demo, sys; demo.TOLERANCE = -1; sys.argv = ['demo', '--steps=2', '--devices=2', '--out=" + str(
        tmp_path
    )
    done = subprocess.run(
        [sys.executable, "-c", broken + "']; sys.exit(demo.main())"],
        cwd=ROOT / "examples",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "FAILED: 8 losses differ" in done.stderr


@pytest.mark.parametrize("devices", [2, 8, 16])
def test_state_of_a_gpt_is_shared_out_evenly(devices):
    sys.path.insert(0, str(ROOT / "examples"))
    gpt = importlib.import_module("gpt")
    shapes = jax.eval_shape(gpt.make_init(gpt.GPT(gpt.SIZES["125M"])), jax.random.key(0))
    mesh = jax.sharding.AbstractMesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    held = [zerojax.make_plan(shapes, mesh, stage=s).memory(optax.adamw(1e-3)).opt_state for s in range(4)]
    assert held[1] == held[2] == held[3] == pytest.approx(held[0] / devices, rel=0.02)
