"""InternViT: patch embedding, class token, resampled position embedding, scanned blocks.

Differs from ViT (Dosovitskiy et al., 2021) in this (reference: modeling_intern_vit.py):
  - LayerScale and stochastic depth; no final norm;
  - the position embedding is resampled to the image's size;
  - the 300M form has LayerNorm and qkv bias; the 6B form RMSNorm, no qkv bias, and RMS over the full
    width of q and k before the head split.
Axes: see models/__init__; n patches.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from argenseg_jax import sharding
from argenseg_jax.models import attention, layers, resize

Array = jax.Array


class Block(nn.Module):
    """Pre-norm attention and MLP, each with LayerScale; a scan body: returns (x, hidden state)."""

    width: int
    heads: int
    mlp: int
    norm: str
    eps: float
    qk_norm: bool
    qkv_bias: bool
    ls_init: float
    capture: bool
    deterministic: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, drop_rate: Array) -> tuple[Array, Array | None]:
        norm = layers.LayerNorm if self.norm == "layer_norm" else layers.RMSNorm
        ls1 = self.param("ls1", nn.initializers.constant(self.ls_init), (self.width,))
        ls2 = self.param("ls2", nn.initializers.constant(self.ls_init), (self.width,))
        y = Attention(self.width, self.heads, self.eps, self.qk_norm, self.qkv_bias, self.dtype, name="attn")(
            norm(self.eps, name="norm1")(x)
        )
        x = x + self.drop_path(y * ls1.astype(y.dtype), drop_rate)
        y = Mlp(self.mlp, self.dtype, name="mlp")(norm(self.eps, name="norm2")(x))
        x = x + self.drop_path(y * ls2.astype(y.dtype), drop_rate)
        return x, (x if self.capture else None)

    def drop_path(self, y: Array, rate: Array) -> Array:
        """Stochastic depth per tile (timm DropPath)."""
        if self.deterministic:
            return y
        keep = jax.random.uniform(self.make_rng("dropout"), (y.shape[0], 1, 1)) >= rate
        return jnp.where(keep, y / (1 - rate).astype(y.dtype), 0)


class Attention(nn.Module):
    """Full self-attention over the patches of one tile."""

    width: int
    heads: int
    eps: float
    qk_norm: bool
    qkv_bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.heads, self.width // self.heads)
        q, k, v = (layers.dense(shape, self.dtype, bias=self.qkv_bias, name=n)(x) for n in "qkv")
        if self.qk_norm:
            flat = (*x.shape[:-1], self.width)
            q = layers.RMSNorm(self.eps, name="q_norm")(q.reshape(flat)).reshape(q.shape)
            k = layers.RMSNorm(self.eps, name="k_norm")(k.reshape(flat)).reshape(k.shape)
        q, k, v = (sharding.constrain(a, "act_batch", None, "act_heads", None) for a in (q, k, v))
        y = attention.attention(q, k, v, None)
        return layers.dense(self.width, self.dtype, inputs=2, name="o")(y)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = layers.dense(self.hidden, self.dtype, name="fc1")(x)
        y = sharding.constrain(jax.nn.gelu(y, approximate=False), "act_batch", None, "act_ffw")
        return layers.dense(x.shape[-1], self.dtype, name="fc2")(y)


class PatchEmbed(nn.Module):
    """A convolution with stride = kernel size, written as one matmul over whole patches."""

    patch: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[P, I, I, c] -> [P, n, D]."""
        p, size, _, c = images.shape
        grid = size // self.patch
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2)), (self.patch, self.patch, c, self.width)
        )
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        x = images.astype(self.dtype).reshape(p, grid, self.patch, grid, self.patch, c)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(p, grid * grid, -1)
        return x @ kernel.astype(self.dtype).reshape(-1, self.width) + bias.astype(self.dtype)


class InternViT(nn.Module):
    """Vision tower. Fields carry the names and meanings of the official vision_config."""

    image_size: int = 448  # native size of the position embedding
    patch: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp: int = 4096
    norm: str = "layer_norm"  # or 'rms_norm'
    eps: float = 1e-6
    qk_norm: bool = False
    qkv_bias: bool = True
    ls_init: float = 0.1
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unroll: bool = False

    @nn.compact
    def __call__(
        self, images: Array, *, deterministic: bool = True, capture: bool = False
    ) -> tuple[Array, Array | None]:
        """Normalised f32[P, I, I, 3] -> ([P, 1 + n, D], hidden states [L + 1, P, 1 + n, D] or None)."""
        x = self.embed(images)
        block = layers.scan_layers(Block, self.depth, remat=self.remat, unroll=self.unroll, in_axes=0)
        fields = dict(
            width=self.width,
            heads=self.heads,
            mlp=self.mlp,
            norm=self.norm,
            eps=self.eps,
            qk_norm=self.qk_norm,
            qkv_bias=self.qkv_bias,
            ls_init=self.ls_init,
            capture=capture,
            deterministic=deterministic or self.drop_path == 0.0,
            dtype=self.dtype,
        )
        last, hidden = block(**fields, name="layers")(x, jnp.linspace(0.0, self.drop_path, self.depth))
        return last, jnp.concatenate([x[None], hidden]) if capture else None

    def embed(self, images: Array) -> Array:
        """Patches, class token and position embedding: [P, 1 + n, D]."""
        p, size = images.shape[:2]
        grid = size // self.patch
        cls = self.param("class_embed", nn.initializers.normal(0.02), (self.width,))
        native = self.image_size // self.patch
        pos = self.param("pos_embed", nn.initializers.normal(0.02), (1 + native**2, self.width))

        x = PatchEmbed(self.patch, self.width, self.dtype, name="patch_embed")(images)
        x = jnp.concatenate([jnp.broadcast_to(cls.astype(self.dtype), (p, 1, self.width)), x], axis=1)
        return x + resample_pos_embed(pos, grid).astype(self.dtype)


def resample_pos_embed(pos: Array, grid: int) -> Array:
    """[1 + n, D] -> [1 + grid^2, D] by torch's bicubic, the class token apart (f32)."""
    native = round((pos.shape[0] - 1) ** 0.5)
    if native == grid:
        return pos
    m = jnp.asarray(resize.bicubic_matrix(native, grid))
    patches = pos[1:].astype(jnp.float32).reshape(native, native, -1)
    patches = jnp.einsum("yh,xw,hwD->yxD", m, m, patches, precision="highest")
    return jnp.concatenate([pos[:1], patches.reshape(grid * grid, -1).astype(pos.dtype)])
