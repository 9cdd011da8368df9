"""Attention: of complete sequences, and of new positions over a KV cache; `choose` selects the kernel.

Axes: see models/__init__.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from argenseg_jax import sharding
from argenseg_jax.models import gpu_attention
from argenseg_jax.models.kv_cache import BLOCK, KVCache

Array = jax.Array
_LOWEST = float(jnp.finfo(jnp.float32).min)
_BLOCKS, _MIN_QUERIES = 8, 64  # of causal attention: most blocks of queries, and fewest queries of a block


@flax.struct.dataclass
class Mask:
    """What the positions of complete sequences see: their own segment, up to themselves or up to `last`.

    Attributes:
      segments: int32[B, T], 0 at padding.
      last: int32[B, T], index of the last key that each query sees; None = the query itself.
      packed: whether a sequence may have several segments, or padding in front of its segment.
    """

    segments: Array
    last: Array | None = None
    packed: bool = flax.struct.field(pytree_node=False, default=True)

    def dense(self) -> Array:
        """bool[B, T, T]."""
        position = jnp.arange(self.segments.shape[1])
        last = position[None] if self.last is None else self.last
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return same & (self.segments[:, None, :] > 0) & (position[None, None, :] <= last[:, :, None])


def choose(
    q: Array, *, sees: str = "causal", kv_heads: int = 1, capacity: int | None = None, platform: str | None = None
) -> str:
    """How attention is computed for queries [B, T, H, N]: 'xla', 'cudnn' (GPU) or 'splash' (TPU).

    Args:
      sees: what the queries see: the keys of their segment up to themselves ('causal') or up to `last`
        ('last') in complete sequences, 'all', or a 'cache'.
      kv_heads: K.
      capacity: S, of the cache.
      platform: where it will run; default: `sharding.platform`.
    """
    platform = platform or sharding.platform()
    _, t, _, h = q.shape
    if platform == "gpu":
        reason = (
            "scales that see themselves whole need a mask of [T, T]"
            if sees == "last"
            else gpu_attention.refusal(q, kv_heads, capacity)
        )
        if reason is None:
            return "cudnn"
        gpu_attention.log_once(reason)
    if platform == "tpu" and sees == "causal" and t % 128 == 0 and h % 128 == 0:
        return "splash"
    return "xla"


def attention(q: Array, k: Array, v: Array, mask: Mask | None, how: str | None = None) -> Array:
    """Grouped-query attention of complete sequences; softmax in f32.

    Args:
      q: [B, T, H, N];  k, v: [B, T, K, N];  mask: None = everything is visible.
      how: the implementation; default: `choose`.

    Returns:
      [B, T, H, N] in the dtype of q.
    """
    causal = mask is not None and mask.last is None
    how = how or choose(q, sees="all" if mask is None else "causal" if causal else "last", kv_heads=k.shape[2])
    if how == "splash":
        return _splash(q, k, v, mask.segments)
    if how == "cudnn":
        if mask is None:
            return gpu_attention.full_sequence(q, k, v, None, packed=False)
        if not causal:
            raise ValueError("cuDNN is given no mask of `last`")
        return gpu_attention.full_sequence(q, k, v, mask.segments, mask.packed)
    dense = None if mask is None else mask.dense()
    y = dense_attention(_grouped(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2), dense, causal)
    return _ungrouped(y.astype(q.dtype))


@flax.struct.dataclass
class PartialSoftmax:
    """Attention to some of the keys: max f32[B, K, G, T], the largest score; denom f32[B, K, G, T], the
    sum of exp(score - max); y f32[B, K, G, T, N], the values weighted so."""

    max: Array
    denom: Array
    y: Array

    def merge(self, other: PartialSoftmax) -> PartialSoftmax:
        """Attention to the keys of both."""
        new_max = jnp.maximum(self.max, other.max)
        a, b = jnp.exp(self.max - new_max), jnp.exp(other.max - new_max)
        return PartialSoftmax(new_max, a * self.denom + b * other.denom, a[..., None] * self.y + b[..., None] * other.y)


def attend_block(q: Array, k: Array, v: Array, seen: Array | None) -> PartialSoftmax:
    """Scaled queries [B, K, G, T, N] on keys [B, S, K, N]; seen: bool[B or 1, T or 1, S] or None = all."""
    scores = jnp.einsum("BKGTN,BSKN->BKGTS", q, k, preferred_element_type=jnp.float32)  # [B, K, G, T, S]
    if seen is not None:
        scores += jnp.where(seen, 0, _LOWEST / 2)[:, None, None]
    new_max = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - new_max[..., None])
    y = jnp.einsum(
        "BKGTS,BSKN->BKGTN", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )  # [B, K, G, T, N]
    return PartialSoftmax(new_max, jnp.sum(weights, axis=-1), y)


def _blocks(t: int, causal: bool = True) -> list[tuple[slice, slice]]:
    """Blocks of T queries, and of T keys those that each needs: causal ones need no later keys.

    Eight blocks do 9/16 of the work, four 5/8.
    """
    size = max(_MIN_QUERIES, -(-t // _BLOCKS)) if causal else t
    return [(slice(i, min(i + size, t)), slice(0, min(i + size, t))) for i in range(0, t, size)]


def attend_causal_block(q: Array, k: Array, v: Array, seen: Array) -> PartialSoftmax:
    """`attend_block` of queries that see no later keys; seen: bool[B or 1, T, T]."""
    parts = [
        attend_block(q[..., queries, :], k[:, keys], v[:, keys], seen[:, queries, keys])
        for queries, keys in _blocks(k.shape[1])
    ]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=3), *parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def dense_attention(q: Array, k: Array, v: Array, seen: Array | None, causal: bool) -> Array:
    """Attention of complete sequences, S = T: scaled queries [B, K, G, T, N] on [B, K, S, N] -> f32[B, K, G, T, N].

    seen: bool[B, T, S] or None = all; causal promises that it shows no later key.

    Written for its gradient, for which XLA's CPU backend, left to itself, transposes arrays of [T, S].
    Here the scores of a query are a column. So the gradients of keys and values, sums over the
    blocks, come as they are needed, and only arrays of [N, T] are transposed: half the time.
    """
    return _dense_attention_fwd(q, k, v, seen, causal)[0]


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_SCORES = "BKSN,BKGTN->BKSGT"  # keys, queries
_BY_QUERY = "BKSN,BKSGT->BKNGT"  # what the queries get from the keys
_BY_KEY = "BKSGT,BKGTN->BKSN"  # what the keys get from the queries


def _dense_attention_fwd(q: Array, k: Array, v: Array, seen: Array | None, causal: bool) -> tuple[Array, tuple]:
    hidden = None if seen is None else jnp.where(seen, 0, _LOWEST / 2).swapaxes(1, 2)[:, None, :, None]
    ys, res = [], []
    for queries, keys in _blocks(q.shape[3], causal):
        scores = _product(_SCORES, k[:, :, keys], q[..., queries, :])  # [B, K, S, G, T]
        if hidden is not None:  # added, not selected: one pass less
            scores += hidden[:, :, keys, :, queries]
        weights = jnp.exp(scores - jnp.max(scores, axis=2, keepdims=True))
        denom = jnp.sum(weights, axis=2)  # [B, K, G, T]
        weights = weights.astype(v.dtype)
        y = jnp.moveaxis(_product(_BY_QUERY, v[:, :, keys], weights), 2, 4)  # [B, K, G, T, N]
        ys.append(y / denom[..., None])  # divides N numbers per query, not S
        res.append((weights, denom))
    y = jnp.concatenate(ys, axis=3)
    return y, (q, k, v, y, res)


def _dense_attention_bwd(causal: bool, residuals: tuple, dy: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, y, res = residuals
    mean = jnp.sum(dy * y, axis=-1)  # [B, K, G, T]
    dq, dk, dv = [], 0, 0
    for (queries, keys), (weights, denom) in zip(_blocks(q.shape[3], causal), res):
        share = (dy[..., queries, :] / denom[..., None]).astype(v.dtype)  # [B, K, G, T, N]
        scores = _product(_SCORES, v[:, :, keys], share) - (mean[..., queries] / denom)[:, :, None]
        scores = (weights * scores).astype(q.dtype)  # [B, K, S, G, T]
        dq.append(jnp.moveaxis(_product(_BY_QUERY, k[:, :, keys], scores), 2, 4))
        unseen = ((0, 0), (0, 0), (0, k.shape[2] - keys.stop), (0, 0))
        dk += jnp.pad(_product(_BY_KEY, scores, q[..., queries, :]), unseen)
        dv += jnp.pad(_product(_BY_KEY, weights, share), unseen)
    dq = jnp.concatenate(dq, axis=3)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


dense_attention.defvjp(_dense_attention_fwd, _dense_attention_bwd)


def cached(
    q: Array, k: Array, v: Array, cache: KVCache, layer: Array | int, block_mask: str, how: str | None = None
) -> Array:
    """Attention of T new positions, which the cache already holds after `length` older ones.

    Only the filled part of the cache is read, in blocks of `kv_cache.BLOCK` positions.

    Args:
      q: [B, T, H, N];  k, v: [B, T, K, N], of the new positions.
      block_mask: how the new positions see each other: 'causal' or 'full'; 'first' is 'causal' in an
        empty cache.
    """
    t = q.shape[1]
    first = {"sees": "causal"} if block_mask == "first" else {"sees": "cache", "capacity": cache.capacity}
    how = how or choose(q, kv_heads=cache.kv_heads, **first)
    if how == "cudnn" and block_mask == "first":
        return attention(q, k, v, Mask(jnp.ones(q.shape[:2], jnp.int32), packed=False), how)
    if how == "cudnn":
        k, v = (x.astype(q.dtype) for x in cache.read(layer, 0, cache.capacity))
        return gpu_attention.cached(q, k, v, cache.length, block_mask)
    grouped = _grouped(q, cache.kv_heads)
    if block_mask == "full":
        part = attend_block(grouped, k, v, None)
    else:
        part = attend_causal_block(grouped, k, v, jnp.tril(jnp.ones((1, t, t), bool)))
    if block_mask == "first":
        return normalize(part, q.dtype)

    def step(i: Array, part: PartialSoftmax) -> PartialSoftmax:
        old = (x.astype(q.dtype) for x in cache.read(layer, i * BLOCK, BLOCK))
        seen = i * BLOCK + jnp.arange(BLOCK) < cache.length[:, None]
        return part.merge(attend_block(grouped, *old, seen[:, None]))

    blocks = (jnp.max(cache.length) + BLOCK - 1) // BLOCK
    return normalize(jax.lax.fori_loop(0, blocks, step, part), q.dtype)


def _grouped(q: Array, kv_heads: int) -> Array:
    """[B, T, H, N] -> [B, K, G, T, N], scaled: matmuls over contiguous blocks, fastest on CPUs."""
    b, t, n, h = q.shape
    return (q * h**-0.5).reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)


def normalize(part: PartialSoftmax, dtype: jnp.dtype) -> Array:
    """The output once all keys are merged: [B, T, H, N]."""
    return _ungrouped((part.y / part.denom[..., None]).astype(dtype))


def _ungrouped(y: Array) -> Array:
    """[B, K, G, T, N] -> [B, T, H, N]."""
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
    return jax.shard_map(
        local, in_specs=(heads, heads, heads, PartitionSpec(sharding.BATCH_AXES)), out_specs=heads, check_vma=False
    )(q, k, v, segments)
