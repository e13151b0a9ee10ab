"""What stands beside the arrays of a checkpoint: names, shapes, versions, checksums, and what a user adds.

A checkpoint is the folder `DIRECTORY/STEP`. A folder under that name is complete: it was written under another, checked
and renamed.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

PyTree = Any
MANIFEST = "zerojax.json"
EXTRA = "extra.json"
_FORMAT = 1
_BLOCK = 2**26  # bytes under one checksum: several threads read one file
_CHUNK = 2**20  # bytes read at once
_LATER = ("_CHECKPOINT_METADATA",)  # Orbax writes into it once more when it renames the folder; nobody reads it
_MARK = "__zerojax__"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
      step: The step it is of.
      leaves: Shape, dtype and layout of each array: `{"params/w": {"shape": [8, 4], "dtype": "float32", "spec": "P()",
        "memory": "device"}}`. Layouts are for people: arrays are whole.
      files: Bytes and CRC-32 of each block of each file.
      mesh: Axes of the mesh that it was saved from.
      processes: Processes that wrote it.
      versions: Of the libraries.
      saved: When, ISO 8601.
    """

    step: int
    leaves: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    mesh: dict[str, int]
    processes: int
    versions: dict[str, str]
    saved: str

    def write(self, folder: pathlib.Path) -> None:
        """Writes itself into a folder, with a checksum of its own."""
        text = json.dumps({"format": _FORMAT} | dataclasses.asdict(self))
        write_durably(folder / MANIFEST, json.dumps({"crc32": zlib.crc32(text.encode()), "manifest": text}))


def read_manifest(folder: pathlib.Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
      FileNotFoundError: the folder has none.
      ValueError: it is damaged, or of a later version.
    """
    try:
        text = (folder / MANIFEST).read_text()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: it is no checkpoint of zerojax.save_checkpoint, or lost that file; "
            f"{way_out(folder)}"
        ) from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{folder / MANIFEST} is damaged: {e}; {way_out(folder)}") from e
    try:
        outer = json.loads(text)
        if zlib.crc32(outer["manifest"].encode()) != outer["crc32"]:
            raise ValueError("its checksum is not that of its text")
        values = json.loads(outer["manifest"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{folder / MANIFEST} is damaged: {e}; {way_out(folder)}") from e
    if (version := values.pop("format")) != _FORMAT:
        raise ValueError(
            f"{folder} has format {version}, this zerojax reads {_FORMAT}: take the zerojax that wrote it."
        )
    return Manifest(**values)


def steps_in(directory: pathlib.Path) -> list[int]:
    """Steps of the checkpoints in a directory, rising; none where there is no directory."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", p.name) and p.is_dir())


def leftovers(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """What saves and deletions that were cut off left behind."""
    return (p for p in directory.iterdir() if re.fullmatch(r"\d+\.(deleted|orbax-checkpoint-tmp.*)", p.name))


def way_out(folder: pathlib.Path) -> str:
    """What to do about a damaged checkpoint."""
    others = [step for step in steps_in(folder.parent) if str(step) != folder.name]
    if not others:
        return f"bring the file back from a copy; {folder.parent} holds no other checkpoint."
    earlier = [step for step in others if step < int(folder.name)] or others
    return f"pass step={max(earlier)} for one beside it, or bring the file back from a copy."


def checksums(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Bytes and CRC-32 of each block of each file in a folder, which it makes durable."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name not in _LATER)
    sizes = {name: (folder / name).stat().st_size for name in names}
    blocks = _blocks(folder, sizes)
    for path in folder.rglob("*"):
        sync(path)
    return {name: {"bytes": sizes[name], "crc32": blocks[name]} for name in names}


def damage(folder: pathlib.Path, files: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What is wrong with which of the files that a manifest lists."""
    sizes, wrong = {}, {}
    for name, written in files.items():
        try:
            sizes[name] = (folder / name).stat().st_size
        except FileNotFoundError:
            wrong[name] = "is missing"
            continue
        if sizes[name] != written["bytes"]:
            wrong[name] = f"has {sizes.pop(name)} bytes, {written['bytes']} were written"
    for name, crc32 in _blocks(folder, sizes).items():
        bad = [i for i, (a, b) in enumerate(zip(crc32, files[name]["crc32"], strict=True)) if a != b]
        if bad:
            end = min((bad[0] + 1) * _BLOCK, sizes[name])
            wrong[name] = f"has other bytes than were written, between {bad[0] * _BLOCK} and {end}"
    return wrong


def _blocks(folder: pathlib.Path, sizes: dict[str, int]) -> dict[str, list[int]]:
    jobs = [(name, start) for name, size in sizes.items() for start in range(0, size, _BLOCK)]

    def crc32(job: tuple[str, int]) -> int:
        name, start = job
        value = 0
        with (folder / name).open("rb") as f:
            f.seek(start)
            for _ in range(0, _BLOCK, _CHUNK):
                value = zlib.crc32(f.read(_CHUNK), value)
        return value

    out: dict[str, list[int]] = {name: [] for name in sizes}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (name, _), value in zip(jobs, pool.map(crc32, jobs), strict=True):
            out[name].append(value)
    return out


def write_durably(path: pathlib.Path, text: str) -> None:
    """Writes a file, and waits until it would outlive the machine."""
    with path.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def sync(path: pathlib.Path) -> None:
    """Waits until a file's bytes, or a folder's names, would outlive the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode(x: PyTree, path: str = "extra") -> Any:
    """What JSON holds, arrays included, of a tree of dicts, lists, numbers, strings and arrays.

    Raises:
      TypeError: names what JSON cannot hold.

    Example:
      >>> decode(encode({"key": np.arange(3, dtype=np.uint32), "note": [1.5, None]}))
      {'key': array([0, 1, 2], dtype=uint32), 'note': [1.5, None]}
    """
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, dict):
        for key in x:
            if not isinstance(key, str) or key == _MARK:
                raise TypeError(f"{path} has the key {key!r}: keys must be strings, and not {_MARK!r}.")
        return {key: encode(value, f"{path}[{key!r}]") for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [encode(value, f"{path}[{i}]") for i, value in enumerate(x)]
    if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        return {_MARK: "key", "impl": str(jax.random.key_impl(x)), "data": encode(jax.random.key_data(x), path)}
    if isinstance(x, np.ndarray | np.generic | jax.Array) and _is_plain(x.dtype):
        x = np.asarray(x, x.dtype.newbyteorder("="))
        return {_MARK: "array", "dtype": x.dtype.name, "shape": x.shape, "data": base64.b64encode(x.tobytes()).decode()}
    raise TypeError(
        f"{path} is {x!r} of type {type(x).__name__}: a checkpoint keeps what JSON holds, and arrays of numbers; make "
        "it of those."
    )


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether `decode` finds a dtype by its name: not of objects, strings and records."""
    try:
        return not dtype.hasobject and jax.numpy.dtype(dtype.name) == dtype.newbyteorder("=")
    except TypeError:
        return False


def decode(x: Any) -> PyTree:
    """What `encode` was given; tuples come back as lists, `jax.Array`s but for keys as NumPy's."""
    if isinstance(x, list):
        return [decode(value) for value in x]
    if not isinstance(x, dict):
        return x
    if x.get(_MARK) == "key":
        return jax.random.wrap_key_data(decode(x["data"]), impl=x["impl"])
    if x.get(_MARK) == "array":
        flat = np.frombuffer(base64.b64decode(x["data"]), jax.numpy.dtype(x["dtype"]))
        return flat.reshape(x["shape"]).copy()
    return {key: decode(value) for key, value in x.items()}
