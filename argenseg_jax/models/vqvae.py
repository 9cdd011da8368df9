"""The mask VQ-VAE: VAR's convolutional encoder and decoder around the multi-scale quantizer.

Submodule names follow the official state dict ('.' -> '/', list indices joined by '_'), so that
weights convert by a table (VAR basic_vae.py, vqvae.py). Differs from VQGAN (Esser et al., 2021) in this:
  - the multi-scale residual quantizer (models/quantizer.py) instead of one code per latent cell;
  - attention at the lowest resolution only, single-head;
  - nano only: folded pixels, local normalisation, a dead zone (see VQVAE).
Axes: see models/__init__; D width; NHWC.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from argenseg_jax.models.quantizer import MultiScaleQuantizer, Quantized

Dtype = Any


class VQVAE(nn.Module):
    """Images in [-1,1] <-> codes of a multi-scale codebook. `dtype` is that of the convolutions.

    The last three fields are off in the official model; they make a nano one cheap and its codes
    predictable: `patch_size` p > 1 folds p x p grey pixels into channels before `conv_in` and
    unfolds them after `conv_out` (colour is lost, masks have none); `local` normalises each
    position alone, lets a latent cell see only its own and the 8 cells around it, and measures
    latents from that of an all-black image; `dead_zone` is the quantizer's.
    """

    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 32
    codebook_size: int = 4096
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    num_phi: int = 4
    phi_ratio: float = 0.5
    beta: float = 0.25
    using_sa: bool = True
    using_mid_sa: bool = True
    dtype: Dtype = jnp.float32
    patch_size: int = 1
    local: bool = False
    dead_zone: float = 0.0

    def setup(self):
        shared = dict(
            ch=self.ch,
            ch_mult=tuple(self.ch_mult),
            num_res_blocks=self.num_res_blocks,
            using_sa=self.using_sa,
            using_mid_sa=self.using_mid_sa,
            dtype=self.dtype,
            local=self.local,
        )
        self.encoder = Encoder(**shared, out_channels=self.z_channels)
        self.decoder = Decoder(**shared, out_channels=self.patch_size**2 if self.patch_size > 1 else 3)
        self.quant_conv = _conv(self.z_channels, self.dtype, 1 if self.local else 3)
        self.post_quant_conv = _conv(self.z_channels, self.dtype)
        self.quantizer = MultiScaleQuantizer(
            codebook_size=self.codebook_size,
            channels=self.z_channels,
            patch_nums=tuple(self.patch_nums),
            num_phi=self.num_phi,
            phi_ratio=self.phi_ratio,
            beta=self.beta,
            dead_zone=self.dead_zone,
        )

    @property
    def image_size(self) -> int:
        """R, the side of the images in pixels."""
        return self.patch_size * 2 ** (len(self.ch_mult) - 1) * self.patch_nums[-1]

    @property
    def bytes_per_image(self) -> int:
        """The largest activation of one image."""
        side = self.image_size // self.patch_size
        return side * side * self.ch * jnp.dtype(self.dtype).itemsize

    def encode(self, image: jax.Array) -> jax.Array:
        """[B,R,R,3] in [-1,1] -> latent f f32[B,h,w,C]."""
        if image.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"this VQ-VAE takes images [B,{self.image_size},{self.image_size},3], got {list(image.shape)}"
            )
        f = self._latent(image)
        # The black one apart: with B others it would make their number odd, hard to split.
        return f - self._latent(jnp.full_like(image[:1], -1)) if self.local else f

    def _latent(self, image: jax.Array) -> jax.Array:
        if self.patch_size > 1:
            image = _space_to_depth(image.mean(-1, keepdims=True), self.patch_size)
        return self.quant_conv(self.encoder(image.astype(self.dtype))).astype(jnp.float32)

    def tokenize(self, image: jax.Array) -> jax.Array:
        """[B,R,R,3] in [-1,1] -> codes i32[B,U]."""
        return self.quantizer.quantize(self.encode(image))[0]

    def decode(self, f_hat: jax.Array) -> jax.Array:
        """[B,h,w,C] -> image f32[B,R,R,3], clamped to [-1,1]."""
        return jnp.clip(self._decode(f_hat), -1, 1)

    def decode_codes(self, codes: jax.Array) -> jax.Array:
        """i32[B,U] -> image f32[B,R,R,3], clamped to [-1,1]."""
        return self.decode(self.quantizer.lookup(codes))

    def forward_train(self, image: jax.Array) -> tuple[jax.Array, jax.Array, Quantized]:
        """[B,R,R,3] -> image f32[B,R,R,3] (not clamped), VQ loss f32[], the quantized latent."""
        f_hat, vq_loss, quantized = self.quantizer.straight_through(self.encode(image))
        return self._decode(f_hat), vq_loss, quantized

    def __call__(self, image: jax.Array) -> tuple[jax.Array, jax.Array, Quantized]:
        """As `forward_train`: touches every parameter, hence the entry point for `init`."""
        return self.forward_train(image)

    def _decode(self, f_hat: jax.Array) -> jax.Array:
        x = self.decoder(self.post_quant_conv(f_hat.astype(self.dtype)))
        if self.patch_size > 1:
            x = jnp.repeat(_depth_to_space(x, self.patch_size), 3, axis=-1)
        return x.astype(jnp.float32)


class Tower(nn.Module):
    """The sizes that encoder and decoder share."""

    out_channels: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    using_sa: bool
    using_mid_sa: bool
    dtype: Dtype
    local: bool


class Encoder(Tower):
    """[B,h,w,c] -> [B,h,w,C], halving the side between the entries of `ch_mult`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        last = len(self.ch_mult) - 1
        kernel = 1 if self.local else 3  # conv_in alone looks around
        x = _conv(self.ch, self.dtype, name="conv_in")(x)
        for i, mult in enumerate(self.ch_mult):
            x = Stage(
                self.ch * mult,
                self.num_res_blocks,
                self.using_sa and i == last,
                "downsample" if i < last else "",
                self.dtype,
                self.local,
                kernel,
                name=f"down_{i}",
            )(x)
        x = Middle(self.using_mid_sa, self.dtype, self.local, kernel, name="mid")(x)
        x = nn.silu(_norm(x, self.local, name="norm_out"))
        return _conv(self.out_channels, self.dtype, kernel, name="conv_out")(x)


class Decoder(Tower):
    """[B,h,w,C] -> [B,h,w,out_channels], doubling the side between the entries of `ch_mult`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        last = len(self.ch_mult) - 1
        x = _conv(self.ch * self.ch_mult[-1], self.dtype, name="conv_in")(x)
        x = Middle(self.using_mid_sa, self.dtype, self.local, name="mid")(x)
        for i in reversed(range(len(self.ch_mult))):
            x = Stage(
                self.ch * self.ch_mult[i],
                self.num_res_blocks + 1,
                self.using_sa and i == last,
                "upsample" if i > 0 else "",
                self.dtype,
                self.local,
                name=f"up_{i}",
            )(x)
        x = nn.silu(_norm(x, self.local, name="norm_out"))
        return _conv(self.out_channels, self.dtype, name="conv_out")(x)


class Stage(nn.Module):
    """The blocks of one resolution, then a change of resolution: 'downsample', 'upsample' or ''."""

    width: int
    num_blocks: int
    attention: bool
    resize: str
    dtype: Dtype
    local: bool
    kernel: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_blocks):
            x = ResnetBlock(self.width, self.dtype, self.local, self.kernel, name=f"block_{i}")(x)
            if self.attention:
                x = AttnBlock(self.dtype, self.local, name=f"attn_{i}")(x)
        if self.resize == "downsample":
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))  # right and bottom only, as VAR does
            x = nn.Conv(self.width, (3, 3), strides=2, padding="VALID", dtype=self.dtype, name="downsample")(x)
        elif self.resize == "upsample":
            x = _conv(self.width, self.dtype, name="upsample")(nearest2x(x))
        return x


class Middle(nn.Module):
    """Two residual blocks around an optional attention, at the lowest resolution."""

    attention: bool
    dtype: Dtype
    local: bool
    kernel: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResnetBlock(x.shape[-1], self.dtype, self.local, self.kernel, name="block_1")(x)
        if self.attention:
            x = AttnBlock(self.dtype, self.local, name="attn_1")(x)
        return ResnetBlock(x.shape[-1], self.dtype, self.local, self.kernel, name="block_2")(x)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    width: int
    dtype: Dtype
    local: bool
    kernel: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(_norm(x, self.local, name="norm1"))
        h = _conv(self.width, self.dtype, self.kernel, name="conv1")(h)
        h = nn.silu(_norm(h, self.local, name="norm2"))
        h = _conv(self.width, self.dtype, self.kernel, name="conv2")(h)
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), dtype=self.dtype, name="nin_shortcut")(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    dtype: Dtype
    local: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, wide, d = x.shape
        h = _norm(x, self.local, name="norm")
        qkv = nn.Conv(3 * d, (1, 1), dtype=self.dtype, name="qkv")(h)
        q, k, v = jnp.split(qkv.reshape(b, height * wide, 3 * d), 3, axis=-1)  # [B, h w, D] each
        weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k).astype(jnp.float32) * d**-0.5)  # [B, h w, h w]
        h = jnp.einsum("bqk,bkd->bqd", weights.astype(v.dtype), v).reshape(x.shape)
        return x + nn.Conv(d, (1, 1), dtype=self.dtype, name="proj_out")(h)


class GroupNorm(nn.Module):
    """torch's GroupNorm over [B,h,w,c], in f32; returns the input's dtype.

    Sums over the positions come first, channel by channel, those over a group's channels after them:
    five times as fast on CPUs as flax's, whose groups cut the innermost axis; and on TPUs, whose tiles
    are 128 wide, an array [..., 32, 5] of 160 channels would fill 25 times its size.
    """

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)

        def mean(y: jax.Array) -> jax.Array:
            """[B,h,w,c] -> [B,1,1,c], the same for all channels of a group."""
            y = jnp.mean(y, axis=(1, 2)).reshape(len(y), self.groups, -1)
            y = jnp.broadcast_to(jnp.mean(y, axis=-1, keepdims=True), y.shape)
            return y.reshape(len(y), 1, 1, -1)

        y = x.astype(jnp.float32)
        y -= mean(y)
        return (y * (jax.lax.rsqrt(mean(y * y) + self.epsilon) * scale) + bias).astype(x.dtype)


def nearest2x(x: jax.Array) -> jax.Array:
    """[B,h,w,c] -> [B,2h,2w,c], each pixel four times."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def _conv(width: int, dtype: Dtype, kernel: int = 3, name: str | None = None) -> nn.Conv:
    """A size-preserving convolution."""
    return nn.Conv(width, (kernel, kernel), dtype=dtype, name=name)


def _norm(x: jax.Array, local: bool, *, name: str) -> jax.Array:
    """GroupNorm(32); a local one takes all channels of each position alone."""
    if local:
        return nn.LayerNorm(epsilon=1e-6, dtype=x.dtype, name=name)(x)
    return GroupNorm(math.gcd(32, x.shape[-1]), name=name)(x)


def _space_to_depth(x: jax.Array, p: int) -> jax.Array:
    """[B,h,w,c] -> [B,h/p,w/p,p*p*c]."""
    b, height, wide, c = x.shape
    x = x.reshape(b, height // p, p, wide // p, p, c).swapaxes(2, 3)
    return x.reshape(b, height // p, wide // p, p * p * c)


def _depth_to_space(x: jax.Array, p: int) -> jax.Array:
    """[B,h,w,p*p*c] -> [B,h*p,w*p,c], the inverse of _space_to_depth."""
    b, height, wide, c = x.shape
    x = x.reshape(b, height, wide, p, p, c // (p * p)).swapaxes(2, 3)
    return x.reshape(b, height * p, wide * p, c // (p * p))
