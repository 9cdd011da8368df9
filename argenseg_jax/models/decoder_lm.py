"""One decoder for InternLM2.5 and Qwen2.5: GQA, RoPE, RMSNorm, SwiGLU; scanned layers, KV cache.

Differs from Llama (Touvron et al., 2023) in this:
  - one table of options covers InternLM2.5 (modeling_internlm2.py) and Qwen2.5 (biases of q, k, v);
  - dynamic NTK scaling of RoPE beyond `max_positions` (InternLM2);
  - nano only: RMSNorm of q and k (Qwen3), and RoPE of which half of the pairs follow image coordinates;
  - the vocabulary is padded; the padding's logits are -inf.
Axes: see models/__init__; T are the new positions, V the padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from argenseg_jax import sharding
from argenseg_jax.models import attention, layers
from argenseg_jax.models.kv_cache import KVCache

Array = jax.Array


class Attention(nn.Module):
    """Self-attention over the new positions, or over the cache and the new positions."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qkv_bias: bool
    qk_norm: bool
    block_mask: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Array,
        rope: tuple[Array, Array],
        mask: attention.Mask | None,
        layer: Array | int,
        cache: KVCache | None,
    ) -> tuple[Array, KVCache | None]:
        def project(heads: int, name: str) -> Array:
            return layers.dense((heads, self.head_dim), self.dtype, bias=self.qkv_bias, name=name)(x)

        q, k, v = project(self.heads, "q"), project(self.kv_heads, "k"), project(self.kv_heads, "v")
        if self.qk_norm:
            q = layers.RMSNorm(self.eps, name="q_norm")(q)
            k = layers.RMSNorm(self.eps, name="k_norm")(k)
        q, k = layers.apply_rope(q, rope), layers.apply_rope(k, rope)
        q, k, v = (sharding.constrain(a, "act_batch", None, "act_heads", None) for a in (q, k, v))
        if cache is None:
            y = attention.attention(q, k, v, mask)  # [B, T, H, N]
        else:
            cache = cache.append(layer, k, v)
            y = attention.cached(q, k, v, cache, layer, self.block_mask)
        return layers.dense(x.shape[-1], self.dtype, inputs=2, bias=False, name="o")(y), cache


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(width: int, name: str):
            return layers.dense(width, self.dtype, bias=False, name=name)

        y = jax.nn.silu(dense(self.hidden, "gate")(x)) * dense(self.hidden, "up")(x)
        return dense(x.shape[-1], "down")(sharding.constrain(y, "act_batch", None, "act_ffw"))


class Block(nn.Module):
    """Pre-norm attention and SwiGLU; a scan body over (x, cache), with the layer index scanned."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    eps: float
    qkv_bias: bool
    qk_norm: bool
    block_mask: str
    capture: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, KVCache | None],
        layer: Array | int,
        rope: tuple[Array, Array],
        mask: attention.Mask | None,
    ) -> tuple[tuple[Array, KVCache | None], Array | None]:
        x, cache = carry
        y, cache = Attention(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            eps=self.eps,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            block_mask=self.block_mask,
            dtype=self.dtype,
            name="attn",
        )(layers.RMSNorm(self.eps, name="attn_norm")(x), rope, mask, layer, cache)
        x = sharding.constrain(x + y, "act_batch", "act_len", "act_emb")
        x = x + Mlp(self.mlp, self.dtype, name="mlp")(layers.RMSNorm(self.eps, name="mlp_norm")(x))
        x = sharding.constrain(x, "act_batch", "act_len", "act_emb")
        return (x, cache), (x if self.capture else None)


class DecoderLM(nn.Module):
    """The language model. `padded_vocab_size` is `vocab_size` padded; the caller masks the padding.

    Fields named as in llm_config where it has them. Nano only (default off): `qk_norm` (RMS of each
    head's q and k, as Qwen3) and `rope_2d` (layers.rope_angles_2d). `split` (decoding only) takes the
    weights of `split_layers`: a scan copies each layer's weights and cache out of their stacks before
    it can multiply, except on TPUs.
    """

    padded_vocab_size: int
    vocab_size: int
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 14336
    eps: float = 1e-5
    rope_theta: float = 1e6
    ntk_factor: float = 1.0  # dynamic NTK beyond max_positions; 1 = off
    max_positions: int = 32768
    qkv_bias: bool = False
    tied: bool = False
    qk_norm: bool = False
    rope_2d: bool = False
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: bool = False
    split: bool = False

    def setup(self):
        self.embed = EmbedTable(self.padded_vocab_size, self.vocab_size, self.width)
        self.norm = layers.RMSNorm(self.eps)
        if not self.tied:
            self.lm_head = Head(self.padded_vocab_size, self.vocab_size, self.width)

    def embed_tokens(self, tokens: Array) -> Array:
        """int32[B, T] -> [B, T, D] in the compute dtype."""
        x = jnp.take(self.embed(), tokens, axis=0).astype(self.dtype)
        return sharding.constrain(x, "act_batch", "act_len", "act_emb")

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array,
        *,
        mask: attention.Mask | None = None,
        coords: Array | None = None,
        cache: KVCache | None = None,
        num_valid: Array | None = None,
        block_mask: str = "causal",
        capture: bool = False,
    ) -> tuple[Array, KVCache | None, Array | None]:
        """Runs T new positions through all layers.

        Args:
          x: [B, T, D] embedded inputs;  positions: int32[B, T].
          mask: required without a cache.
          coords: f32[B, T, 2], image coordinates for rope_2d.
          cache: appended to; a sequence's positions beyond num_valid[b] are overwritten by its next call.
          num_valid: int32[B], how many of the T positions are real (default all).
          block_mask: how the new positions see each other through the cache: 'causal', 'full', or 'first',
            which is 'causal' where the cache holds nothing yet.

        Returns:
          ([B, T, D] after the final norm, the new cache or None, hidden states or None). The hidden
          states [L + 1, B, T, D] start with x; the last one is the normed one, as in transformers.
        """
        if self.rope_2d:
            angles = layers.rope_angles_2d(positions, coords, self.head_dim, self.rope_theta)
        else:
            angles = layers.rope_angles(positions, self.head_dim, self.rope_theta, self.ntk_factor, self.max_positions)
        rope = layers.cos_sin(angles)
        fields = dict(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            mlp=self.mlp,
            eps=self.eps,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            block_mask=block_mask,
            capture=capture,
            dtype=self.dtype,
        )
        carry, hidden = (x, cache), None
        if self.split:
            for i in range(self.depth):
                carry, _ = Block(**fields, name=f"layers_{i}")(carry, i, rope, mask)
        else:
            block = layers.scan_layers(
                Block, self.depth, remat=self.remat, unroll=self.unroll, in_axes=(0, nn.broadcast, nn.broadcast)
            )
            carry, hidden = block(**fields, name="layers")(carry, jnp.arange(self.depth), rope, mask)
        y, cache = carry
        y = self.norm(y)
        if cache is not None:
            cache = cache.replace(length=cache.length + (x.shape[1] if num_valid is None else num_valid))
        if capture:
            hidden = jnp.concatenate([x[None], hidden[:-1], y[None]])
        return y, cache, hidden

    def head_matrix(self) -> Array:
        """[D, V], as it is stored; tied to the embedding or not."""
        return self.embed().T if self.tied else self.lm_head()

    def logits(self, hidden: Array) -> Array:
        """[B, T, D] -> f32[B, T, V]; the padding of the vocabulary is -inf."""
        head = self.head_matrix().astype(self.dtype)
        with jax.named_scope("head"):
            y = layers.head_product(hidden.astype(self.dtype), head, self.vocab_size)
        return sharding.constrain(y, "act_batch", None, "act_vocab")

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        return KVCache.empty(self.depth, batch, capacity, self.kv_heads, self.head_dim, self.dtype, self.split)


class EmbedTable(nn.Module):
    """Token embedding [V, D]."""

    padded_vocab_size: int
    vocab_size: int
    width: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("embedding", _padded_init(self.vocab_size, 0), (self.padded_vocab_size, self.width))


class Head(nn.Module):
    """Output head [D, V]."""

    padded_vocab_size: int
    vocab_size: int
    width: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", _padded_init(self.vocab_size, 1), (self.width, self.padded_vocab_size))


def _padded_init(vocab_size: int, axis: int) -> nn.initializers.Initializer:
    """Normal(0.02), but zero for the padding of the vocabulary, as after an import."""

    def init(key: Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> Array:
        real = jnp.arange(shape[axis]) < vocab_size
        return jnp.where(real[:, None] if axis == 0 else real, nn.initializers.normal(0.02)(key, shape, dtype), 0)

    return init


def split_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of the decoder with a subtree for each layer instead of one stack for all."""
    stacked = params["layers"]
    depth = jax.tree.leaves(stacked)[0].shape[0]
    return {
        **{name: part for name, part in params.items() if name != "layers"},
        **{f"layers_{i}": jax.tree.map(lambda x: x[i], stacked) for i in range(depth)},
    }
