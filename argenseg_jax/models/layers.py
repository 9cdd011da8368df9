"""Layers that InternViT and the decoder share: norms, attention core, RoPE, layer scan.

Axes: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H head dim,
D width, F MLP width, L layers.
"""
from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in f32; returns the input's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, in f32; returns the input's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)


def attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Grouped-query attention; softmax in f32.

    Args:
      q: [B, T, N, H];  k, v: [B, S, K, H];  mask: bool[B, T, S] (True = visible) or None.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    # Heads go first: batched matmuls over contiguous [T, H] blocks are twice as fast on CPUs.
    q = (q * h ** -0.5).reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v)
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def flat_dot_general(x: Array, kernel: Array, dimension_numbers: Any, precision: Any = None,
                     preferred_element_type: Any = None) -> Array:
    """dot_general of a dense layer as one 2-D matmul.

    The gradient of the kernel then contracts one axis instead of two, which XLA's CPU backend
    runs 1.3 times as fast; elsewhere it makes no difference.
    """
    (contract, onto), batch = dimension_numbers
    n = len(contract)
    if batch != ((), ()) or tuple(contract) != tuple(range(x.ndim - n, x.ndim)) \
            or tuple(onto) != tuple(range(n)):
        raise ValueError(f"not the contraction of a dense layer: {dimension_numbers}")
    depth = math.prod(kernel.shape[:n])
    y = jax.lax.dot_general(x.reshape(-1, depth), kernel.reshape(depth, -1), (((1,), (0,)), ((), ())),
                            precision=precision, preferred_element_type=preferred_element_type)
    return y.reshape(*x.shape[:x.ndim - n], *kernel.shape[n:])


def dense(features: int | tuple[int, ...], dtype: jnp.dtype, *, inputs: int = 1, bias: bool = True,
          name: str | None = None) -> nn.DenseGeneral:
    """A dense layer from the last `inputs` axes to `features`; kernel [*in, *features]."""
    return nn.DenseGeneral(features, axis=tuple(range(-inputs, 0)), use_bias=bias, dtype=dtype,
                           dot_general=flat_dot_general, name=name)


def rope_angles(positions: Array, head_dim: int, theta: float,
                ntk_factor: float = 1.0, max_positions: int = 0) -> Array:
    """Rotation angles f32[B, T, head_dim / 2] of plain RoPE, with dynamic NTK scaling if asked for.

    Dynamic NTK (InternLM2): beyond `max_positions` the base grows with the length of the row. The
    reference keeps the largest base that a module has ever seen, so its results depend on the order
    of calls; here the base is a function of the row's own highest position in this call, which
    equals a fresh reference module in one full pass.
    """
    base = jnp.full(positions.shape[:1], theta, jnp.float32)
    if ntk_factor > 1.0:
        length = jnp.max(positions, axis=-1).astype(jnp.float32) + 1
        grown = ntk_factor * length / max_positions - (ntk_factor - 1)
        base = jnp.where(length > max_positions,
                         base * jnp.maximum(grown, 1.0) ** (head_dim / (head_dim - 2)), base)
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    inv_freq = 1.0 / base[:, None] ** exponent  # [B, H/2]
    return positions.astype(jnp.float32)[:, :, None] * inv_freq[:, None, :]


def rope_angles_2d(positions: Array, coords: Array, head_dim: int, theta: float) -> Array:
    """Angles whose pairs turn half with the sequence position, a quarter each with y and x.

    Image and visual tokens lie on one picture: sharing its (y, x) lets a visual token find its
    patch by content-free attention. coords: f32[B, T, 2] in 0..1 of the picture's side.
    """
    quarter = head_dim // 8
    seq = rope_angles(positions, head_dim - 4 * quarter, theta)
    freq = jnp.pi * 2.0 ** jnp.linspace(0.0, 3.0, quarter)
    yx = coords.astype(jnp.float32)[..., None] * freq  # [B, T, 2, quarter]
    return jnp.concatenate([seq, yx.reshape(*yx.shape[:2], -1)], axis=-1)


def apply_rope(x: Array, angles: Array) -> Array:
    """Rotates the pairs (x[i], x[i + H/2]) of x [B, T, heads, H] by angles [B, T, H/2]."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def scan_layers(block: type[nn.Module], length: int, *, remat: str, unroll: bool,
                in_axes: Any = nn.broadcast) -> type[nn.Module]:
    """`block` repeated `length` times with stacked parameters, rematerialised by a named policy."""
    if remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=unroll)
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
                   in_axes=in_axes, length=length, unroll=length if unroll else 1)
