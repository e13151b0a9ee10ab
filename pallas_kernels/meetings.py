"""Blocks of a cluster tell each other numbers, each waiting for what it is told and for nothing else.

A barrier of the whole cluster, which would do as well, has every thread wait until all that it wrote is in memory, and
throws away the L1 cache: of rows that follow one another it costs more than their sums.
"""

from __future__ import annotations

from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jaxlib.mlir.dialects import nvvm

from pallas_kernels import mlir

# Barriers in shared memory, and places for what is told, are taken in turns. A block that hears of a row only after it
# has told of the next one may by then have been told of the three that follow: so there are four.
PLACES = 4
BARRIER_BYTES = PLACES * 8


def prepare(barriers: ir.Value) -> None:
    """By all threads of a cluster, before the first meeting."""

    def init() -> None:
        for offset in range(0, BARRIER_BYTES, 8):
            _asm("mbarrier.init.shared::cta.b64 [$0], 1;", "r", mlir.at(barriers, offset))
        _asm("fence.mbarrier_init.release.cluster;", "")

    mlir.when(_first_thread(), init)
    nvvm.cluster_arrive_relaxed(aligned=True)
    nvvm.cluster_wait(aligned=True)


class Meeting:
    """The i-th time, from 0, that all blocks of a cluster meet; `barriers` is where `prepare` made them.

    Attributes:
      place: Which of `PLACES` it takes, an index.
    """

    def __init__(self, barriers: ir.Value, i: ir.Value):
        self.place = arith.remui(i, mlir.index(PLACES))
        self._barrier = mlir.at(barriers, mlir.times(self.place, 8))
        self._phase = mlir.to_int32(arith.andi(arith.divui(i, mlir.index(PLACES)), mlir.index(1)))

    def expect(self, size: int) -> None:
        """By all threads: of how many bytes this block is told, by itself too."""
        text = f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size};"
        mlir.when(_first_thread(), lambda: _asm(text, "r", self._barrier))

    def tell(self, value: ir.Value, place: ir.Value, block: ir.Value) -> None:
        """By one thread: a float32 to a block of the cluster; `place` is where it would be in our shared memory."""
        _asm(
            "{ .reg .b32 there, barrier; mapa.shared::cluster.u32 there, $0, $2;"
            " mapa.shared::cluster.u32 barrier, $1, $2;"
            " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], $3, [barrier]; }",
            "r,r,r,f",
            place,
            self._barrier,
            mlir.to_int32(block),
            value,
        )

    def wait(self) -> None:
        """By all threads: until this block has been told everything."""
        _asm(
            "{ .reg .pred done; AGAIN${:uid}: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;"
            " @!done bra AGAIN${:uid}; }",
            "r,r",
            self._barrier,
            self._phase,
        )


def arrive(barrier: ir.Value, threads: int) -> None:
    """By all threads of a warp: they do not wait for the others of so many that the numbered barrier counts."""
    _asm(f"barrier.cta.arrive.aligned $0, {threads};", "r", barrier)


def wait_for_all(barrier: ir.Value, threads: int) -> None:
    """Likewise: they wait, and see what those who arrived have written."""
    _asm(f"barrier.cta.sync.aligned $0, {threads};", "r", barrier)


def _first_thread() -> ir.Value:
    return mlir.equal(mlir.to_index(mgpu.thread_idx()), 0)


def _asm(text: str, kinds: str, *operands: ir.Value) -> None:
    constraints = f"{kinds},~{{memory}}" if kinds else "~{memory}"
    mlir.llvm.inline_asm(None, list(operands), text, constraints, has_side_effects=True)
