"""Choosing words: greedy, top-k, top-p, and samples that depend on seed and place alone."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.decode.sampling import DecodeConfig, Sampling, allowed, sample_tokens
from argenseg_jax.errors import UserError

LOGITS = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))


def drawn(n=400, **settings):
    """How often each word is drawn at n places."""
    draw = Sampling(**settings).on_device(1)
    words = sample_tokens(jnp.tile(LOGITS[:, None], (1, n, 1)), draw, jnp.arange(n)[None])
    return np.bincount(words[0], minlength=4) / n


def test_greedy_takes_the_likeliest():
    assert Sampling().on_device(3) is None
    assert sample_tokens(LOGITS, None, jnp.zeros(1, int)).tolist() == [1]


@pytest.mark.parametrize(
    "settings, kept",
    [
        (dict(), [0, 1, 2, 3]),
        (dict(top_k=2), [1, 3]),
        (dict(top_p=0.8), [1, 2, 3]),
        (dict(top_p=0.01), [1]),
        (dict(top_k=3, top_p=0.6), [1, 3]),
    ],
    ids=str,
)
def test_samples_follow_the_distribution_that_is_left(settings, kept):
    chances = np.exp(LOGITS[0])
    want = np.where(np.isin(np.arange(4), kept), chances, 0)
    np.testing.assert_allclose(drawn(temperature=1.0, **settings), want / want.sum(), atol=0.08)


def test_temperature_sharpens():
    assert drawn(temperature=0.2)[1] > 0.9 and drawn(temperature=50.0).min() > 0.15


def test_a_row_draws_the_same_whoever_is_beside_it():
    """Row b has seed + b; other places and other seeds draw other words."""
    logits, places = jnp.zeros((3, 8, 50)), jnp.tile(jnp.arange(8), (3, 1))
    draw = lambda seed, rows: sample_tokens(
        logits[:rows], Sampling(temperature=1, seed=seed).on_device(rows), places[:rows]
    )
    batch = draw(5, 3)
    for row in range(3):
        np.testing.assert_array_equal(draw(5 + row, 1)[0], batch[row])
    assert len(set(np.asarray(batch).reshape(-1).tolist())) > 12


def test_twins_get_the_words_of_the_answer():
    """Under guidance; in the reference's way they keep their own."""
    logits = jnp.eye(4)[:4]  # 0, 1 cond and 2, 3 uncond: each prefer their own number
    places = jnp.zeros(4, int)
    assert DecodeConfig(guidance=jnp.float32(2)).next_tokens(logits, places).tolist() == [0, 1, 0, 1]
    assert DecodeConfig(guidance=jnp.float32(2), reference=True).next_tokens(logits, places).tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(DecodeConfig(guidance=jnp.float32(2)).guide(logits, 0.5), 2 * logits[:2] - logits[2:])


@pytest.mark.torch
def test_the_words_that_are_left_are_those_of_transformers(monkeypatch):
    """Alone and one after the other, on logits without and with ties, down to a single word."""
    import torch

    # Which of equal logits comes first is torch's whim in rows of more than 16 words, unless it is asked.
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    rng = np.random.default_rng(0)
    plain = rng.normal(size=(5, 200)).astype(np.float32) * 3
    tied = np.round(rng.normal(size=(5, 200))).astype(np.float32)
    same = np.zeros((2, 200), np.float32)
    for logits in (plain, tied, same, np.where(plain < 0, -np.inf, plain)):
        for k in (0, 1, 7, 40, 500):
            for p in (1e-6, 0.3, 0.5, 0.9, 1.0):
                scores = torch.from_numpy(logits)
                scores = TopKLogitsWarper(k)(None, scores) if k else scores
                scores = TopPLogitsWarper(p)(None, scores) if p < 1 else scores
                draw = Sampling(temperature=1, top_k=k, top_p=p).on_device(1)
                got = np.asarray(allowed(logits, draw.top_k, draw.tail)) & np.isfinite(logits)
                np.testing.assert_array_equal(got, np.isfinite(scores.numpy()), f"{k}, {p}")


def test_what_top_k_leaves_is_the_whole_of_top_p():
    """0.5, 0.25 and 0.15 of 0.9: half of them is the first alone, though it is under 0.6 of all."""
    np.testing.assert_array_equal(allowed(LOGITS, 3, np.float32(1 - 0.55)), [[False, True, False, False]])
    np.testing.assert_array_equal(allowed(LOGITS, 0, np.float32(1 - 0.55)), [[False, True, False, True]])


def test_a_word_and_a_code_at_one_position_draw_different_noise():
    logits, places = jnp.zeros((1, 64, 50)), jnp.arange(64)[None]
    words, codes = (
        sample_tokens(logits, Sampling(temperature=1).on_device(1, of), places) for of in ("tokens", "codes")
    )
    assert np.mean(np.asarray(words) == np.asarray(codes)) < 0.2


def test_hardly_any_temperature_is_greedy():
    assert Sampling(temperature=1e-40).on_device(1) is None
    assert drawn(temperature=1e-20)[1] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-1),
        dict(top_k=-1),
        dict(top_p=0),
        dict(top_p=1.5),
        dict(temperature=float("nan")),
        dict(temperature=float("inf")),
        dict(top_p=float("nan")),
        dict(top_k=2**40),
    ],
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
