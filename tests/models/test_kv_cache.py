"""The cache: blocks land behind each row's own length; what a query may see."""
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.models import kv_cache


def test_blocks_land_behind_each_rows_length():
    cache = kv_cache.KVCache.empty(2, 3, 6, 1, 1, jnp.float32)
    assert cache.capacity == 6 and cache.k.shape == (2, 3, 6, 1, 1) and not cache.length.any()
    new = jnp.arange(1.0, 7.0).reshape(3, 2, 1, 1)
    k = kv_cache.append(cache.k, jnp.int32(1), new, jnp.array([0, 3, 5]))[..., 0, 0]
    assert not k[0].any()
    np.testing.assert_array_equal(k[1], [[1, 2, 0, 0, 0, 0], [0, 0, 0, 3, 4, 0],
                                         [0, 0, 0, 0, 0, 5]])  # 6 is beyond the capacity: dropped


@pytest.mark.parametrize("within, last", [("causal", [2, 3, 4]), ("full", [4, 4, 4])])
def test_visible(within, last):
    """Three new places behind 2 (and behind 0) old ones."""
    seen = kv_cache.visible(jnp.array([2, 0]), 3, 6, within)
    place = np.arange(6)
    np.testing.assert_array_equal(seen[0], place <= np.array(last)[:, None])
    np.testing.assert_array_equal(seen[1], place <= np.array(last)[:, None] - 2)
