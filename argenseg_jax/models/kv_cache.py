"""The KV cache: an explicit struct that is passed in and returned; sequences may differ in length."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from argenseg_jax import sharding

Array = jax.Array
BLOCK = 128  # positions that attention reads at once; capacities are multiples of it


@flax.struct.dataclass
class KVCache:
    """Keys (after RoPE) and values of every layer.

    Attributes:
      k, v: [L, B, S, K, N], or where the decoder's layers are split a tuple of L arrays
        [B, S, K, N]; entries at and beyond a sequence's length are garbage.
      length: int32[B], the number of filled positions of each sequence.
    """

    k: Array | tuple[Array, ...]
    v: Array | tuple[Array, ...]
    length: Array

    @property
    def capacity(self) -> int:
        """S."""
        return self.k[0].shape[1]

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.k[0].shape[2]

    @classmethod
    def empty(
        cls, layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: jnp.dtype, split: bool = False
    ) -> KVCache:
        """A cache of zeros with nothing filled; the capacity is rounded up to whole blocks."""
        shape = (batch, -(-capacity // BLOCK) * BLOCK, kv_heads, head_dim)

        def zeros() -> Array | tuple[Array, ...]:
            if split:
                return tuple(_constrained(jnp.zeros(shape, dtype)) for _ in range(layers))
            return _constrained(jnp.zeros((layers, *shape), dtype))

        return cls(zeros(), zeros(), jnp.zeros((batch,), jnp.int32))

    def append(self, layer: Array | int, k: Array, v: Array) -> KVCache:
        """Writes [B, T, K, N] after each sequence's filled part of one layer; `length` stays.

        A sequence that lacks space for T positions is overwritten at its end: the caller sees to it that only
        sequences which are done can be so short.
        """
        return self.replace(k=_write(self.k, layer, k, self.length), v=_write(self.v, layer, v, self.length))

    def read(self, layer: Array | int, start: Array | int, size: int) -> tuple[Array, Array]:
        """Keys and values [B, size, K, N] of one layer from position `start` on."""
        return _read(self.k, layer, start, size), _read(self.v, layer, start, size)


def _write(
    store: Array | tuple[Array, ...], layer: Array | int, new: Array, length: Array
) -> Array | tuple[Array, ...]:
    update = jax.lax.dynamic_update_slice
    if isinstance(store, tuple):
        rows = jax.vmap(lambda row, block, at: update(row, block, (at, 0, 0)))(
            store[layer], new.astype(store[layer].dtype), length
        )
        return *store[:layer], rows, *store[layer + 1 :]
    return jax.vmap(lambda rows, block, at: update(rows, block[None], (layer, at, 0, 0)), (1, 0, 0), 1)(
        store, new.astype(store.dtype), length
    )


def _read(store: Array | tuple[Array, ...], layer: Array | int, start: Array | int, size: int) -> Array:
    if isinstance(store, tuple):
        return jax.lax.dynamic_slice_in_dim(store[layer], start, size, axis=1)
    _, b, _, *rest = store.shape
    return jax.lax.dynamic_slice(store, (layer, 0, start, 0, 0), (1, b, size, *rest))[0]


def _constrained(store: Array) -> Array:
    """Sequences over the data axes, heads over the tensor axis."""
    return sharding.constrain(store, *[None] * (store.ndim - 4), "act_batch", None, "act_heads", None)
