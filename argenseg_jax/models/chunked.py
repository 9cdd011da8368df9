"""A function of sequences or images, a few of the batch at a time: the same results with less memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from argenseg_jax import sharding

_LARGEST = 64 << 20  # bytes of the largest array of a chunk, on one device


def chunked_map(fn: Callable[[jax.Array], jax.Array], x: jax.Array, item_bytes: int) -> jax.Array:
    """fn(x) for an fn that treats the entries of x [B, ...] alike and independently.

    Every device goes through its own entries, one chunk after the other (lax.map); small batches are one
    chunk. Not for the backward pass, which would store the activations of all chunks.

    Args:
      item_bytes: size of the largest array that fn makes of one entry.
    """
    batch, mesh = len(x), jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else math.prod(mesh.shape[a] for a in sharding.BATCH_AXES)
    local = batch // ways if batch % ways == 0 else batch
    chunk = max(n for n in range(1, local + 1) if local % n == 0 and n * item_bytes <= max(_LARGEST, item_bytes))
    count = local // chunk
    if count == 1:
        return fn(x)
    # Strided, so that every device keeps its own entries: [B, ...] -> [b, A, ...] -> [A, b, ...].
    chunks = jnp.swapaxes(x.reshape(batch // count, count, *x.shape[1:]), 0, 1)
    y = jax.lax.map(fn, sharding.constrain(chunks, None, "act_batch", *(None,) * (chunks.ndim - 2)))
    return jnp.swapaxes(y, 0, 1).reshape(batch, *y.shape[2:])
