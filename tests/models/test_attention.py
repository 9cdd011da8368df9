"""Attention: its definition, that the implementations agree, and that a cache changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.models import attention
from argenseg_jax.models.attention import Mask
from argenseg_jax.models.kv_cache import BLOCK, KVCache


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def heads(t, n=4, k=2, h=8, dtype=jnp.float32):
    return normal(2, t, n, h, dtype=dtype), *(normal(2, t, k, h, seed=s, dtype=dtype) for s in (1, 2))


def test_attention_is_that_of_every_head_alone():
    """Query head n uses key head n // G, as the official repeat_kv."""
    q, k, v = heads(5)
    mask = Mask(jnp.array([[1, 1, 1, 1, 1], [1, 1, 2, 2, 2]]))
    y = attention.attention(q, k, v, mask)
    for n in range(4):
        scores = np.einsum("bth,bsh->bts", q[:, :, n], k[:, :, n // 2]) / np.sqrt(8)
        weights = jax.nn.softmax(np.where(mask.dense(), scores, -np.inf), -1)
        np.testing.assert_allclose(y[:, :, n], weights @ v[:, :, n // 2], atol=1e-5)


def test_blocks_of_causal_queries_change_nothing():
    """150 places make three blocks; a row of two segments and padding."""
    q, k, v = heads(150)
    segments = jnp.array([[1] * 150, [1] * 70 + [2] * 60 + [0] * 20])
    causal = jnp.tile(jnp.arange(150), (2, 1))
    got = attention.attention(q, k, v, Mask(segments), "xla")
    whole = attention.attention(q, k, v, Mask(segments, causal), "xla")
    np.testing.assert_allclose(got[0], whole[0], atol=1e-6)
    np.testing.assert_allclose(got[1, :130], whole[1, :130], atol=1e-6)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("kind", ["causal", "last", "all"])
def test_gradients_are_those_of_the_definition(kind):
    """By hand in `attention`, by autodiff here; 150 places make three blocks, the last one smaller."""
    q, k, v = heads(150)
    causal = jnp.tile(jnp.arange(150), (2, 1))
    mask = {
        "causal": Mask(jnp.array([[1] * 150, [1] * 70 + [2] * 80])),
        "all": None,
        "last": Mask(jnp.ones((2, 150), int), jnp.minimum(causal // 7 * 7 + 6, 149)),
    }[kind]

    def defined(q, k, v):
        scores = jnp.einsum("btngh,bsnh->bngts", q.reshape(2, 150, 2, 2, 8), k) / np.sqrt(8)
        if mask is not None:
            scores = jnp.where(mask.dense()[:, None, None], scores, -jnp.inf)
        return jnp.einsum("bngts,bsnh->btngh", jax.nn.softmax(scores, -1), v).reshape(2, 150, 4, 8)

    def grads(fn):
        return jax.grad(lambda *x: jnp.sum(fn(*x) * normal(2, 150, 4, 8, seed=5)), (0, 1, 2))(q, k, v)

    for got, want in zip(grads(lambda *x: attention.attention(*x, mask, "xla")), grads(defined)):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_masks():
    """Own segment, no padding, up to itself or up to `last`."""
    np.testing.assert_array_equal(
        Mask(jnp.array([[1, 1, 2, 0]])).dense()[0].astype(int), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    )
    full = Mask(jnp.ones((1, 3), int), jnp.array([[0, 2, 2]])).dense()[0]
    np.testing.assert_array_equal(full.astype(int), [[1, 0, 0], [1, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize("block_mask", ["causal", "full"])
@pytest.mark.parametrize("split", [False, True])
def test_a_cache_changes_nothing(block_mask, split):
    """Two rows of 130 and 3 old places, five new ones, over more than one block."""
    q, k, v = heads(BLOCK + 7)
    old = np.array([BLOCK + 2, 3])
    cache = KVCache.empty(1, 2, 2 * BLOCK, 2, 8, jnp.float32, split)
    cache = cache.append(0, k, v).replace(length=jnp.array(old))
    take = old[:, None] + np.arange(5)
    new = [np.take_along_axis(np.asarray(x), take[..., None, None], 1) for x in (q, k, v)]
    run = jax.jit(functools.partial(attention.cached, layer=0, block_mask=block_mask))
    got = run(*new, cache.append(0, *new[1:]))
    last = np.tile(np.arange(BLOCK + 7), (2, 1))
    if block_mask == "full":
        np.put_along_axis(last, take, (old + 4)[:, None].repeat(5, 1), 1)
    whole = attention.attention(q, k, v, Mask(jnp.ones((2, BLOCK + 7), int), jnp.asarray(last)), "xla")
    np.testing.assert_allclose(got, np.take_along_axis(np.asarray(whole), take[..., None, None], 1), atol=1e-5)


def test_places_beyond_the_filled_part_are_not_even_read():
    """Garbage, even NaN, in later blocks leaves no trace."""
    q, k, v = heads(3)
    cache = KVCache.empty(1, 2, 3 * BLOCK, 2, 8, jnp.float32)
    poison = cache.k.at[:, :, BLOCK:].set(jnp.nan)
    cache = cache.replace(k=poison, v=poison, length=jnp.array([5, 70])).append(0, k, v)
    assert np.isfinite(attention.cached(q, k, v, cache, 0, "causal")).all()


def test_who_is_chosen_where():
    q = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)
    half = jax.ShapeDtypeStruct((2, 100, 4, 64), jnp.float32)
    assert [attention.choose(q, platform=p) for p in ("cpu", "gpu", "tpu")] == ["xla", "cudnn", "splash"]
    assert {attention.choose(q, sees=sees, platform="tpu") for sees in ("last", "all", "cache")} == {"xla"}
    gpu = {sees: attention.choose(q, sees=sees, platform="gpu") for sees in ("causal", "all", "last")}
    assert gpu == {"causal": "cudnn", "all": "cudnn", "last": "xla"}
    assert attention.choose(q, sees="cache", capacity=512, platform="gpu") == "cudnn"
    assert {attention.choose(half, platform=p) for p in ("cpu", "gpu", "tpu")} == {"xla"}


def test_splash_agrees():
    """Interpreted here: two segments and padding in a row, grouped heads."""
    q, k, v = heads(256, h=128)
    segments = jnp.array([[1] * 100 + [2] * 156, [1] * 200 + [0] * 56])
    want = attention.attention(q, k, v, Mask(segments), "xla")
    got = attention._splash(q, k, v, segments, interpret=True)
    real = np.asarray(segments > 0)
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("t", [255, 256])
@pytest.mark.parametrize("kind", ["single", "packed", "all"])
def test_cudnn_agrees(kind, t):
    """Values and gradients of whole rows, odd and even, in bfloat16."""
    q, k, v = heads(t, h=64, dtype=jnp.bfloat16)
    segments = {"single": [[1] * t, [1] * 100 + [0] * (t - 100)], "packed": [[1] * t, [1] * 100 + [2] * (t - 100)]}
    mask = None if kind == "all" else Mask(jnp.array(segments[kind]), packed=kind == "packed")
    real = jnp.ones((2, t, 1, 1), bool) if mask is None else (mask.segments > 0)[..., None, None]

    def outcome(how):
        loss = lambda *x: jnp.sum(jnp.where(real, attention.attention(*x, mask, how).astype(jnp.float32), 0) ** 2)
        return loss(q, k, v), *jax.grad(loss, (0, 1, 2))(q, k, v)

    for got, want in zip(outcome("cudnn"), outcome("xla")):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("block_mask, new", [("causal", 9), ("causal", 1), ("full", 9)])
def test_cudnn_agrees_on_a_cache(block_mask, new):
    q, k, v = heads(256, h=64, dtype=jnp.bfloat16)
    cache = KVCache.empty(1, 2, 2 * BLOCK, 2, 64, jnp.bfloat16).append(0, k, v)
    cache = cache.replace(length=jnp.array([100, 7])).append(0, k[:, :new], v[:, :new])
    both = [
        attention.cached(q[:, :new], k[:, :new], v[:, :new], cache, 0, block_mask, how).astype(jnp.float32)
        for how in ("cudnn", "xla")
    ]
    np.testing.assert_allclose(*both, atol=2e-2)
