"""Device times of all fused kernels on one GPU, beside XLA, a copy in the same run, and peers recorded on an H200.

    python benchmarks/kernels.py                       # every case -> results/kernels-<device>.{md,json}
    python benchmarks/kernels.py adamw/1.3B softmax/   # those whose name holds one of these
    python benchmarks/kernels.py --list                # names, byte floors and peers of the cases; needs no GPU

A time is the sum of a call's kernels that the profiler saw on the device, a median over calls after some to warm up.
Calls take turns over copies of their arguments, and results are kept, so that none finds its own in the L2. An
optimizer keeps one state: its sets of small leaves, which fit into the L2, are timed as a loop finds them.
GB/s counts the bytes that the op cannot do without, whatever an implementation really moves (results/ says how).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxlib  # noqa: E402
import kernels_page  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from device_time import Case, copy_ceiling, device_time, measured  # noqa: E402
from row_cases import row_cases  # noqa: E402

import zerojax  # noqa: E402

PEERS = json.loads((ROOT / "benchmarks" / "peers" / "h200.json").read_text())
Shape = tuple[int, ...]


# Optimizers


def gpt(layers: int, width: int, vocab: int = 50304, context: int = 1024) -> list[Shape]:
    """The leaves of a GPT whose layers are separate arrays."""
    layer = [(width, 3 * width), (3 * width,), (width, width), (width,), (width, 4 * width), (4 * width,)]
    layer += [(4 * width, width), (width,), *[(width,)] * 4]
    return [(vocab, width), (context, width), *layer * layers, (width,), (width,)]


def vit(layers: int, width: int) -> list[Shape]:
    """The leaves of a ViT for patches of 16 x 16 of 224 x 224 pixels."""
    embeddings = [(width, 3, 16, 16), (width,), (1, 1, width), (1, 197, width)]
    return [*embeddings, *gpt(layers, width)[2:], (1000, width), (1000,)]


def sizes(count: int, low: int, high: int) -> list[Shape]:
    """Leaves of sizes spread evenly over the logarithm, multiples of 8."""
    rng = np.random.default_rng(0)
    return [(int(math.exp(x)) // 8 * 8,) for x in rng.uniform(math.log(low), math.log(high), count)]


LEAVES = {  # all but the second and the fourth are those that peers were timed on
    "1.3B": gpt(24, 2048, context=2048),
    "125M": gpt(12, 768),
    "ViT-S": vit(24, 384),
    "300 of 1K to 64K": sizes(300, 1024, 65536),
    "300 of 64 to 4K": [(n,) for n in (64, 128, 256, 512, 1024, 2048, 4096, 768, 1000, 3000)] * 30,
}
CLIP = optax.clip_by_global_norm(1.0)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer, what XLA runs in its place, and the formats of its arrays.

    Attributes:
      floor: Bytes a param.
      ours, plain: Transformations.
      params, grads: Dtypes.
      leaves: Names of the sets of leaves that it is timed on.
    """

    floor: float
    ours: Any
    plain: Any
    params: str = "float32"
    grads: str = "float32"
    leaves: tuple[str, ...] = tuple(LEAVES)


def small(dtype: str, *, split: bool = False) -> tuple[Any, Any]:
    """AdamW with moments of a dtype by the kernel, and by XLA: Optax has no such moments."""
    make = functools.partial(zerojax.fused_adamw, 1e-3, mu_dtype=dtype, nu_dtype=dtype)
    both = make(), make(implementation="xla")
    return (zerojax.master_weights(both[0]), zerojax.master_weights(both[1])) if split else both


ADAMW = zerojax.fused_adamw(1e-3), optax.adamw(1e-3)
LARGE = ("1.3B", "125M")
OPTIMIZERS = {
    "adamw": Optimizer(28, *ADAMW),
    "adamw bfloat16 gradients": Optimizer(26, *ADAMW, grads="bfloat16", leaves=LARGE),
    "adamw bfloat16 moments": Optimizer(18, *small("bfloat16"), grads="bfloat16", leaves=LARGE),
    "adamw int8 moments": Optimizer(14.0625, *small("int8"), grads="bfloat16", leaves=LARGE),
    "adamw int8 moments, split params": Optimizer(
        14.0625, *small("int8", split=True), params="bfloat16", grads="bfloat16", leaves=LARGE
    ),
    "clip+adamw": Optimizer(32, zerojax.chain(CLIP, ADAMW[0]), optax.chain(CLIP, ADAMW[1])),
    "lamb": Optimizer(40, zerojax.fused_lamb(1e-3, weight_decay=0.01), optax.lamb(1e-3, weight_decay=0.01)),
}
STEPS = 5


def optimizer_program(tx: Any, optimizer: Optimizer, shapes: list[Shape]) -> Callable[[], dict[str, Any]]:
    """A step of `tx`, on leaves in the formats of `optimizer`."""
    dtypes = optimizer.params, optimizer.grads
    leaves, like_grads = ([jax.ShapeDtypeStruct(shape, dtype) for shape in shapes] for dtype in dtypes)
    # Donated in the order in which they come back: JAX pairs buffers of one shape by position, and copies the others.
    step = jax.jit(lambda params, state, grads: zerojax.apply(tx, grads, state, params), donate_argnums=(0, 1))
    compiled = step.lower(leaves, jax.eval_shape(tx.init, leaves), like_grads).compile()
    values = np.random.default_rng(0).standard_normal((2, len(shapes))) * [[1.0], [0.01]]

    def start() -> Any:
        params, grads = (
            [jnp.full(shape, x, dtype) for shape, x in zip(shapes, row, strict=True)]
            for row, dtype in zip(values, dtypes, strict=True)
        )
        return params, tx.init(params), grads

    compiled_start = jax.jit(start).lower().compile()  # leaf by leaf, each would be a program of its own

    def measure() -> dict[str, Any]:
        *state, grads = compiled_start()

        def run(_: int) -> Any:
            nonlocal state
            state = compiled(*state, grads)
            return state

        return measured(device_time(run, warm=2, timed=STEPS), compiled)

    return measure


# LAMB as a program of torch's foreach ops would run it: each line one pass over memory, 116 bytes a param.
UNFUSED_LAMB: list[tuple[str, Callable[..., jax.Array], str]] = [
    ("m", lambda m, g: m + 0.1 * (g - m), "m g"),
    ("v", lambda v: 0.999 * v, "v"),
    ("v", lambda v, g: v + 0.001 * g * g, "v g"),
    ("d", jnp.sqrt, "v"),
    ("d", lambda d: d / 0.03, "d"),
    ("d", lambda d: d + 1e-6, "d"),
    ("u", lambda m: m / 0.1, "m"),
    ("u", lambda u, d: u / d, "u d"),
    ("u", lambda u, p: u + 0.01 * p, "u p"),
    ("p_norm", jnp.linalg.norm, "p"),
    ("u_norm", jnp.linalg.norm, "u"),
    ("u", lambda u, p_norm, u_norm: u * (p_norm / u_norm), "u p_norm u_norm"),
    ("p", lambda p, u: p - 1e-3 * u, "p u"),
]


def unfused_lamb(shapes: list[Shape]) -> Callable[[], dict[str, Any]]:
    """The passes of `UNFUSED_LAMB` over one array of as many params, which spares it the leaves' launches."""
    size = sum(map(math.prod, shapes))
    like = lambda name: jax.ShapeDtypeStruct(() if "_" in name else (size,), jnp.float32)
    passes = [(out, jax.jit(f).lower(*map(like, of.split())).compile(), of.split()) for out, f, of in UNFUSED_LAMB]

    def measure() -> dict[str, Any]:
        arrays = {name: jnp.full(size, 0.01, jnp.float32) for name in "mvgp"}

        def run(_: int) -> Any:
            for out, f, names in passes:
                # Waited for: what is replaced is 5 GB, and is to be free again.
                arrays[out] = jax.block_until_ready(f(*(arrays[name] for name in names)))
            return arrays

        timing = device_time(run, warm=1, timed=3)
        return {"us": round(timing.us, 1), "launches": timing.launches}

    return measure


def optimizer_cases() -> list[Case]:
    """Every optimizer on every set of leaves."""
    cases = []
    for name, optimizer in OPTIMIZERS.items():
        for leaves in filter(LEAVES.__contains__, optimizer.leaves):
            shapes = LEAVES[leaves]
            programs = {
                "zerojax": functools.partial(optimizer_program, optimizer.ours, optimizer, shapes),
                "xla": functools.partial(optimizer_program, optimizer.plain, optimizer, shapes),
            }
            if (name, leaves) == ("lamb", "1.3B"):
                programs["unfused"] = functools.partial(unfused_lamb, shapes)
            floor = round(optimizer.floor * sum(map(math.prod, shapes)))
            cases.append(Case(f"{name}/{leaves}", floor, "", programs))
    return cases


# The run

TOGETHER = 40  # cases that are compiled at once, before they are timed


def measure(cases: list[Case], deadline: float) -> Iterator[dict[str, Any]]:
    """Compiles some cases, in threads, then times them one after the other: compiling runs kernels of its own."""
    threads = futures.ThreadPoolExecutor()
    for first in range(0, len(cases), TOGETHER):
        together, start = cases[first : first + TOGETHER], time.monotonic()
        jobs = {(case.name, key): threads.submit(p) for case in together for key, p in case.programs.items()}
        futures.wait(jobs.values(), timeout=max(0, deadline - start))
        print(f"{len(jobs)} programs compiled in {time.monotonic() - start:.0f} s", flush=True)
        for i, case in enumerate(together):
            if time.monotonic() > deadline:
                print(f"no time left for {len(cases) - first - i} cases", flush=True)
                threads.shutdown(wait=False, cancel_futures=True)
                return
            times, errors = {}, {}
            for key in case.programs:
                try:
                    times[key] = jobs[case.name, key].result(timeout=0)()
                except Exception as error:  # one program's failure is no other's
                    errors[key] = f"{type(error).__name__}: {error}"
                    print(f"{case.name} {key}: {errors[key][:300]}", flush=True)
            row = {"name": case.name, "floor_bytes": case.floor_bytes, "runs": case.runs, "times": times}
            row |= {"errors": errors, "peers": PEERS["cases"].get(case.name, {})}
            print(kernels_page.short(row), flush=True)
            yield row


def compared(case: Case) -> bool:
    """Whether there are peers of it, or something that stands in for them."""
    return case.name in PEERS["cases"] or "unfused" in case.programs


def commit() -> str:
    """The commit that is checked out, with a mark if files differ from it; "unknown" where git cannot say."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    """Measures the cases asked for and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="parts of names; all cases where none is given")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--commit", help="for the page's head, where git is absent")
    parser.add_argument("--seconds", type=float, default=3600, help="what is not timed by then is left out")
    parser.add_argument("--ours", action="store_true", help="leave out XLA, whose programs take longest to compile")
    parser.add_argument("--list", action="store_true", help="list the cases, run nothing")
    args = parser.parse_args()
    start = time.monotonic()
    cases = [*optimizer_cases(), *row_cases()]
    cases = [case for case in cases if not args.cases or any(part in case.name for part in args.cases)]
    if args.ours:
        without = lambda programs: {key: p for key, p in programs.items() if key not in kernels_page.XLA}
        cases = [dataclasses.replace(case, programs=without(case.programs)) for case in cases]
    if args.list:
        for case in cases:
            print(f"{case.name:55s} {case.floor_bytes / 1e6:8.1f} MB  {', '.join(PEERS['cases'].get(case.name, []))}")
        return
    device = jax.devices()[0]
    ceiling = copy_ceiling()
    print(f"{device.device_kind}: a copy runs at {ceiling:.0f} GB/s", flush=True)
    results = {
        "device": device.device_kind,
        "date": str(datetime.date.today()),
        "commit": args.commit or commit(),
        "versions": {m.__name__: m.__version__ for m in (jax, jaxlib, optax)},
        "platform": " ".join(device.client.platform_version.split()),
        "command": " ".join(["python benchmarks/kernels.py", *args.cases]),
        "ceiling": round(ceiling),
        "peers": PEERS["origin"],
        "rows": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"kernels-{device.device_kind.replace(' ', '-').lower()}"
    order = {case.name: i for i, case in enumerate(cases)}
    # What has peers first, in case time runs out; written as it comes.
    for row in measure(sorted(cases, key=lambda case: not compared(case)), start + args.seconds):
        results["rows"] = sorted([*results["rows"], row], key=lambda row: order[row["name"]])
        results["claims"] = kernels_page.claims(results["rows"])
        path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(kernels_page.markdown(results))
    for claim in results.get("claims", []):
        print(" | ".join(map(str, claim.values())))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
