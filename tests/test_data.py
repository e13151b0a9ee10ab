"""The dataloader: what each step sees, by seed and step alone, and where it goes on."""

import json
import subprocess
import sys

import models
import numpy as np
import pytest
import test_engine
from jax.sharding import NamedSharding, PartitionSpec

import zerojax
from zerojax.data import Dataloader


def sharding(devices=8, names=("data",)):
    sizes = (devices,) if len(names) == 1 else (2, devices // 2)
    return NamedSharding(models.mesh_of(*sizes, names=names), PartitionSpec("data"))


def table(rows=20):
    return {"x": np.arange(rows * 3, dtype=np.float32).reshape(rows, 3), "row": np.arange(rows)}


class Examples:
    """A data set of which one example at a time can be read."""

    def __init__(self, rows=20):
        self.table, self.read = table(rows), []

    def __len__(self):
        return len(self.table["row"])

    def __getitem__(self, i):
        self.read.append(i)
        return {name: x[i] for name, x in self.table.items()}


def rows_of(batches):
    return [np.asarray(batch["row"]).tolist() for batch in batches]


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("make", [table, Examples])
def test_epochs_are_permutations_and_the_last_batch_is_completed(make, prefetch):
    loader = Dataloader(make(), sharding(), 8, seed=1, prefetch=prefetch)
    assert len(loader) == 3
    epochs = [rows_of(loader), rows_of(loader)]
    for epoch in epochs:
        flat = [row for batch in epoch for row in batch]
        assert sorted(flat[:20]) == list(range(20)) and flat[20:] == flat[:4]
    assert epochs[0] != epochs[1]
    again = Dataloader(make(), sharding(), 8, seed=1, prefetch=0)
    assert [rows_of(again), rows_of(again)] == epochs
    assert rows_of(Dataloader(make(), sharding(), 8, seed=2)) != epochs[0]


def test_rows_lie_where_the_step_wants_them():
    for where in (sharding(), sharding(names=("model", "data"))):
        loader = Dataloader(table(), where, 8, shuffle=False)
        batch = loader.next_batch()
        assert batch["x"].sharding.is_equivalent_to(where, 2) and batch["x"].dtype == np.float32
        np.testing.assert_array_equal(batch["x"], table()["x"][:8])
        np.testing.assert_array_equal(batch["row"], np.arange(8))


def test_drop_last_and_more_rows_than_data():
    loader = Dataloader(table(), sharding(), 8, drop_last=True, shuffle=False)
    assert rows_of(loader) == [list(range(8)), list(range(8, 16))] and len(loader) == 2
    assert rows_of(Dataloader(table(3), sharding(), 8, shuffle=False)) == [[0, 1, 2, 0, 1, 2, 0, 1]]


def test_an_epoch_is_taken_up_in_its_middle():
    want = rows_of(Dataloader(table(), sharding(), 8))
    loader = Dataloader(table(), sharding(), 8)
    first = next(iter(loader))
    assert rows_of([first]) + rows_of(loader) == want and loader.step == 3


@pytest.mark.parametrize("prefetch", [0, 2])
def test_state_is_json_and_counts_what_was_taken_not_what_is_ready(prefetch):
    loader = Dataloader(table(), sharding(), 8, prefetch=prefetch)
    rows_of([loader.next_batch(), loader.next_batch()])
    state = json.loads(json.dumps(loader.state()))
    want = rows_of([loader.next_batch() for _ in range(4)])
    other = Dataloader(table(), sharding(4), 8, prefetch=prefetch)
    rows_of([other.next_batch()])
    other.restore(state)
    assert rows_of([other.next_batch() for _ in range(4)]) == want
    loader.restore(state)
    assert rows_of([loader.next_batch() for _ in range(4)]) == want


@pytest.mark.parametrize("change", [{"rows": 16}, {"seed": 5}])
def test_state_of_another_order_is_refused(change):
    state = Dataloader(table(), sharding(), 8).state()
    loader = Dataloader(table(), sharding(), **{"rows": 8} | change)
    with pytest.raises(ValueError, match=rf"{next(iter(change))}=.*load_checkpoint\(\.\.\., data=False\)"):
        loader.restore(state)


class Stream:
    """An iterable as Grain's: its iterator knows its state."""

    def __init__(self, batches, as_bytes=False):
        self.batches, self.as_bytes = batches, as_bytes

    def __iter__(self):
        return StreamIterator(self)


class StreamIterator:
    def __init__(self, stream):
        self.stream, self.at = stream, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at >= len(self.stream.batches):
            raise StopIteration
        self.at += 1
        return self.stream.batches[self.at - 1]

    def get_state(self):
        return json.dumps({"at": self.at}).encode() if self.stream.as_bytes else {"at": self.at}

    def set_state(self, state):
        self.at = (json.loads(state) if self.stream.as_bytes else state)["at"]


def batches(count=5):
    return [{"row": np.arange(8) + 8 * i} for i in range(count)]


@pytest.mark.parametrize("kind", ["list_iterator", "dict_state", "bytes_state"])
def test_iterables_of_batches(kind):
    class Plain:
        def __iter__(self):
            return iter(batches())

    make = {
        "list_iterator": Plain,
        "dict_state": lambda: Stream(batches()),
        "bytes_state": lambda: Stream(batches(), as_bytes=True),
    }[kind]
    loader = Dataloader(make(), sharding(), None)
    assert loader.example()["row"].tolist() == list(range(8))
    assert rows_of(loader) == rows_of(batches())
    rows_of([loader.next_batch(), loader.next_batch()])
    state = json.loads(json.dumps(loader.state()))
    want = rows_of([loader.next_batch() for _ in range(6)])
    assert want == rows_of([batches()[i % 5] for i in range(2, 8)])
    other = Dataloader(make(), sharding(), None)
    other.restore(state)
    assert rows_of([other.next_batch() for _ in range(6)]) == want and other.step == 13
    with pytest.raises(TypeError, match="does not say how many"):
        len(loader)


def test_an_error_of_the_data_reaches_the_loop():
    class Broken(Examples):
        def __getitem__(self, i):
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        Dataloader(Broken(), sharding(), 8).next_batch()


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (table(4), {"rows": 8, "drop_last": True}, "4 rows are fewer than a batch of 8"),
        ([], {"rows": 8}, "it is empty"),
        ({"x": np.ones(4), "y": np.ones(3)}, {"rows": 2}, "leaves differ in their leading dim"),
        (table(), {"rows": None}, "set batch.rows or batch.micro_rows"),
        (3, {"rows": 8}, "got int"),
    ],
)
def test_errors(data, options, message):
    with pytest.raises(ValueError, match=message):
        Dataloader(data, sharding(), **options)


PROCESS = """
import sys
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:{port}", 2, int(sys.argv[1]))
from jax.sharding import NamedSharding, PartitionSpec
sys.path.insert(0, "tests")
from test_data import Examples
from zerojax.data import Dataloader
data, mesh = Examples(), jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
loader = Dataloader(data, NamedSharding(mesh, PartitionSpec("data")), 8, seed=1, prefetch=0)
batch = loader.next_batch()
mine = np.concatenate([np.asarray(s.data) for s in batch["row"].addressable_shards])
total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(batch["row"])
print(mine.tolist(), data.read, int(total))
import test_engine, zerojax
config = test_engine.small(zero={"stage": 3, "min_size": 1})
engine, *_ = zerojax.initialize(config, model=test_engine.MLPLoss(), training_data=test_engine.data(64))
print(*[float(engine.train_batch()["loss"]) for _ in range(2)], engine.get_global_grad_norm())
"""


@pytest.mark.slow
def test_two_processes_read_their_own_rows_and_train_as_one():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        code = PROCESS.replace("{port}", str(s.getsockname()[1]))
    import os

    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    start = lambda k: subprocess.Popen(
        [sys.executable, "-c", code, str(k)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    outs = [p.communicate(timeout=120) for p in [start(0), start(1)]]
    assert all(out for out, _ in outs), outs
    want = rows_of([Dataloader(table(), sharding(4), 8, seed=1).next_batch()])[0]
    config = test_engine.small(zero={"stage": 3, "min_size": 1})
    engine, *_ = zerojax.initialize(
        config, model=test_engine.MLPLoss(), training_data=test_engine.data(64), mesh=models.mesh_of(4)
    )
    alone = [*(float(engine.train_batch()["loss"]) for _ in range(2)), engine.get_global_grad_norm()]
    for k, (out, _) in enumerate(outs):
        rows, trained = out.splitlines()[-2:]
        part = want[4 * k : 4 * k + 4]
        assert rows == f"{part} {part} {sum(want)}"
        np.testing.assert_allclose([float(x) for x in trained.split()], alone, rtol=1e-5)
