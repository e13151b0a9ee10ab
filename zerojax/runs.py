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

from zerojax import manifest


class StopRequest:
    """SIGTERM and SIGINT as something to ask for between steps; the second one ends the program at once.

    Of several processes in `zerojax.distributed`, a SIGTERM to any makes all stop at one step, as before a preemption;
    further ones do nothing, and SIGINT ends them as it would.

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

    Raises:
      ValueError: a line that was written whole is none of JSON, or has no step.

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
    kept = []
    for number, line in enumerate(whole, 1):
        try:
            values = json.loads(line)
            kept += [values] if values["step"] <= step else []
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}, line {number} is damaged ({e}): mend it, or delete the line.") from e
    new = path.with_name(f"{path.name}.new")
    manifest.write_durably(new, "".join(f"{json.dumps(line)}\n" for line in kept))
    new.replace(path)
    return kept
