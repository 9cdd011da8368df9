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
from argenseg_jax.models import gpu_attention
from argenseg_jax.models.kv_cache import BLOCK, KVCache

Array = jax.Array
_LOWEST = float(jnp.finfo(jnp.float32).min)
_BLOCKS, _MIN_QUERIES = 8, 64  # of causal attention: most blocks of queries, and fewest queries of a block


@flax.struct.dataclass
class Mask:
    """What the places of whole rows see: their own segment, up to themselves or up to `last`.

    Attributes:
      segments: int32[B, T], 0 at padding.
      last: int32[B, T], index of the last key that each query sees; None = the query itself.
      packed: whether a row may have several segments, or padding in front of its segment.
    """

    segments: Array
    last: Array | None = None
    packed: bool = flax.struct.field(pytree_node=False, default=True)

    def dense(self) -> Array:
        """bool[B, T, T]."""
        place = jnp.arange(self.segments.shape[1])
        last = place[None] if self.last is None else self.last
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return same & (self.segments[:, None, :] > 0) & (place[None, None, :] <= last[:, :, None])


def choose(
    q: Array, *, sees: str = "causal", kv_heads: int = 1, capacity: int | None = None, platform: str | None = None
) -> str:
    """How attention is computed for queries [B, T, N, H]: 'xla', 'cudnn' (GPU) or 'splash' (TPU).

    Args:
      sees: what the queries see: the keys of their segment up to themselves ('causal') or up to `last`
        ('last') in whole rows, 'all', or a 'cache'.
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
        gpu_attention.say(reason)
    if platform == "tpu" and sees == "causal" and t % 128 == 0 and h % 128 == 0:
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
    causal = mask is not None and mask.last is None
    how = how or choose(q, sees="all" if mask is None else "causal" if causal else "last", kv_heads=k.shape[2])
    if how == "splash":
        return _splash(q, k, v, mask.segments)
    if how == "cudnn":
        if mask is None:
            return gpu_attention.rows(q, k, v, None, packed=False)
        if not causal:
            raise ValueError("cuDNN is given no mask of `last`")
        return gpu_attention.rows(q, k, v, mask.segments, mask.packed)
    dense = None if mask is None else mask.dense()
    y = _rows(_grouped(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2), dense, causal)
    return _ungrouped(y.astype(q.dtype))


@flax.struct.dataclass
class _Part:
    """Attention to some of the keys: top f32[B, K, G, T], the largest score; total f32[B, K, G, T], the
    sum of exp(score - top); y f32[B, K, G, T, H], the values weighted so."""

    top: Array
    total: Array
    y: Array

    def with_part(self, other: _Part) -> _Part:
        """Attention to the keys of both."""
        top = jnp.maximum(self.top, other.top)
        a, b = jnp.exp(self.top - top), jnp.exp(other.top - top)
        return _Part(top, a * self.total + b * other.total, a[..., None] * self.y + b[..., None] * other.y)


def _part(q: Array, k: Array, v: Array, seen: Array | None) -> _Part:
    """Scaled queries [B, K, G, T, H] on keys [B, S, K, H]; seen: bool[B or 1, T or 1, S] or None = all."""
    scores = jnp.einsum("BKGTH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    if seen is not None:
        scores += jnp.where(seen, 0, _LOWEST / 2)[:, None, None]
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    y = jnp.einsum("BKGTS,BSKH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return _Part(top, jnp.sum(weights, axis=-1), y)


def _blocks(t: int, causal: bool = True) -> list[tuple[slice, slice]]:
    """Blocks of T queries, and of T keys those that each needs: causal ones need no later keys.

    Eight blocks do 9/16 of the work, four 5/8.
    """
    size = max(_MIN_QUERIES, -(-t // _BLOCKS)) if causal else t
    return [(slice(i, min(i + size, t)), slice(0, min(i + size, t))) for i in range(0, t, size)]


def _causal_part(q: Array, k: Array, v: Array, seen: Array) -> _Part:
    """`_part` of queries that see no later keys; seen: bool[B or 1, T, T]."""
    parts = [_part(q[..., rows, :], k[:, keys], v[:, keys], seen[:, rows, keys]) for rows, keys in _blocks(k.shape[1])]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=3), *parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _rows(q: Array, k: Array, v: Array, seen: Array | None, causal: bool) -> Array:
    """Attention of whole rows, S = T: scaled queries [B, K, G, T, H] on [B, K, S, H] -> f32[B, K, G, T, H].

    seen: bool[B, T, S] or None = all; causal promises that it shows no later key.

    Written for its gradient, for which XLA's CPU backend, left to itself, transposes arrays of [T, S].
    Here the scores of a query stand in a column. So the gradients of keys and values, sums over the
    blocks, come as they are needed, and only arrays of [H, T] are transposed: half the time.
    """
    return _rows_fwd(q, k, v, seen, causal)[0]


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_SCORES = "BKSH,BKGTH->BKSGT"  # keys, queries
_BY_QUERY = "BKSH,BKSGT->BKHGT"  # what the queries get from the keys
_BY_KEY = "BKSGT,BKGTH->BKSH"  # what the keys get from the queries


def _rows_fwd(q: Array, k: Array, v: Array, seen: Array | None, causal: bool) -> tuple[Array, tuple]:
    hidden = None if seen is None else jnp.where(seen, 0, _LOWEST / 2).swapaxes(1, 2)[:, None, :, None]
    ys, kept = [], []
    for rows, keys in _blocks(q.shape[3], causal):
        scores = _product(_SCORES, k[:, :, keys], q[..., rows, :])
        if hidden is not None:  # added, not selected: one pass less
            scores += hidden[:, :, keys, :, rows]
        weights = jnp.exp(scores - jnp.max(scores, axis=2, keepdims=True))
        total = jnp.sum(weights, axis=2)
        weights = weights.astype(v.dtype)
        y = jnp.moveaxis(_product(_BY_QUERY, v[:, :, keys], weights), 2, 4)
        ys.append(y / total[..., None])  # divides H numbers a query, not S
        kept.append((weights, total))
    y = jnp.concatenate(ys, axis=3)
    return y, (q, k, v, y, kept)


def _rows_bwd(causal: bool, saved: tuple, dy: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, y, kept = saved
    mean = jnp.sum(dy * y, axis=-1)
    into_q, into_k, into_v = [], 0, 0
    for (rows, keys), (weights, total) in zip(_blocks(q.shape[3], causal), kept):
        share = (dy[..., rows, :] / total[..., None]).astype(v.dtype)
        scores = _product(_SCORES, v[:, :, keys], share) - (mean[..., rows] / total)[:, :, None]
        scores = (weights * scores).astype(q.dtype)
        into_q.append(jnp.moveaxis(_product(_BY_QUERY, k[:, :, keys], scores), 2, 4))
        unseen = ((0, 0), (0, 0), (0, k.shape[2] - keys.stop), (0, 0))
        into_k += jnp.pad(_product(_BY_KEY, scores, q[..., rows, :]), unseen)
        into_v += jnp.pad(_product(_BY_KEY, weights, share), unseen)
    into_q = jnp.concatenate(into_q, axis=3)
    return into_q.astype(q.dtype), into_k.astype(k.dtype), into_v.astype(v.dtype), None


_rows.defvjp(_rows_fwd, _rows_bwd)


def cached(
    q: Array, k: Array, v: Array, cache: KVCache, layer: Array | int, block_mask: str, how: str | None = None
) -> Array:
    """Attention of T new places, which the cache already holds behind `length` older ones.

    Only the filled part of the cache is read, in blocks of `kv_cache.BLOCK` places.

    Args:
      q: [B, T, N, H];  k, v: [B, T, K, H], of the new places.
      block_mask: how the new places see each other: 'causal' or 'full'; 'first' is 'causal' in a cache that
        holds nothing else.
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
        part = _part(grouped, k, v, None)
    else:
        part = _causal_part(grouped, k, v, jnp.tril(jnp.ones((1, t, t), bool)))
    if block_mask == "first":
        return _whole(part, q.dtype)

    def step(i: Array, part: _Part) -> _Part:
        old = (x.astype(q.dtype) for x in cache.read(layer, i * BLOCK, BLOCK))
        seen = i * BLOCK + jnp.arange(BLOCK) < cache.length[:, None]
        return part.with_part(_part(grouped, *old, seen[:, None]))

    blocks = (jnp.max(cache.length) + BLOCK - 1) // BLOCK
    return _whole(jax.lax.fori_loop(0, blocks, step, part), q.dtype)


def _grouped(q: Array, kv_heads: int) -> Array:
    """[B, T, N, H] -> [B, K, G, T, H], scaled: matmuls over contiguous blocks, fastest on CPUs."""
    b, t, n, h = q.shape
    return (q * h**-0.5).reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)


def _whole(part: _Part, dtype: jnp.dtype) -> Array:
    """What attention yields once all keys are in: [B, T, N, H]."""
    return _ungrouped((part.y / part.total[..., None]).astype(dtype))


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
    return jax.shard_map(
        local, in_specs=(heads, heads, heads, PartitionSpec(sharding.BATCH_AXES)), out_specs=heads, check_vma=False
    )(q, k, v, segments)
