"""Around a training loop: to stop in order when one is asked to, and to go on with what was written."""

from __future__ import annotations

import json
import os
import pathlib
import signal
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """SIGTERM and SIGINT as something to ask for between steps; the second one ends the program at once.

    Of several processes in `zerojax.distributed`, a SIGTERM to any makes all stop at one step, as before a preemption.

    Attributes:
      signal: Which one came, None so far.

    Example:
      >>> with StopRequest() as stop:
      ...     for step in range(3):
      ...         if stop.at(step):
      ...             break
      >>> step, stop.signal
      (2, None)
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        # Of several processes SIGTERM is the service's: it makes all agree on a step. And a SIGINT goes to all of them,
        # at different steps.
        caught = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {number: signal.signal(number, self._handle) for number in caught}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def at(self, step: int) -> bool:
        """Whether to stop after this step; every process asks after every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None


def lines_until(path: str | os.PathLike[str], step: int) -> list[dict[str, Any]]:
    """Cuts a file of JSON lines behind a step: what a run wrote after the checkpoint that is gone on from.

    Args:
      path: Each line has a "step"; a last line that was cut off is dropped. May be missing.
      step: The last one to keep.

    Returns:
      The lines that stay.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> _ = path.write_text('{"step": 1}\\n{"step": 2}\\n{"ste')
      >>> lines_until(path, 1), path.read_text()
      ([{'step': 1}], '{"step": 1}\\n')
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1].splitlines()
    kept = [line for line in map(json.loads, whole) if line["step"] <= step]
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    new.replace(path)
    return kept
