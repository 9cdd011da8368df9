"""One decoder for InternLM2.5 and Qwen2.5: GQA, RoPE, RMSNorm, SwiGLU; scanned layers, KV cache.

Axes: B batch, T new places, S keys, N query heads, K key/value heads, H head dim, D width,
F MLP width, V padded vocabulary, L layers.
"""
from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from argenseg_jax import sharding
from argenseg_jax.models import kv_cache, layers

Array = jax.Array
KVCache = kv_cache.KVCache


class Attention(nn.Module):
    """Self-attention over the new places, or over the cache and the new places."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qkv_bias: bool
    qk_norm: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, angles: Array, mask: Array, layer: Array,
                 cache: KVCache | None) -> tuple[Array, KVCache | None]:
        def project(heads: int, name: str) -> Array:
            return layers.dense((heads, self.head_dim), self.dtype, bias=self.qkv_bias, name=name)(x)

        q, k, v = project(self.heads, "q"), project(self.kv_heads, "k"), project(self.kv_heads, "v")
        if self.qk_norm:
            q = layers.RMSNorm(self.eps, name="q_norm")(q)
            k = layers.RMSNorm(self.eps, name="k_norm")(k)
        q, k = layers.apply_rope(q, angles), layers.apply_rope(k, angles)
        q, k, v = (sharding.constrain(a, "act_batch", None, "act_heads", None) for a in (q, k, v))
        if cache is not None:
            cache = cache.replace(k=kv_cache.append(cache.k, layer, k, cache.length),
                                  v=kv_cache.append(cache.v, layer, v, cache.length))
            k, v = cache.k[layer].astype(k.dtype), cache.v[layer].astype(v.dtype)
        y = layers.attention(q, k, v, mask)
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
        return dense(x.shape[-1], "down")(sharding.constrain(y, "act_batch", "act_len", "act_ffw"))


class Block(nn.Module):
    """Pre-norm attention and SwiGLU; a scan body over (x, cache), with the layer index scanned."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    eps: float
    qkv_bias: bool
    qk_norm: bool
    capture: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry: tuple[Array, KVCache | None], layer: Array, angles: Array,
                 mask: Array) -> tuple[tuple[Array, KVCache | None], Array | None]:
        x, cache = carry
        y, cache = Attention(self.heads, self.kv_heads, self.head_dim, self.eps, self.qkv_bias,
                             self.qk_norm, self.dtype, name="attn")(
            layers.RMSNorm(self.eps, name="attn_norm")(x), angles, mask, layer, cache)
        x = sharding.constrain(x + y, "act_batch", "act_len", "act_emb")
        x = x + Mlp(self.mlp, self.dtype, name="mlp")(layers.RMSNorm(self.eps, name="mlp_norm")(x))
        x = sharding.constrain(x, "act_batch", "act_len", "act_emb")
        return (x, cache), (x if self.capture else None)


class DecoderLM(nn.Module):
    """The language model. `vocab_rows` is `vocab_size` padded; the caller masks the padding.

    Fields named as in llm_config where it has them. Nano only (default off): `qk_norm` (RMS of each
    head's q and k, as Qwen3) and `rope_2d` (layers.rope_angles_2d).
    """

    vocab_rows: int
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

    def setup(self):
        self.embed = EmbedTable(self.vocab_rows, self.vocab_size, self.width)
        self.norm = layers.RMSNorm(self.eps)
        if not self.tied:
            self.lm_head = Head(self.vocab_rows, self.vocab_size, self.width)

    def embed_tokens(self, tokens: Array) -> Array:
        """int32[B, T] -> [B, T, D] in the compute dtype."""
        x = jnp.take(self.embed(), tokens, axis=0).astype(self.dtype)
        return sharding.constrain(x, "act_batch", "act_len", "act_emb")

    @nn.compact
    def __call__(self, x: Array, positions: Array, *, mask: Array | None = None,
                 coords: Array | None = None, cache: KVCache | None = None,
                 advance: Array | None = None, within: str = "causal", capture: bool = False
                 ) -> tuple[Array, KVCache | None, Array | None]:
        """Runs T new places through all layers.

        Args:
          x: [B, T, D] embedded inputs;  positions: int32[B, T].
          mask: bool[B, T, T], required without a cache.
          coords: f32[B, T, 2], picture coordinates for rope_2d.
          cache: appended to; a row's places beyond advance[b] are overwritten by its next call.
          advance: int32[B], how many of the T places are real (default all).
          within: how the new places see each other through the cache: 'causal' or 'full'.

        Returns:
          ([B, T, D] after the final norm, the new cache or None, hidden states or None). The hidden
          states [L + 1, B, T, D] start with x; the last one is the normed one, as in transformers.
        """
        if self.rope_2d:
            angles = layers.rope_angles_2d(positions, coords, self.head_dim, self.rope_theta)
        else:
            angles = layers.rope_angles(positions, self.head_dim, self.rope_theta, self.ntk_factor,
                                        self.max_positions)
        if cache is not None:
            mask = kv_cache.visible(cache.length, x.shape[1], cache.capacity, within)
        block = layers.scan_layers(Block, self.depth, remat=self.remat, unroll=self.unroll,
                                   in_axes=(0, nn.broadcast, nn.broadcast))
        (y, cache), hidden = block(
            self.heads, self.kv_heads, self.head_dim, self.mlp, self.eps, self.qkv_bias,
            self.qk_norm, capture, self.dtype, name="layers",
        )((x, cache), jnp.arange(self.depth), angles, mask)
        y = self.norm(y)
        if cache is not None:
            cache = cache.replace(length=cache.length + (x.shape[1] if advance is None else advance))
        if capture:
            hidden = jnp.concatenate([x[None], hidden[:-1], y[None]])
        return y, cache, hidden

    def head_matrix(self) -> Array:
        """[D, V] in the compute dtype."""
        table = self.embed().T if self.tied else self.lm_head()
        return table.astype(self.dtype)

    def logits(self, hidden: Array) -> Array:
        """[B, T, D] -> f32[B, T, V] (padding rows included)."""
        y = jnp.einsum("...D,DV->...V", hidden.astype(self.dtype), self.head_matrix(),
                       preferred_element_type=jnp.float32)
        return sharding.constrain(y, "act_batch", "act_len", "act_vocab")

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        return KVCache.empty(self.depth, batch, capacity, self.kv_heads, self.head_dim, self.dtype)


class EmbedTable(nn.Module):
    """Token embedding [V, D]."""

    rows: int
    words: int
    width: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("embedding", _words_first(self.words, 0), (self.rows, self.width))


class Head(nn.Module):
    """Output head [D, V]."""

    rows: int
    words: int
    width: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", _words_first(self.words, 1), (self.width, self.rows))


def _words_first(words: int, axis: int) -> nn.initializers.Initializer:
    """Normal(0.02), but zero for the padding of the vocabulary, as after an import."""
    def init(key: Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> Array:
        real = jnp.arange(shape[axis]) < words
        return jnp.where(real[:, None] if axis == 0 else real,
                         nn.initializers.normal(0.02)(key, shape, dtype), 0)

    return init


def causal_mask(segment_ids: Array, last_visible: Array | None = None) -> Array:
    """bool[B, T, T]: same non-zero segment, and no later than the query (or its last_visible).

    Args:
      segment_ids: int32[B, T], 0 at padding.
      last_visible: int32[B, T], index of the last key each query sees; default the query itself.
    """
    t = segment_ids.shape[1]
    place = jnp.arange(t)
    last = place[None] if last_visible is None else last_visible
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, None, :] > 0)
    return same & (place[None, None, :] <= last[:, :, None])
