"""The KV cache: an explicit struct that is passed in and returned; rows may differ in length."""
from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array


@flax.struct.dataclass
class KVCache:
    """Keys (after RoPE) and values of every layer.

    Attributes:
      k, v: [L, B, S, K, H]; entries at and beyond a row's length are garbage.
      length: int32[B], the number of filled places of each row.
    """

    k: Array
    v: Array
    length: Array

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    @classmethod
    def empty(cls, layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int,
              dtype: jnp.dtype) -> "KVCache":
        """A cache of zeros with nothing filled."""
        zeros = jnp.zeros((layers, batch, capacity, kv_heads, head_dim), dtype)
        return cls(zeros, zeros, jnp.zeros((batch,), jnp.int32))


def append(stack: Array, layer: Array, new: Array, length: Array) -> Array:
    """Writes a block behind each row's filled part of one layer.

    Args:
      stack: [L, B, S, K, H];  layer: int32[];  new: [B, T, K, H];  length: int32[B].

    Places beyond the capacity are dropped, so callers check T + length <= S on the host before.
    """
    b, t = new.shape[:2]
    rows = jnp.arange(b)[:, None]
    places = length[:, None] + jnp.arange(t)[None, :]
    return stack.at[layer, rows, places].set(new.astype(stack.dtype), mode="drop")


def visible(length: Array, t: int, capacity: int, within: str) -> Array:
    """bool[B, T, S]: what T new places see of a cache that held `length` places before them.

    `within` tells how the new places see each other: 'causal' or 'full' (block-causal scales).
    """
    last = length[:, None] + (jnp.arange(t)[None] if within == "causal" else jnp.full((1, t), t - 1))
    return jnp.arange(capacity)[None, None, :] <= last[:, :, None]
