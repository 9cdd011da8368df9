"""Multi-scale residual quantizer of the VQ-VAE (VAR quant.py, VectorQuantizer2), always in f32.

A latent f is coded coarse to fine: each scale codes what the scales before have left over, and the
sum of the looked-up, up-sampled and phi-smoothed codes is f_hat. Axes: see
models/__init__; pn side of a scale; NHWC.
"""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from argenseg_jax.models.resize import area_matrix, bicubic_matrix
from argenseg_jax.scales import Scales

_EXACT = jax.lax.Precision.HIGHEST  # a product in bf16 would flip nearest codes


@flax.struct.dataclass
class Quantized:
    """A quantized latent: codes i32[B,U]; targets f32[B,U,C], the vectors that the codes stand for;
    f_hats, the Z sums f32[B,h,w,C] after each scale."""

    codes: jax.Array
    targets: jax.Array
    f_hats: list[jax.Array]


def resample(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """f32[B,s,s,C] -> f32[B,t,t,C] by a separable operator float32[t,s] (models/resize)."""
    x = jnp.einsum("th,bhwc->btwc", matrix, x, precision=_EXACT)
    return jnp.einsum("uw,btwc->btuc", matrix, x, precision=_EXACT)


class MultiScaleQuantizer(nn.Module):
    """Codebook and phi convolutions, used by its methods (there is no `__call__`).

    As in VAR, `phi_ratio` 0 means no phi at all.

    `dead_zone` > 0 (nano): code 0 is the zero vector and is chosen wherever no other code comes nearer
    to the target by more than that share of the codebook's mean square norm (in squared distance),
    so that empty regions cost nothing to predict.
    """

    codebook_size: int
    channels: int
    patch_nums: tuple[int, ...]
    num_phi: int = 4
    phi_ratio: float = 0.5
    beta: float = 0.25
    dead_zone: float = 0.0

    def setup(self):
        self.codebook = self.param("codebook", _uniform_init, (self.codebook_size, self.channels), jnp.float32)
        self.phi = [
            nn.Conv(self.channels, (3, 3), precision=_EXACT) for _ in range(self.num_phi if self.phi_ratio else 0)
        ]

    @property
    def scales(self) -> Scales:
        """The token grid."""
        return Scales(tuple(self.patch_nums))

    # ---- between latents and codes ---------------------------------------------------------------

    def quantize(self, f: jax.Array) -> tuple[jax.Array, jax.Array]:
        """f[B,h,w,C] -> codes i32[B,U], f_hat f32[B,h,w,C]."""
        q = self.residual_quantize(f)
        return q.codes, q.f_hats[-1]

    def residual_quantize(self, f: jax.Array) -> Quantized:
        """f[B,h,w,C] -> codes, what they stand for, and f_hat after every scale."""
        f = jax.lax.stop_gradient(f.astype(jnp.float32))
        f_rest, f_hat = f, jnp.zeros_like(f)
        codes, targets, f_hats = [], [], []
        for k, pn in enumerate(self.scales.patch_nums):
            target = self._down(f_rest, k).reshape(f.shape[0], pn * pn, self.channels)  # [B, pn^2, C]
            code = self.nearest(jax.lax.stop_gradient(target))  # [B, pn^2]
            h = self._up(code, k)  # [B, h, w, C]
            # f_rest is carried along with f_hat, not recomputed as f - f_hat: rounding must match VAR's.
            f_hat, f_rest = f_hat + h, f_rest - h
            codes.append(code), targets.append(target), f_hats.append(f_hat)
        return Quantized(jnp.concatenate(codes, 1), jnp.concatenate(targets, 1), f_hats)

    def straight_through(self, f: jax.Array) -> tuple[jax.Array, jax.Array, Quantized]:
        """f[B,h,w,C] -> f_hat with the gradient of f, the VQ loss (mean over scales), details."""
        f = f.astype(jnp.float32)
        q = self.residual_quantize(f)
        stop = jax.lax.stop_gradient
        loss = sum(
            self.beta * jnp.mean((stop(f_hat) - f) ** 2) + jnp.mean((f_hat - stop(f)) ** 2) for f_hat in q.f_hats
        ) / len(self.scales)
        return stop(q.f_hats[-1] - f) + f, loss, q

    def nearest(self, z: jax.Array) -> jax.Array:
        """Index of the nearest code: f32[...,C] -> i32[...]."""
        codebook = self._codebook()
        norms = jnp.sum(codebook * codebook, -1)
        distance = (
            jnp.sum(z * z, -1, keepdims=True) + norms - 2 * jnp.einsum("...c,vc->...v", z, codebook, precision=_EXACT)
        )
        if self.dead_zone:
            distance = distance.at[..., 0].add(-self.dead_zone * jnp.mean(norms))
        return jnp.argmin(distance, -1).astype(jnp.int32)

    # ---- one scale at a time, for decoding -------------------------------------------------------

    def accumulate(self, f_hat: jax.Array, codes_k: jax.Array, k: int) -> jax.Array:
        """Adds scale k's codes i32[B,pn*pn] to f_hat f32[B,h,w,C]; f_hat starts as zeros."""
        return f_hat + self._up(codes_k, k)

    def scale_input(self, f_hat: jax.Array, k: int) -> jax.Array:
        """f_hat of the scales before k, seen at scale k: f32[B,h,w,C] -> f32[B,pn*pn,C]."""
        return self._down(f_hat, k).reshape(f_hat.shape[0], -1, self.channels)

    # ---- all scales, from codes ------------------------------------------------------------------

    def f_hats(self, codes: jax.Array) -> list[jax.Array]:
        """codes i32[B,U] -> the Z sums f32[B,h,w,C] after each scale."""
        f_hat = jnp.zeros((codes.shape[0], self.scales.side, self.scales.side, self.channels))
        sums = []
        for k, (begin, end) in enumerate(self.scales.bounds):
            f_hat = self.accumulate(f_hat, codes[:, begin:end], k)
            sums.append(f_hat)
        return sums

    def lookup(self, codes: jax.Array) -> jax.Array:
        """codes i32[B,U] -> f_hat f32[B,h,w,C]."""
        return self.f_hats(codes)[-1]

    def teacher_inputs(self, codes: jax.Array) -> jax.Array:
        """codes i32[B,U] -> f32[B,U-pn_0^2,C]: the input of every scale after the first.

        VAR's idxBl_to_var_input; for scale k it equals `scale_input` of the sum before k.
        """
        sums = self.f_hats(codes)[:-1]
        inputs = [self.scale_input(f_hat, k + 1) for k, f_hat in enumerate(sums)]
        empty = jnp.zeros((codes.shape[0], 0, self.channels))
        return jnp.concatenate([empty, *inputs], axis=1)

    # ---- parts -----------------------------------------------------------------------------------

    def _codebook(self) -> jax.Array:
        codebook = jnp.asarray(self.codebook, jnp.float32)
        return codebook.at[0].set(0.0) if self.dead_zone else codebook

    def _down(self, x: jax.Array, k: int) -> jax.Array:
        """f32[B,h,w,C] -> f32[B,pn,pn,C]."""
        if k == len(self.scales) - 1:
            return x
        return resample(area_matrix(self.scales.side, self.scales.patch_nums[k]), x)

    def _up(self, codes_k: jax.Array, k: int) -> jax.Array:
        """Codes i32[B,pn*pn] of scale k -> their share of f_hat, f32[B,h,w,C]."""
        pn = self.scales.patch_nums[k]
        h = self._codebook()[codes_k].reshape(codes_k.shape[0], pn, pn, self.channels)  # [B, pn, pn, C]
        if k < len(self.scales) - 1:
            h = resample(bicubic_matrix(pn, self.scales.side), h)
        if not self.phi_ratio:
            return h
        phi = self.phi[self.scales.phi_index(self.num_phi)[k]]
        return (1 - self.phi_ratio) * h + self.phi_ratio * phi(h)


def _uniform_init(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
    """VAR's codebook init: uniform within 1/Q."""
    return jax.random.uniform(key, shape, dtype, -1 / shape[0], 1 / shape[0])
