"""Layers that InternViT and the decoder share: norms, dense layers, RoPE, layer scan.

Axes: see models/__init__; I and O are the products of a kernel's input and output axes, r the rank.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from argenseg_jax import sharding

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


@flax.struct.dataclass
class Int8:
    """A kernel in eight bits: values int8[*in, *out] times scale f32[*out], one per output channel.

    Takes the place of a dense layer's kernel array, in any module built with `dense`.
    """

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @classmethod
    def from_kernel(cls, kernel: Array, outputs: int, stacked: bool = False) -> Int8:
        """Rounds a kernel whose last `outputs` axes are channels (the first one layers if stacked)."""
        inputs = tuple(range(stacked, kernel.ndim - outputs))
        kernel = kernel.astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=inputs, keepdims=True), 1e-30) / 127
        return cls(jnp.round(kernel / scale).astype(jnp.int8), jnp.squeeze(scale, inputs))


@flax.struct.dataclass
class Adapted:
    """A kernel [*in, *out] and what is added to it: a [I, r] times b [r, O], over the flat axes.

    Takes the place of a dense layer's kernel array, like Int8; see models/lora.py.
    """

    kernel: Array
    a: Array
    b: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape


@flax.struct.dataclass
class GradIn:
    """A kernel whose gradient is computed, and so summed over devices, in a dtype of its own.

    Takes the place of a dense layer's kernel array. A plain kernel's gradient has the dtype of the
    computation, and is rounded to it on every device before the sum.
    """

    kernel: Array
    dtype: jnp.dtype = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape


Kernel = Array | Int8 | Adapted | GradIn
# Paths of the kernels that `dense` has made.
DENSE = r"(llm|vision)/layers/(attn|mlp)/\w+/kernel|connector/fc\d/kernel"


def kernel_inputs(path: str) -> int:
    """How many of the axes of a dense layer's kernel are inputs: heads and their width of attn/o."""
    return 2 if path.endswith("/attn/o/kernel") else 1


def flat_dot_general(
    x: Array, kernel: Kernel, dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None
) -> Array:
    """dot_general of a dense layer as one 2-D matmul.

    Eight-bit kernels are scaled after the product, so that only bytes are read.
    """
    (contract, onto), batch = dimension_numbers
    n = len(contract)
    if (
        batch != ((), ())
        or tuple(contract) != tuple(range(x.ndim - n, x.ndim))
        or tuple(onto) != tuple(range(n))
        or precision
        or preferred_element_type
    ):
        raise ValueError(
            f"not the contraction of a dense layer: {dimension_numbers}, {precision}, {preferred_element_type}"
        )
    depth = math.prod(kernel.shape[:n])
    if isinstance(kernel, Adapted):
        y = flat_dot_general(x, kernel.kernel, dimension_numbers)
        return y + (x.reshape(-1, depth) @ kernel.a @ kernel.b).reshape(y.shape).astype(y.dtype)
    if isinstance(kernel, Int8):
        y = flat_dot_general(x, kernel.values.astype(x.dtype), dimension_numbers)
        return y * kernel.scale.astype(y.dtype)
    weights = kernel.kernel if isinstance(kernel, GradIn) else kernel
    y = _product(x.reshape(-1, depth), weights.reshape(depth, -1), kernel.dtype)
    return y.reshape(*x.shape[: x.ndim - n], *kernel.shape[n:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, kernel: Array, grad_dtype: jnp.dtype) -> Array:
    """x [T, I] times kernel [I, O] in the dtype of x, whatever that of the kernel."""
    return x @ kernel.astype(x.dtype)


def _product_fwd(x: Array, kernel: Array, grad_dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel.astype(x.dtype), (x, kernel)  # plain, so that the policy 'dots' of remat sees it


def _product_bwd(grad_dtype: jnp.dtype, res: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = res
    dkernel = jnp.dot(transposed(x), dy, preferred_element_type=grad_dtype)
    return dy @ kernel.astype(x.dtype).T, dkernel.astype(kernel.dtype)


_product.defvjp(_product_fwd, _product_bwd)


def transposed(x: Array) -> Array:
    """x [T, I] -> [I, T], the left side of the product that is a kernel's gradient.

    On CPUs a copy: XLA's products there take a transposed left side at two thirds of
    their speed. Elsewhere the transpose is free.
    """
    return jax.lax.optimization_barrier(x.T) if sharding.platform() == "cpu" else x.T


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def head_product(x: Array, head: Array, vocab_size: int) -> Array:
    """x [..., D] times the output head [D, V], in the dtype of x: f32[..., V], -inf after the first `vocab_size`.

    The gradient of the head has the head's own dtype.

    Written for its gradient. Left to itself, XLA's CPU backend transposes the cotangent of the logits for
    the head's gradient and takes twice as long; here it transposes x, which is narrow, and the padding is
    masked there, so that a tied table's transpose cannot be pulled into the product.
    """
    y = jnp.einsum("...D,DV->...V", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(head.shape[1]) < vocab_size, y, -jnp.inf)


def _head_product_fwd(x: Array, head: Array, vocab_size: int) -> tuple[Array, tuple[Array, Array]]:
    return head_product(x, head, vocab_size), (x, head)


def _head_product_bwd(vocab_size: int, res: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, head = res
    dhead = jnp.dot(
        transposed(x.reshape(-1, x.shape[-1])), dy.reshape(-1, dy.shape[-1]), preferred_element_type=jnp.float32
    )
    dhead = jnp.where(jnp.arange(head.shape[1]) < vocab_size, dhead, 0)
    dx = jnp.einsum("...V,DV->...D", dy, head.astype(x.dtype), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dhead.astype(head.dtype)


head_product.defvjp(_head_product_fwd, _head_product_bwd)


def dense(
    features: int | tuple[int, ...], dtype: jnp.dtype, *, inputs: int = 1, bias: bool = True, name: str | None = None
) -> nn.DenseGeneral:
    """A dense layer from the last `inputs` axes to `features`; kernel [*in, *features]."""
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-inputs, 0)),
        use_bias=bias,
        dtype=dtype,
        dot_general=flat_dot_general,
        promote_dtype=_promote,
        name=name,
    )


def _promote(x: Array, kernel: Kernel, bias: Array | None, dtype: jnp.dtype) -> tuple[Array, Kernel, Array | None]:
    """flax's promotion to the compute dtype, but for kernels that are promoted where they are used."""
    if isinstance(kernel, Adapted):
        x, bias, *parts = promote_dtype(x, bias, kernel.kernel, kernel.a, kernel.b, dtype=dtype)
        return x, Adapted(*parts), bias
    if isinstance(kernel, Int8 | GradIn):
        x, bias = promote_dtype(x, bias, dtype=dtype)
        return x, kernel, bias
    return promote_dtype(x, kernel, bias, dtype=dtype)


def rope_angles(
    positions: Array, head_dim: int, theta: float, ntk_factor: float = 1.0, max_positions: int = 0
) -> Array:
    """Rotation angles f32[B, T, head_dim / 2] of plain RoPE, with dynamic NTK scaling if asked for.

    Dynamic NTK (InternLM2): beyond `max_positions` the base grows with the length of the sequence. The
    reference keeps the largest base that a module has ever seen, so its results depend on the order
    of calls; here the base is a function of the sequence's highest position in this call, which
    equals a fresh reference module in one full pass.
    """
    base = jnp.full(positions.shape[:1], theta, jnp.float32)
    if ntk_factor > 1.0:
        length = jnp.max(positions, axis=-1).astype(jnp.float32) + 1
        grown = ntk_factor * length / max_positions - (ntk_factor - 1)
        base = jnp.where(length > max_positions, base * jnp.maximum(grown, 1.0) ** (head_dim / (head_dim - 2)), base)
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    inv_freq = 1.0 / base[:, None] ** exponent  # [B, N/2]
    return positions.astype(jnp.float32)[:, :, None] * inv_freq[:, None, :]


def rope_angles_2d(positions: Array, coords: Array, head_dim: int, theta: float) -> Array:
    """Angles whose pairs rotate half with the sequence position, a quarter each with y and x.

    Image and visual tokens are on one image: sharing its (y, x) lets a visual token find its
    patch by content-free attention. coords: f32[B, T, 2] in 0..1 of the image's side.
    """
    quarter = head_dim // 8
    seq = rope_angles(positions, head_dim - 4 * quarter, theta)  # [B, T, N/2 - 2 quarter]
    freq = jnp.pi * 2.0 ** jnp.linspace(0.0, 3.0, quarter)
    yx = coords.astype(jnp.float32)[..., None] * freq  # [B, T, 2, quarter]
    return jnp.concatenate([seq, yx.reshape(*yx.shape[:2], -1)], axis=-1)


def cos_sin(angles: Array) -> tuple[Array, Array]:
    """Cosines and sines of angles f32[B, T, N/2], for all heads and layers.

    The division is by one. XLA takes a cosine for cheap, and on CPUs computes it again wherever it is
    used, head by head, 25 ms in a nano step of 540; what ends in a division it computes once.
    """
    return tuple(y / jnp.maximum(jnp.abs(y), 1.0) for y in (jnp.cos(angles), jnp.sin(angles)))


def apply_rope(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotates the pairs (x[i], x[i + N/2]) of x [B, T, heads, N] by the angles of `cos_sin`."""
    cos, sin = (t[:, :, None] for t in rope)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [B, T, H, N/2] each
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def scan_layers(
    block: type[nn.Module], length: int, *, remat: str, unroll: bool, in_axes: Any = nn.broadcast
) -> type[nn.Module]:
    """`block` repeated `length` times with stacked parameters, rematerialised by a named policy."""
    if remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=unroll)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        unroll=length if unroll else 1,
    )
