"""What people read: byte counts, text tables, the collectives of a compiled program, and pictures."""

from __future__ import annotations

import collections
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

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
      >>> collectives("%x = f32[8] all-gather(%a) %y = f32[2] reduce-scatter-start(%b) %z = reduce-scatter-done(%y)")
      {'reduce-scatter': 1, 'all-gather': 1}
    """
    found = {name: len(re.findall(rf"[ )]{name}(?:-start)?\(", hlo)) for name in _COLLECTIVES}
    return {name: count for name, count in found.items() if count}


def result_bytes(hlo: str, name: str) -> list[int]:
    """Bytes of the result of each collective `name` in the text of a compiled program, on one device.

    Example:
      >>> result_bytes("%x = (f32[2]{0}, bf16[8,4]{1,0}) all-gather(%a, %b)", "all-gather")
      [72]
    """
    sizes = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s64": 8, "u64": 8, "f64": 8}
    lines = re.findall(rf"= (.*?) {name}(?:-done)?\(", hlo)
    arrays = [re.findall(r"(\w+)\[([\d,]*)\]", line) for line in lines]
    return [
        sum(sizes.get(t, 4) * math.prod(map(int, filter(None, dims.split(",")))) for t, dims in found)
        for found in arrays
    ]


def device_bytes(tree: Any) -> int:
    """Bytes that the arrays of a pytree hold on the device that holds most, counted from their shards.

    Example:
      >>> device_bytes({"w": jax.numpy.zeros((4, 2)), "b": jax.numpy.zeros(2)})
      40
    """
    held: collections.Counter[Any] = collections.Counter()
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values(), default=0)


def plot_lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    xlabel: str,
    ylabel: str,
) -> None:
    """Draws curves, each a name with its xs and ys, into a PNG."""
    figure, axes = _axes()
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        axes.plot(xs, ys, label=name, linestyle=("-", "--", "-.", ":")[i % 4], linewidth=1.6)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_stacked(
    bars: Mapping[str, Mapping[str, float]],
    path: str | os.PathLike[str],
    *,
    ylabel: str,
    limit: float | None = None,
) -> None:
    """Draws stacked bars, each a name with its parts and their heights, into a PNG; `limit` is a line across."""
    figure, axes = _axes()
    base = dict.fromkeys(bars, 0.0)
    for part in next(iter(bars.values())):
        heights = [parts[part] for parts in bars.values()]
        axes.bar(list(bars), heights, bottom=list(base.values()), label=part, width=0.6)
        base = {name: base[name] + height for name, height in zip(bars, heights, strict=True)}
    if limit is not None:
        axes.axhline(limit, color="black", linestyle="--", linewidth=1, label="memory of a device")
    if len(bars) > 4:
        axes.tick_params(axis="x", rotation=35)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    axes.set(ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _axes() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("pictures need matplotlib: pip install zerojax[examples]") from e
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    return figure, figure.subplots()
