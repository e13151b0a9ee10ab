"""What people read: byte counts, text tables, and the collectives of a compiled program."""

from __future__ import annotations

import re
from collections.abc import Sequence

_COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")


def format_bytes(n: float) -> str:
    """A byte count with a decimal unit, as memory is sold.

    Example:
      >>> format_bytes(141e9), format_bytes(512), format_bytes(0)
      ('141 GB', '512 B', '0 B')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 999.5 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" or n >= 99.95 else f"{n:.3g} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in plain text: first column to the left, all others to the right.

    Example:
      >>> print(text_table(["leaf", "bytes"], [["w", 64], ["bias", 4]]))
      leaf  bytes
      ----  -----
      w        64
      bias      4
    """
    cells = [list(map(str, header)), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    return "\n".join([line(cells[0]), line(["-" * w for w in widths]), *map(line, cells[1:])])


def collectives(hlo: str) -> dict[str, int]:
    """Counts the collective operations in the text of a compiled program, asynchronous pairs once.

    Args:
      hlo: What `step.lower(state, batch).compile().as_text()` gives.

    Returns:
      Operations by name, those that occur; one inside a loop counts once.

    Example:
      >>> collectives("%x = f32[8] all-gather(%a)\\n %y = f32[2] reduce-scatter-start(%b)\\n %z = reduce-scatter-done(%y)")
      {'reduce-scatter': 1, 'all-gather': 1}
    """
    found = {name: len(re.findall(rf"[ )]{name}(?:-start)?\(", hlo)) for name in _COLLECTIVES}
    return {name: count for name, count in found.items() if count}
