"""The decoder: cached equals uncached for ragged rows, masks, the named fields on and off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax import trees
from argenseg_jax.models.attention import Mask
from tests import tiny


@functools.cache
def run(form):
    """(uncached, cached) as compiled functions of one form's weights."""
    model, params = tiny.made(form)
    lm, weights = model.llm, {"params": params["llm"]}

    def whole(x, positions, mask, coords):
        return lm.apply(weights, x, positions, mask=mask, coords=coords)[0]

    def step(x, positions, cache, num_valid, coords, block_mask="causal"):
        return lm.apply(weights, x, positions, coords=coords, cache=cache, num_valid=num_valid, block_mask=block_mask)[
            :2
        ]

    return jax.jit(whole), jax.jit(step, static_argnames="block_mask")


def inputs(seed=0, rows=2, length=12):
    a, b = jax.random.split(jax.random.key(seed))
    positions = jnp.tile(jnp.arange(length), (rows, 1))
    return jax.random.normal(a, (rows, length, 32)), positions, jax.random.uniform(b, (rows, length, 2))


@pytest.mark.parametrize("form", tiny.FORMS)
def test_cached_equals_uncached(form):
    """Rows of 5 and 8 places, right padded, then three blocks; padding is overwritten."""
    whole, step = run(form)
    x, positions, coords = inputs()
    want = whole(x, positions, Mask(jnp.ones((2, 12), jnp.int32)), coords)
    cache = tiny.made(form)[0].llm.empty_cache(2, 16)
    filled, got = np.zeros(2, int), [[], []]
    for size, num_valid in ((8, [5, 8]), (4, [4, 1]), (4, [2, 2]), (4, [1, 1])):
        take = np.minimum(filled[:, None] + np.arange(size), 11)
        block = [np.take_along_axis(np.asarray(a), take[..., None], 1) for a in (x, coords)]
        y, cache = step(block[0], take, cache, jnp.array(num_valid), block[1])
        for row in range(2):
            got[row].append(y[row, : num_valid[row]])
        filled += num_valid
    np.testing.assert_array_equal(cache.length, [12, 12])
    for row in range(2):
        np.testing.assert_allclose(jnp.concatenate(got[row]), want[row], atol=1e-4)


@pytest.mark.parametrize(
    "field, on, off",
    [
        ("qk_norm", "nano", None),
        ("rope_2d", "nano", None),
        ("qkv_bias", "qwen", "internlm2"),
        ("tied", "qwen, tied", "qwen"),
    ],
)
def test_fields_on_and_off(field, on, off):
    """Each field decides about its parameters, and about the use of coordinates."""
    names = lambda form: set(trees.flatten(tiny.made(form)[1]["llm"]))
    owned = {
        "qk_norm": {"layers/attn/q_norm/scale", "layers/attn/k_norm/scale"},
        "rope_2d": set(),
        "qkv_bias": {f"layers/attn/{n}/bias" for n in "qkv"},
        "tied": set(),
    }[field]
    assert owned <= names(on) and not owned & names(off or "qwen, tied")
    assert ("lm_head/kernel" in names(on)) == (not tiny.made(on)[0].llm.tied)
    if field == "rope_2d":
        x, positions, coords = inputs()
        mask = Mask(jnp.ones((2, 12), jnp.int32))
        for form, used in (("nano", True), ("qwen", False)):
            whole = run(form)[0]
            moved = np.abs(whole(x, positions, mask, coords) - whole(x, positions, mask, 1 - coords))
            assert (moved.max() > 1e-2) == used


def test_qk_norm_makes_attention_blind_to_the_size_of_q():
    """Scaling the q kernel changes nothing behind an RMS norm, and something without one."""
    x, positions, coords = inputs()
    mask = Mask(jnp.ones((2, 12), jnp.int32))
    for form, blind in (("nano", True), ("internlm2", False)):
        model, params = tiny.made(form)
        apply = jax.jit(lambda p: model.llm.apply({"params": p}, x, positions, mask=mask, coords=coords)[0])
        kernel = params["llm"]["layers"]["attn"]["q"]["kernel"]
        scaled = trees.replace(params["llm"], {"layers/attn/q/kernel": 5 * kernel})
        moved = np.abs(apply(params["llm"]) - apply(scaled)).max()
        assert (moved < 1e-3) == blind, moved


def test_segments_are_blind_to_each_other():
    """Packed rows: a segment's outputs are those of the segment alone; padding is seen by none."""
    whole, _ = run("qwen")
    x, positions, coords = inputs(rows=1)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    packed = whole(x, jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]]), Mask(segments), coords)
    moved = jnp.roll(x, -5, axis=1)
    alone = whole(moved, positions, Mask(jnp.array([[1] * 4 + [0] * 8])), coords)
    np.testing.assert_allclose(packed[:, 5:9], alone[:, :4], atol=1e-5)
    assert np.isfinite(packed).all()


def test_hidden_states_and_the_padding_of_the_vocabulary():
    model, params = tiny.made("qwen")
    x, positions, coords = inputs()
    mask = Mask(jnp.ones((2, 12), jnp.int32))
    y, _, hidden = jax.jit(
        lambda p: model.llm.apply({"params": p}, x, positions, mask=mask, coords=coords, capture=True)
    )(params["llm"])
    assert hidden.shape == (3, 2, 12, 32)
    np.testing.assert_array_equal(hidden[0], x)
    np.testing.assert_array_equal(hidden[-1], y)
    logits = model.apply({"params": params}, y, method="logits")
    assert np.isfinite(logits[..., : model.vocab.size]).all()
    assert np.all(np.asarray(logits[..., model.vocab.size :]) == -np.inf)
    codes = model.apply({"params": params}, y, method="code_logits")
    first = model.vocab.first_code
    np.testing.assert_allclose(codes, logits[..., first : first + tiny.NUM_CODES], atol=1e-5)
