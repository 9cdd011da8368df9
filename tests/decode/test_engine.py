"""Decoding: rows do not depend on their neighbours, masks anywhere in an answer, no recompilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax import sharding
from argenseg_jax.data.transforms import binarize
from argenseg_jax.decode.engine import Engine, compiler_options
from argenseg_jax.errors import UserError
from tests import tiny

VOCAB = tiny.tokenizer().vocab
GE, END, EOS = VOCAB.ge_start, VOCAB.ge_end, VOCAB.eos
TEXT_MASK, TEXT, MASK, A, B, C = 10, 11, 12, 20, 21, 22  # last words of prompts; words of answers
# What follows the last word of the prompt, and what follows a mask.
ONCE = {TEXT_MASK: A, A: GE, TEXT: B, B: EOS, MASK: GE, END: C, C: EOS}
AGAIN = {TEXT_MASK: A, A: GE, TEXT: B, B: EOS, MASK: GE, END: A}


@functools.cache
def engine():
    """One engine for all tests: its weights are exchanged, its programs are shared."""
    return Engine(*tiny.scripted(ONCE))


@functools.cache
def weights(name):
    return tiny.scripted({"once": ONCE, "again": AGAIN}[name])[1]


def use(chain):
    engine().params = weights("once" if chain is ONCE else "again")


def prompts(*lasts, image=True, seed=0):
    """(tokens, lengths, tiles): random words around a picture, of different lengths."""
    rng = np.random.default_rng(seed)
    tokens = np.full((len(lasts), 128), VOCAB.pad, np.int32)
    lengths = np.zeros(len(lasts), np.int32)
    for row, last in enumerate(lasts):
        words = rng.integers(100, 400, 9 + 5 * row)
        line = [*words[:4], *[VOCAB.img_context] * (4 * image), *words[4:], last]
        tokens[row, : len(line)], lengths[row] = line, len(line)
    tiles = rng.integers(0, 256, (len(lasts), 1, 32, 32, 3), np.uint8)
    return tokens, lengths, tiles if image else None


def generate(chain, tokens, lengths, tiles, max_masks=3, **kw):
    use(chain)
    return engine().generate(tokens, lengths, tiles, max_text=5, max_masks=max_masks, **kw)


def answers(out):
    return [out.ids[i, :count].tolist() for i, count in enumerate(out.counts)]


def test_a_batch_of_eight_equals_eight_singles():
    """Text and mask, text alone, <ge_start> as the very first token, with a picture and without."""
    kinds = (TEXT_MASK, TEXT, MASK, TEXT_MASK, MASK, TEXT, TEXT_MASK, MASK)
    tokens, lengths, tiles = prompts(*kinds)
    for row in (3, 4):  # no picture
        tokens[row][tokens[row] == VOCAB.img_context] = 150
    both = generate(ONCE, tokens, lengths, tiles)
    said = {TEXT_MASK: [A, GE, C, EOS], TEXT: [B, EOS], MASK: [GE, C, EOS]}
    assert answers(both) == [said[kind] for kind in kinds] and both.scales is None
    assert both.num_masks.tolist() == [int(kind != TEXT) for kind in kinds]
    assert not both.codes[1].any() and not both.images[1].any() and both.confidence[1] == 0
    masked = [i for i, kind in enumerate(kinds) if kind != TEXT]
    assert len({tuple(c) for c in both.codes[masked, 0]}) == len(masked)  # they depend on the prompt
    for i in range(8):
        one = generate(ONCE, tokens[i : i + 1], lengths[i : i + 1], tiles[i : i + 1])
        np.testing.assert_array_equal(one.ids[0], both.ids[i])
        assert one.num_masks[0] == both.num_masks[i]
        np.testing.assert_array_equal(one.codes[0, 0], both.codes[i, 0])
        np.testing.assert_array_equal(*(binarize(x, (30, 40)) for x in (one.images[0, 0], both.images[i, 0])))
        assert np.abs(one.images[0, 0].astype(int) - both.images[i, 0]).max() <= 1
        np.testing.assert_allclose(one.confidence[0, 0], both.confidence[i, 0], atol=1e-5)


def test_an_answer_with_a_mask_is_greedy_throughout():
    """The uncached model, fed the whole answer, chooses each of its tokens and codes."""
    tokens, lengths, tiles = prompts(TEXT_MASK)
    out = generate(ONCE, tokens, lengths, tiles)
    model, params = tiny.scripted(ONCE)
    answer = [A, GE, *[VOCAB.mask_context] * 20, END, C, EOS]
    line = [*tokens[0, : lengths[0]], *answer]
    line = np.array([line + [VOCAB.pad] * (64 - len(line))])  # the padding comes later: unseen

    @jax.jit
    def run(params):
        call = lambda method, *args: model.apply({"params": params}, *args, method=method)
        hidden = call(
            "hidden",
            line,
            np.arange(64)[None],
            np.ones((1, 64), int),
            call("encode_images", tiles),
            jnp.asarray(out.codes),
        )
        return call("logits", hidden)[0], call("code_logits", hidden)[0]

    logits, code_logits = map(np.asarray, run(params))
    begin = lengths[0] - 1
    np.testing.assert_array_equal(logits.argmax(-1)[[begin, begin + 1, begin + 23, begin + 24]], [A, GE, C, EOS])
    np.testing.assert_array_equal(code_logits.argmax(-1)[begin + 2 : begin + 23], out.codes[0, 0])


def test_several_masks_end_at_either_limit():
    """Five tokens of text, also where the last one is a mask; or a number of masks."""
    asked = prompts(TEXT_MASK, TEXT, MASK, TEXT)
    out = generate(AGAIN, *asked)
    assert answers(out) == [[A, GE, A, GE, A], [B, EOS], [GE, A, GE, A, GE], [B, EOS]]
    assert out.num_masks.tolist() == [2, 0, 3, 0] and out.codes.shape == (4, 3, 21)
    assert np.any(out.codes[2, 0] != out.codes[2, 2])  # a mask sees the ones before
    few = generate(AGAIN, *asked, max_masks=1)
    assert answers(few) == [[A, GE], [B, EOS], [GE], [B, EOS]]
    np.testing.assert_array_equal(few.codes[:, 0], out.codes[:, 0])


def test_previews_grow_into_the_mask():
    out = generate(ONCE, *prompts(TEXT_MASK, TEXT, MASK, TEXT), previews=True)
    assert out.scales.shape == (4, 1, 3, 16, 16, 3) and out.scales.dtype == np.uint8
    np.testing.assert_array_equal(out.scales[0, 0, -1], out.images[0, 0])
    assert out.floats.shape == (4, 1, 16, 16, 3) and out.floats.dtype == np.float32
    np.testing.assert_array_equal(((out.floats[0, 0] + 1) / 2 * 255).astype(np.uint8), out.images[0, 0])
    assert np.any(out.scales[0, 0, 0] != out.images[0, 0])


def test_nothing_is_compiled_again_for_another_prompt():
    """Other words, lengths, pictures, numbers of masks, answers and weights."""
    generate(AGAIN, *prompts(TEXT_MASK, TEXT, MASK, MASK))
    phases = engine().phases
    programs = (phases.prefill, phases.text, phases.mask)
    sizes = [program._cache_size() for program in programs]
    assert min(sizes) > 0
    generate(AGAIN, *prompts(MASK, MASK, TEXT, MASK, seed=1), max_masks=2)
    generate(AGAIN, *prompts(TEXT, TEXT, TEXT, TEXT, seed=2))
    generate(AGAIN, *prompts(MASK, MASK, MASK, MASK, seed=3))
    out = generate(ONCE, *prompts(TEXT_MASK, TEXT, TEXT, TEXT))
    assert out.ids[0, :4].tolist() == [A, GE, C, EOS]
    assert [program._cache_size() for program in programs] == sizes


def test_without_pictures():
    asked = prompts(TEXT_MASK, TEXT, TEXT, TEXT, image=False)
    assert asked[2] is None and answers(generate(ONCE, *asked))[:2] == [[A, GE, C, EOS], [B, EOS]]


def test_a_prompt_that_leaves_no_room_is_named():
    tokens = np.full((1, 2048), 100, np.int32)
    with pytest.raises(UserError, match="prompt of 2000 tokens .* needs 2071 positions.*2048"):
        generate(ONCE, tokens, np.array([2000]), None)


def test_guided_codes_are_those_of_the_two_prompts_weighed():
    """The chosen codes maximise (1 + t) * with - t * without, t growing to the guidance (SPEC 4.2)."""
    tokens, lengths, tiles = prompts(TEXT_MASK)
    uncond_prompt = np.array([101, 102, 103], np.int32)
    out = generate(ONCE, tokens, lengths, tiles, guidance=3.0, uncond_prompt=uncond_prompt)
    plain = generate(ONCE, tokens, lengths, tiles)
    assert answers(out) == answers(plain) == [[A, GE, C, EOS]]
    assert np.any(out.codes != plain.codes)
    model, params = tiny.scripted(ONCE)
    lines, at = np.full((2, 64), VOCAB.pad), []
    for line, head in zip(lines, (tokens[0, : lengths[0]], uncond_prompt)):
        whole = [*head, A, GE, *[VOCAB.mask_context] * 20]
        line[: len(whole)] = whole
        at.append(len(head) + 1)

    @jax.jit
    def code_logits(params):
        call = lambda method, *args: model.apply({"params": params}, *args, method=method)
        places = np.tile(np.arange(64), (2, 1))
        return call(
            "code_logits",
            call(
                "hidden",
                lines,
                places,
                np.ones((2, 64), int),
                call("encode_images", tiles[[0, 0]]),
                jnp.asarray(out.codes[[0, 0]]),
            ),
        )

    logits = code_logits(params)
    cond, uncond = (np.asarray(logits[i, at[i] : at[i] + 21]) for i in range(2))
    t = 3.0 * model.scales.levels[:, None] / (len(model.scales) - 1)
    np.testing.assert_array_equal(((1 + t) * cond - t * uncond).argmax(-1), out.codes[0, 0])


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=4, tensor=2)], ids=str)
def test_devices_together_equal_one(axes):
    """Weights laid out by the sharding table, quantizer and VQ-VAE among them: the same codes."""
    asked = prompts(TEXT_MASK, TEXT, MASK, TEXT_MASK, MASK, TEXT, TEXT_MASK, MASK)
    want = generate(ONCE, *asked, max_masks=1)
    mesh = sharding.make_mesh({"dcn_data": 1, "data": 1, "fsdp": 1, "tensor": 1, **axes})
    with jax.set_mesh(mesh):
        spread = jax.device_put(weights("once"), sharding.shardings(weights("once"), mesh))
        many = Engine(tiny.made()[0], spread)
        rows = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in asked]
        got = many.generate(*rows, max_text=5, max_masks=1)
    kernel = many.params["llm"]["layers_0"]["mlp"]["gate"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert kernel.sharding.shard_shape(kernel.shape)[1] == 48 // axes.get("tensor", 1)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.codes, want.codes)
    assert np.abs(got.images.astype(int) - want.images).max() <= 1


def test_convolutions_stay_with_the_compiler():
    """Not with a library that runs them on one thread."""
    conv = jax.jit(
        lambda x, kernel: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        compiler_options=compiler_options(jax.default_backend()),
    )
    program = conv.lower(jnp.ones((1, 64, 64, 32)), jnp.ones((3, 3, 32, 32))).compile().as_text()
    assert "convolution" in program and "ynn" not in program
