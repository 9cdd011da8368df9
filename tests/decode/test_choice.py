"""Choosing words: greedy, top-k, top-p, and samples that depend on seed and place alone."""
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.decode.choice import Rules, Sampling, choose
from argenseg_jax.errors import UserError

LOGITS = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))


def drawn(n=400, **settings):
    """How often each word is drawn at n places."""
    draw = Sampling(**settings).on_device(1)
    words = choose(jnp.tile(LOGITS[:, None], (1, n, 1)), draw, jnp.arange(n)[None])
    return np.bincount(words[0], minlength=4) / n


def test_greedy_takes_the_likeliest():
    assert Sampling().on_device(3) is None
    assert choose(LOGITS, None, jnp.zeros(1, int)).tolist() == [1]


@pytest.mark.parametrize("settings, kept", [
    (dict(), [0, 1, 2, 3]), (dict(top_k=2), [1, 3]), (dict(top_p=0.8), [1, 2, 3]),
    (dict(top_p=0.01), [1]), (dict(top_k=3, top_p=0.6), [1, 3])], ids=str)
def test_samples_follow_the_distribution_that_is_left(settings, kept):
    chances = np.exp(LOGITS[0])
    want = np.where(np.isin(np.arange(4), kept), chances, 0)
    np.testing.assert_allclose(drawn(temperature=1.0, **settings), want / want.sum(), atol=0.08)


def test_temperature_sharpens():
    assert drawn(temperature=0.2)[1] > 0.9 and drawn(temperature=50.0).min() > 0.15


def test_a_row_draws_the_same_whoever_is_beside_it():
    """Row b has seed + b; other places and other seeds draw other words."""
    logits, places = jnp.zeros((3, 8, 50)), jnp.tile(jnp.arange(8), (3, 1))
    draw = lambda seed, rows: choose(logits[:rows], Sampling(temperature=1, seed=seed).on_device(rows),
                                     places[:rows])
    batch = draw(5, 3)
    for row in range(3):
        np.testing.assert_array_equal(draw(5 + row, 1)[0], batch[row])
    assert len(set(np.asarray(batch).reshape(-1).tolist())) > 12


def test_twins_get_the_words_of_the_answer():
    """Under guidance; in the reference's way they keep their own."""
    logits = jnp.eye(4)[:4]  # rows 0, 1 and their twins 2, 3 each prefer their own number
    places = jnp.zeros(4, int)
    assert Rules(guidance=jnp.float32(2)).next_words(logits, places).tolist() == [0, 1, 0, 1]
    assert Rules(guidance=jnp.float32(2), reference=True).next_words(logits, places).tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(Rules(guidance=jnp.float32(2)).guide(logits, 0.5), 2 * logits[:2] - logits[2:])


@pytest.mark.parametrize("wrong", [dict(temperature=-1), dict(top_k=-1), dict(top_p=0), dict(top_p=1.5)])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
