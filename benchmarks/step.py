"""One training step of a GPT: ms, tokens/s, device peak and collectives, of zerojax at each stage and of plain JAX.

    python benchmarks/step.py --size=350M --rows=8                          # every case, one process each -> results/
    python benchmarks/step.py --size=350M --rows=8 --case=zerojax:3:scan    # one case, one JSON line

A case is PROGRAM:STAGE:LAYERS: zerojax or plain, 0 to 3, scan or unrolled. Each runs in a process of its own, so that
the device's peak is its own. Times are medians over steps that are waited for one by one.
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
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "benchmarks")]

CASES = (
    "plain:1:unrolled zerojax:1:unrolled zerojax:2:unrolled plain:1:scan zerojax:1:scan zerojax:2:scan "
    "plain:3:unrolled zerojax:3:unrolled plain:3:scan zerojax:3:scan"
).split()
WARM, TIMED = 5, 20


def run_case(case: str, size: str, rows: int, tokens: int) -> dict[str, Any]:
    """Compiles and times one case on all local devices."""
    import gpt
    import jax
    import numpy as np
    import optax
    import plain_jax

    import zerojax
    from zerojax import report

    program, stage, layers = case.split(":")
    config = gpt.SIZES[size]
    config = dataclasses.replace(config, unroll=1 if layers == "scan" else config.layers)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.01))
    if program == "plain":
        state, step = plain_jax.build(config, mesh, int(stage), tx)
    else:
        model = gpt.GPT(config)
        init = gpt.make_init(model)
        plan = zerojax.make_plan(jax.eval_shape(init, jax.random.key(0)), mesh, stage=int(stage))
        tx = zerojax.zero(tx, plan)
        state = zerojax.create_train_state(init, tx, plan, jax.random.key(0))
        step = zerojax.make_train_step(gpt.make_loss(model), tx, plan, layerwise=gpt.LAYERWISE)
    batch = np.random.default_rng(0).integers(0, config.vocab, (rows * mesh.size, tokens + 1), dtype=np.int32)
    batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    hlo = compiled.as_text()
    times, losses = [], []
    for i in range(WARM + TIMED):
        start = time.perf_counter()
        state, out = compiled(state, batch)
        jax.block_until_ready((state, out))
        if i >= WARM:
            times.append(time.perf_counter() - start)
        losses.append(float(out["loss"] if program == "zerojax" else out))
    seconds = statistics.median(times)
    device = jax.local_devices()[0]
    return {
        "case": case,
        "ms": round(seconds * 1e3, 2),
        "ms_min": round(min(times) * 1e3, 2),
        "tokens_per_s": round(rows * mesh.size * tokens / seconds),
        "peak_gib": round((device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30, 2),
        "temp_gib": round(compiled.memory_analysis().temp_size_in_bytes / 2**30, 2),
        "compile_s": round(compile_s),
        "collectives": report.collectives(hlo),
        "largest_gather_mb": round(max(report.result_bytes(hlo, "all-gather"), default=0) / 1e6, 1),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "device": f"{mesh.size} x {device.device_kind}",
        "jax": jax.__version__,
    }


def markdown(results: list[dict[str, Any]], command: str) -> str:
    """The page under results/."""
    head = results[0]
    columns = [
        "case",
        "ms",
        "ms_min",
        "tokens_per_s",
        "peak_gib",
        "temp_gib",
        "compile_s",
        "collectives",
        "largest_gather_mb",
        "last_loss",
    ]
    lines = [
        f"# A GPT's training step on {head['device']}, {datetime.date.today()}",
        "",
        f"`{command}`, jax {head['jax']}. float32 params, bfloat16 compute, AdamW behind a clip by global norm. "
        f"Medians of {TIMED} steps after {WARM}. `plain`: benchmarks/plain_jax.py, no Flax, sharding constraints; "
        "it keeps "
        "what JAX keeps for the backward pass, zerojax what `keep_expensive` does.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for r in results:
        cells = {
            **r,
            "collectives": ", ".join(f"{n} {k}" for k, n in r["collectives"].items()),
            "last_loss": f"{r['last_loss']:.4f}",
        }
        lines.append("| " + " | ".join(str(cells[c]) for c in columns) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs one case here, or each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="350M")
    parser.add_argument("--rows", type=int, default=8, help="rows of each device")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--case")
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case, args.size, args.rows, args.tokens)))
        return
    results = []
    for case in args.cases:
        command = [
            sys.executable,
            __file__,
            f"--size={args.size}",
            f"--rows={args.rows}",
            f"--tokens={args.tokens}",
            f"--case={case}",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{case} failed:\n{done.stderr[-3000:]}", flush=True)
            continue
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print({k: v for k, v in results[-1].items() if k not in ("device", "jax")}, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"step-{args.size}-{results[0]['device'].replace(' x ', 'x').replace(' ', '-')}".lower()
    command = f"python benchmarks/step.py --size={args.size} --rows={args.rows} --tokens={args.tokens}"
    (args.out / f"{name}.json").write_text(
        json.dumps({"command": command, "date": str(datetime.date.today()), "cases": results}, indent=1)
    )
    (args.out / f"{name}.md").write_text(markdown(results, command))


if __name__ == "__main__":
    main()
