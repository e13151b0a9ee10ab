"""Times on the device, by the profiler: the kernels' own durations, without what the host needs between them."""

from __future__ import annotations

import dataclasses
import glob
import math
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

FRESH_BYTES = 240_000_000  # four times the L2 of an H200: what is this far back has left the cache


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds that the kernels of a call take, a median over calls, and how many kernels that are."""

    us: float
    launches: float


@dataclasses.dataclass(frozen=True)
class Case:
    """An op on arrays of given shapes. A program compiles when it is called, and returns what measures it."""

    name: str
    floor_bytes: int
    runs: str
    programs: dict[str, Callable[[], Callable[[], dict[str, Any]]]]


def device_time(step: Callable[[int], Any], *, warm: int, timed: int) -> Timing:
    """Times `step(i)`, which starts call i and returns its arrays; the first `warm` calls are not counted.

    Raises:
      RuntimeError: The profiler saw no kernels, as on a CPU.
    """
    options = jax.profiler.ProfileOptions()
    # What the host does is not asked for, and slows both the calls and the reading of the trace.
    options.host_tracer_level = options.python_tracer_level = 0
    options.enable_hlo_proto = False
    out = None
    for i in range(warm):
        out = step(i)
    jax.block_until_ready(out)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            for i in range(warm, warm + timed):
                out = step(i)
            jax.block_until_ready(out)
        durations = kernel_durations(directory)
    if not durations:
        raise RuntimeError("the profiler saw no kernels: is there a GPU?")
    launches, rest = divmod(len(durations), timed)
    if rest:  # calls differ in what they launch: where one ends is not known
        return Timing(math.fsum(durations) / timed, round(len(durations) / timed, 1))
    calls = [math.fsum(durations[i * launches : (i + 1) * launches]) for i in range(timed)]
    return Timing(statistics.median(calls), launches)


def kernel_durations(directory: str) -> list[float]:
    """Microseconds of what the first GPU ran, in the order in which it began."""
    (path,) = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)
    streams = [
        line
        for plane in jax.profiler.ProfileData.from_file(path).planes
        if "GPU:0" in plane.name
        for line in plane.lines
        if line.name.startswith("Stream")
    ]
    events = sorted((event.start_ns, event.duration_ns) for line in streams for event in line.events)
    return [duration / 1e3 for _, duration in events]


def rotating(run: Callable[..., Any], make_arguments: Callable[[], tuple[Any, ...]]) -> Timing:
    """Times `run` over so many copies of its arguments and results that no call finds its own in the L2."""
    arguments = [make_arguments()]
    size = sum(a.nbytes for a in jax.tree.leaves(arguments))
    arguments += [make_arguments() for _ in range(max(2, math.ceil(FRESH_BYTES / size)) - 1)]
    results: list[Any] = [None] * len(arguments)

    def step(i: int) -> Any:
        i %= len(arguments)
        results[i] = run(*arguments[i])
        return results[i]

    return device_time(step, warm=len(arguments), timed=max(len(arguments), 10))


def copy_ceiling() -> float:
    """GB/s of `x + 1` in place over 2 GiB."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(2**29)

    def step(_: int) -> Any:
        nonlocal x
        x = add(x)
        return x

    return 2 * x.nbytes / device_time(step, warm=3, timed=10).us / 1e3


def measured(timing: Timing, compiled: Any) -> dict[str, Any]:
    """A timing as it stands in the results."""
    temp_mb = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return {"us": round(timing.us, 1), "launches": timing.launches, "temp_mb": round(temp_mb, 1)}
