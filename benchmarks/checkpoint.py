"""What a checkpoint costs: how long saving holds up training, how long it takes, host memory, restoring.

    python benchmarks/checkpoint.py            # a state of 1 GB -> results/checkpoint-<device>.{md,json}

A step goes on while a save is written, as in training. With `offload="pinned_host"` the state is copied first: a step
works on the host memory that it lies in.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import threading
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import zerojax  # noqa: E402


class Resident:
    """The most resident memory of this process above what it had, while in use."""

    def __enter__(self) -> Resident:
        self._before, self.most, self._on = self._now(), 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()

    def _watch(self) -> None:
        while self._on:
            self.most = max(self.most, self._now() - self._before)
            time.sleep(0.01)

    @staticmethod
    def _now() -> int:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def measured(directory: pathlib.Path, size: float, offload: str | None) -> dict[str, Any]:
    """Saves and restores a state of `size` bytes."""
    width = 1024
    layers = max(round(size / (12 * width * width)), 1)
    rng = np.random.default_rng(0)
    params = {f"w{i}": rng.normal(size=(width, width)).astype(np.float32) / 32 for i in range(layers)}
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    plan = zerojax.make_plan(params, mesh, stage=3, offload=offload)
    tx = zerojax.zero(zerojax.fused_adamw(1e-3), plan)

    def loss(p: Any, x: jax.Array) -> jax.Array:
        for w in p.values():
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    state = zerojax.create_train_state(params, tx, plan)
    step = zerojax.make_train_step(loss, tx, plan)
    batch = jax.device_put(rng.normal(size=(8 * mesh.size, width)).astype(np.float32), plan.batch)

    def train(state: Any, until: Any) -> tuple[Any, list[float]]:
        times: list[float] = []
        while until(times):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
        return state, times

    state, times = train(state, lambda times: len(times) < 8)
    alone = statistics.median(times[3:])
    rows = []
    for folder in (directory / str(number) for number in range(3)):
        gc.collect()
        with Resident() as resident:
            start = time.perf_counter()
            zerojax.save_checkpoint(directory, state, step=int(folder.name), wait=False, max_to_keep=1)
            blocked = time.perf_counter() - start
            state, during = train(state, lambda _, folder=folder: not folder.exists())
            zerojax.wait_until_finished()
            whole = time.perf_counter() - start
        rows.append((blocked, whole, statistics.median(during), len(during), resident.most))
    blocked, whole, during_step, steps, most = sorted(rows)[1]
    nbytes = sum(f.stat().st_size for f in (directory / "2").rglob("*") if f.is_file())
    del state
    start = time.perf_counter()
    jax.block_until_ready(zerojax.restore_checkpoint(directory, tx, plan)[0])
    restored = time.perf_counter() - start
    return {
        "state": "on the device" if offload is None else "moments in host memory",
        "bytes": nbytes,
        "blocks_ms": round(blocked * 1e3, 1),
        "save_ms": round(whole * 1e3),
        "blocks": f"{blocked / whole:.1%}",
        "mb_per_s": round(nbytes / whole / 1e6),
        "step_ms": round(alone * 1e3),
        "step_meanwhile_ms": round(during_step * 1e3),
        "steps_meanwhile": steps,
        "host_bytes_above": most,
        "restore_ms": round(restored * 1e3),
    }


def main() -> None:
    """Measures, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=1e9, help="of the state")
    parser.add_argument("--directory", type=pathlib.Path, help="where checkpoints go; a temporary one by default")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    rows = []
    for offload in (None, "pinned_host"):
        folder = pathlib.Path(tempfile.mkdtemp(dir=args.directory))
        try:
            rows.append(measured(folder, args.bytes, offload))
        finally:
            shutil.rmtree(folder)
        print(rows[-1], flush=True)
    device, today = jax.devices()[0].device_kind, str(datetime.date.today())
    command = f"python benchmarks/checkpoint.py --bytes={args.bytes:g}"
    lines = [
        f"# Saving and restoring, {jax.device_count()} x {device}, {today}",
        "",
        f"`{command}`, jax {jax.__version__}, {os.cpu_count()} cores. The median of three saves with `wait=False`, "
        "while steps go on. blocks: until `save_checkpoint` returns; save: until the checkpoint is durable, checksums "
        "and all; host_bytes_above: the most resident memory above what the process had. A step that runs meanwhile "
        "shares the cores with the save.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(f"{x:,}" if isinstance(x, int) else str(x) for x in row.values()) + " |" for row in rows),
    ]
    name = f"checkpoint-{device.replace(' ', '-').lower()}"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text("\n".join(lines) + "\n")
    page = {"command": command, "date": today, "jax": jax.__version__, "cores": os.cpu_count(), "cases": rows}
    (args.out / f"{name}.json").write_text(json.dumps(page, indent=1) + "\n")


if __name__ == "__main__":
    main()
