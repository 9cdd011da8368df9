"""Training loss of the mask VQ-VAE, with a codebook that follows the data by moving averages.

The codebook has no gradient: each code moves to the running mean of the vectors assigned to it, and an
unused code restarts at a vector with a large quantization error (chosen as in k-means++). Axes: B batch,
R image side, c image channels, Q codebook entries, C latent channels, n = B * (codes per image) vectors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from argenseg_jax.models.quantizer import Quantized
from argenseg_jax.models.vqvae import VQVAE

Arrays = dict[str, jax.Array]
CODEBOOK = "quantizer/codebook"  # the leaf set directly, within the VQ-VAE's parameters


@dataclasses.dataclass(frozen=True)
class VqvaeLossOptions:
    """Weights and thresholds of the loss.

    Attributes:
      decay: of the running means.
      min_hits: uses per step below which a code restarts.
      sharpness: of the sigmoid that maps a decoded grey value to a probability of foreground.
      l2, vq: weights of the squared error and of the quantizer's loss; the cross entropy has 1.
      mix: probability of each of the two combinations with other masks of the batch (mix_masks).
    """

    decay: float = 0.97
    min_hits: float = 0.1
    sharpness: float = 4.0
    l2: float = 0.1
    vq: float = 0.25
    mix: float = 0.7


def init_state(model: VQVAE) -> Arrays:
    """Running means per step: uses of each code, hits f32[Q], and sums of their vectors, sums f32[Q, C].

    All zero: the first step moves the used codes to the means of its batch and restarts the others.
    """
    return {"hits": jnp.zeros(model.codebook_size), "sums": jnp.zeros((model.codebook_size, model.z_channels))}


def vqvae_loss(
    model: VQVAE,
    params: Any,
    masks: jax.Array,
    rng: jax.Array,
    state: Arrays,
    opts: VqvaeLossOptions = VqvaeLossOptions(),
) -> tuple[jax.Array, Arrays, Arrays, Arrays]:
    """Loss of one batch, and what the codebook becomes after it.

    Args:
      params: the VQ-VAE's own tree.
      masks: f32[B, R, R, 3] in [-1, 1].
      rng: for mixing masks and restarting unused codes.
      state: of init_state, or of the previous step.
      opts: weights and thresholds.

    Returns:
      (loss f32[], metrics (of the mixed masks), overrides {leaf name: array}, new state).
    """
    mix_rng, rng = jax.random.split(rng)
    grey = model.patch_size > 1  # such a model has no colours: one channel is enough
    masks = mix_masks(mix_rng, masks[..., :1] if grey else masks, opts.mix)  # [B, R, R, c]
    recon, vq_loss, quantized = model.apply(
        {"params": params}, jnp.repeat(masks, 3, axis=-1) if grey else masks, method=VQVAE.forward_train
    )
    recon = recon[..., :1] if grey else recon  # [B, R, R, c]
    logits, target = opts.sharpness * recon, (masks + 1) / 2
    bce = jnp.mean(jax.nn.softplus(logits) - target * logits)
    mse = jnp.mean((jnp.clip(recon, -1, 1) - masks) ** 2)
    new_codebook, new_state, usage = jax.lax.stop_gradient(
        update_codebook(params["quantizer"]["codebook"], quantized, rng, state, opts.decay, opts.min_hits)
    )
    if model.dead_zone:
        new_codebook = new_codebook.at[0].set(0.0)
    metrics = {"bce": bce, "mse": mse, "vq": vq_loss, "iou": batch_iou(recon, masks), **usage}
    loss = bce + opts.l2 * mse + opts.vq * vq_loss
    return loss, metrics, {CODEBOOK: new_codebook}, new_state


def mix_masks(rng: jax.Array, masks: jax.Array, share: float) -> jax.Array:
    """Replaces masks [B, R, R, c] in [-1, 1], with probability `share`, by their exclusive or with shifted
    other masks of the batch; done twice.

    Most patches of most masks are empty or full and soon learned; the exclusive or has the outlines of
    both masks, so that one step is worth several.
    """
    side = masks.shape[1]
    for key in jax.random.split(rng, 2 if share else 0):
        which, shift, keep = jax.random.split(key, 3)
        dy, dx = jax.random.randint(shift, (2,), 0, side)
        other = jnp.roll(jax.random.permutation(which, masks), (dy, dx), axis=(1, 2))
        chosen = jax.random.bernoulli(keep, share, (masks.shape[0], 1, 1, 1))
        masks = jnp.where(chosen, -masks * other, masks)  # xor of -1 and 1
    return masks


def update_codebook(
    codebook: jax.Array, quantized: Quantized, rng: jax.Array, state: Arrays, decay: float, min_hits: float
) -> tuple[jax.Array, Arrays, Arrays]:
    """One step of the moving averages: (codebook f32[Q, C], state, usage metrics)."""
    size, channels = codebook.shape
    codes, vectors = quantized.codes.reshape(-1), quantized.targets.reshape(-1, channels)  # [n], [n, C]
    hits = jnp.zeros(size).at[codes].add(1.0)  # [Q]
    sums = jnp.zeros((size, channels)).at[codes].add(vectors)  # [Q, C]
    mean_hits = decay * state["hits"] + (1 - decay) * hits
    mean_sums = decay * state["sums"] + (1 - decay) * sums
    moved = mean_sums / jnp.maximum(mean_hits, 1e-6)[:, None]

    # Restarts at vectors sampled in proportion to their squared error (as in k-means++), without
    # replacement (Gumbel top-k).
    error = jnp.sum((vectors - codebook[codes]) ** 2, axis=-1)  # [n]
    score = jnp.log(error + 1e-12) + jax.random.gumbel(rng, error.shape)
    fresh = vectors[jax.lax.top_k(score, min(size, score.size))[1]]
    fresh = jnp.resize(fresh, (size, channels))
    dead = mean_hits < min_hits  # [Q]
    # A restarted code starts at twice the threshold, so that it has time to find its own vectors.
    start = 2 * min_hits
    new_state = {"hits": jnp.where(dead, start, mean_hits), "sums": jnp.where(dead[:, None], start * fresh, mean_sums)}
    share = hits / hits.sum()
    usage = {
        "codes_used": jnp.mean(hits > 0),
        "codes_restarted": jnp.mean(dead),
        "code_entropy": -jnp.sum(share * jnp.log(share + 1e-12)),
    }
    return jnp.where(dead[:, None], fresh, moved), new_state, usage


def batch_iou(recon: jax.Array, masks: jax.Array) -> jax.Array:
    """Mean IoU over the batch, of images [B, R, R, c] thresholded at 0; 1 if both masks are empty."""
    a, b = recon.mean(-1) > 0, masks.mean(-1) > 0
    inter, union = jnp.sum(a & b, (1, 2)), jnp.sum(a | b, (1, 2))
    return jnp.mean(jnp.where(union > 0, inter / jnp.maximum(union, 1), 1.0))
