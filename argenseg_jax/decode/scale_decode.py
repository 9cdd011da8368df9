"""From <ge_start> to codes: Z scale-parallel cached steps in one jit (paper section 3.3).

Axes: see models/__init__.
Functions take a bound ARGenSeg `m`; wrap them with `nn.apply(fn, model)`.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from argenseg_jax.decode.sampling import sample_tokens
from argenseg_jax.decode.text_decode import Answer
from argenseg_jax.models import chunked
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.kv_cache import KVCache

Array = jax.Array


@flax.struct.dataclass
class MaskCodes:
    """What one mask decoding yields.

    Attributes:
      codes: int32[B, U].
      confidence: f32[B], mean probability of the chosen codes.
      f_hats: f32[B, Z, h, w, C], the accumulated latent after each scale.
    """

    codes: Array
    confidence: Array
    f_hats: Array


def decode_codes(m: ARGenSeg, answer: Answer) -> tuple[MaskCodes, KVCache]:
    """Codes of one mask for every sequence, all scales unrolled; sequences not at a mask keep their cache.

    The input of position i predicts the code of position i: <ge_start> the only code of scale 0, then
    each scale's positions carry the interpolated sum of the scales before (paper section 3.2). Guidance
    grows with the scales.
    """
    config, cache, b = answer.config, answer.cache, len(answer.at_mask)
    q = m.vqvae.quantizer
    block_mask = "full" if m.block_causal else "causal"
    f_hat = jnp.zeros((b, m.scales.side, m.scales.side, q.channels), jnp.float32)
    start = answer.token if config.reference else jnp.full_like(answer.token, m.vocab.ge_start)
    x = m.llm.embed_tokens(start[:, None])
    codes, chosen, f_hats = [], [], []
    for k, (begin, end) in enumerate(m.scales.bounds):
        with jax.named_scope(f"scale_{k}"):
            if k:
                x = config.duplicate_for_cfg(m.scale_inputs(f_hat, k))
            coords = jnp.broadcast_to(jnp.asarray(m.scales.centers[begin:end]), (len(x), end - begin, 2))
            positions = cache.length[:b, None] + jnp.arange(end - begin)
            hidden, cache = m.extend(
                x, coords, cache, config.duplicate_for_cfg(answer.at_mask) * (end - begin), block_mask
            )
            logits = config.guide(m.code_logits(hidden), k / max(len(m.scales) - 1, 1))  # [B, pn^2, Q]
            best = sample_tokens(logits, config.codes, positions)  # [B, pn^2]
            likely = jnp.take_along_axis(logits, best[..., None], axis=-1)[..., 0]
            chosen.append(jnp.exp(likely - jax.nn.logsumexp(logits, axis=-1)))
            codes.append(best)
            f_hat = q.accumulate(f_hat, best, k)
            f_hats.append(f_hat)
    return MaskCodes(
        jnp.concatenate(codes, 1), jnp.mean(jnp.concatenate(chosen, 1), axis=1), jnp.stack(f_hats, axis=1)
    ), cache


def to_floats(m: ARGenSeg, f_hat: Array) -> Array:
    """f_hat f32[B, h, w, C] -> f32[B, R, R, 3] in [-1, 1]."""
    vqvae, weights = m.vqvae.unbind()
    return chunked.chunked_map(lambda f_hat: vqvae.apply(weights, f_hat, method="decode"), f_hat, vqvae.bytes_per_image)


def to_bytes(image: Array) -> Array:
    """Floats in [-1, 1] -> u8, by truncation of (x + 1) / 2 * 255."""
    return ((image + 1) / 2 * 255).astype(jnp.uint8)


def to_image(m: ARGenSeg, f_hat: Array) -> Array:
    """f_hat f32[B, h, w, C] -> u8[B, R, R, 3]."""
    return to_bytes(to_floats(m, f_hat))
