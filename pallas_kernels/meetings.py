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

# Of two barriers in shared memory, taken in turns: a block that is ahead may already tell of the next row.
BARRIER_BYTES = 16


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

    A place that is told in one meeting may be told again two meetings later.
    """

    def __init__(self, barriers: ir.Value, i: ir.Value):
        odd = arith.andi(i, mlir.index(1))
        self._barrier = mlir.at(barriers, mlir.times(odd, 8))
        self._phase = mlir.to_int32(arith.andi(arith.shrui(i, mlir.index(1)), mlir.index(1)))

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


def _first_thread() -> ir.Value:
    return mlir.equal(mlir.to_index(mgpu.thread_idx()), 0)


def _asm(text: str, kinds: str, *operands: ir.Value) -> None:
    constraints = f"{kinds},~{{memory}}" if kinds else "~{memory}"
    mlir.llvm.inline_asm(None, list(operands), text, constraints, has_side_effects=True)
