"""A GPT's training step with its optimizer state in host memory: ms, GB/s over PCIe, device peak, host bytes.

    python benchmarks/offload.py --size=1.3B                  # every case, one process each -> results/
    python benchmarks/offload.py --size=1.3B --case=int8      # one case, one JSON line

A case is WHAT[:BUCKET_MB]: bfloat16 params in all of them, and beside them split master weights and moments of dtype
WHAT, in host memory; `none` keeps the state of float32 moments on the device. `walk` is the update alone, gradients
ready: its bytes, both ways, give the GB/s.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

CASES = ("none", "float32", "bfloat16", "int8")
WARM = 3


def build(case: str, args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """A case's optimizer, state, step and batch."""
    import gpt
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import zerojax

    what, _, bucket = case.partition(":")
    config = gpt.SIZES[args.size]
    config = dataclasses.replace(config, remat=args.remat, unroll=config.layers if args.unrolled else 1)
    model = gpt.GPT(config)
    full = gpt.make_init(model)
    init = lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), full(key))
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    size = int(float(bucket or 32) * 2**20)
    offload = None if what == "none" else zerojax.Offload(bucket_bytes=size, params=args.params)
    plan = zerojax.make_plan(jax.eval_shape(init, jax.random.key(0)), mesh, stage=args.stage, offload=offload)
    dtype = None if what in ("none", "float32") else what
    adamw = zerojax.fused_adamw(1e-4, weight_decay=0.01, mu_dtype=dtype, nu_dtype=dtype)
    tx = zerojax.zero(zerojax.master_weights(zerojax.chain(optax.clip_by_global_norm(1.0), adamw)), plan)
    state = zerojax.create_train_state(init, tx, plan, jax.random.key(0))
    step = zerojax.make_train_step(gpt.make_loss(model), tx, plan, layerwise=gpt.LAYERWISE)
    rows = args.rows * mesh.size
    batch = np.random.default_rng(0).integers(0, config.vocab, (rows, args.tokens + 1), dtype=np.int32)
    return tx, state, step, jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))


def run_case(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times one case on all local devices."""
    import jax

    tx, state, step, batch = build(case, args)
    times, losses = [], []
    for _ in range(WARM + args.steps):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
    seconds = statistics.median(times[WARM:])
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    plan = tx.plan
    memory = plan.memory(tx)
    peak = stats.get("peak_bytes_in_use", 0)
    result = {
        "case": case,
        "ms": round(seconds * 1e3, 1),
        "ms_min": round(min(times[WARM:]) * 1e3, 1),
        "first_s": round(times[0], 1),
        "tokens_per_s": round(len(batch) * args.tokens / seconds),
        "peak_gib": round(peak / 2**30, 2),
        "host_gb": round(memory.host * plan.mesh.size / 1e9, 2),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "device": f"{plan.mesh.size} x {device.device_kind}",
        "jax": jax.__version__,
    }
    if plan.offload is not None and args.walk:
        walks = [_walk(state, tx) for _ in range(3)]
        result["walk_ms"] = round(min(walks[1:]) * 1e3, 1)
        result["gb_per_s"] = round(2 * memory.host / min(walks[1:]) / 1e9, 1)
    return result


def _walk(state: Any, tx: Any) -> float:
    """Seconds of an update alone; what it updates is thrown away."""
    import jax
    import jax.numpy as jnp

    import zerojax

    grads = jax.tree.map(jnp.zeros_like, state.params)
    jax.block_until_ready(grads)
    start = time.perf_counter()
    jax.block_until_ready(zerojax.apply(tx, grads, state.opt_state, state.params))
    return time.perf_counter() - start


def markdown(results: list[dict[str, Any]], command: str) -> str:
    """The page under results/."""
    head = results[0]
    columns = "case ms ms_min walk_ms gb_per_s tokens_per_s peak_gib host_gb first_loss last_loss".split()
    lines = [
        f"# A GPT's training step with its state in host memory, {head['device']}, {datetime.date.today()}",
        "",
        f"`{command}`, jax {head['jax']}. bfloat16 params and gradients, split master weights, AdamW behind a clip by "
        "global norm; moments in the case's dtype, all state in pinned host memory but for `none`. ms: medians, each "
        "step waited for. walk: the update alone; GB/s: its bytes, both ways.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(str(r.get(c, "")) for c in columns) + " |" for r in results),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs one case here, or each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.3B")
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8, help="rows of each device")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--unrolled", action="store_true", help="layers side by side, not in a scan")
    parser.add_argument("--params", action="store_true", help="params in host memory, too; at stage 3")
    parser.add_argument("--no-walk", dest="walk", action="store_false", help="not the update alone, which takes a copy")
    parser.add_argument("--case")
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case, args)))
        return
    options = [f"--{k}={getattr(args, k)}" for k in ("size", "stage", "rows", "tokens", "steps")]
    options += ["--remat"] * args.remat + ["--unrolled"] * args.unrolled
    options += ["--params"] * args.params + ["--no-walk"] * (not args.walk)
    results = []
    for case in args.cases:
        command = [sys.executable, __file__, *options, f"--case={case}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{case} failed:\n{done.stderr[-3000:]}", flush=True)
            continue
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print({k: v for k, v in results[-1].items() if k not in ("device", "jax")}, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    what = f"{args.size}-params" if args.params else args.size
    name = f"offload-{what}-{results[0]['device'].replace(' x ', 'x').replace(' ', '-')}".lower()
    shown = f"python benchmarks/offload.py {' '.join([*options, '--cases', *args.cases])}"
    page = {"command": shown, "date": str(datetime.date.today()), "cases": results}
    (args.out / f"{name}.json").write_text(json.dumps(page, indent=1))
    (args.out / f"{name}.md").write_text(markdown(results, shown))


if __name__ == "__main__":
    main()
