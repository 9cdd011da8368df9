"""Prefill and greedy text on the KV cache, row by row until <ge_start> or the end of the answer.

Axes: B rows, L prompt length (bucketed), P tiles a row, A capacity for answer tokens.
Functions take a bound ARGenSeg `m`; wrap them with `nn.apply(fn, model)`.
"""
from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.kv_cache import KVCache

Array = jax.Array


@flax.struct.dataclass
class Answer:
    """Answers in the making.

    Attributes:
      cache: everything that has been fed.
      token: int32[B], the next token, chosen but not fed.
      ids: int32[B, A], the tokens emitted so far; <ge_start> stands for a whole mask.
      count: int32[B], how many of them there are.
      ended: bool[B], the answer is complete (or has reached A tokens).
      at_mask: bool[B], the last emitted token is a <ge_start> whose codes are to be decoded.
    """

    cache: KVCache
    token: Array
    ids: Array
    count: Array
    ended: Array
    at_mask: Array


def prefill(m: ARGenSeg, tokens: Array, lengths: Array, tiles: Array | None, capacity: int,
            max_text: int) -> Answer:
    """Reads the prompts.

    Args:
      tokens: int32[B, L], right padded;  lengths: int32[B].
      tiles: u8[B, P, S, S, 3] or None.
      capacity: places of the cache; the caller has checked that prompt and answer fit.
      max_text: A.
    """
    b, t = tokens.shape
    features = None if tiles is None else m.encode_images(tiles)
    x, coords = m.embed(tokens, features)
    hidden, cache = m.extend(x, coords, m.empty_cache(b, capacity), lengths)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    no = jnp.zeros((b,), bool)
    return Answer(cache, next_token(m, last), jnp.zeros((b, max_text), jnp.int32),
                  jnp.zeros((b,), jnp.int32), no, no)


def next_token(m: ARGenSeg, hidden: Array) -> Array:
    """Greedy choice over the whole vocabulary: [B, 1, D] -> int32[B]."""
    return jnp.argmax(m.logits(hidden)[:, 0], axis=-1).astype(jnp.int32)


def feed(m: ARGenSeg, cache: KVCache, token: Array, rows: Array) -> tuple[KVCache, Array]:
    """Feeds one token to the rows that want it (bool[B]): (cache, the token after it int32[B])."""
    x = m.llm.embed_tokens(token[:, None])
    hidden, cache = m.extend(x, jnp.zeros((*x.shape[:2], 2)), cache, rows.astype(jnp.int32))
    return cache, next_token(m, hidden)


def write_text(m: ARGenSeg, answer: Answer) -> Answer:
    """Emits text until every row has ended or stands at a mask; one while_loop."""
    rows = jnp.arange(answer.token.shape[0])

    def writing(a: Answer) -> Array:
        return ~a.ended & ~a.at_mask

    def step(m: ARGenSeg, a: Answer) -> Answer:
        emit = writing(a)
        at = jnp.where(emit, a.count, a.ids.shape[1])  # out of range: dropped
        ids = a.ids.at[rows, at].set(a.token, mode="drop")
        count = a.count + emit
        at_mask = a.at_mask | (emit & (a.token == m.vocab.ge_start))
        ended = a.ended | (emit & (a.token == m.vocab.eos)) | (~at_mask & (count >= a.ids.shape[1]))
        cache, token = feed(m, a.cache, a.token, emit & ~at_mask & ~ended)
        token = jnp.where(emit & ~at_mask & ~ended, token, a.token)
        return Answer(cache, token, ids, count, ended, at_mask)

    return nn.while_loop(lambda m, a: jnp.any(writing(a)), step, m, answer,
                         carry_variables=(), broadcast_variables="params")


def after_mask(m: ARGenSeg, answer: Answer, cache: KVCache) -> Answer:
    """Feeds <ge_end> behind the codes of the rows that stood at a mask, and lets text go on."""
    ge_end = jnp.full_like(answer.token, m.vocab.ge_end)
    cache, token = feed(m, cache, ge_end, answer.at_mask)
    full = answer.count >= answer.ids.shape[1]
    return answer.replace(cache=cache, token=jnp.where(answer.at_mask, token, answer.token),
                          ended=answer.ended | (answer.at_mask & full),
                          at_mask=jnp.zeros_like(answer.at_mask))
