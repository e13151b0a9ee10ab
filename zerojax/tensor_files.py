"""The files of weights: safetensors and their index, as Hugging Face names them. Written whole or not at all."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from zerojax import manifest

_INDEX = "model.safetensors.index.json"
_METADATA = {"format": "pt"}  # Hugging Face's loaders refuse files that say "np"
FLOATS = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
CODES = (
    FLOATS | {"bool": "BOOL"} | {f"{k}int{n}": f"{(k or 'i').upper()}{n}" for k in ("", "u") for n in (8, 16, 32, 64)}
)
"""What safetensors calls a dtype."""


def write(folder: pathlib.Path, arrays: Iterator[np.ndarray], sizes: dict[str, int], most: int) -> None:
    """Writes a folder of files, under another name until it is complete.

    Args:
      folder: A new one.
      arrays: In the order of `sizes`; those of one file are in memory at once.
      sizes: Bytes of each array, by its name.
      most: Bytes of arrays in one file, of several arrays.

    Raises:
      OSError, SafetensorError: it could not be written; nothing is left of it.
    """
    partial = folder.with_name(f"{folder.name}.zerojax-partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True)
        files = list(_files(sizes, most))
        for i, names in enumerate(files):
            held = {name: next(arrays) for name in names}
            save_file(held, partial / _file_name(i, len(files)), metadata=_METADATA)
            del held  # before those of the next file are read
        _complete(partial, folder, files, sum(sizes.values()))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """Names of the arrays of each file."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > most:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _file_name(i: int, files: int) -> str:
    return "model.safetensors" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.safetensors"


def _complete(partial: pathlib.Path, folder: pathlib.Path, files: list[list[str]], size: int) -> None:
    """Adds the index, makes all durable, and gives the folder its name."""
    if len(files) > 1:
        where = {name: _file_name(i, len(files)) for i, names in enumerate(files) for name in names}
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2)
        manifest.write_durably(partial / _INDEX, text)
    for file in partial.iterdir():
        manifest.sync(file)
    partial.rename(folder)
    manifest.sync(folder.parent)


def slices_at(path: pathlib.Path) -> dict[str, Any]:
    """Slices of all arrays by name, of which nothing is read yet."""
    slices: dict[str, Any] = {}
    place: dict[str, pathlib.Path] = {}
    for file in _files_at(path):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing.")
        try:
            opened = safe_open(file, framework="np")
            names = list(opened.keys())
            slices |= {name: opened.get_slice(name) for name in names}
        except SafetensorError as e:
            raise ValueError(f"{file} is damaged or no safetensors file: {e}. Export or download it again.") from e
        if twice := [name for name in names if name in place]:
            raise ValueError(f"{some(twice)} is in {place[twice[0]].name} and in {file}: import one of the files.")
        place |= dict.fromkeys(names, file)
    return slices


def _files_at(path: pathlib.Path) -> list[pathlib.Path]:
    """One file; or of a folder those that its index names, without an index all."""
    if not path.is_dir():
        return [path]
    index = path / _INDEX
    if not index.exists():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{path} has no .safetensors file.")
        return files
    try:
        return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{index} is damaged, or no index: {e!r}. Export or download it again.") from e


def some(names: Iterable[Any]) -> str:
    """The first few of many names."""
    shown = [repr(name) for name in names]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
