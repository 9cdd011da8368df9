"""The whole model: teacher forcing equals decoding scale by scale, and every place gets its input."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax import trees
from argenseg_jax.decode import scale_decode, text_decode
from argenseg_jax.decode.sampling import DecodeConfig
from argenseg_jax.errors import UserError
from argenseg_jax.models import variants
from argenseg_jax.train import losses
from tests import tiny


@functools.cache
def made(form, block_causal=False):
    if not block_causal:
        return tiny.made(form)
    return variants.build(tiny.config(form, block_causal=True)), tiny.made(form)[1]


def apply(model, params, fn, *args):
    """fn(bound model, *args), compiled over weights and arrays."""
    return jax.jit(lambda p, *a: nn.apply(fn, model)({"params": p}, *a))(params, *args)


def decode_with_logits(m, tokens, lengths, tiles):
    """Prefills the prompts and decodes a mask, and says what the code logits were on the way."""
    logits = []

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "code_logits":
            logits.append(out)
        return out

    answer = text_decode.prefill(m, tokens, lengths, tiles, DecodeConfig(), 128, 1)
    with nn.intercept_methods(record):
        mask, cache = scale_decode.decode_codes(m, answer.replace(at_mask=~answer.at_mask))
    return mask, jnp.concatenate(logits, axis=1), cache.length


@pytest.mark.parametrize("form, block_causal", [(f, False) for f in tiny.FORMS] + [("internlm2", True), ("nano", True)])
def test_teacher_forcing_equals_scale_by_scale_decoding(form, block_causal):
    """Invariant 1, to 1e-4: for the codes that decoding chose, in rows of different length."""
    model, params = made(form, block_causal)
    batch = tiny.batch(model, [tiny.sample(0), tiny.sample(1)])
    at = np.argmax(batch["tokens"] == model.vocab.ge_start, axis=1)
    assert at[0] != at[1]
    prompt = np.where(np.arange(96) < at[:, None], batch["tokens"], model.vocab.pad)[:, :64]
    mask, cached, length = apply(model, params, decode_with_logits, prompt, at, batch["tiles"])
    n = model.scales.num_codes
    np.testing.assert_array_equal(length, at + n)

    def forced(m, codes):
        hidden = m.hidden(
            batch["tokens"], batch["positions"], batch["segment_ids"], m.encode_images(batch["tiles"]), codes[:, None]
        )
        places = at[:, None] + np.arange(n)
        return m.code_logits(jnp.take_along_axis(hidden, places[..., None], axis=1))

    logits = apply(model, params, forced, mask.codes)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, cached, atol=1e-4)
    np.testing.assert_array_equal(jnp.argmax(logits, -1), mask.codes)
    likely = jax.nn.softmax(logits).max(-1).mean(-1)
    np.testing.assert_allclose(mask.confidence, likely, atol=1e-5)
    assert len(np.unique(mask.codes)) > 3


def test_a_mask_of_a_single_code():
    """One scale: no <MASK_CONTEXT>, no ramp of guidance; training and decoding still agree."""
    sizes = tiny.config("nano", block_causal=True)
    sizes["vqvae"] |= {"patch_nums": (1,), "patch_size": 8}
    model = variants.build(sizes)
    params = tiny.params(model)
    batch = tiny.batch(model, [tiny.sample(0)])
    start = int(np.argmax(batch["tokens"][0] == model.vocab.ge_start))
    assert batch["tokens"][0, start + 1] == model.vocab.ge_end
    prompt = np.full((1, 64), model.vocab.pad, np.int32)
    prompt[0, :start] = batch["tokens"][0, :start]
    mask, cached, length = apply(model, params, decode_with_logits, prompt, np.array([start]), batch["tiles"])
    assert mask.codes.shape == (1, 1) and length.tolist() == [start + 1]

    def forced(m, codes):
        hidden = m.hidden(
            batch["tokens"], batch["positions"], batch["segment_ids"], m.encode_images(batch["tiles"]), codes[:, None]
        )
        return m.code_logits(hidden[:, start : start + 1]), m.last_visible(batch["tokens"])

    logits, last = apply(model, params, forced, mask.codes)
    np.testing.assert_allclose(logits, cached, atol=1e-4)
    np.testing.assert_array_equal(last, np.arange(96)[None])
    task = losses.lm_task(model, losses.LMOptions(scale_accuracy=True))
    loss = jax.jit(lambda p: task.loss(p, None, batch, jax.random.key(0), task.normalizer(batch))[0])
    value, grads = jax.value_and_grad(loss)(params)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_first_scale_has_one_code():
    """<ge_start> is all of its input; four codes there would have no input of their own."""
    sizes = tiny.config()
    sizes["vqvae"] |= {"patch_nums": (2, 4)}
    with pytest.raises(UserError, match=r"model.vqvae.patch_nums=\(2, 4\): the first scale has a single code"):
        variants.build(sizes)


def test_logits_of_a_batch_are_those_of_its_rows():
    """Eight prompts of different lengths, to 1e-4."""
    model, params = made("qwen")
    batch = tiny.batch(model, [tiny.sample(i) for i in range(8)])
    at = np.argmax(batch["tokens"] == model.vocab.ge_start, axis=1)
    asked = (np.where(np.arange(96) < at[:, None], batch["tokens"], model.vocab.pad)[:, :64], at, batch["tiles"])
    run = jax.jit(functools.partial(nn.apply(decode_with_logits, model), {"params": params}))
    mask, logits, _ = run(*asked)
    for i in range(8):
        one, alone, _ = run(*(x[i : i + 1] for x in asked))
        np.testing.assert_allclose(alone[0], logits[i], atol=1e-4)
        np.testing.assert_array_equal(one.codes[0], mask.codes[i])


def test_block_causal_sees_the_own_scale_whole_and_nothing_beyond():
    """The last place seen: the end of its scale for a code, the place itself for text."""
    model, params = made("qwen", True)
    batch = tiny.batch(model, [tiny.sample(0, masks=2)], max_masks=2, max_tokens=128)
    last = np.asarray(apply(model, params, lambda m, t: m.last_visible(t), batch["tokens"]))[0]
    starts = np.flatnonzero(batch["tokens"][0] == model.vocab.ge_start)
    assert len(starts) == 2
    for start in starts:
        np.testing.assert_array_equal(last[start : start + 21] - start, [0, *[4] * 4, *[20] * 16])
    text = batch["tokens"][0] != model.vocab.mask_context
    np.testing.assert_array_equal(last[text], np.flatnonzero(text))


def test_every_place_gets_its_own_input():
    model, params = made("nano")
    batch = tiny.batch(model, [tiny.sample(0, masks=2), tiny.sample(3, masks=0)], max_masks=2, max_tokens=128)
    codes = np.random.default_rng(0).integers(0, tiny.NUM_CODES, (2, 2, 21)).astype(np.int32)

    def embed(m, tokens, tiles, codes):
        features = m.encode_images(tiles)
        return (*m.embed(tokens, features, codes), features, m.visual_inputs(codes[0]), m.llm.embed_tokens(tokens))

    tokens = batch["tokens"]
    x, coords, features, visual, text = apply(model, params, embed, tokens, batch["tiles"], codes)
    images = tokens == model.vocab.img_context
    for row in range(2):
        np.testing.assert_array_equal(x[row][images[row]], features[row])
    masks = tokens == model.vocab.mask_context
    assert masks[0].sum() == 40 and masks[1].sum() == 0
    np.testing.assert_allclose(x[0][masks[0]], visual.reshape(40, -1), atol=1e-5)
    np.testing.assert_array_equal(x[~images & ~masks], text[~images & ~masks])
    np.testing.assert_array_equal(coords[0][images[0]], [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]])
    np.testing.assert_array_equal(coords[0][masks[0]], np.tile(model.scales.centers[1:], (2, 1)))
    np.testing.assert_array_equal(coords[0][tokens[0] == model.vocab.ge_start], [[0.5, 0.5]] * 2)
    assert not np.asarray(coords)[~images & ~masks & (tokens != model.vocab.ge_start)].any()


def test_uint8_pictures_equal_normalised_floats():
    model, params = made("qwen")
    tiles = tiny.picture(0, 32, 32)[None, None]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    floats = ((tiles / 255 - mean) / std).astype(np.float32)
    run = functools.partial(apply, model, params, lambda m, x: m.encode_images(x))
    np.testing.assert_allclose(run(tiles), run(floats), atol=1e-4)
    masks = tiny.picture(1, 16, 16)[None, None]
    run = functools.partial(apply, model, params, lambda m, x: m.tokenize(x))
    np.testing.assert_array_equal(run(masks), run((masks / 127.5 - 1).astype(np.float32)))


def test_the_reference_starts_the_three_tables_with_zeros():
    model, _ = made("qwen")
    x = jnp.zeros((1, 20, 8))
    init = model.visual.init(jax.random.key(0), x, model.scales.levels[1:], np.arange(1, 21))["params"]
    assert set(trees.flatten(init)) == {"word_embed/kernel", "word_embed/bias", "lvl_embed", "pos_embed"}
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(init))
