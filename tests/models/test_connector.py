"""Pixel shuffle by hand, and what the connector does around it."""

import jax
import numpy as np
import pytest

from argenseg_jax.models.connector import Connector, pixel_shuffle


def test_pixel_shuffle_by_hand():
    """A 4 x 4 grid of one channel: each output place holds its 2 x 2 block, row by row."""
    x = np.arange(16, dtype=np.float32).reshape(1, 16, 1)
    v2 = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(pixel_shuffle(x, 0.5)[0], v2)
    np.testing.assert_array_equal(pixel_shuffle(x, 0.5, "v1")[0], np.asarray(v2)[[0, 2, 1, 3]])
    np.testing.assert_array_equal(pixel_shuffle(x, 1.0), x)


def test_channels_of_a_patch_stay_together():
    x = np.arange(32, dtype=np.float32).reshape(1, 16, 2)
    np.testing.assert_array_equal(pixel_shuffle(x, 0.5)[0, 0], [0, 1, 2, 3, 8, 9, 10, 11])


@pytest.mark.parametrize("ratio, places", [(0.5, 4), (1.0, 16)])
def test_the_class_token_is_dropped(ratio, places):
    x = jax.random.normal(jax.random.key(0), (2, 17, 8))
    y, variables = Connector(width=12, ratio=ratio).init_with_output(jax.random.key(1), x)
    assert y.shape == (2, places, 12)
    other = Connector(width=12, ratio=ratio).apply(variables, x.at[:, 0].set(7.0))
    np.testing.assert_array_equal(y, other)
