"""Real text that every machine has: the documentation and the standard library that come with Python, as bytes."""

from __future__ import annotations

import dataclasses
import pathlib
import pydoc_data.topics
import sysconfig

import numpy as np

VOCAB = 256


@dataclasses.dataclass(frozen=True)
class Text:
    """`train` and `held_out`: uint8 [bytes] each; the held-out tenth is never trained on."""

    train: np.ndarray
    held_out: np.ndarray


def load(*, source_bytes: int = 2_000_000) -> Text:
    """Python's documentation topics, then standard library source up to `source_bytes`, in a fixed order.

    Its content differs between Python versions, so compare losses under one version.
    """
    topics = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())).encode()
    source = b""
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(source) >= source_bytes:
            break
        source += path.read_bytes()
    parts = [np.frombuffer(part, np.uint8) for part in (topics, source[:source_bytes])]
    cuts = [len(part) * 9 // 10 for part in parts]
    return Text(
        train=np.concatenate([part[:cut] for part, cut in zip(parts, cuts, strict=True)]),
        held_out=np.concatenate([part[cut:] for part, cut in zip(parts, cuts, strict=True)]),
    )


def batch_at(data: np.ndarray, step: int, *, rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    """The batch of one step, by seed and step alone, so that a resumed run sees what an unbroken one would.

    Returns:
      int32 [rows, tokens + 1]: inputs and, one further, targets.
    """
    starts = np.random.default_rng((seed, step)).integers(0, len(data) - tokens, rows)
    return data[starts[:, None] + np.arange(tokens + 1)].astype(np.int32)
