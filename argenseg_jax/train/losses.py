"""What is trained: the LM task (text CE + code CE) and the VQ-VAE task, as the loop sees them.

Axes: B sequences, T tokens, D model width, V padded vocabulary, M masks per sequence, R their side, Q
codebook entries (and code tokens); num_codes is the number of codes per mask.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax import sharding, trees
from argenseg_jax.models import chunked
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.layers import DENSE, GradIn, head_product
from argenseg_jax.models.lora import Lora
from argenseg_jax.train import vqvae_loss
from argenseg_jax.train.state import Aux, Batch, Params, Task
from argenseg_jax.vocab import IGNORE

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LMOptions:
    """Departures from the loss of the paper; all off by default.

    Attributes:
      soft_targets: temperature of a softmax over distances between codes; the targets then spread
        over near codes, since many codes decode to almost the same patch. 0 = one-hot.
      scale_power: the weight of a code is (codes of its scale) ** -power, normalized. 0 = all equal.
      foreground: weight of codes other than code 0 (nano's code of an empty patch). 1 = all equal.
      text: weight of the text loss relative to that of the codes. A short answer is a small part of
        the text targets of a mixture, most of which are the fixed tokens around a mask.
      corrupt: up to this fraction of the input codes is replaced by random ones, so that decoding
        learns to recover from its own mistakes. 0 = never.
      chunk: number of positions whose logits are in memory at a time; 0 = all. No extra FLOPs.
      scale_accuracy: also log the accuracy of the codes of each scale.
      max_labels: at most this many targets per sequence; the head reads only these positions. 0 = all.
      grad_dtype: of the gradients of the head and of dense layers, in which they are summed over
        devices (that of the head over chunks always in f32); '' = that of the computation.
      packed: whether sequences may hold several samples; if False, none does.
    """

    soft_targets: float = 0.0
    scale_power: float = 0.0
    foreground: float = 1.0
    text: float = 1.0
    corrupt: float = 0.0
    chunk: int = 0
    scale_accuracy: bool = False
    max_labels: int = 0
    grad_dtype: str = ""
    packed: bool = True


def targets(model: ARGenSeg, labels: Array, codes: Array | None) -> tuple[Array, Array, Array]:
    """The target of the logits at each position: the labels, shifted by one.

    Args:
      labels: int32[B, T]: IGNORE, a text id, or <MASK_CONTEXT> for a code.
      codes: int32[B, M, num_codes] or None.

    Returns:
      ids int32[B, T] (IGNORE = no target), is_code bool[B, T], and the index int32[B, T] of the code
      among the M * num_codes of the sequence.
    """
    ids = jnp.concatenate([labels[:, 1:], jnp.full_like(labels[:, :1], IGNORE)], axis=1)  # [B, T]
    is_code = ids == model.vocab.mask_context  # [B, T]
    index = jnp.cumsum(is_code, axis=1) - 1  # [B, T]
    if codes is not None:
        flat = codes.reshape(codes.shape[0], -1)  # [B, M * num_codes]
        at = jnp.clip(index, 0, flat.shape[1] - 1)
        ids = jnp.where(is_code, model.vocab.first_code + jnp.take_along_axis(flat, at, axis=1), ids)
    return ids, is_code, index


def token_nll(
    model: ARGenSeg, params: Params, hidden: Array, ids: Array, is_code: Array, weight: Array, opts: LMOptions
) -> tuple[Array, Array, Array]:
    """Negative log likelihoods of the targets, and their weighted sum, the only differentiable result.

    The softmax is over the full vocabulary, for text and for codes. With soft targets the likelihood
    of a code is averaged over codes by their distance.

    Args:
      hidden: [B, T, D], the last hidden states.
      ids, is_code: of `targets`.
      weight: f32[B, T], 0 = no target; a constant.

    Returns:
      The sum f32[]; nll f32[B, T]; and bool[B, T], whether the target has the largest logit.
    """
    first, size = model.vocab.first_code, model.vocab.num_codes
    neighbours = None
    if opts.soft_targets:
        codebook = jax.lax.stop_gradient(params["vqvae"]["quantizer"]["codebook"])
        neighbours = code_neighbours(codebook, opts.soft_targets, zero_first=bool(model.vqvae.dead_zone))

    t = hidden.shape[1]
    chunk = opts.chunk if 0 < opts.chunk < t else t
    if t % chunk:
        raise ValueError(f"train.loss.chunk={opts.chunk} does not divide the {t} positions of a sequence")

    def chunk_nll(hidden: Array, head: Array, labels: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        ids, is_code, weight = labels
        logits = head_product(hidden, head, model.vocab.size)  # [B, T, V]
        logits = sharding.constrain(logits, None, None, "act_vocab")
        log_z = jax.nn.logsumexp(logits, axis=-1)  # [B, T]
        # A comparison, not a gather: a gather's gradient is a scatter, and V may be sharded.
        at = jnp.maximum(ids, 0)[..., None]  # [B, T, 1]
        target_logit = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == at, logits, 0), axis=-1)  # [B, T]
        correct = target_logit >= jnp.max(logits, axis=-1)  # [B, T]; argmax is several times slower on CPUs
        if neighbours is not None:
            probs = neighbours[jnp.clip(ids - first, 0, size - 1)]  # [B, T, Q]
            soft = jnp.sum(probs * logits[..., first : first + size], axis=-1)  # [B, T]
            target_logit = jnp.where(is_code, soft, target_logit)
        nll = log_z - target_logit  # [B, T]
        return jnp.sum(weight * nll), (nll, correct)

    def local(hidden: Array, ids: Array, is_code: Array, weight: Array, head: Array) -> tuple[Array, Array, Array]:
        total, (nll, correct) = in_chunks(chunk_nll, chunk)(hidden, head, (ids, is_code, weight))
        return total[None], nll, correct  # one sum per device

    # Cast before the all-gather: half the bytes to send.
    head = model.apply({"params": params}, method="head_matrix").astype(opts.grad_dtype or model.llm.dtype)
    total, nll, correct = sharding.data_parallel(local, (hidden, ids, is_code, weight), head)
    return jnp.sum(total), nll, correct


def in_chunks(function: Callable[..., tuple[Array, Any]], chunk: int) -> Callable[..., tuple[Array, Any]]:
    """`function`, summed over chunks of T: (x [B, T, D], head, constants [B, T]) -> (sum f32[], aux [B, T]).

    `function` has the same arguments and results for T = chunk; constants and aux are trees. The
    gradients of the sum, dx and dhead, are computed chunk by chunk in the forward pass, so that no logits
    are stored and none are computed twice. dhead is accumulated in f32, whatever the head's dtype, and
    rounded to it once: 4 bytes per entry of the head while the loss is computed.
    """

    def split(x: Array) -> Array:  # [B, T, ...] -> [chunks, B, chunk, ...]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def joined(x: Array) -> Array:  # [chunks, B, chunk, ...] -> [B, T, ...]
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    @jax.custom_vjp
    def run(x: Array, head: Array, constants: Any) -> tuple[Array, Any]:
        totals, aux = jax.lax.map(lambda args: function(args[0], head, args[1]), jax.tree.map(split, (x, constants)))
        return jnp.sum(totals), jax.tree.map(joined, aux)

    def forward(x: Array, head: Array, constants: Any) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
        def step(dhead: Array, args: tuple[Array, Any]) -> tuple[Array, tuple[Array, Any, Array]]:
            # A head in f32 has its gradient in f32; `function` casts it back, and XLA drops both casts.
            (total, aux), (dx, dhead_of_chunk) = jax.value_and_grad(function, (0, 1), has_aux=True)(
                args[0], head.astype(jnp.float32), args[1]
            )
            return dhead + dhead_of_chunk, (total, aux, dx)

        dhead, (totals, aux, dx) = jax.lax.scan(
            step, jnp.zeros(head.shape, jnp.float32), jax.tree.map(split, (x, constants))
        )
        return (jnp.sum(totals), jax.tree.map(joined, aux)), (joined(dx), dhead.astype(head.dtype))

    def backward(residuals: tuple[Array, Array], grads: tuple[Array, Any]) -> tuple[Array, Array, None]:
        dx, dhead = (grads[0].astype(x.dtype) * x for x in residuals)
        return dx, dhead, None

    run.defvjp(forward, backward)
    return run


def code_neighbours(codebook: Array, temperature: float, zero_first: bool) -> Array:
    """f32[Q, Q]: row q is a softmax over -distance^2 / temperature from code q to all codes, in units of
    the mean squared distance of a code to its nearest other code."""
    e = codebook.astype(jnp.float32)
    if zero_first:
        e = e.at[0].set(0.0)
    sq = jnp.sum(e * e, axis=-1)  # [Q]
    distance = jnp.maximum(sq[:, None] + sq[None] - 2 * jnp.dot(e, e.T, precision="highest"), 0.0)  # [Q, Q]
    nearest = jnp.min(distance + 1e9 * jnp.eye(len(e)), axis=-1)  # [Q]
    return jax.nn.softmax(-distance / (temperature * jnp.mean(nearest) + 1e-12), axis=-1)


def code_weights(model: ARGenSeg, opts: LMOptions, ids: Array, index: Array) -> Array:
    """f32[B, T]: the weight of each code target; its mean over a mask is 1 if opts.foreground is 1."""
    per_scale = np.asarray([pn * pn for pn in model.scales.patch_nums], np.float32) ** -opts.scale_power
    weight = per_scale[model.scales.levels]  # [num_codes]
    weight = jnp.asarray(weight / weight.mean())[jnp.maximum(index, 0) % len(weight)]
    return jnp.where(ids == model.vocab.first_code, 1.0, opts.foreground) * weight


def lm_loss(
    model: ARGenSeg,
    params: Params,
    batch: Batch,
    rng: Array,
    norm: Mapping[str, Array],
    opts: LMOptions,
    *,
    deterministic: bool = False,
) -> tuple[Array, Aux]:
    """CE(text) + CE(codes), each a mean over its own targets in the batch: the training objective of the paper.

    `batch` is a microbatch, `norm` the counts of the full batch (of `Task.normalizer`)."""
    drop, noise, amount, which = jax.random.split(rng, 4)

    def run(method: str, *args, **kwargs):
        return model.apply({"params": params}, *args, method=method, rngs={"dropout": drop}, **kwargs)

    codes = features = None
    if batch["masks"].shape[1]:
        if batch["masks"].ndim == 3:  # int32[B, M, num_codes]: tokenized by `prepare`
            codes = batch["masks"]
        else:  # frozen, with by far the largest activations: 40 MiB per mask in the official VQ-VAE
            codes = chunked.chunked_map(
                lambda masks: run("tokenize", masks),
                batch["masks"],
                batch["masks"].shape[1] * model.vqvae.bytes_per_image,
            )
        codes = jax.lax.stop_gradient(codes)
    if batch["tiles"].shape[1]:
        features = run("encode_images", batch["tiles"], deterministic=deterministic)
    inputs = codes
    if codes is not None and opts.corrupt and not deterministic:
        rate = opts.corrupt * jax.random.uniform(amount, (codes.shape[0], codes.shape[1], 1))
        hit = jax.random.uniform(noise, codes.shape) < rate  # [B, M, num_codes]
        random_codes = jax.random.randint(which, codes.shape, 0, model.vocab.num_codes)
        inputs = jnp.where(hit, random_codes, codes)
    hidden = run(
        "hidden", batch["tokens"], batch["positions"], batch["segment_ids"], features, inputs, packed=opts.packed
    )
    ids, is_code, index = targets(model, batch["labels"], codes)
    if 0 < opts.max_labels < ids.shape[1]:
        # Positions with a target first, in order; the data pipeline has checked that there are no more.
        positions = jnp.argsort(ids == IGNORE, axis=1, stable=True)[:, : opts.max_labels]  # [B, max_labels]
        ids, is_code, index = (jnp.take_along_axis(x, positions, axis=1) for x in (ids, is_code, index))
        hidden = jnp.take_along_axis(hidden, positions[..., None], axis=1)  # [B, max_labels, D]; T from here on
    is_text = (ids != IGNORE) & ~is_code
    code_weight = jnp.where(is_code, code_weights(model, opts, ids, index) / norm["codes"], 0.0)
    weight = jnp.where(is_text, opts.text / norm["text"], code_weight)  # [B, T]
    with jax.named_scope("loss"):
        loss, nll, correct = token_nll(model, params, hidden, ids, is_code, weight, opts)
    text_loss = jnp.sum(jnp.where(is_text, nll, 0.0)) / norm["text"]
    gen_loss = jnp.sum(code_weight * nll)
    accuracy = jnp.sum(is_code & correct) / norm["codes"]
    by_scale = {}
    if opts.scale_accuracy:
        level = jnp.asarray(model.scales.levels)[jnp.maximum(index, 0) % model.scales.num_codes]  # [B, T]
        for k, side in enumerate(model.scales.patch_nums):
            count = norm["codes"] * (side * side / model.scales.num_codes)  # each mask has all scales
            by_scale[f"code_accuracy_{k}"] = jnp.sum(is_code & correct & (level == k)) / count
    return loss, Aux(
        {"loss": loss, "text_loss": text_loss, "gen_loss": gen_loss, "code_accuracy": accuracy, **by_scale}
    )


def lm_task(model: ARGenSeg, opts: LMOptions, lora: Lora = Lora()) -> Task:
    """Fine-tunes everything except the VQ-VAE; with adapters, only them and what `lora.also` names."""
    summed = jnp.dtype(opts.grad_dtype) if opts.grad_dtype else None

    def normalizer(batch: Batch) -> dict[str, Array]:
        ids, is_code, _ = targets(model, batch["labels"], None)
        text = jnp.sum((ids != IGNORE) & ~is_code)
        return {
            "text": jnp.maximum(text, 1).astype(jnp.float32),
            "codes": jnp.maximum(jnp.sum(is_code), 1).astype(jnp.float32),
        }

    def loss(params: Params, extra: Any, batch: Batch, rng: Array, norm: Any) -> tuple[Array, Aux]:
        params = lora.adapted(params)
        if summed:
            params = trees.map_named(
                lambda path, x: GradIn(x, summed) if isinstance(x, jax.Array) and re.fullmatch(DENSE, path) else x,
                params,
            )
        return lm_loss(model, params, batch, rng, norm, opts)

    return Task("lm", ("vqvae/.*", *lora.held()), lambda params: None, normalizer, loss)


def vqvae_task(model: ARGenSeg) -> Task:
    """Trains only the VQ-VAE, on masks u8[B, R, R, 3]."""

    def loss(params: Params, extra: Any, batch: Batch, rng: Array, norm: Any) -> tuple[Array, Aux]:
        masks = batch["masks"].astype(jnp.float32) / 255 * 2 - 1
        value, metrics, overrides, state = vqvae_loss.vqvae_loss(model.vqvae, params["vqvae"], masks, rng, extra)
        weight = len(masks) / norm["images"]
        return value * weight, Aux(
            {k: v * weight for k, v in {"loss": value, **metrics}.items()},
            {f"vqvae/{k}": v for k, v in overrides.items()},
            state,
        )

    return Task(
        "vqvae",
        ("(vision|connector|llm|visual)/.*", f"vqvae/{vqvae_loss.CODEBOOK}"),
        lambda params: vqvae_loss.init_state(model.vqvae),
        lambda batch: {"images": jnp.float32(batch["masks"].shape[0])},
        loss,
        overridden=(f"vqvae/{vqvae_loss.CODEBOOK}",),
    )
