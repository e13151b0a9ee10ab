"""Device times of the fused optimizers on one GPU, beside Optax under XLA and a copy measured in the same run.

    python benchmarks/kernels.py                     # every case -> results/kernels-<device>.{md,json}
    python benchmarks/kernels.py adamw/1.3B lamb     # those whose name holds one of these

A time is the sum of the kernels' durations that the profiler saw on the device, a mean over steps after two to warm up.
The sets of small leaves fit into the L2, 63 MB, or nearly: they are timed as a loop finds them, not read from memory.
GB/s counts the bytes that the op cannot do without (bytes_per_param), whatever an implementation really moves.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import glob
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import zerojax  # noqa: E402

STEPS = 5
Shape = tuple[int, ...]


def gpt(layers: int, width: int, vocab: int = 50304, context: int = 1024) -> list[Shape]:
    """The leaves of a GPT whose layers are separate arrays."""
    layer = [(width, 3 * width), (3 * width,), (width, width), (width,), (width, 4 * width), (4 * width,)]
    layer += [(4 * width, width), (width,), *[(width,)] * 4]
    return [(vocab, width), (context, width), *layer * layers, (width,), (width,)]


def sizes(count: int, low: int, high: int) -> list[Shape]:
    """Leaves of sizes spread evenly over the logarithm, multiples of 8."""
    rng = np.random.default_rng(0)
    return [(int(math.exp(x)) // 8 * 8,) for x in rng.uniform(math.log(low), math.log(high), count)]


LEAVES = {
    "1.3B": gpt(24, 2048),
    "125M": gpt(12, 768),
    "300 of 1K to 64K": sizes(300, 1024, 65536),
    "300 of 64 to 4K": sizes(300, 64, 4096),
}
CLIP = optax.clip_by_global_norm(1.0)
OPTIMIZERS: dict[str, tuple[int, Any, Any]] = {  # bytes a param, ours, Optax's
    "adamw": (28, zerojax.fused_adamw(1e-3), optax.adamw(1e-3)),
    "clip+adamw": (32, zerojax.chain(CLIP, zerojax.fused_adamw(1e-3)), optax.chain(CLIP, optax.adamw(1e-3))),
    "lamb": (40, zerojax.fused_lamb(1e-3, weight_decay=0.01), optax.lamb(1e-3, weight_decay=0.01)),
}


def device_times(step: Callable[..., Any], state: Any) -> tuple[float, dict[str, list[float]], Any]:
    """Microseconds of a step on the device, and of each kernel by name: [count, mean]."""
    for _ in range(2):
        state = step(*state)
    jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(STEPS):
                state = step(*state)
            jax.block_until_ready(state)
        (path,) = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(path)
    durations = collections.defaultdict(list)
    for plane in profile.planes:
        if "GPU:0" in plane.name:
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        durations[event.name].append(event.duration_ns / 1e3)
    total = sum(map(sum, durations.values())) / STEPS
    return total, {name: [len(x) / STEPS, sum(x) / len(x)] for name, x in durations.items()}, state


def copy_ceiling() -> float:
    """GB/s of `x + 1` in place over 2 GiB."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    us, _, _ = device_times(lambda x: (add(x),), (jnp.zeros(2**29),))
    return 2 * 2**31 / us / 1e3


def optimizer_case(name: str, leaves: str, ours: bool) -> dict[str, Any]:
    """One optimizer on one set of leaves."""
    bytes_per_param, fused, plain = OPTIMIZERS[name]
    tx = fused if ours else plain
    shapes = LEAVES[leaves]
    rng = np.random.default_rng(0)
    make = lambda scale: [jnp.full(shape, scale * rng.standard_normal(), jnp.float32) for shape in shapes]
    params, grads = make(1.0), make(0.01)
    # Donated in the order in which they come back: JAX pairs buffers of one shape by position, and copies the others.
    step = jax.jit(lambda params, state, grads: zerojax.apply(tx, grads, state, params), donate_argnums=(0, 1))
    start = time.perf_counter()
    compiled = step.lower(params, tx.init(params), grads).compile()
    compile_s = time.perf_counter() - start
    us, kernels, _ = device_times(lambda *state: compiled(*state, grads), (params, tx.init(params)))
    count = sum(map(math.prod, shapes))
    return {
        "op": name,
        "leaves": leaves,
        "implementation": "zerojax" if ours else "optax, XLA",
        "us": round(us, 1),
        "GB/s": round(count * bytes_per_param / us / 1e3),
        "launches": round(sum(n for n, _ in kernels.values())),
        "temp_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
        "compile_s": round(compile_s, 1),
    }


def markdown(head: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The page under results/."""
    columns = list(rows[0])
    lines = [
        f"# Fused optimizers on one {head['device']}, {head['date']}",
        "",
        f"`{head['command']}`, jax {head['jax']}. Device times by the profiler, float32. Copy ceiling of this run: "
        f"{head['ceiling']} GB/s (`x + 1` in place over 2 GiB). GB/s counts 28 bytes a param for adamw, 32 with a clip "
        "by global norm, 40 for lamb.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(str(row[c]) for c in columns) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures the cases asked for and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    ceiling = round(copy_ceiling())
    print(f"copy ceiling {ceiling} GB/s", flush=True)
    rows = []
    for name in OPTIMIZERS:
        for leaves in LEAVES:
            if args.cases and not any(part in f"{name}/{leaves}" for part in args.cases):
                continue
            for ours in (True, False):
                row = optimizer_case(name, leaves, ours)
                rows.append(row | {"of ceiling": f"{row['GB/s'] / ceiling:.1%}"})
                print(rows[-1], flush=True)
    device = jax.devices()[0].device_kind
    head = {
        "device": device,
        "jax": jax.__version__,
        "date": str(datetime.date.today()),
        "command": "python benchmarks/kernels.py " + " ".join(args.cases),
        "ceiling": ceiling,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"kernels-{device.replace(' ', '-').lower()}"
    path.with_suffix(".json").write_text(json.dumps(head | {"cases": rows}, indent=1))
    path.with_suffix(".md").write_text(markdown(head, rows))


if __name__ == "__main__":
    main()
