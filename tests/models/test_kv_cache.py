"""The cache: blocks land behind each row's own length, in one stack and in split layers alike."""

import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.models.kv_cache import BLOCK, KVCache


@pytest.mark.parametrize("split", [False, True])
def test_blocks_land_behind_each_rows_length(split):
    cache = KVCache.empty(2, 3, BLOCK + 1, 1, 1, jnp.float32, split)
    assert cache.capacity == 2 * BLOCK and cache.kv_heads == 1 and not cache.length.any()
    assert isinstance(cache.k, tuple) == split
    new = jnp.arange(1.0, 7.0).reshape(3, 2, 1, 1)
    cache = cache.replace(length=jnp.array([0, 3, BLOCK])).append(1 if split else jnp.int32(1), new, -new)
    k, v = (np.asarray(x)[..., 0, 0] for x in cache.read(1, 0, cache.capacity))
    want = np.zeros((3, 2 * BLOCK))
    want[0, :2], want[1, 3:5], want[2, BLOCK : BLOCK + 2] = [1, 2], [3, 4], [5, 6]
    np.testing.assert_array_equal(k, want)
    np.testing.assert_array_equal(v, -want)
    assert not cache.read(0, 0, BLOCK)[0].any()
    np.testing.assert_array_equal(cache.read(1, 3, 2)[0][1, :, 0, 0], [3, 4])
