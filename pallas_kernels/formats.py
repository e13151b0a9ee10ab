"""How an optimizer's leaves are stored, where that is not one plain array, and how they become float32 and back.

Arithmetic is float32 always; these are the bytes between two steps:

* `Split`: a float32 number cut into its upper 16 bits, which are a bfloat16 number, and its lower 16: exact, 4 bytes.
* `Copied`: a float32 number, and what it is in 16 bits, for a model that computes in them: 6 bytes.
* `Blocks`: 8-bit codes, and a power of two for each 32 neighbours along the last dim (as in the OCP Microscaling
  formats): 1.03 bytes. Signed codes are linear, for a first moment. Unsigned ones hold the square root, for a second
  moment: it is what a step divides by, and small values stay where linear codes would make them zero.
* a moment in bfloat16: 2 bytes.

What does not fit is rounded stochastically, up or down at random so that the mean is right: to nearest, a second moment
that changes by 0.1 % a step would never change, bfloat16 and codes being 0.4 % apart at least. The random bits are a
hash of the step, the leaf and the element's place in it: the same however a leaf is cut over devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
GROUP = 32  # neighbours that share a power of two


class Split(NamedTuple):
    """float32 numbers: `high` bfloat16, their upper halves; `low` uint16, their lower ones."""

    high: Array
    low: Array


class Copied(NamedTuple):
    """float32 numbers, and the same rounded to 16 bits."""

    value: Array
    copy: Array


class Blocks(NamedTuple):
    """8-bit numbers: `codes` int8 or uint8 [..., n], `exponents` int8 [..., ceil(n / 32)]."""

    codes: Array
    exponents: Array


class Cut(NamedTuple):
    """How a shard lies along one dim of a leaf, by row-major places: i goes to i + i // period * stride + offset."""

    period: int
    stride: Any
    offset: Any


class Place(NamedTuple):
    """Which leaf an array is, or is a shard of; and how that is cut, the last of its dims first."""

    leaf: int
    cuts: tuple[Cut, ...] = ()


WHOLE = Place(0)


def split(value: Array) -> Split:
    """The halves of float32 numbers.

    Example:
      >>> split(jnp.float32(1.0000001))
      Split(high=Array(1, dtype=bfloat16), low=Array(1, dtype=uint16))
    """
    bits = lax.bitcast_convert_type(value, jnp.uint32)
    high = lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return Split(high, bits.astype(jnp.uint16))


def joined(halves: Split) -> Array:
    """The float32 numbers of `halves`.

    Example:
      >>> float(joined(split(jnp.float32(0.1)))) == float(jnp.float32(0.1))
      True
    """
    high = lax.bitcast_convert_type(halves.high, jnp.uint16).astype(jnp.uint32)
    return lax.bitcast_convert_type(high << 16 | halves.low.astype(jnp.uint32), jnp.float32)


def zeros(shape: Sequence[int], *, signed: bool) -> Blocks:
    """Zeros in blocks.

    Example:
      >>> [x.shape for x in zeros((3, 40), signed=True)]
      [(3, 40), (3, 2)]
    """
    lead, n = tuple(shape[:-1]), (shape[-1] if shape else 1)
    codes = jnp.zeros(shape, jnp.int8 if signed else jnp.uint8)
    return Blocks(codes, jnp.zeros((*lead, math.ceil(n / GROUP)), jnp.int8))


def is_stored(x: Any) -> bool:
    """Whether x is one leaf of several arrays; for `jax.tree.map(..., is_leaf=is_stored)`."""
    return isinstance(x, Split | Copied | Blocks)


def shape_of(leaf: Any) -> tuple[int, ...]:
    """Shape of the numbers that a leaf holds."""
    return np.shape(leaf[0] if is_stored(leaf) else leaf)


def random_bits(key: Array, place: Array) -> Array:
    """int32 like `place`: 32 bits that look random (Wellons' lowbias32, https://nullprogram.com/blog/2018/07/31/).

    Args:
      key: int32 scalar, or like `place`.
      place: int32, an element's place in its leaf, modulo 2**32.
    """
    x = place ^ key
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ lax.shift_right_logical(x, _like(shift, x))) * _like(factor, x)
    return x ^ lax.shift_right_logical(x, _like(16, x))


def leaf_key(seed: Array, leaf: Any) -> Array:
    """int32, a leaf's key in a step; `seed` is int32, the number of the step, say."""
    scrambled = random_bits(jnp.int32(0), seed)
    return random_bits(scrambled, jnp.asarray(leaf, jnp.int32) * np.int32(-1640531527))  # 2**32 / golden ratio


def places(shape: Sequence[int]) -> Array:
    """int32 of a shape: row-major places. A sum of iotas, which XLA computes on shards."""
    total, stride = jnp.zeros(shape, jnp.int32), 1
    for dim in reversed(range(len(shape))):
        total += lax.broadcasted_iota(jnp.int32, shape, dim) * np.uint32(stride % 2**32).view(np.int32)
        stride *= shape[dim]
    return total


@dataclasses.dataclass(frozen=True)
class Tools:
    """Operations that a kernel has instructions of its own for.

    Attributes:
      sqrt: Square root.
      divide: `divide(a, b)`, a / b.
      square: x * x, rounded. Compilers fuse a product with a sum, or not, as it suits their code; the sum of a leaf's
        squares shall not depend on which other leaves a launch has.
      floor: The integer below, of numbers of magnitude below 2**22, as int32 modulo 256 and as float32.
      at_most: `at_most(x, limit)`, the smaller, and the limit of NaN.
      group_max: Gives the largest magnitude of each `GROUP` neighbours along the last dim, to each of them; NaN counts
        for nothing.
      unpack: float32 of 8-bit integers.
      pack: `pack(x, dtype)`, 8-bit integers of int32 modulo 256.
      join: float32 of `Split`'s arrays.
      halves: `Split`'s arrays of float32.
      once: Of a value that several arrays are made of. XLA may compute it for each, rounded otherwise in the last bit:
        halves of two weights, or codes for another exponent.
    """

    sqrt: Callable[[Array], Array]
    divide: Callable[[Array, Array], Array]
    square: Callable[[Array], Array]
    floor: Callable[[Array], tuple[Array, Array]]
    at_most: Callable[[Array, float], Array]
    group_max: Callable[[Array], Array]
    unpack: Callable[[Array], Array]
    pack: Callable[[Array, Any], Array]
    join: Callable[[Array, Array], Array]
    halves: Callable[[Array], Sequence[Array]]
    once: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Format:
    """How one leaf is stored: a plain array.

    Attributes:
      dtypes: Of the leaf's arrays.
      half: Which 16 of an element's random bits are this leaf's, 0 or 1; None rounds to nearest.
    """

    dtypes: tuple[str, ...]
    half: int | None = None

    @property
    def random(self) -> bool:
        """Whether what does not fit is rounded stochastically."""
        return self.half is not None and self.dtypes[0] == "bfloat16"

    @property
    def fast(self) -> bool:
        """Whether arithmetic, not memory, sets the pace, and precision is lost anyway."""
        return False

    @property
    def unread(self) -> frozenset[int]:
        """Which of the arrays follow from the others."""
        return frozenset()

    @property
    def narrow(self) -> bool:
        """Whether the first array has elements of 16 bits or fewer."""
        return jnp.dtype(self.dtypes[0]).itemsize <= 2

    def decode(self, arrays: Sequence[Array], tools: Tools) -> Array:
        """float32 (or wider) of arrays as `seen` gives them."""
        return widen(arrays[0])

    def encode(self, value: Array, bits: Array | None, tools: Tools) -> list[Array]:
        """Arrays as `seen` gives them.

        Args:
          value: float32 or wider.
          bits: From `random_bits`.
          tools: What to compute it with.
        """
        dtype = jnp.dtype(self.dtypes[0])
        if not self.random:
            return [value.astype(dtype)]
        assert bits is not None
        exact = lax.bitcast_convert_type(value.astype(jnp.float32), jnp.int32)
        # A carry out of the lower half rounds the magnitude up; NaN and infinity stay what they are.
        kept = (exact + self._uniform(bits)) & _like(-65536, exact)
        rounded = lax.bitcast_convert_type(kept, jnp.float32)
        finite = jnp.abs(value) < _like(math.inf, value)
        return [jnp.where(finite, rounded, value.astype(jnp.float32)).astype(dtype)]

    def _uniform(self, bits: Array) -> Array:
        """int32 from 0 to 65535."""
        if self.half:
            return lax.shift_right_logical(bits, _like(16, bits))
        return bits & _like(65535, bits)


class _SplitFormat(Format):
    def decode(self, arrays: Sequence[Array], tools: Tools) -> Array:
        return tools.join(*arrays)

    def encode(self, value: Array, bits: Array | None, tools: Tools) -> list[Array]:
        return list(tools.halves(tools.once(value)))


class _CopiedFormat(Format):
    @property
    def unread(self) -> frozenset[int]:
        return frozenset((1,))

    def encode(self, value: Array, bits: Array | None, tools: Tools) -> list[Array]:
        value = tools.once(value)
        return [value.astype(dtype) for dtype in self.dtypes]


class _BlocksFormat(Format):
    @property
    def random(self) -> bool:
        return True

    @property
    def fast(self) -> bool:
        return True

    @property
    def signed(self) -> bool:
        return self.dtypes[0] == "int8"

    def decode(self, arrays: Sequence[Array], tools: Tools) -> Array:
        codes, exponents = arrays
        value = tools.unpack(codes) * _power(exponents)
        return value if self.signed else value * value

    def encode(self, value: Array, bits: Array | None, tools: Tools) -> list[Array]:
        assert bits is not None
        root = value if self.signed else tools.sqrt(value)
        # One that is not finite, NaN by now, gets the largest code, and leaves its neighbours alone.
        root = root + 0 * root
        # The least power of two by which all codes fit, with a margin for rounding: 0x7FFFFF carries into the exponent.
        bound = tools.group_max(root) * (1.0001 / (127 if self.signed else 255))
        ceil = lax.bitcast_convert_type(bound, jnp.int32) + _like(0x7FFFFF, bits)
        exponents = lax.shift_right_logical(ceil, _like(23, bits)) - 127
        exponents = tools.once(jnp.clip(exponents, _like(-126, bits), _like(126, bits)))
        scaled = root * _power(-exponents)
        random = self._fraction(bits)
        if self.signed:
            codes, _ = tools.floor(tools.at_most(scaled + random, 127.0))
        else:
            # What is not zero must not become so, since it is divided by; zeros get the least code of their neighbours.
            scaled = jnp.maximum(tools.at_most(scaled, 255.0), 1.0)
            # Unbiased in the moment, not in its root: up by the share of the way from this code's square to the next's.
            codes, low = tools.floor(scaled)
            missing = low * (low + 2 * random) + random - scaled * scaled  # if negative, up
            codes += lax.shift_right_logical(lax.bitcast_convert_type(missing, jnp.int32), _like(31, codes))
        return [tools.pack(codes, self.dtypes[0]), exponents]

    def _fraction(self, bits: Array) -> Array:
        """float32 from 0 to 1, without it: a number of 2**23 and more has its integer in its last bits."""
        shifted = lax.bitcast_convert_type(self._uniform(bits) | _like(0x4B000000, bits), jnp.float32)
        return shifted * 2.0**-16 - 2.0**7


def format_of(leaf: Any, *, half: int | None = None) -> Format:
    """The format of a leaf; `half` as in `Format`, for a moment."""
    if not is_stored(leaf):
        return Format((leaf.dtype.name,), half)
    kind = {Split: _SplitFormat, Copied: _CopiedFormat, Blocks: _BlocksFormat}[type(leaf)]
    return kind(tuple(x.dtype.name for x in leaf), half)


def arrays_of(leaf: Any) -> list[Array]:
    """The arrays of a leaf as they are stored."""
    return list(leaf) if is_stored(leaf) else [leaf]


def leaf_of(arrays: Sequence[Array], like: Any) -> Any:
    """The leaf of arrays as they are stored."""
    return type(like)(*arrays) if is_stored(like) else arrays[0]


def seen(leaf: Any) -> list[Array]:
    """A leaf's arrays as a kernel's body sees them: of the leaf's shape, exponents as int32."""
    if isinstance(leaf, Blocks):
        n = shape_of(leaf)[-1:]
        spread = jnp.repeat(leaf.exponents, GROUP, axis=-1)[..., : n[0] if n else 1].reshape(leaf.codes.shape)
        return [leaf.codes, spread.astype(jnp.int32)]
    return arrays_of(leaf)


def unseen(arrays: Sequence[Array], like: Any) -> Any:
    """The leaf of arrays as `seen` gives them."""
    if isinstance(like, Blocks):
        codes, exponents = arrays
        return Blocks(codes, jnp.atleast_1d(exponents)[..., ::GROUP].astype(like.exponents.dtype))
    return leaf_of(arrays, like)


def whole_groups(leaf: Any) -> bool:
    """Whether no row of a leaf ends within a group, so that groups are those of its elements in row-major order."""
    return not isinstance(leaf, Blocks) or (leaf.codes.ndim > 0 and leaf.codes.shape[-1] % GROUP == 0)


def group_max(x: Array) -> Array:
    """The largest magnitude of each `GROUP` neighbours along the last dim, to each of them; NaN counts for nothing."""
    n = x.shape[-1] if x.ndim else 1
    x = jnp.where(jnp.isnan(x), 0, jnp.abs(x))
    rows = jnp.pad(x.reshape(*x.shape[:-1], n), [(0, 0)] * max(x.ndim - 1, 0) + [(0, -n % GROUP)])
    largest = jnp.max(rows.reshape(*rows.shape[:-1], rows.shape[-1] // GROUP, GROUP), axis=-1)
    return jnp.repeat(largest, GROUP, axis=-1)[..., :n].reshape(x.shape)


EXACT = Tools(
    sqrt=jnp.sqrt,
    divide=jnp.divide,
    square=jnp.square,
    floor=lambda x: (jnp.floor(x).astype(jnp.int32), jnp.floor(x)),
    at_most=lambda x, limit: jnp.where(x < limit, x, limit),
    group_max=group_max,
    unpack=lambda x: x.astype(jnp.float32),
    pack=lambda x, dtype: x.astype(dtype),
    join=lambda high, low: joined(Split(high, low)),
    halves=split,
    once=lax.optimization_barrier,
)


def decode(leaf: Any) -> Array:
    """float32 (or wider) of a leaf."""
    return format_of(leaf).decode(seen(leaf), EXACT)


def encode(value: Array, like: Any, *, half: int | None = None, seed: Any = None, place: Place = WHOLE) -> Any:
    """`value` stored as `like` is.

    Args:
      value: float32 or wider.
      like: A leaf of the wanted format.
      half: As in `Format`, for a moment.
      seed: int32, of the step, where that is rounded stochastically.
      place: Of the leaf.
    """
    kind, bits = format_of(like, half=half), None
    if kind.random:
        at = places(value.shape)
        for period, stride, offset in place.cuts:
            at = at + (at.view(jnp.uint32) // jnp.uint32(period)).view(jnp.int32) * stride + offset
        bits = random_bits(leaf_key(seed, place.leaf), at)
    return unseen(kind.encode(value, bits, EXACT), like)


def keep(applied: Any, new: Any, old: Any) -> Any:
    """A leaf, `new` where a step is applied."""
    return jax.tree.map(lambda new, old: jnp.where(applied, new, old), new, old)


def widen(x: Array) -> Array:
    """`x` in the dtype that it is computed in: float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _power(exponent: Array) -> Array:
    """2**exponent, float32, for exponents from -126 to 127."""
    return lax.bitcast_convert_type(lax.shift_left(exponent + 127, _like(23, exponent)), jnp.float32)


def _like(number: float, x: Array) -> Array:
    """A number in x's shape and dtype: the kernel's compiler broadcasts no operand of a shift or a select."""
    wrapped = np.uint32(int(number) % 2**32).view(np.int32) if x.dtype == jnp.int32 else number
    return jnp.full(jnp.shape(x), wrapped, x.dtype)
