"""From InternViT to the decoder: pixel shuffle and the two-layer projector `mlp1`."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from argenseg_jax.models import layers

Array = jax.Array


def pixel_shuffle(x: Array, ratio: float, version: str = "v2") -> Array:
    """[P, n, D] -> [P, n * ratio^2, D / ratio^2]: neighbouring patches move into the channels.

    Version v1 leaves the grid transposed, as the first InternVL releases did (ps_version).
    """
    p, n, d = x.shape
    side, r = round(n**0.5), round(1 / ratio)
    x = x.reshape(p, side, side // r, r * d).transpose(0, 2, 1, 3)
    x = x.reshape(p, side // r, side // r, r * r * d)
    if version == "v2":
        x = x.transpose(0, 2, 1, 3)
    return x.reshape(p, (side // r) ** 2, r * r * d)


class Connector(nn.Module):
    """Drops the class token, pixel shuffle, LayerNorm, Linear, exact GELU, Linear."""

    width: int  # of the decoder
    ratio: float = 0.5
    version: str = "v2"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[P, 1 + n, Dv] -> [P, n * ratio^2, D]."""
        x = pixel_shuffle(x[:, 1:], self.ratio, self.version)
        x = layers.LayerNorm(1e-5, name="norm")(x)
        x = jax.nn.gelu(layers.dense(self.width, self.dtype, name="fc1")(x), approximate=False)
        return layers.dense(self.width, self.dtype, name="fc2")(x)
