"""The kernels on a GPU, by `python -m pytest -m gpu tests/test_gpu.py`: values, bits and memory.

Row kernels are compared with float64 in numpy, on the inputs as they were rounded; optimizers with XLA's form on the
same device. The cases' programs are compiled side by side before they run, since the compiler takes most of the time.
"""

import concurrent.futures
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_offload
import test_offload_params
from test_layer_norm import BACKWARD, FORWARD, ROUNDING, exact
from test_softmax import f64, lower, oracle, oracle_gradient

import pallas_kernels
import zerojax
from pallas_kernels import dispatch, formats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(dispatch.unavailable()), reason=str(dispatch.unavailable())),
]
IMPLEMENTATION = "mosaic"
BFLOAT16 = jnp.dtype("bfloat16")


@pytest.fixture(scope="session")
def ready(request):
    """Gives a case's compiled programs and its inputs."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = {case: pool.submit(case.compile) for case in dict.fromkeys(p["case"] for p in params if "case" in p)}
        yield lambda case: futures[case].result()


def on(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def call(program, inputs):
    return jax.device_get(program(*inputs))


def assert_same_bits(got, want):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    assert all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


def assert_close(got, want, dtype, bound):
    """Relative L2 within `bound`; in 16 bits, within 1.02 of what rounding the exact result once costs."""
    assert got.dtype == dtype and got.shape == want.shape
    rounding = 0.0
    if got.dtype != np.float32:
        rounding = ROUNDING * np.linalg.norm(f64(want.astype(np.float32).astype(got.dtype)) - want)
    assert np.linalg.norm(f64(got) - want) <= rounding + bound * np.linalg.norm(want)


class Case:
    """One setting of the attributes: its inputs, and the programs that run on them."""

    def __str__(self):
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = [f.name for f in dataclasses.fields(self) if given[f.name] != f.default]
        return ",".join(f"{name}={given[name]}" for name in changed).replace(" ", "")


class Rows(Case):
    """A case of a kernel of rows: one program, which gives a pass over all rows and one over one of them alone."""

    def compile(self):
        inputs = self.inputs(np.random.default_rng(0))
        return jax.jit(self.run).lower(*inputs).compile(), inputs


@dataclasses.dataclass(frozen=True)
class LayerNorm(Rows):
    shape: tuple[int, int]
    dtype: str
    weights: str = "float32"
    mean: float = 0.0
    residual: bool = False

    def inputs(self, rng):
        draw = lambda shape, dtype, at=0.0: (rng.standard_normal(shape) + at).astype(jnp.dtype(dtype))
        n = self.shape[1:]
        x, dy = draw(self.shape, self.dtype, self.mean), draw(self.shape, self.dtype)
        added = (draw(self.shape, self.dtype), draw(self.shape, self.dtype)) if self.residual else (None, None)
        weights = (draw(n, self.weights, 1.0), draw(n, self.weights)) if self.weights else (None, None)
        return x, dy, *added, *weights

    def run(self, *inputs):
        def both(x, dy, residual, dtotal, scale, bias):
            one = lambda x, residual, scale, bias: pallas_kernels.layer_norm(
                x, scale, bias, residual=residual, implementation=IMPLEMENTATION
            )
            y, vjp = jax.vjp(one, x, residual, scale, bias)
            return y, vjp(dy if residual is None else (dy, dtotal))

        last = [None if x is None else x[-1:] for x in inputs[:4]]
        alone, (dx, *_) = both(*last, *inputs[4:])
        return both(*inputs), (alone, dx)


@dataclasses.dataclass(frozen=True)
class Softmax(Rows):
    shape: tuple[int, ...]
    dtype: str
    scale: float = 1.0
    causal: bool = False
    masks: tuple[int, ...] | None = None

    def inputs(self, rng):
        draw = lambda size: (size * rng.standard_normal(self.shape, np.float32)).astype(jnp.dtype(self.dtype))
        x, dy = draw(2), draw(1)
        if self.masks is None:
            return x, dy, None, None
        keep = rng.random(self.masks) < 0.7
        if self.masks[-2] > 1:
            keep[..., 0, :] = False
        return x, dy, keep, rng.standard_normal(self.masks, np.float32)

    def run(self, *inputs):
        def both(x, dy, keep, bias):
            one = lambda x, bias: pallas_kernels.softmax(
                x, scale=self.scale, where=keep, bias=bias, causal=self.causal, implementation=IMPLEMENTATION
            )
            y, vjp = jax.vjp(one, x, bias)
            return y, vjp(dy)

        if not self.alone:
            return both(*inputs), None
        alone, (dx, _) = both(*(x[..., self.alone, :] for x in inputs[:2]), None, None)
        return both(*inputs), (alone, dx)

    @property
    def alone(self):
        """The row that is computed alone too: the last, or one that begins a vector of 16 bytes as an array does."""
        ragged = self.shape[-1] % 8 != 0
        if self.masks or (ragged and self.causal):
            return None
        row = (self.shape[-2] - 1) // 8 * 8 if ragged else self.shape[-2] - 1
        return slice(row, row + 1)


LENGTHS = (7, 129, 512, 1000, 4097, 16384, 50257, 65536, 131072, 262144, 524288)
SHAPES = (
    (1031, 1024),
    (515, 4096),
    (77, 14432),
    (300, 16384),
    (201, 8200),
    (90, 30000),
    (4099, 128),
    (1, 1000),
    (131, 1001),
)
NORMS = [
    *(LayerNorm(shape, dtype) for shape in SHAPES for dtype in ("float32", "bfloat16")),
    *(LayerNorm(shape, "float16") for shape in ((515, 4096), (131, 1001))),
    *(LayerNorm(shape, "float32", mean=1e4) for shape in ((515, 4096), (300, 16384), (131, 1001))),
    LayerNorm((1031, 1024), "float32", weights=""),
    LayerNorm((1031, 1024), "bfloat16", weights="bfloat16"),
    LayerNorm((515, 4096), "bfloat16", residual=True),
    LayerNorm((77, 14432), "float32", residual=True),
]
SOFTMAXES = [
    *(Softmax((min(4099, 2**20 // n + 5), n), dtype) for n in LENGTHS for dtype in ("float32", "bfloat16")),
    Softmax((513, 1000), "float16", scale=-0.7),
    Softmax((2, 3, 301, 301), "bfloat16", scale=0.125, causal=True),
    Softmax((33, 8192), "float32", scale=0.125, causal=True),
    Softmax((300, 129), "float32", causal=True),  # queries without keys
    Softmax((2, 129, 1000), "float32", scale=0.5, masks=(129, 1000)),
    Softmax((2, 9, 65536), "bfloat16", masks=(2, 9, 1)),
    Softmax((2, 3, 64, 256), "float16", causal=True, masks=(3, 1, 256)),
]
SPOILT = [Softmax((min(4099, 2**20 // n + 5), n), dtype) for n in (1000, 65536) for dtype in ("float32", "bfloat16")]


@on(NORMS)
def test_layer_norm(ready, case):
    program, inputs = ready(case)
    (y, (dx, dresidual, dscale, dbias)), (y_alone, dx_alone) = got = call(program, inputs)
    x, dy, residual, dtotal, scale, bias = inputs
    if case.residual:
        y, total = y
        y_alone, total_alone = y_alone
        assert_same_bits((total, total_alone, dresidual), (x + residual, (x + residual)[-1:], dx))
        x = total
    wanted = exact(
        x, 1.0 if scale is None else scale, 0.0 if bias is None else bias, dy, dtotal=0.0 if dtotal is None else dtotal
    )
    assert (dscale is None, dbias is None) == (scale is None, bias is None)
    assert_close(y, wanted[0], case.dtype, FORWARD)
    assert_close(dx, wanted[1], case.dtype, BACKWARD)
    if scale is not None:
        assert_close(dscale, wanted[2], case.weights, BACKWARD)
        assert_close(dbias, wanted[3], case.weights, BACKWARD)
    assert_same_bits((y_alone, dx_alone), (y[-1:], dx[-1:]))
    assert_same_bits(call(program, inputs), got)


@on(SOFTMAXES)
def test_softmax(ready, case):
    program, inputs = ready(case)
    (y, (dx, dbias)), alone = got = call(program, inputs)
    x, dy, keep, bias = inputs
    kept = np.ones(x.shape, bool)
    if case.causal:
        kept &= lower(*x.shape[-2:])
    if keep is not None:
        kept &= keep
    assert_close(y, oracle(x, case.scale, kept, 0.0 if bias is None else f64(bias)), case.dtype, FORWARD)
    assert_close(dx, oracle_gradient(y, dy, case.scale), case.dtype, BACKWARD)
    assert not y[~kept].any() and not dx[~kept].any()  # rows of which nothing is kept among them
    if bias is not None:
        lead = x.ndim - bias.ndim
        summed = (*range(lead), *(lead + d for d in range(bias.ndim) if bias.shape[d] != x.shape[lead + d]))
        dz = oracle_gradient(y, dy)
        # Its terms cancel: what float32 loses is a part of their sizes' sum.
        error = np.abs(dbias - dz.sum(summed).reshape(bias.shape))
        assert np.all(error <= BACKWARD * np.abs(dz).sum(summed).reshape(bias.shape) + 1e-9)
    elif case.alone:
        assert_same_bits(alone, (y[..., case.alone, :], dx[..., case.alone, :]))
    assert_same_bits(call(program, inputs), got)


@on(SPOILT)
def test_what_is_not_finite_stays_in_its_row(ready, case):
    program, (x, dy, *masks) = ready(case)
    (clean, (clean_dx, _)), _ = call(program, (x, dy, *masks))
    x = x.copy()
    x[0, 3], x[1], x[2, 0], x[3, 1:], x[4] = np.nan, -np.inf, np.inf, -np.inf, 3e38
    (y, (dx, _)), _ = call(program, (x, dy, *masks))
    assert np.isnan(f64(y[:3])).all() and np.isnan(f64(dx[:3])).all()
    assert_same_bits(y[3], np.eye(1, x.shape[1], dtype=y.dtype)[0])
    np.testing.assert_allclose(f64(y[4]), 1 / x.shape[1], rtol=2e-7 if case.dtype == "float32" else 2**-8)
    assert_same_bits((y[5:], dx[5:]), (clean[5:], clean_dx[5:]))


OPS = {
    "adam": (pallas_kernels.adam, pallas_kernels.adam_reference, pallas_kernels.adam_scalars),
    "lamb": (pallas_kernels.lamb, pallas_kernels.lamb_reference, pallas_kernels.lamb_scalars),
}
LEAVES = [(), (0, 4), (7,), (33, 5), (129, 64), (20_001, 96)]
# With 8-bit moments the kernels take leaves of whole groups along their rows, XLA the others.
LARGE, LARGE_ROWS = (5_000_011,), (156_251, 32)
FEW = 8 * np.finfo(np.float32).eps  # square roots and quotients, XLA's too, are good to 2 units in the last place
# A float32 that differs in its last bits before it is rounded at random may fall to the other side of its threshold:
# those bits are some 2**-16 of the way between two bfloat16 numbers or codes.
few = lambda apart: np.sum(apart) <= 1 + 2e-4 * apart.size


@dataclasses.dataclass(frozen=True)
class Step(Case):
    """A step of an optimizer, by kernel and by XLA."""

    op: str
    grads: str
    moments: str
    params: str = "float32"

    def inputs(self, rng):
        shapes = [*LEAVES, LARGE_ROWS if self.moments == "int8" else LARGE]
        normal = lambda size: [np.asarray(size * rng.standard_normal(shape, np.float32)) for shape in shapes]
        params, mu, grads = normal(1), normal(0.1), [g.astype(jnp.dtype(self.grads)) for g in normal(0.1)]
        nu = [np.asarray(x**2) for x in normal(0.1)]
        if self.moments == "int8":
            mu, nu = ([_blocks(rng, shape, signed) for shape in shapes] for signed in (True, False))
        elif self.moments == "bfloat16":
            mu, nu = ([x.astype(BFLOAT16) for x in moment] for moment in (mu, nu))
        if self.params == "split":
            params = [_split(x) for x in params]
        elif self.params == "copied":
            params = [formats.Copied(x, x.astype(BFLOAT16)) for x in params]
        return params, mu, nu, grads, np.int32(10)

    def compile(self):
        op, reference, scalars = OPS[self.op]

        def step(op, params, mu, nu, grads, count, apply):
            s = scalars(count, 1e-2, weight_decay=0.1, scale=0.5, apply=apply)
            return op(params, grads, mu, nu, s)

        inputs = (*self.inputs(np.random.default_rng(0)), np.bool_(True))
        kernel = jax.jit(
            functools.partial(step, functools.partial(op, implementation=IMPLEMENTATION)), donate_argnums=(0, 1, 2)
        )
        by_xla = jax.jit(functools.partial(step, reference))
        return kernel.lower(*inputs).compile(), by_xla.lower(*inputs).compile(), inputs


def _split(x):
    bits = x.view(np.uint32)
    return formats.Split((bits >> 16).astype(np.uint16).view(BFLOAT16), bits.astype(np.uint16))


def _weight(leaf):
    """float32, of a param in any format."""
    if isinstance(leaf, formats.Split):
        return (leaf.high.view(np.uint16).astype(np.uint32) << 16 | leaf.low).view(np.float32)
    return leaf.value if isinstance(leaf, formats.Copied) else leaf


def _blocks(rng, shape, signed):
    groups = (*shape[:-1], math.ceil(math.prod(shape[-1:]) / formats.GROUP))
    low, high, dtype = (-127, 128, np.int8) if signed else (1, 256, np.uint8)
    codes = np.asarray(rng.integers(low, high, shape, dtype))
    return formats.Blocks(codes, rng.integers(-12, -8, groups, np.int8))


def assert_weights_close(got, want, old, *, rounded=False):
    """To a few units in the last place of the larger of old, new and 1; after `rounded` moments all but a few."""
    if isinstance(got, formats.Copied):
        assert_same_bits(got.copy, got.value.astype(BFLOAT16))
    got, want, old = _weight(got), _weight(want), _weight(old)
    apart = np.abs(got - want) > FEW * (np.abs(want) + np.abs(old)) + 1e-7
    assert few(apart) if rounded else not np.any(apart)


def assert_moments_close(got, want, old):
    if isinstance(want, formats.Blocks):
        same = got.exponents == want.exponents
        apart = np.abs(got.codes.astype(int) - want.codes)
        along = np.repeat(same, formats.GROUP, -1)[..., : math.prod(want.codes.shape[-1:])].reshape(apart.shape)
        assert few(~same) and few(apart > 0)
        assert np.all(apart[along] <= 1)
        return
    size = np.abs(f64(want)) + np.abs(f64(old))
    apart = np.abs(f64(got) - f64(want))
    if want.dtype == np.float32:
        assert np.all(apart <= FEW * size)
    else:
        assert few(apart > 0)
        assert np.all(apart <= 2.0**-7 * np.abs(f64(want)) + FEW * size)


STEPS = [
    Step(op, *formats_of)
    for op in OPS
    for formats_of in (
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("float16", "bfloat16"),
        ("bfloat16", "int8"),
        ("bfloat16", "int8", "split"),
        ("bfloat16", "bfloat16", "copied"),
    )
]


@on(STEPS)
def test_optimizer(ready, case):
    kernel, by_xla, inputs = ready(case)
    got, want = call(kernel, inputs), call(by_xla, inputs)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    # LAMB steps by the moments as they were rounded.
    rounded = case.op == "lamb" and case.moments != "float32"
    for new, expected, old in zip(got[0], want[0], inputs[0], strict=True):
        assert_weights_close(new, expected, old, rounded=rounded)
    for k in (1, 2):
        for new, expected, old in zip(got[k], want[k], inputs[k], strict=True):
            assert_moments_close(new, expected, old)
    assert_same_bits(call(kernel, inputs), got)
    assert_same_bits(call(kernel, (*inputs[:-1], np.bool_(False))), inputs[:3])


@on(STEPS)
def test_optimizer_is_in_place(ready, case):
    kernel, _, inputs = ready(case)
    memory = kernel.memory_analysis()
    donated = sum(x.nbytes for x in jax.tree.leaves(inputs[:3]))
    assert memory.alias_size_in_bytes >= donated
    assert memory.temp_size_in_bytes <= 0.01 * donated  # sums of blocks; the small leaves that are XLA's


@dataclasses.dataclass(frozen=True)
class Apply(Case):
    """Two steps by `zerojax.apply`, with kernels and without."""

    masters: bool

    def compile(self):
        rng = np.random.default_rng(0)
        shapes = {"kernel": (4096, 96), "bias": (96,), "gain": ()}
        dtype = BFLOAT16 if self.masters else np.float32
        draw = lambda: {name: np.asarray(rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}
        params, grads = draw(), [draw(), draw()]

        def run(implementation, params, grads):
            small = {"mu_dtype": "int8", "nu_dtype": "int8"} if self.masters else {}
            tx = zerojax.fused_adamw(1e-2, weight_decay=0.1, implementation=implementation, **small)
            if self.masters:
                tx = zerojax.master_weights(zerojax.chain(optax.clip_by_global_norm(1.0), tx))
            state = tx.init(params)
            for g in grads:
                params, state = zerojax.apply(tx, g, state, params)
            return params, zerojax.full_precision(params, state) if self.masters else params

        programs = [jax.jit(functools.partial(run, name)) for name in (IMPLEMENTATION, "xla")]
        return *(program.lower(params, grads).compile() for program in programs), (params, grads)


@on([Apply(False), Apply(True)])
def test_apply(ready, case):
    kernel, by_xla, inputs = ready(case)
    (params, full), (_, wanted) = got, _ = call(kernel, inputs), call(by_xla, inputs)
    for name, old in inputs[0].items():
        # The second step is by the moments as the first rounded them.
        assert_weights_close(full[name], wanted[name], f64(old), rounded=case.masters)
        if case.masters:
            assert_same_bits(params[name], _split(full[name]).high)
    assert_same_bits(call(kernel, inputs), got)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", test_offload.OPTIMIZERS)
def test_twenty_steps_with_state_in_host_memory(name, stage):
    run = functools.partial(
        test_offload.train, test_offload.OPTIMIZERS[name](), test_offload.mesh_of(1), stage, steps=20
    )
    tx, state, losses = run(test_offload.SMALL)
    placed = [x.sharding.memory_kind for x in jax.tree.leaves(state)]
    assert "pinned_host" in placed and "device" in placed
    on_device, resident, wanted = run(None)
    assert losses == wanted
    test_offload.assert_same(test_offload.arrays(tx, state), test_offload.arrays(on_device, resident))


def test_params_in_host_memory():
    results = []
    for offload in (None, test_offload_params.ON_HOST):
        plan = test_offload_params.plan_of(1, offload)
        tx, state, losses = test_offload_params.train(test_offload.OPTIMIZERS["split"](), plan, steps=20, accumulate=2)
        results.append((losses, test_offload.arrays(tx, state)))
    assert set(test_offload_params.kinds(state.params)) == {"pinned_host", "device"}
    assert results[0][0] == results[1][0]
    test_offload.assert_same(results[0][1], results[1][1])
