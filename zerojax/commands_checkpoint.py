"""`python -m zerojax checkpoint DIRECTORY`: which steps it holds, and what is in one."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from typing import Any

import jax.numpy as jnp

from zerojax import manifest, report


def checkpoint(argv: list[str]) -> int:
    """Prints it; 1 where a checkpoint is damaged or there is none."""
    parser = argparse.ArgumentParser(prog="python -m zerojax checkpoint", description=__doc__, allow_abbrev=False)
    parser.add_argument("directory", type=pathlib.Path, help="what save_checkpoint was given")
    parser.add_argument("--step", type=int, help="this one in detail; the latest by default")
    parser.add_argument("--leaves", action="store_true", help="every array of it")
    parser.add_argument("--verify", action="store_true", help="compare every file with its checksums")
    args = parser.parse_args(argv)
    steps = manifest.steps_in(args.directory)
    if args.step not in (None, *steps):
        held = f"it holds the steps {', '.join(map(str, steps))}" if steps else "it holds none"
        print(f"{args.directory} holds no checkpoint of step {args.step}: {held}.", file=sys.stderr)
        return 1
    if not steps:
        print(f"{args.directory} holds no checkpoint.", file=sys.stderr)
        return 1
    rows, whole = [], True
    for step in steps:
        row, sound = _row(args.directory / str(step), verify=args.verify)
        rows.append([step, *row])
        whole &= sound
    print(report.text_table(["step", "saved", "bytes", "leaves", "state"], rows))
    try:
        print(_detail(args.directory / str(steps[-1] if args.step is None else args.step), leaves=args.leaves))
    except (OSError, ValueError) as e:
        print(e, file=sys.stderr)
        return 1
    return 0 if whole else 1


def _row(folder: pathlib.Path, *, verify: bool) -> tuple[list[object], bool]:
    """A checkpoint in a line, and whether it is sound as far as that was looked at."""
    try:
        saved = manifest.read_manifest(folder)
    except (OSError, ValueError) as e:
        return ["", "", "", "damaged" if isinstance(e, ValueError) else f"no {manifest.MANIFEST}"], False
    missing = [name for name in saved.files if not (folder / name).exists()]
    wrong = list(manifest.damage(folder, saved.files)) if verify else missing
    state = f"damaged: {wrong[0]}" if wrong else "as written" if verify else "complete"
    size = sum(file["bytes"] for file in saved.files.values())
    return [saved.saved, report.format_bytes(size), len(saved.leaves), state], not wrong


def _detail(folder: pathlib.Path, *, leaves: bool) -> str:
    saved = manifest.read_manifest(folder)
    parts: dict[str, list[dict[str, Any]]] = {}
    for name, leaf in saved.leaves.items():
        parts.setdefault(name.split("/")[0], []).append(leaf)
    total = lambda some: report.format_bytes(sum(map(_size, some)))
    mesh = ", ".join(f"{axis} {size}" for axis, size in saved.mesh.items()) or "one device"
    on_host = [x for some in parts.values() for x in some if x["memory"] == "pinned_host"]
    params, opt_state = (parts.get(name, []) for name in ("params", "opt_state"))
    numbers = sum(math.prod(x["shape"]) for x in params)
    lines = [
        "",
        f"step {saved.step}, saved {saved.saved} from {mesh}; processes: {saved.processes}",
        f"  params: {numbers:,} in {len(params)} arrays, {total(params)}: {_dtypes(params)}",
        f"  optimizer state: {total(opt_state)}: {_dtypes(opt_state)}",
        f"  from host memory: {total(on_host)}",
        f"  loss scale: {'yes' if 'loss_scale' in parts else 'no'}",
        f"  versions: {', '.join(f'{name} {version}' for name, version in saved.versions.items())}",
    ]
    try:
        extra = json.loads((folder / manifest.EXTRA).read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{folder / manifest.EXTRA} is damaged: {e}; {manifest.way_out(folder)}") from e
    lines += [f"  extra: {line}" for line in _short(manifest.decode(extra))]
    if leaves:
        rows = [
            [name, leaf["dtype"], "x".join(map(str, leaf["shape"])) or "scalar", leaf["spec"], leaf["memory"]]
            for name, leaf in saved.leaves.items()
        ]
        lines += ["", report.text_table(["array", "dtype", "shape", "was laid out", "in"], rows)]
    return "\n".join(lines)


def _size(leaf: dict[str, Any]) -> int:
    """Bytes of an array; a random key is two numbers of 32 bits, mostly."""
    itemsize = 8 if leaf["dtype"].startswith("key<") else jnp.dtype(leaf["dtype"]).itemsize
    return math.prod(leaf["shape"]) * itemsize


def _dtypes(leaves: list[dict[str, Any]]) -> str:
    """Which dtypes hold how many bytes."""
    sizes: dict[str, int] = {}
    for x in leaves:
        sizes[x["dtype"]] = sizes.get(x["dtype"], 0) + _size(x)
    return ", ".join(f"{name} {report.format_bytes(size)}" for name, size in sizes.items()) or "none"


def _short(extra: Any) -> list[str]:
    """What a user added, a line each, none of them long."""
    if not isinstance(extra, dict):
        return [] if extra is None else [_cut(repr(extra))]
    return [_cut(f"{key} = {value!r}") for key, value in extra.items()]


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:97] + "..."
