"""Recordings of kind E: the decoder in one pass, through the cache, and in greedy generation."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax.interop import hf_config, weight_map
from argenseg_jax.interop import state_dict as torch_convert
from argenseg_jax.models import attention, layers
from argenseg_jax.models.decoder_lm import DecoderLM
from argenseg_jax.parity.recording import EQUAL, Recording

Params = Mapping[str, Any]


def compare_lm(record: Recording) -> None:
    """Every variant (they may share the weights), then the split of the fused attention weights."""
    params = {}
    for variant, cfg in record.config["variants"].items():
        size = cfg["config"]["vocab_size"]
        lm = DecoderLM(padded_vocab_size=size, vocab_size=size, **hf_config.llm_cfg(cfg["config"]))
        shapes = jax.eval_shape(
            functools.partial(lm.init, method=_forward), jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
        )
        params = torch_convert.to_jax(record.weights(variant), {"llm": shapes["params"]}, source=str(record.folder))[
            "llm"
        ]
        _compare_variant(record, f"{variant}/", lm, params, cfg["config"])
    for m in record.names(r"split/layer(\d+)/(q|k|v|wqkv)"):
        heads = params["layers"]["attn"]
        leaves = {name: np.asarray(heads[name]["kernel"][int(m[1])]) for name in "qkv"}
        got = (
            weight_map.GROUPED_WQKV.to_torch(tuple(leaves.values()))
            if m[2] == "wqkv"
            else weight_map.HEADS_IN.to_torch((leaves[m[2]],))
        )
        record.check(m[0], got, EQUAL)


def _forward(lm: DecoderLM, tokens, positions=None, segments=None):
    """Logits [B, T, V] and hidden states [L + 1, B, T, D] of a pass without a cache."""
    b, t = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(t), (b, t)) if positions is None else positions
    segments = jnp.ones((b, t), jnp.int32) if segments is None else segments
    y, _, hidden = lm(lm.embed_tokens(tokens), positions, mask=attention.Mask(segments), capture=True)
    return lm.logits(y), hidden


def _step(lm: DecoderLM, tokens, cache, num_valid):
    """Logits [B, T, V] of T more positions after the cache, and the new cache."""
    positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
    y, cache, _ = lm(lm.embed_tokens(tokens), positions, cache=cache, num_valid=num_valid)
    return lm.logits(y), cache


def _jitted(lm: DecoderLM, params: Params, method) -> Callable:
    run = jax.jit(lambda p, *args: lm.apply({"params": p}, *args, method=method))
    return lambda *args: run(params, *args)


def _compare_variant(record: Recording, name: str, lm: DecoderLM, params: Params, cfg) -> None:
    forward = _jitted(lm, params, _forward)
    for side in ("right", "left"):
        if f"{name}{side}_input_ids" not in record:
            continue
        tokens = record.ints(f"{name}{side}_input_ids", 2, below=lm.vocab_size)
        mask = record.ints(f"{name}{side}_attention_mask", 2, default=np.ones_like(tokens))
        positions = record.ints(f"{name}{side}_position_ids", 2, default=np.where(mask, np.cumsum(mask, 1) - 1, 1))
        logits, hidden = forward(tokens, positions, mask)
        real = mask == 1  # fully masked rows of the reference are garbage
        record.check(f"{name}{side}_logits", logits, where=real)
        record.check(f"{name}{side}_hidden_states", hidden, where=np.broadcast_to(real, (hidden.shape[0], *real.shape)))

    if f"{name}long_input_ids" in record:
        _compare_long(record, name, lm, params, forward, cfg)
    for found in record.names(rf"{re.escape(name)}gen_(batch|single)_tokens"):
        # The reference generates from the left padded batch, or from its longest sequence alone.
        ids = record.ints(f"{name}left_input_ids", 2, below=lm.vocab_size)
        mask = record.ints(f"{name}left_attention_mask", 2, default=np.ones_like(ids))
        if found[1] == "single":
            best = int(mask.sum(1).argmax())
            ids, mask = ids[best : best + 1], mask[best : best + 1]
        steps = record.ints(found[0], 2).shape[1]
        tokens, scores = _generate(lm, params, ids, mask, steps, cfg.get("eos_token_id", 2))
        record.check(found[0], tokens)
        record.check(re.sub("tokens$", "scores", found[0]), scores)


def _compare_long(record: Recording, name: str, lm: DecoderLM, params: Params, forward, cfg) -> None:
    """One pass, one token a call, blocks; what RoPE does beyond the trained length."""
    tokens = record.ints(f"{name}long_input_ids", 2, below=lm.vocab_size)
    length = tokens.shape[1]
    record.check(f"{name}long_logits_full", forward(tokens)[0])

    prefill = 0
    if f"{name}kv_prefill_len" in record:
        prefill = int(record.ints(f"{name}kv_prefill_len", 0, below=length + 1))
        logits, _ = _in_blocks(lm, params, tokens, [prefill] * (prefill > 0) + [1] * (length - prefill))
        record.check(f"{name}long_logits_kv_step", logits)
    if f"{name}kv_blocks" in record:
        blocks = record.ints(f"{name}kv_blocks", 1, below=length + 1).tolist()
        if prefill + sum(blocks) > length:
            raise record.fault(f"{name}kv_blocks", f"and the prefill are longer than the {length} long_input_ids")
        logits, cache = _in_blocks(lm, params, tokens, [n for n in (prefill, *blocks) if n])
        record.check(f"{name}long_logits_kv_blocks", logits)
        for part in "kv":
            filled = getattr(cache, part)[0, :, : prefill + sum(blocks)]
            record.check(f"{name}kv_cache_layer0_{part}", jnp.swapaxes(filled, 1, 2))

    for m in record.names(rf"{re.escape(name)}short_(fresh|after_long)_logits"):
        short = tokens[:, : record.input(m[0]).shape[1]]
        got = (
            forward(short)[0]
            if m[1] == "fresh"
            else _with_base(lm, params, _forward)(_base_after(lm, length), short)[0]
        )
        record.check(m[0], got)
    rope = (lm.head_dim, lm.rope_theta, lm.ntk_factor, lm.max_positions)
    for when, positions in (("initial", [[0, 1]]), ("after_long", [list(range(length))])):
        angles = layers.rope_angles(jnp.asarray(positions), *rope)
        record.check(f"{name}inv_freq_{when}", angles[0, 1])


def _in_blocks(lm: DecoderLM, params: Params, tokens: np.ndarray, sizes: list[int]):
    """Logits of all places, fed block by block through the cache; the cache."""
    step, out, at = _jitted(lm, params, _step), [], 0
    cache = lm.empty_cache(tokens.shape[0], sum(sizes))
    for size in sizes:
        logits, cache = step(tokens[:, at : at + size], cache, None)
        out.append(logits)
        at += size
    return jnp.concatenate(out, axis=1), cache


def _base_after(lm: DecoderLM, length: int) -> float:
    """RoPE base of the reference once it has seen sequences of some (padded) length.

    The reference keeps the largest base that it ever used, for all sequences; ours depends on each sequence
    alone. The recordings that show this are met by fixing the base.
    """
    if lm.ntk_factor <= 1 or length <= lm.max_positions:
        return lm.rope_theta
    grown = lm.ntk_factor * length / lm.max_positions - (lm.ntk_factor - 1)
    return lm.rope_theta * grown ** (lm.head_dim / (lm.head_dim - 2))


def _with_base(lm: DecoderLM, params: Params, method) -> Callable:
    """(base, *args) -> the method of a decoder whose RoPE has that base."""

    @jax.jit
    def run(p, base, *args):
        fixed = lm.clone(ntk_factor=1.0, rope_theta=base)
        return fixed.apply({"params": p}, *args, method=method)

    return lambda base, *args: run(params, base, *args)


def _generate(
    lm: DecoderLM, params: Params, ids: np.ndarray, mask: np.ndarray, steps: int, eos: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy ids [B, steps] and logits [B, steps, V] after left padded sequences."""
    lengths = mask.sum(1)
    rows = np.zeros_like(ids)
    for row, source, n in zip(rows, ids, lengths):
        row[:n] = source[-n:]
    padded = ids.shape[1]
    step = _with_base(lm, params, _step)
    cache = lm.empty_cache(len(ids), padded + steps)
    logits, cache = step(_base_after(lm, padded), rows, cache, jnp.asarray(lengths))
    last = np.asarray(logits)[np.arange(len(ids)), lengths - 1]
    tokens, scores, done = [], [], np.zeros(len(ids), bool)
    for i in range(steps):
        token = np.where(done, eos, last.argmax(-1))
        done |= token == eos
        tokens.append(token)
        scores.append(last)
        logits, cache = step(_base_after(lm, padded + i + 1), token[:, None], cache, jnp.ones(len(ids), jnp.int32))
        last = np.asarray(logits)[:, 0]
    return np.stack(tokens, 1), np.stack(scores, 1)
