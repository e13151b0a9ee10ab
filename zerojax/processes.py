"""A program that runs as several processes, of a machine or a GPU each: joining, and ending all when one ends badly."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    join_timeout_s: int = 300,
    lost_timeout_s: int = 100,
) -> Iterator[None]:
    """Joins the processes of a job for what is inside, which each of them runs; before anything else of JAX.

    Under SLURM, Open MPI or Kubernetes, JAX finds out the arguments. Devices and meshes are then those of all.

    A process that ends by an exception says so and ends at once, without the others; these notice, by a collective that
    fails or by its silence, and end too. A save that is under way is dropped. What is to be done then is to start all
    again: a program that restores its latest checkpoint goes on from there.

    SIGTERM does not end a process inside: JAX takes it as the notice of a preemption, which
    `jax.experimental.multihost_utils.reached_preemption_sync_point(step)` tells all of at one step.

    Args:
      coordinator_address: "host:port" of process 0, the same in all processes.
      num_processes: How many.
      process_id: Which one this is, from 0.
      join_timeout_s: Seconds to wait for all to join.
      lost_timeout_s: Seconds without a sign of life after which a process counts as lost; and that processes which are
        done wait for the others.

    Raises:
      ValueError: some arguments are missing, and no cluster is there to ask.
      RuntimeError: the processes did not join in time.

    Example:
      >>> with distributed("127.0.0.1:0", 1, 0):  # doctest: +SKIP
      ...     train()
    """
    # A default of JAX's that an environment may have changed: without it there is nothing between CPUs.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"distributed: {', '.join(missing)} is missing; pass all three, or none under a scheduler.")
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=join_timeout_s,
            heartbeat_timeout_seconds=lost_timeout_s,
            shutdown_timeout_seconds=lost_timeout_s,
        )
    except ValueError as e:
        raise ValueError(
            f"distributed: JAX found no cluster to ask ({e}). Pass coordinator_address=, num_processes= and "
            "process_id=, or start under SLURM, Open MPI or Kubernetes."
        ) from e
    try:
        yield
    except BaseException as e:
        if isinstance(e, SystemExit) and not e.code:
            raise
        traceback.print_exc()
        print(
            f"process {jax.process_index()} of {jax.process_count()} ends: {type(e).__name__}: {e}\n"
            "If it lost the connection to another one, that one says why, or was killed and says nothing. All end "
            "now; start all again to go on from the latest checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        # An orderly end would wait for the others, who are waiting for this one.
        sys.stdout.flush()
        os._exit(e.code if isinstance(e, SystemExit) and isinstance(e.code, int) else 1)
