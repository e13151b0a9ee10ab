"""The programs of benchmarks/precision.py and moment_maps.py on a CPU: a tiny model through all of each."""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

import moment_maps
import precision


@pytest.fixture
def tiny(monkeypatch):
    config = functools.partial(precision.gpt.GPTConfig, layers=1, heads=2, width=128, context=16)
    monkeypatch.setattr(precision.gpt, "GPTConfig", config)
    monkeypatch.setattr(precision, "EVERY", 2)
    monkeypatch.setattr(precision, "ROWS", 8)
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


def test_variants_train_and_write_their_page(tiny, monkeypatch, tmp_path):
    names = ["float32", "bfloat16, split masters, int8 moments"]
    monkeypatch.setattr(precision, "VARIANTS", {name: precision.VARIANTS[name] for name in names})
    monkeypatch.setattr(
        sys, "argv", ["precision.py", "--steps=4", "--seeds=2", "--held-out-batches=1", f"--out={tmp_path}"]
    )
    precision.main()
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    for runs in results["runs"].values():
        assert [len(run["held_out"]) for run in runs] == [2, 2]
        assert all(run["held_out"][1] < run["held_out"][0] < np.log(256) + 0.1 for run in runs)
    exact, small = (results["runs"][name][0]["held_out"][-1] for name in names)
    assert precision.difference(results, names[1])[0] == pytest.approx(100 * (small / exact - 1))
    page = path.with_suffix(".md").read_text()
    assert page == precision.markdown(results) and "mean of 2 seeds" in page
    precision.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize("name", list(moment_maps.STORES))
def test_stored_moments_are_unbiased_and_within_their_resolution(name):
    store, seeds = jax.jit(moment_maps.STORES[name]), 64
    x = jnp.asarray(np.random.default_rng(0).uniform(0.2, 1, (4, 128)) ** 2, "float32")
    many = np.stack([np.asarray(store(x, jnp.int32(seed)), np.float64) for seed in range(seeds)])
    # Codes take half of 255 at least; where x is 0.04 of the largest, steps of its square root are 1 / 128 of 1, so
    # neighbours are 2 * 0.2 / 128 apart, 8 % of x; linear ones 1 / 128, 20 %.
    off = many / x - 1
    assert np.all(np.abs(off) <= 0.21)
    # A rounding's deviation is half of the spacing at most; five deviations of the mean.
    assert np.all(np.abs(off.mean(0)) <= 5 * 0.5 * 0.2 / np.sqrt(seeds))
    assert np.abs(off.mean()) <= 5 * 0.5 * 0.2 / np.sqrt(off.size)
    assert name == "float32" or off.any()


def test_candidates_are_measured_and_trained(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(moment_maps, "STORES", {name: moment_maps.STORES[name] for name in ("float32", "linear, 32")})
    monkeypatch.setattr(moment_maps, "TRAINED", ("float32",))
    monkeypatch.setattr(
        sys, "argv", ["moment_maps.py", "--steps=4", "--rows=8", "--held-out-batches=1", f"--out={tmp_path}"]
    )
    moment_maps.main()
    (path,) = tmp_path.glob("*.json")
    stores = json.loads(path.read_text())["stores"]
    assert stores["float32"]["errors"] == [0, 0] and len(stores["float32"]["losses"]) == 1
    assert all(0.001 < error < 0.5 for error in stores["linear, 32"]["errors"])
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out
