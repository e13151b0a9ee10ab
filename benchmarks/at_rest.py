"""What a plan foretells for a GPT beside what a device holds after a training step, all else freed.

python benchmarks/at_rest.py --size=1.3B          # -> results/at-rest-<size>-<devices>.{md,json}
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import pathlib
from typing import Any

import jax
import offload

CASES = [("none", 1), ("none", 2), ("none", 3), ("int8", 1)]


def measured(case: str, stage: int, args: argparse.Namespace) -> dict[str, Any]:
    """Bytes of the first device, planned and in use."""
    device = jax.local_devices()[0]
    in_use = lambda: device.memory_stats()["bytes_in_use"]
    before = in_use()
    options = {"size": args.size, "stage": stage, "rows": 1, "tokens": 64, "remat": False, "unrolled": False}
    tx, state, step, batch = offload.build(case, argparse.Namespace(**options))
    for _ in range(2):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    del metrics, batch
    gc.collect()
    held, memory = in_use() - before, tx.plan.memory(tx)
    planned = memory.params + memory.opt_state
    return {
        "state": "on the device, float32 moments" if case == "none" else f"in host memory, {case} moments",
        "stage": stage,
        "planned_bytes": planned,
        "held_bytes": held,
        "off": f"{held / planned - 1:+.2%}",
        "planned_host_bytes": memory.host,
    }


def main() -> None:
    """Measures every case in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.3B")
    parser.add_argument("--out", type=pathlib.Path, default=offload.ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    rows = []
    for case, stage in CASES:
        rows.append(measured(case, stage, args))
        print(rows[-1], flush=True)
    devices, today = f"{jax.device_count()} x {jax.devices()[0].device_kind}", str(datetime.date.today())
    head = f"`python benchmarks/at_rest.py --size={args.size}`, jax {jax.__version__}."
    lines = [
        f"# Planned and held at rest, a GPT of {args.size}, {devices}, {today}",
        "",
        f"{head} bfloat16 params, split master weights, AdamW. held: `bytes_in_use` of a device after two training "
        "steps, their gradients and activations freed, less what was in use before.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(f"{x:,}" if isinstance(x, int) else x for x in r.values()) + " |" for r in rows),
    ]
    name = f"at-rest-{args.size}-{devices.replace(' x ', 'x').replace(' ', '-')}".lower()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text("\n".join(lines) + "\n")
    page = {"command": head, "date": today, "devices": devices, "cases": rows}
    (args.out / f"{name}.json").write_text(json.dumps(page, indent=1))


if __name__ == "__main__":
    main()
