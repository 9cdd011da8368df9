"""Shared layers against their definitions, written out plainly."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.models import layers


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_norms():
    x = 3 + 2 * normal(2, 5, 8)
    rms = layers.RMSNorm(1e-6).apply({"params": {"scale": jnp.full(8, 2.0)}}, x)
    np.testing.assert_allclose(rms, 2 * x / np.sqrt(np.mean(np.square(x), -1, keepdims=True)), atol=1e-5)
    both = {"scale": jnp.full(8, 2.0), "bias": jnp.full(8, -1.0)}
    y = layers.LayerNorm(1e-6).apply({"params": both}, x)
    np.testing.assert_allclose(y, 2 * (x - x.mean(-1, keepdims=True)) / np.std(x, -1, keepdims=True) - 1, atol=1e-5)
    big = (1000 * x).astype(jnp.bfloat16)  # statistics in f32, the dtype of the input on the way out
    assert layers.RMSNorm(1e-6).apply({"params": {"scale": jnp.ones(8)}}, big).dtype == jnp.bfloat16


def test_eight_bit_kernels_stand_where_kernels_are():
    """One scale an output channel: each entry is off by half a step of its channel at most."""
    x, kernel = normal(2, 3, 8), normal(3, 8, 5, 2, seed=1) * jnp.array([1.0, 100.0])
    small = layers.Int8.from_kernel(kernel, outputs=2, stacked=True)
    assert small.values.dtype == jnp.int8 and small.scale.shape == (3, 5, 2) and small.shape == kernel.shape
    back = small.values * small.scale[:, None]
    assert np.all(np.abs(back - kernel) <= 0.501 * small.scale[:, None])
    one = layers.Int8(small.values[0], small.scale[0])
    y = layers.dense((5, 2), jnp.float32, bias=False).apply({"params": {"kernel": one}}, x)
    np.testing.assert_allclose(y, np.tensordot(x, back[0], 1), rtol=1e-4, atol=1e-3)


def test_dense_equals_a_tensor_product():
    x, kernel = normal(2, 3, 4, 8), normal(4, 8, 5, 2, seed=1)
    y = layers.dense((5, 2), jnp.float32, inputs=2, bias=False).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(y, np.tensordot(x, kernel, 2), atol=1e-4)
    with pytest.raises(ValueError, match="not the contraction"):
        layers.flat_dot_general(x, kernel, (((1,), (0,)), ((), ())))


def test_rope_depends_on_the_distance_alone():
    q, k = normal(1, 1, 1, 16), normal(1, 1, 1, 16, seed=1)

    def score(i, j):
        at = lambda x, p: layers.apply_rope(x, layers.cos_sin(layers.rope_angles(jnp.array([[p]]), 16, 1e4)))
        return float(jnp.sum(at(q, i) * at(k, j)))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-2
    assert score(5, 5) == pytest.approx(float(jnp.sum(q * k)), abs=1e-4)


def test_dynamic_ntk_grows_the_base_beyond_the_native_length():
    """InternLM2: base * (factor * length / max - (factor - 1)) ** (H / (H - 2))."""
    angles = lambda n, **kw: layers.rope_angles(jnp.arange(n)[None], 16, 1e4, **kw)
    plain, ntk = angles(64), dict(ntk_factor=2.0, max_positions=64)
    np.testing.assert_array_equal(angles(64, **ntk), plain)
    base = 1e4 * (2 * 128 / 64 - 1) ** (16 / 14)
    np.testing.assert_allclose(angles(128, **ntk)[0, 100], 100 / base ** (np.arange(0, 16, 2) / 16), rtol=1e-5)
    rows = layers.rope_angles(jnp.stack([jnp.arange(128) % 64, jnp.arange(128)]), 16, 1e4, **ntk)
    np.testing.assert_array_equal(rows[0, :64], plain[0])  # each row by its own length


def test_rope_2d_turns_by_place_and_picture():
    """At equal sequence positions only the picture's (y, x) matters, and only by its difference."""
    q, k = normal(1, 1, 1, 32), normal(1, 1, 1, 32, seed=1)

    def score(yx, uv, i=4, j=4):
        at = lambda x, p, c: layers.apply_rope(
            x, layers.cos_sin(layers.rope_angles_2d(jnp.array([[p]]), jnp.array([[c]]), 32, 1e4))
        )
        return float(jnp.sum(at(q, i, yx) * at(k, j, uv)))

    assert score((0.5, 0.75), (0.25, 0.25)) == pytest.approx(score((0.75, 0.625), (0.5, 0.125)), abs=1e-4)
    assert score((0.5, 0.5), (0.5, 0.5)) == pytest.approx(float(jnp.sum(q * k)), abs=1e-4)
    same = score((0.5, 0.5), (0.5, 0.5))
    for other in (((0.5, 0.5), (0.25, 0.5)), ((0.5, 0.5), (0.5, 0.25)), ((0.5, 0.5), (0.5, 0.5), 9)):
        assert abs(score(*other) - same) > 1e-2


def test_the_gradient_of_a_kernel_has_a_dtype_of_its_own():
    """In bfloat16 the sum over rows is rounded before it leaves a device, in float32 it is not."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 8))
    layer = layers.dense((2, 4), jnp.bfloat16, bias=False)
    kernel = layer.init(jax.random.key(1), x)["params"]["kernel"]

    def grads(wrap):
        return jax.grad(lambda k, x: jnp.sum(jnp.sin(layer.apply({"params": {"kernel": wrap(k)}}, x))), argnums=(0, 1))(
            kernel, x
        )

    plain = grads(lambda k: k)
    fine, coarse = (grads(lambda k: layers.GradIn(k, jnp.dtype(d))) for d in ("float32", "bfloat16"))
    rounded = lambda g: g.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.array_equal(coarse[0], plain[0]) and np.array_equal(coarse[0], rounded(coarse[0]))
    assert not np.array_equal(fine[0], rounded(fine[0]))
    np.testing.assert_allclose(fine[0], coarse[0], rtol=0.02, atol=0.02)
    for grad in (fine, coarse):
        assert np.array_equal(grad[1], plain[1])  # that of the input is as it was
        assert grad[0].dtype == jnp.float32


@pytest.mark.parametrize("remat, products", [("none", 6), ("dots", 6), ("full", 7)])
def test_remat_computes_again_what_its_policy_says(remat, products):
    """Of two dense layers in a scan, forward and backward; the last one's result is not needed again."""

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + layers.dense(8, x.dtype, name="b")(jnp.sin(layers.dense(8, x.dtype, name="a")(x))), None

    stack = layers.scan_layers(Body, 3, remat=remat, unroll=False)(name="layers")
    x = jnp.ones((4, 8))
    params = stack.init(jax.random.key(0), x, None)
    grad = jax.jit(jax.grad(lambda p, x: stack.apply(p, x, None)[0].sum(), argnums=(0, 1)))
    assert grad.lower(params, x).compile().as_text().count(" dot(") == products
