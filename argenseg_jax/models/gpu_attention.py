"""Attention by cuDNN's flash kernels (NVIDIA GPUs), with its own causal mask and lengths of sequences.

No array of [T, T] is made: rows of one segment are causal up to their length, packed rows are computed
segment by segment. Axes as in models/attention.
"""

from __future__ import annotations

import functools
import logging
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from argenseg_jax import sharding

Array = jax.Array
_MAX_HEAD, _HEAD_STEP = 128, 8


def refusal(q: Array, kv_heads: int, keys: int | None = None) -> str | None:
    """Why cuDNN does not take queries [B, T, H, N] on keys of K heads, in words; None where it does.

    Args:
      keys: S, where the new keys are in a cache of that capacity; None: S = T.
    """
    _, t, n, h = q.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in 16 bits, not in {q.dtype}"
    if h > _MAX_HEAD or h % _HEAD_STEP:
        return f"heads of {h} numbers are no multiple of {_HEAD_STEP} up to {_MAX_HEAD}"
    if jax.default_backend() != "gpu":
        return None  # compiled here for elsewhere: there is nobody to ask
    return _tried(t + t % 2, keys, n, kv_heads, h, jnp.dtype(q.dtype))


@functools.cache
def _tried(t: int, keys: int | None, heads: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> str | None:
    """What this machine's cuDNN says to attention of these sizes, with gradients where rows are whole."""

    def shaped(length: int, heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, length, heads, head_dim), dtype)

    def loss(q: Array, k: Array, v: Array, lengths: Array) -> Array:
        return jnp.sum(_call(q, k, v, lengths, lengths, causal=keys is None).astype(jnp.float32))

    run = loss if keys is not None else jax.grad(loss, argnums=(0, 1, 2))
    args = (
        shaped(t, heads),
        shaped(keys or t, kv_heads),
        shaped(keys or t, kv_heads),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    try:
        jax.jit(run).trace(*args).lower().compile()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # XLA's errors are RuntimeErrors
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


@functools.cache
def log_once(reason: str) -> None:
    """One line in the log for each reason why cuDNN is not used."""
    logging.getLogger(__name__).warning("attention is XLA's, not cuDNN's: %s", reason)


# ---- complete sequences --------------------------------------------------------------------------------------


def full_sequence(q: Array, k: Array, v: Array, segments: Array | None, packed: bool) -> Array:
    """Attention of complete sequences under the mesh in use: [B, T, H, N].

    Args:
      q: [B, T, H, N];  k, v: [B, T, K, N].
      segments: int32[B, T], each a stretch of its own within a row, 0 at padding; causal within each.
        None = every query sees every key.
      packed: a row may have several segments, or padding in front; otherwise it has one from its start.
    """
    t = q.shape[1]
    if t % 2:  # with a mask of lengths, odd ones are taken by few versions of cuDNN
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    if segments is None and t % 2 == 0:
        return _sharded(lambda q, k, v: _call(q, k, v), q, k, v)
    if segments is None:
        lengths = jnp.full(q.shape[:1], t, jnp.int32)
        return _sharded(lambda q, k, v, n: _call(q, k, v, n, n), q, k, v, lengths)[:, :t]
    segments = jnp.pad(segments, ((0, 0), (0, t % 2)))
    return _sharded(_packed if packed else _single, q, k, v, segments)[:, :t]


def _call(
    q: Array,
    k: Array,
    v: Array,
    queries: Array | None = None,
    keys: Array | None = None,
    *,
    causal: bool = False,
    mask: Array | None = None,
) -> Array:
    """The kernel: [B, T, H, N] of q [B, T, H, N] on k, v [B, S, K, N].

    Args:
      queries, keys: int32[B], how many of the T and S count; None = all.
      mask: bool[B, 1, T, S], what is seen besides.
    """
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=causal,
        query_seq_lengths=queries,
        key_value_seq_lengths=keys,
        implementation="cudnn",
    )


def _causal(q: Array, k: Array, v: Array, lengths: Array) -> Array:
    """Causal attention of sequences that count up to their length; what comes after it is arbitrary."""
    lengths = jnp.maximum(lengths, 1).astype(jnp.int32)  # a row of padding alone: one key rather than none
    return _call(q, k, v, lengths, lengths, causal=True)


def _single(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """Rows of one segment from their start on. Padding is zero there and back, whatever the kernel leaves."""
    real = (segments > 0)[..., None, None]
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    return jnp.where(real, _causal(q, k, v, jnp.sum(segments > 0, axis=1)), 0)


@jax.custom_vjp
def _packed(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """Segment after segment: each is moved to the start of its row, computed by its length, moved back.

    The kernel's work is that of the segments' own lengths. Its gradient runs it once more (it is not kept
    for each segment), so that as many segments may come as there are.
    """

    def step(number: Array, y: Array) -> Array:
        at = _Segment(segments, number)
        return at.put(_causal(*map(at.take, (q, k, v)), at.length), y)

    return jax.lax.fori_loop(1, jnp.max(segments) + 1, step, jnp.zeros_like(q))


def _packed_fwd(*args: Array) -> tuple[Array, tuple[Array, ...]]:
    return _packed(*args), args


def _packed_bwd(residuals: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    *inputs, segments = residuals

    def step(number: Array, into: tuple[Array, ...]) -> tuple[Array, ...]:
        at = _Segment(segments, number)
        _, pull = jax.vjp(lambda q, k, v: _causal(q, k, v, at.length), *map(at.take, inputs))
        return tuple(map(at.put, pull(at.take(dy)), into))

    zeros = tuple(map(jnp.zeros_like, inputs))
    return (*jax.lax.fori_loop(1, jnp.max(segments) + 1, step, zeros), None)


_packed.defvjp(_packed_fwd, _packed_bwd)


class _Segment:
    """Where a numbered segment is in each sequence; a sequence may have none."""

    def __init__(self, segments: Array, number: Array):
        self._inside = (segments == number)[..., None, None]
        self._start = jnp.argmax(segments == number, axis=1)
        self.length = jnp.sum(segments == number, axis=1)

    def take(self, x: Array) -> Array:
        """[B, T, ...] with the segment at the start of each sequence, and zeros after it."""
        return jax.vmap(functools.partial(jnp.roll, axis=0))(jnp.where(self._inside, x, 0), -self._start)

    def put(self, x: Array, into: Array) -> Array:
        """What `take` gave, back in its place in `into`; the rest of `into` stays."""
        return jnp.where(self._inside, jax.vmap(functools.partial(jnp.roll, axis=0))(x, self._start), into)


# ---- a cache -----------------------------------------------------------------------------------------


def cached(q: Array, k: Array, v: Array, length: Array, block_mask: str) -> Array:
    """Attention of T new positions on a cache that holds them already: [B, T, H, N].

    Args:
      k, v: [B, S, K, N], the whole of the cache;  length: int32[B], filled before the new ones.
      block_mask: how the new ones see each other, 'causal' or 'full'.
    """
    t, capacity = q.shape[1], k.shape[1]
    q = jnp.pad(q, ((0, 0), (0, t % 2), (0, 0), (0, 0)))
    seen = jnp.minimum(length + t, capacity).astype(jnp.int32)  # a row that is done may lack room
    queries = jnp.full_like(seen, t)
    if block_mask == "full" or t == 1:
        return _sharded(lambda q, k, v, n, m: _call(q, k, v, n, m), q, k, v, queries, seen)[:, :t]
    # The kernel's own causal mask begins at key 0, not after the filled ones.
    last = length[:, None] + jnp.arange(q.shape[1])
    mask = jnp.arange(capacity) <= last[:, None, :, None]
    return _sharded(lambda q, k, v, n, m, mask: _call(q, k, v, n, m, mask=mask), q, k, v, queries, seen, mask)[:, :t]


# ---- the mesh ----------------------------------------------------------------------------------------


def _sharded(run, q: Array, k: Array, v: Array, *others: Array) -> Array:
    """run(q, k, v, *others) on every device for its own rows and heads; others have rows first."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(q, k, v, *others)
    ways, tensor = math.prod(mesh.shape[a] for a in sharding.BATCH_AXES), mesh.shape["tensor"]
    batch = sharding.BATCH_AXES if q.shape[0] % ways == 0 else None
    heads = "tensor" if q.shape[2] % tensor == 0 else None
    if heads and k.shape[2] % tensor:  # too few to be split: each query head gets its own
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    whole = PartitionSpec(batch, None, heads, None)
    return jax.shard_map(
        run, in_specs=(whole, whole, whole, *(PartitionSpec(batch),) * len(others)), out_specs=whole, check_vma=False
    )(q, k, v, *others)
