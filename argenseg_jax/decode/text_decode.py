"""Prefill and text on the KV cache, sequence by sequence until <ge_start> or the end of the answer.

Axes: see models/__init__; B' sequences of the cache: B, or 2 B under guidance (decode/sampling); T the
bucketed prompt length.
Functions take a bound ARGenSeg `m`; wrap them with `nn.apply(fn, model)`.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from argenseg_jax.decode.sampling import DecodeConfig
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.kv_cache import KVCache

Array = jax.Array


@flax.struct.dataclass
class Answer:
    """Answers in the making.

    Attributes:
      cache: everything that has been fed.
      token: int32[B'], the next token, chosen but not fed.
      ids: int32[B, A], the tokens emitted so far; <ge_start> represents a complete mask.
      count: int32[B], how many of them there are.
      ended: bool[B], the answer is complete (or has reached A tokens).
      at_mask: bool[B], the last emitted token is a <ge_start> whose codes are to be decoded.
      config: how tokens are chosen.
    """

    cache: KVCache
    token: Array
    ids: Array
    count: Array
    ended: Array
    at_mask: Array
    config: DecodeConfig


def prefill(
    m: ARGenSeg, tokens: Array, lengths: Array, tiles: Array | None, config: DecodeConfig, capacity: int, max_text: int
) -> Answer:
    """Reads the prompts.

    Args:
      tokens: int32[B', T], right padded;  lengths: int32[B'].
      tiles: u8[B', P, I, I, 3], or of B where the uncond half has the same images, or None.
      capacity: positions of the cache; the caller has checked that prompt and answer fit.
      max_text: A.
    """
    features = None if tiles is None else m.encode_images(tiles)
    if features is not None and len(features) < len(tokens):
        features = config.duplicate_for_cfg(features)
    x, coords = m.embed(tokens, features)
    hidden, cache = m.extend(x, coords, m.empty_cache(len(tokens), capacity), lengths, "first")
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    token = config.next_tokens(m.logits(last)[:, 0], cache.length)
    b = len(tokens) if config.guidance is None else len(tokens) // 2
    no = jnp.zeros((b,), bool)
    return Answer(cache, token, jnp.zeros((b, max_text), jnp.int32), jnp.zeros((b,), jnp.int32), no, no, config)


def feed(m: ARGenSeg, answer: Answer, token: Array, active: Array) -> Answer:
    """Feeds int32[B'], one token per sequence, to the sequences that want it (bool[B]); chooses what follows."""
    wanted = answer.config.duplicate_for_cfg(active)
    x = m.llm.embed_tokens(token[:, None])
    hidden, cache = m.extend(x, jnp.zeros((*x.shape[:2], 2)), answer.cache, wanted.astype(jnp.int32))
    token = answer.config.next_tokens(m.logits(hidden)[:, 0], cache.length)
    return answer.replace(cache=cache, token=jnp.where(wanted, token, answer.token))


def write_text(m: ARGenSeg, answer: Answer) -> Answer:
    """Emits text until every sequence has ended or is waiting for a mask; one while_loop."""
    b, limit = answer.ids.shape

    def writing(a: Answer) -> Array:
        return ~a.ended & ~a.at_mask

    def step(m: ARGenSeg, a: Answer) -> Answer:
        emit, token = writing(a), a.token[:b]
        at = jnp.where(emit, a.count, limit)  # out of range: dropped
        ids = a.ids.at[jnp.arange(b), at].set(token, mode="drop")
        count = a.count + emit
        at_mask = a.at_mask | (emit & (token == m.vocab.ge_start))
        ended = a.ended | (emit & (token == m.vocab.eos)) | (~at_mask & (count >= limit))
        a = a.replace(ids=ids, count=count, ended=ended, at_mask=at_mask)
        return feed(m, a, a.token, emit & writing(a))

    return nn.while_loop(
        lambda m, a: jnp.any(writing(a)), step, m, answer, carry_variables=(), broadcast_variables="params"
    )


def after_mask(m: ARGenSeg, answer: Answer) -> Answer:
    """Feeds <ge_end> after the codes of the sequences that were waiting for a mask; text resumes."""
    answer = feed(m, answer, jnp.full_like(answer.token, m.vocab.ge_end), answer.at_mask)
    full = answer.count >= answer.ids.shape[1]
    return answer.replace(ended=answer.ended | (answer.at_mask & full), at_mask=jnp.zeros_like(answer.at_mask))
