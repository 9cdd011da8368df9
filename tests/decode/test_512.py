"""Masks of 512 px: 2240 codes each, several in an answer, text before, between and behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.decode.engine import Engine
from tests import tiny

VOCAB = tiny.tokenizer().vocab
GE, END = VOCAB.ge_start, VOCAB.ge_end
TEXT_MASK, MASK, A = 10, 12, 20  # last words of the prompts; a word of the answers
CHAIN = {TEXT_MASK: A, A: GE, MASK: GE, END: A}
MOST = dict(max_text=4, max_masks=3)


@pytest.fixture(scope="module")
def answered():
    """(engine, prompts, answers): <ge_start> as the first token and no picture; text first, a picture."""
    engine = Engine(*tiny.scripted(CHAIN, tiny.made_512()))
    words = np.random.default_rng(0).integers(100, 400, (2, 64)).astype(np.int32)
    words[1, 3:7] = VOCAB.img_context
    lengths = np.array([9, 21], np.int32)
    words[[0, 1], lengths - 1] = MASK, TEXT_MASK
    tiles = np.stack([tiny.picture(i, 32, 32) for i in range(2)])[:, None]
    return engine, (words, lengths, tiles), engine.generate(words, lengths, tiles, previews=True, **MOST)


def test_text_goes_on_behind_each_mask(answered):
    engine, _, out = answered
    assert engine.model.scales.num_codes == 2240 and engine.model.mask_size == 512
    assert [row.tolist() for row in out.ids] == [[GE, A, GE, A], [A, GE, A, GE]]
    assert out.num_masks.tolist() == [2, 2] and out.codes.shape == (2, 2, 2240)
    assert out.images.shape == (2, 2, 512, 512, 3) and out.scales.shape == (2, 2, 10, 512, 512, 3)
    np.testing.assert_array_equal(out.scales[:, :, -1], out.images)
    assert len({row.tobytes() for row in out.codes.reshape(4, -1)}) == 4  # each sees what was before


def test_codes_do_not_depend_on_the_neighbour(answered):
    """Beside a copy of itself instead of another prompt."""
    engine, asked, out = answered
    one = engine.generate(*(x[[1, 1]] for x in asked), previews=True, **MOST)
    np.testing.assert_array_equal(one.ids, out.ids[[1, 1]])
    np.testing.assert_array_equal(one.codes, out.codes[[1, 1]])


def test_codes_and_text_are_those_of_the_uncached_model(answered):
    """Fed the whole answer up to the word behind the first mask, it chooses each code and that word."""
    _engine, (words, lengths, tiles), out = answered
    model, params = tiny.scripted(CHAIN, tiny.made_512())
    line = np.array([[*words[1, : lengths[1]], A, GE, *[VOCAB.mask_context] * 2239, END, A]])

    @jax.jit
    def run(params):
        call = lambda method, *args: model.apply({"params": params}, *args, method=method)
        hidden = call(
            "hidden",
            line,
            np.arange(line.size)[None],
            np.ones_like(line),
            call("encode_images", tiles[1:]),
            jnp.asarray(out.codes[1:, :1]),
        )
        return call("code_logits", hidden[:, lengths[1] + 1 : -2])[0], call("logits", hidden[:, -2:])[0]

    codes, text = (np.asarray(x).argmax(-1) for x in run(params))
    np.testing.assert_array_equal(codes, out.codes[1, 0])
    assert text.tolist() == [A, GE]
