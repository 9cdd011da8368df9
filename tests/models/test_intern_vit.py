"""InternViT: patches by a convolution, both norm forms, other image sizes, stochastic depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax import trees
from argenseg_jax.models.intern_vit import InternViT, PatchEmbed, resample_pos_embed

SMALL = dict(image_size=32, patch=8, width=32, depth=2, heads=4, mlp=48)
LARGE = dict(norm="rms_norm", qk_norm=True, qkv_bias=False)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (3, 32, 32, 3))


def run(model, images, params=None, **kw):
    params = params or jax.jit(model.init)(jax.random.key(0), images)["params"]
    return params, jax.jit(lambda p, x: model.apply({"params": p}, x, **kw))(params, images)


def test_patch_embedding_is_a_strided_convolution(images):
    model = PatchEmbed(8, 5, jnp.float32)
    y, variables = model.init_with_output(jax.random.key(0), images)
    want = jax.lax.conv_general_dilated(
        images, variables["params"]["kernel"], (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(y, want.reshape(3, 16, 5), atol=1e-5)


@pytest.mark.parametrize("form", [{}, LARGE], ids=["300M", "6B"])
def test_forms_and_hidden_states(form, images):
    params, (last, hidden) = run(InternViT(**SMALL, **form), images, capture=True)
    assert last.shape == (3, 17, 32) and hidden.shape == (3, 3, 17, 32)
    np.testing.assert_array_equal(last, hidden[-1])  # the last layer's output: no final norm
    names = set(trees.flatten(params["layers"]))
    assert ("attn/q/bias" in names) == (not form) == ("norm1/bias" in names)
    assert ("attn/q_norm/scale" in names) == bool(form)
    if form:  # over the full width, before the head split
        assert params["layers"]["attn"]["q_norm"]["scale"].shape == (2, 32)
    assert np.all(params["layers"]["ls1"] == np.float32(0.1))


def test_tiles_do_not_see_each_other(images):
    params, (a, _) = run(InternViT(**SMALL), images)
    _, (b, _) = run(InternViT(**SMALL), images.at[1].set(0.0), params)
    np.testing.assert_allclose(a[::2], b[::2], atol=1e-6)
    assert np.abs(a[1] - b[1]).max() > 1e-2


def test_other_image_sizes_resample_the_positions(images):
    pos = jax.random.normal(jax.random.key(0), (17, 6))
    assert resample_pos_embed(pos, 4) is pos
    large = resample_pos_embed(pos, 8)
    assert large.shape == (65, 6)
    np.testing.assert_array_equal(large[0], pos[0])
    flat = jnp.concatenate([pos[:1], jnp.ones((16, 6))])
    np.testing.assert_allclose(resample_pos_embed(flat, 7)[1:], 1.0, atol=1e-5)
    params, _ = run(InternViT(**SMALL), images)
    _, (y, _) = run(InternViT(**SMALL), jnp.ones((1, 64, 64, 3)), params)
    assert y.shape == (1, 65, 32)


def test_drop_path_drops_whole_tiles_in_training_alone(images):
    model = InternViT(**{**SMALL, "depth": 2}, drop_path=0.5)
    params, (still, _) = run(model, images)
    np.testing.assert_array_equal(still, run(InternViT(**SMALL), images, params)[1][0])
    many = jnp.tile(images[:1], (64, 1, 1, 1))
    train = jax.jit(
        lambda key: model.apply({"params": params}, many, deterministic=False, capture=True, rngs={"dropout": key})[1]
    )
    hidden = np.asarray(train(jax.random.key(0)))
    np.testing.assert_allclose(hidden[1], np.tile(hidden[1, :1], (64, 1, 1)), atol=1e-6)  # rate 0
    kinds = np.unique(np.round(hidden[2].reshape(64, -1)[:, :8], 4), axis=0)
    assert len(kinds) == 4  # attention and MLP of the last layer: each is there, twice as strong, or not
    assert np.any(train(jax.random.key(1)) != hidden)


def test_remat_and_unroll_change_nothing(images):
    params, (plain, _) = run(InternViT(**SMALL), images)
    for kw in (dict(remat="full"), dict(remat="dots", unroll=True)):
        np.testing.assert_allclose(run(InternViT(**SMALL, **kw), images, params)[1][0], plain, atol=1e-6)
