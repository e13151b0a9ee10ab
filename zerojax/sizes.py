"""A transformer by its sizes, to plan with: shapes of its params, bytes of its activations, a loss to compile.

Layers are stacked along a leading dim, as `flax.linen.scan` has them, so a model of any depth has a dozen leaves.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from zerojax.gather import gather, keep_expensive

PyTree = Any
LAYERWISE = "^(embed|head|blocks)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a decoder.

    Attributes:
      layers: Blocks of attention and MLP.
      width: Of the residual stream.
      hidden: Of the MLP.
      heads: Of attention; of queries, where keys have fewer.
      kv_heads: Heads of keys and values.
      vocab: Tokens.
      context: Tokens of a row.
      gated: Whether the MLP has a gate beside its first matrix, as Llama's.
      plain: Whether it has neither biases nor learned positions, as Llama.
      tied: Whether the embedding is the head, too.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    gated: bool = False
    plain: bool = False
    tied: bool = True

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def qkv(self) -> int:
        """Width of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head

    def shapes(self, dtype: Any = "float32") -> PyTree:
        """The params, `ShapeDtypeStruct`s; with the GPT's sizes those of `examples/gpt.py`."""
        array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        stack = (self.layers,)

        def dense(fan_in: int, fan_out: int, lead: tuple[int, ...] = stack) -> dict[str, Any]:
            bias = {} if self.plain else {"bias": array(*lead, fan_out)}
            return {"kernel": array(*lead, fan_in, fan_out)} | bias

        def norm(*lead: int) -> dict[str, Any]:
            return {"scale": array(*lead, self.width)} | ({} if self.plain else {"bias": array(*lead, self.width)})

        params = {
            "embed": {"embedding": array(self.vocab, self.width)},
            "blocks": {
                "norm1": norm(*stack),
                "qkv": dense(self.width, self.qkv),
                "out": dense(self.heads * self.head, self.width),
                "norm2": norm(*stack),
                "up": dense(self.width, self.hidden * (2 if self.gated else 1)),
                "down": dense(self.hidden, self.width),
            },
            "norm": norm(),
        }
        if not self.plain:
            params["positions"] = array(self.context, self.width)
        if not self.tied:
            params["head"] = {"kernel": array(self.width, self.vocab)}
        return params

    @property
    def count(self) -> int:
        """Number of params."""
        return sum(x.size for x in jax.tree.leaves(self.shapes()))

    def row_bytes(self, dtype: Any, *, remat: bool = False) -> int:
        """Bytes of activations that one row of `context` tokens keeps for the backward pass: an estimate.

        Each layer keeps what `keep_expensive` does (queries, keys, values, attention's result, the MLP's hidden layer)
        and its input; with `remat` its input alone. Logits are kept in `dtype`, and in float32 once more. On two H200s
        a GPT of 350M measured 760 kB a token at stage 3 (benchmarks/results/); this says 744 kB.
        """
        size = jnp.dtype(dtype).itemsize
        expensive = self.qkv + self.heads * self.head + self.hidden * (2 if self.gated else 1)
        layer = self.width + (0 if remat else expensive)
        return self.context * (self.layers * layer * size + self.vocab * (4 + size))

    def loss(self, params: PyTree, tokens: jax.Array, *, dtype: Any, remat: bool = False) -> jax.Array:
        """Mean cross entropy of next tokens, int32 [B, T + 1]: to compile what such a model computes."""
        policy = jax.checkpoint_policies.nothing_saveable if remat else keep_expensive

        def cast(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: x.astype(dtype), gather(tree, dtype=dtype))

        @jax.checkpoint
        def embedding(tree: PyTree) -> jax.Array:
            return cast(tree)["embedding"]

        x = embedding(params["embed"])[tokens[:, :-1]]
        if not self.plain:
            x = x + params["positions"][: x.shape[1]].astype(dtype)

        def layer(x: jax.Array, weights: PyTree) -> tuple[jax.Array, None]:
            return self._block(x, cast(weights)), None

        x, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), x, params["blocks"])
        x = _normed(x, params["norm"])
        out = embedding(params["embed"]).T if self.tied else cast(params["head"])["kernel"]
        logits = (x.astype(dtype) @ out).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)

    def _block(self, x: jax.Array, w: PyTree) -> jax.Array:
        cuts = [self.heads * self.head, (self.heads + self.kv_heads) * self.head]
        parts = jnp.split(_dense(_normed(x, w["norm1"]), w["qkv"]), cuts, -1)
        q, k, v = (part.reshape(*x.shape[:2], -1, self.head) for part in parts)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + _dense(mixed.reshape(*x.shape[:2], -1), w["out"])
        hidden = _dense(_normed(x, w["norm2"]), w["up"])
        if self.gated:
            gate, hidden = jnp.split(hidden, 2, -1)
            return x + _dense(jax.nn.silu(gate) * hidden, w["down"])
        return x + _dense(jax.nn.gelu(hidden), w["down"])


def of_count(count: float, context: int = 2048) -> Sizes:
    """A GPT of about `count` params, with the proportions that GPTs have and a vocabulary of 50304.

    Example:
      >>> sizes = of_count(7e9)
      >>> sizes.layers, sizes.width, round(sizes.count / 1e9, 2)
      (34, 4096, 6.99)
    """
    if count < 1e6:
        raise ValueError(f"a GPT has at least a million params to plan for, got {count:g}.")
    vocab = 50304 if count >= 5e7 else 256
    unit, ratio = (1024, 128) if count >= 3e9 else (256 if count >= 1e8 else 32, 80)  # width to layers, as GPT-3's
    width = max(unit, unit * round((count * ratio / 12) ** (1 / 3) / unit))
    layers = max(1, round((count - vocab * width) / (12 * width * width)))
    hidden = 4 * width
    heads = max(1, width // 128)
    sizes = Sizes(layers=layers, width=width, hidden=hidden, heads=heads, kv_heads=heads, vocab=vocab, context=context)
    step = 256 if count >= 1e8 else 64  # 8-bit moments come in groups of 32, which 8 devices should not part
    more = round((count - sizes.count) / (2 * width * layers) / step) * step
    return dataclasses.replace(sizes, hidden=max(step, hidden + more))


def of_model(model: Mapping[str, Any]) -> Sizes:
    """Sizes by a model's config: of this repository's GPT, or Hugging Face's GPT-2, Llama, Mistral and their like.

    Raises:
      ValueError: neither, with what is missing.

    Example:
      >>> of_model({"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256,
      ...           "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192}).count
      70553706496
    """
    get = lambda *names, default=None: next((model[n] for n in names if model.get(n) is not None), default)
    width, layers = get("width", "hidden_size", "n_embd"), get("layers", "num_hidden_layers", "n_layer")
    heads, vocab = get("heads", "num_attention_heads", "n_head"), get("vocab", "vocab_size")
    missing = [n for n, x in {"width": width, "layers": layers, "heads": heads, "vocab": vocab}.items() if x is None]
    if missing:
        raise ValueError(
            f"the model's config does not say {', '.join(missing)}; known are the keys of examples/gpt.py (layers, "
            "width, heads, vocab, context) and Hugging Face's (num_hidden_layers, hidden_size, num_attention_heads, "
            "vocab_size)."
        )
    like_llama = "num_key_value_heads" in model or "intermediate_size" in model
    return Sizes(
        layers=layers,
        width=width,
        hidden=get("intermediate_size", "n_inner", default=4 * width),
        heads=heads,
        kv_heads=get("num_key_value_heads", default=heads),
        vocab=vocab,
        context=get("context", "max_position_embeddings", "n_positions", default=2048),
        gated=like_llama,
        plain=like_llama,
        tied=bool(get("tie_word_embeddings", default=not like_llama)),
    )


def read(params: str, config: Mapping[str, Any]) -> Sizes:
    """Sizes as the command line has them: a number, the path of a model's JSON, or "" for the `model` of the config."""
    if not params:
        if "model" not in config:
            raise ValueError(
                "the config has no section 'model': say --params=7e9, or the path of a model's config.json."
            )
        return of_model(config["model"])
    try:
        return of_count(float(params))
    except ValueError as e:
        if not pathlib.Path(params).is_file():
            raise ValueError(f"--params={params!r} is neither a number of params nor a file: {e}") from None
    return of_model(json.loads(pathlib.Path(params).read_text()))


def _dense(x: jax.Array, w: PyTree) -> jax.Array:
    y = x @ w["kernel"]
    return y + w["bias"] if "bias" in w else y


def _normed(x: jax.Array, w: PyTree) -> jax.Array:
    wide = x.astype(jnp.float32)
    centered = wide - wide.mean(-1, keepdims=True)
    y = centered * jax.lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-6) * w["scale"]
    return (y + w["bias"] if "bias" in w else y).astype(x.dtype)
