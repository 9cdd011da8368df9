"""Attention: over whole rows, and of new places over a KV cache; one function chooses how.

Axes: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H head dim,
L layers.
"""
from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from argenseg_jax import sharding
from argenseg_jax.models.kv_cache import BLOCK, KVCache

Array = jax.Array
_LOWEST = float(jnp.finfo(jnp.float32).min)
_MIN_QUERIES = 64  # of a block of causal attention


@flax.struct.dataclass
class Mask:
    """What the places of whole rows see: their own segment, up to themselves or up to `last`.

    Attributes:
      segments: int32[B, T], 0 at padding.
      last: int32[B, T], index of the last key that each query sees; None = the query itself.
    """

    segments: Array
    last: Array | None = None

    def dense(self) -> Array:
        """bool[B, T, T]."""
        place = jnp.arange(self.segments.shape[1])
        last = place[None] if self.last is None else self.last
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return same & (self.segments[:, None, :] > 0) & (place[None, None, :] <= last[:, :, None])


def choose(q: Array, *, plain: bool = True, platform: str | None = None) -> str:
    """How attention is computed for queries [B, T, N, H]: 'xla', 'cudnn' (GPU) or 'splash' (TPU).

    Args:
      plain: whether the mask is a causal one of whole rows, which is all that splash is given.
      platform: where it will run; default: `sharding.platform`.
    """
    platform = platform or sharding.platform()
    _, t, _, h = q.shape
    if platform == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and h <= 128 and h % 8 == 0:
        return "cudnn"
    if platform == "tpu" and plain and t % 128 == 0 and h % 128 == 0:
        return "splash"
    return "xla"


def attention(q: Array, k: Array, v: Array, mask: Mask | None, how: str | None = None) -> Array:
    """Grouped-query attention of whole rows; softmax in f32.

    Args:
      q: [B, T, N, H];  k, v: [B, T, K, H];  mask: None = everything is visible.
      how: the implementation; default: `choose`.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    how = how or choose(q, plain=mask is not None and mask.last is None)
    if how == "splash":
        return _splash(q, k, v, mask.segments)
    dense = None if mask is None else mask.dense()
    if how == "cudnn":
        return jax.nn.dot_product_attention(
            q, k, v, mask=None if dense is None else dense[:, None], implementation="cudnn")
    grouped, t = _grouped(q, k.shape[2]), k.shape[1]
    if mask is None or mask.last is not None:
        return _ungrouped(_weighted(grouped, k, v, dense))
    # Causal: a block of queries needs no later keys. Four blocks at most, three eighths of the work.
    size = max(_MIN_QUERIES, -(-t // 4))
    blocks = [_weighted(grouped[..., i:i + size, :], k[:, :i + size], v[:, :i + size],
                        dense[:, i:i + size, :i + size]) for i in range(0, t, size)]
    return _ungrouped(jnp.concatenate(blocks, axis=3))


def _weighted(q: Array, k: Array, v: Array, seen: Array | None) -> Array:
    """Softmax attention of scaled queries [B, K, G, T, H]; seen: bool[B, T, S] or None = all."""
    scores = jnp.einsum("BKGTH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    if seen is not None:  # added, not selected: the backward pass then leaves the scores alone
        scores += jnp.where(seen, 0, _LOWEST / 2)[:, None, None]
    # Divided by the sum behind the product with v: the backward pass then sums over H, not over S.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    y = jnp.einsum("BKGTS,BSKH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (y / jnp.sum(weights, axis=-1)[..., None]).astype(v.dtype)


def cached(q: Array, cache: KVCache, layer: Array | int, within: str, how: str | None = None) -> Array:
    """Attention of T new places, which the cache holds behind `length` older ones.

    Only the filled part of the cache is read, in blocks of `kv_cache.BLOCK` places.

    Args:
      q: [B, T, N, H];  within: how the new places see each other: 'causal' or 'full'.
    """
    t = q.shape[1]
    how = how or choose(q, plain=False)
    last = cache.length[:, None] + (jnp.arange(t) if within == "causal" else jnp.full(t, t - 1))
    if how == "cudnn":
        k, v = cache.read(layer, 0, cache.capacity)
        seen = jnp.arange(cache.capacity) <= last[:, None, :, None]
        return jax.nn.dot_product_attention(
            q, k.astype(q.dtype), v.astype(q.dtype), mask=seen, implementation="cudnn",
            query_seq_lengths=jnp.full_like(cache.length, t), key_value_seq_lengths=cache.length + t)
    grouped = _grouped(q, cache.kv_heads)

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """Takes in one block; keeps the largest score, the sum of weights and the weighted values."""
        top, total, y = state
        k, v = cache.read(layer, i * BLOCK, BLOCK)
        scores = jnp.einsum("BKGTH,BSKH->BKGTS", grouped, k.astype(q.dtype),
                            preferred_element_type=jnp.float32)
        seen = i * BLOCK + jnp.arange(BLOCK) <= last[:, :, None]
        scores = jnp.where(seen[:, None, None], scores, _LOWEST)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights, fade = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
        new = jnp.einsum("BKGTS,BSKH->BKGTH", weights.astype(q.dtype), v.astype(q.dtype),
                         preferred_element_type=jnp.float32)
        return higher, total * fade + jnp.sum(weights, axis=-1), y * fade[..., None] + new

    state = (jnp.full(grouped.shape[:-1], _LOWEST), jnp.zeros(grouped.shape[:-1]),
             jnp.zeros(grouped.shape, jnp.float32))
    blocks = (jnp.max(cache.length) + t + BLOCK - 1) // BLOCK
    _, total, y = jax.lax.fori_loop(0, blocks, step, state)
    return _ungrouped((y / total[..., None]).astype(q.dtype))


def _grouped(q: Array, kv_heads: int) -> Array:
    """[B, T, N, H] -> [B, K, G, T, H], scaled: matmuls over contiguous blocks, fastest on CPUs."""
    b, t, n, h = q.shape
    return (q * h ** -0.5).reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)


def _ungrouped(y: Array) -> Array:
    """[B, K, G, T, H] -> [B, T, N, H]."""
    b, kv_heads, g, t, h = y.shape
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, kv_heads * g, h)


def _splash(q: Array, k: Array, v: Array, segments: Array, interpret: bool = False) -> Array:
    """The TPU's kernel under the mesh in use; scores never leave the chip's fast memory."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to load

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        t = q.shape[1]
        causal = splash.MultiHeadMask([splash.CausalMask((t, t))] * q.shape[2])
        kernel = splash.make_splash_mha_single_device(causal, interpret=interpret)
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
        y = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
        return y.transpose(0, 2, 1, 3)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v, segments)
    heads = PartitionSpec(sharding.BATCH_AXES, None, "tensor", None)
    return jax.shard_map(local, in_specs=(heads, heads, heads, PartitionSpec(sharding.BATCH_AXES)),
                         out_specs=heads, check_vma=False)(q, k, v, segments)
