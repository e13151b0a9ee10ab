"""The programs of benchmarks/kernels.py on a CPU: its cases, their byte floors and peers, and the page it writes."""

import functools
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

import device_time
import kernels
import kernels_page
import row_cases

CASES = {case.name: case for case in [*kernels.optimizer_cases(), *row_cases.row_cases()]}
PEERS = kernels.PEERS["cases"]
# Recorded for formats that are not timed here.
OTHER_FORMATS = ("adamw bfloat16/", "adamw bfloat16 gradients/")


def test_every_recorded_peer_has_its_case():
    missing = [name for name in PEERS if name not in CASES and not name.startswith(OTHER_FORMATS)]
    assert not missing


@pytest.mark.parametrize("name", [name for name in PEERS if name in CASES])
def test_floors_are_those_that_the_peers_were_told_by(name):
    for peer, figures in PEERS[name].items():
        # GB/s are rounded to 1, microseconds to the four digits or the tenth that were recorded.
        rounding = 0.5 / figures["GB/s"] + max(0.05, 5e-4 * figures["us"]) / figures["us"]
        assert CASES[name].floor_bytes / figures["us"] / 1e3 == pytest.approx(figures["GB/s"], rel=rounding), peer


def test_every_shape_of_a_peer_is_timed_with_it():
    for op, shapes in {
        "layer_norm": row_cases.PEER_NORMS,
        "softmax": row_cases.PEER_ROWS,
        "causal": row_cases.SQUARES,
    }.items():
        sought = [f"{op}/{'x'.join(map(str, shape))}/" for shape in shapes]
        assert all(name in PEERS for name in CASES if name.startswith(tuple(sought)))
    assert "adamw/1.3B" in PEERS and len(kernels.LEAVES["1.3B"]) == 292 and len(kernels.LEAVES["ViT-S"]) == 296


def small(index, spec):
    return jax.random.normal(jax.random.key(index), spec.shape, spec.dtype)


@pytest.mark.parametrize("op", row_cases.ROW_OPS)
def test_directions_give_what_autodiff_gives(op):
    arguments = row_cases.row_arguments(op, (2, 16, 16), "float32")
    f = functools.partial(row_cases.layer_norm if op == "layer_norm" else row_cases.softmax, implementation="xla")
    dy, *values = [small(i, spec) for i, spec in enumerate([arguments[0], *arguments])]
    y, vjp = jax.vjp(f, *values)
    for direction, wanted in {"backward": vjp(dy), "forward+backward": (y, vjp(dy))}.items():
        run, make_arguments = row_cases.compile_rows(f, arguments, direction, saved=False)
        got = run(*make_arguments(small))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, wanted)


def test_backward_pass_is_given_what_the_forward_pass_saved():
    (x,) = row_cases.row_arguments("softmax", (4, 16), "float32")
    run, make_arguments = row_cases.compile_rows(row_cases.softmax, [x], "backward", saved=True)
    y, dy = small(0, x), small(1, x)
    (dx,) = run(*make_arguments(small))
    np.testing.assert_allclose(dx, y * (dy - (dy * y).sum(-1, keepdims=True)), rtol=1e-5, atol=1e-5)


def test_unfused_lamb_is_lamb():
    """Its passes by hand, on the first step from zero moments, against the formula: p - lr (|p| / |u|) u."""
    arrays = {"m": jnp.zeros(3), "v": jnp.zeros(3), "g": jnp.array([1.0, -2.0, 3.0]), "p": jnp.array([2.0, 1.0, 2.0])}
    p = arrays["p"]
    for out, f, names in kernels.UNFUSED_LAMB:
        arrays[out] = f(*(arrays[name] for name in names.split()))
    u = jnp.sign(arrays["g"]) * 0.03 / math.sqrt(0.001) + 0.01 * p  # moments corrected by 0.1 and 0.03 squared
    np.testing.assert_allclose(arrays["p"], p - 1e-3 * 3 / jnp.linalg.norm(u) * u, rtol=1e-4)


def test_no_time_without_a_profile_of_kernels():
    with pytest.raises(RuntimeError, match="saw no kernels"):
        device_time.device_time(lambda i: jnp.zeros(i + 1), warm=1, timed=2)


def test_run_writes_the_page(monkeypatch, tmp_path, capsys):
    """All but the profiler, in whose place every call takes 100 us."""

    def timed_as_run(step, *, warm, timed):
        jax.block_until_ready(step(0))
        return device_time.Timing(100.0, 2)

    shapes = {"layer_norm": (64, 128), "softmax": (32, 4096), "causal": (2, 16, 16)}
    small_ops = {op: ([shape], row_cases.ROW_OPS[op][1]) for op, shape in shapes.items()}
    peers = {"softmax/32x4096/float32/forward": {"torch": {"us": 150.0}, "quack": {"us": 80.0}}}
    peers["softmax/32x4096/float32/backward"] = {"torch": {"us": 60.0}}
    monkeypatch.setattr(row_cases, "ROW_OPS", small_ops)
    monkeypatch.setattr(kernels, "LEAVES", {"1.3B": [(8, 8), (8,)]})
    monkeypatch.setattr(kernels, "PEERS", {"origin": "A sample.", "cases": peers})
    monkeypatch.setattr(row_cases, "PEER_NORMS", [(64, 128)])
    monkeypatch.setattr(row_cases, "POOL", 2**18)
    monkeypatch.setattr(kernels, "copy_ceiling", lambda: 4000.0)
    monkeypatch.setattr(kernels, "device_time", timed_as_run)
    monkeypatch.setattr(row_cases, "rotating", lambda run, make: timed_as_run(lambda _: run(*make()), warm=0, timed=1))
    monkeypatch.setattr(sys, "argv", ["kernels.py", "lamb", "float32", f"--out={tmp_path}", "--commit=abc"])
    kernels.main()
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    page = path.with_suffix(".md").read_text()
    assert page == kernels_page.markdown(results)
    assert "softmax/32x4096/f32/bwd" in capsys.readouterr().out
    assert "commit abc" in page and "| softmax, forward + backward, 32x4096, float32 | 210.0 |" in page
    assert "recorded peer, or faster, in 0 of 2; behind in: softmax/32x4096/float32/backward 0.60x" in page
    assert [row["errors"] for row in results["rows"]] == [{}] * 8
    assert all(set(row["times"]) >= {"zerojax", "xla"} for row in results["rows"])
    assert all(title in page for title in kernels_page.SECTIONS)
