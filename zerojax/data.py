"""Batches on the devices: rows by seed and step alone, cut over the mesh, made ready while the device computes."""

from __future__ import annotations

import base64
import collections
import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from zerojax import meshes

PyTree = Any


class Dataloader:
    """Global batches of a data set, each a pytree of `jax.Array`s with `rows` rows over the ZeRO axis.

    What a step sees depends on seed and step alone, so a resumed run goes on where it was. Every process reads the rows
    of its own devices. Iterating goes on from where the loader is to the end of that epoch; `next_batch` goes on
    without end.

    Args:
      data: Arrays (NumPy or JAX, or a dict, tuple or named tuple of them with equal leading dims); or anything with
        `len` and `[i]` that gives examples, a list or `grain.MapDataset` say; or an iterable of batches, Grain's
        `IterDataset` or `DataLoader` say, which gives each process its part of the rows.
      sharding: Of a batch, `plan.batch`.
      rows: Rows of a batch, over all devices. None for an iterable, whose batches say it.
      seed: Of the order.
      shuffle: Another order in each epoch; not for an iterable, which has its own.
      drop_last: Drops an epoch's last rows where they are too few for a batch; otherwise its first complete them.
      prefetch: Batches made ready ahead, by a thread; 0 for none.

    Raises:
      ValueError: no rows, arrays that differ in length, or data too small for one batch under `drop_last`.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> sharding = NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
      >>> loader = Dataloader(np.arange(6), sharding, rows=4, shuffle=False)
      >>> [batch.tolist() for batch in loader]
      [[0, 1, 2, 3], [4, 5, 0, 1]]
      >>> loader.step
      2
    """

    def __init__(
        self,
        data: Any,
        sharding: NamedSharding,
        rows: int | None,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        prefetch: int = 2,
    ) -> None:
        self._step = 0
        self._rows, self._seed, self._sharding = rows, seed, sharding
        self._prefetch = max(prefetch, 0)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="zerojax-data") if prefetch > 0 else None
        self._ready: collections.deque[Future[Any]] = collections.deque()
        self._source: _Indexed | _Streamed
        if _is_arrays(data) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            if rows is None:
                raise ValueError("the data set needs to know the rows of a batch: set batch.rows or batch.micro_rows.")
            self._source = _Indexed(data, rows, seed=seed, shuffle=shuffle, drop_last=drop_last)
        elif isinstance(data, Iterable):
            self._source = _Streamed(data)
        else:
            raise ValueError(
                f"training data must be arrays, have len and [i], or be iterable; got {type(data).__name__}."
            )

    @property
    def step(self) -> int:
        """Batches taken so far."""
        return self._step

    def __len__(self) -> int:
        """Batches in an epoch."""
        if isinstance(self._source, _Streamed):
            raise TypeError("an iterable does not say how many batches it has.")
        return self._source.batches

    def __iter__(self) -> Iterator[PyTree]:
        """Batches to the end of the epoch."""
        source = self._source
        if isinstance(source, _Indexed):
            for _ in range(source.batches - self._step % source.batches):
                yield self.next_batch()
            return
        while (batch := self._next()) is not None:
            yield batch

    def next_batch(self) -> PyTree:
        """The batch of this step; after an epoch's last comes the next one's first."""
        batch = self._next()
        return self._next() if batch is None else batch

    def example(self) -> PyTree:
        """A row of a batch, or of an iterable its first batch, as NumPy arrays with a leading dim."""
        return self._source.example()

    def state(self) -> dict[str, Any]:
        """Where the loader is, as JSON holds it."""
        state = {"step": self._step, "rows": self._rows, "seed": self._seed}
        return state | ({"source": self._source.taken} if isinstance(self._source, _Streamed) else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
          ValueError: it was taken with other rows or another seed, so that steps saw other rows.
        """
        for name, mine in (("rows", self._rows), ("seed", self._seed)):
            if state[name] != mine:
                raise ValueError(
                    f"the data's position was saved with {name}={state[name]}, this loader has {name}={mine}: steps "
                    "see other rows. Set it as it was, or go without the position: load_checkpoint(..., data=False)."
                )
        for future in self._ready:
            future.cancel() or future.result()
        self._ready.clear()
        self._step = int(state["step"])
        if isinstance(self._source, _Streamed):
            self._source.restore(state["source"], self._step)

    def _next(self) -> PyTree | None:
        """The next batch; None where an iterable has come to its end, after which it begins anew."""
        if self._pool is None:
            batch, taken = self._make(self._step)
        else:
            while len(self._ready) < 1 + self._prefetch:
                self._ready.append(self._pool.submit(self._make, self._step + len(self._ready)))
            batch, taken = self._ready.popleft().result()
        if isinstance(self._source, _Streamed):
            self._source.taken = taken
        self._step += batch is not None
        return batch

    def _make(self, step: int) -> tuple[PyTree | None, Any]:
        """One batch on the devices, and where its source is after it."""
        source = self._source
        if isinstance(source, _Indexed):
            return _place_rows(source, step, self._sharding), None
        batch, taken = source.read()
        if batch is None:
            return None, taken
        place = functools.partial(jax.make_array_from_process_local_data, self._sharding)
        return jax.tree.map(lambda x: place(np.asarray(x)), batch), taken


class _Indexed:
    """Data of which row i can be read; the order of each epoch is a permutation by seed and epoch."""

    def __init__(self, data: Any, rows: int, *, seed: int, shuffle: bool, drop_last: bool) -> None:
        self._data, self._arrays = data, _is_arrays(data)
        self._seed, self._shuffle = seed, shuffle
        self.rows, self._count = rows, _count(data) if self._arrays else len(data)
        self.batches = self._count // rows if drop_last else -(-self._count // rows)
        if not self.batches:
            short = f"its {self._count} rows are fewer than a batch of {rows}, and drop_last drops them"
            raise ValueError(f"the data set has no batch: {short if self._count else 'it is empty'}.")

    def indices(self, step: int) -> np.ndarray:
        """The rows of one step, int64 [rows]."""
        epoch, batch = divmod(step, self.batches)
        places = np.arange(batch * self.rows, (batch + 1) * self.rows) % self._count
        return self._order(epoch)[places] if self._shuffle else places

    def read(self, indices: np.ndarray) -> PyTree:
        """Some rows, stacked: leaves [len(indices), ...]."""
        if self._arrays:
            return jax.tree.map(lambda x: np.asarray(x[indices]), self._data)
        examples = [self._data[int(i)] for i in indices]
        return jax.tree.map(lambda *rows: np.stack([np.asarray(row) for row in rows]), *examples)

    def example(self) -> PyTree:
        """One row."""
        return self.read(np.zeros(1, np.int64))

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_known", (None,))[0] != epoch:
            self._known = epoch, np.random.default_rng((self._seed, epoch)).permutation(self._count)
        return self._known[1]


class _Streamed:
    """An iterable of batches. `taken` says where it is: its iterator's own state, where it has one."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._data, self._iterator = data, iter(data)
        self._peeked: list[tuple[PyTree, Any]] = []
        self.taken: Any = self._state()

    def read(self) -> tuple[PyTree | None, Any]:
        """The next batch, or None at the end; and the state after it."""
        if self._peeked:
            return self._peeked.pop()
        batch = next(self._iterator, None)
        if batch is None:
            self._iterator = iter(self._data)
        return batch, self._state()

    def example(self) -> PyTree:
        """The first batch, which is not lost."""
        batch, state = self.read()
        if batch is None:
            raise ValueError("the training data gives no batch.")
        self._peeked.append((batch, state))
        return jax.tree.map(np.asarray, batch)

    def restore(self, state: Any, step: int) -> None:
        """Goes to where `state` was, by the iterator's own means, or by reading `step` batches."""
        self._iterator, self._peeked, self.taken = iter(self._data), [], state
        if state is not None:
            is_bytes = isinstance(state, dict) and set(state) == {"base64"}
            self._iterator.set_state(base64.b64decode(state["base64"]) if is_bytes else state)  # type: ignore[attr-defined]
            return
        for _ in range(step):
            while self.read()[0] is None:
                pass

    def _state(self) -> Any:
        if not hasattr(self._iterator, "get_state"):
            return None
        state = self._iterator.get_state()
        return {"base64": base64.b64encode(state).decode()} if isinstance(state, bytes) else state


def _place_rows(source: _Indexed, step: int, sharding: NamedSharding) -> PyTree:
    """A batch as global arrays; this process reads only what its devices hold."""
    indices = source.indices(step)
    parts: Any = sharding.addressable_devices_indices_map((source.rows,)).values()
    mine = sorted({row for index in parts for row in range(*index[0].indices(source.rows))})
    where = {row: k for k, row in enumerate(mine)}
    local = source.read(indices[mine])

    def place(path: Any, x: np.ndarray) -> jax.Array:
        def rows_of(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(source.rows)
            return x[where[start] : where[start] + stop - start]

        try:
            return jax.make_array_from_callback((source.rows, *x.shape[1:]), sharding, rows_of)
        except ValueError as e:
            e.add_note(f"zerojax: placing leaf {meshes.path_name(path)!r} of a batch of {source.rows} rows")
            raise

    return jax.tree_util.tree_map_with_path(place, local)


def _is_arrays(data: Any) -> bool:
    """Whether `data` is arrays, rather than a sequence of examples; a list is a sequence of examples."""
    leaves = jax.tree.leaves(data, is_leaf=lambda x: isinstance(x, list))
    return bool(leaves) and all(isinstance(x, np.ndarray | jax.Array) for x in leaves)


def _count(data: Any) -> int:
    named = {meshes.path_name(path): np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(data)}
    lengths = {name: shape[0] if shape else None for name, shape in named.items()}
    if None in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(f"training data: leaves differ in their leading dim, or lack one: {lengths}.")
    return next(n for n in lengths.values() if n is not None)
