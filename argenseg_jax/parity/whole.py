"""Recordings of kind F, the whole model: training here, decoding in parity/decoding."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax.interop import hf_config, hf_folder
from argenseg_jax.interop import torch as torch_convert
from argenseg_jax.models import variants
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.parity.decoding import compare_decoding, per_row
from argenseg_jax.parity.recording import LOSS, Recording, check_gradients
from argenseg_jax.parity.vq import nhwc
from argenseg_jax.train import losses
from argenseg_jax.vocab import IGNORE, SPECIAL_TOKENS

Params = Mapping[str, Any]


def model_section(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A recording's config.json -> the `model` section of our configuration."""
    vae = {ours: cfg["vae"][theirs] for theirs, ours in (
        ("ch", "ch"), ("ch_mult", "ch_mult"), ("num_res_blocks", "num_res_blocks"),
        ("z_channels", "z_channels"), ("vocab_size", "codebook_size"))}
    return hf_config.model_cfg_from_hf({
        "downsample_ratio": cfg.get("downsample_ratio", 0.5),
        "ps_version": cfg.get("ps_version", "v2"), **cfg,
        hf_config.OWN: {"vqvae": {**vae, "patch_nums": cfg["patch_nums"]},
                        "vocab": {"base": cfg["tokens"][SPECIAL_TOKENS[0]],
                                  "eos": cfg["eos_token_id_in_generate"],
                                  "pad": cfg["pad_token_id_in_generate"]}}})


def load_model(record: Recording) -> tuple[ARGenSeg, Params]:
    """The model of the recording's config.json, with its weights."""
    model = variants.build(model_section(record.config))
    params = torch_convert.to_jax(record.weights(), hf_folder.param_shapes(model),
                                  vocab_size=model.vocab.size, source=str(record.folder))
    return model, jax.tree.map(jnp.asarray, params)


def compare_training(record: Recording, model: ARGenSeg, params: Params) -> None:
    """Codes, inputs, logits, losses and gradients of one batch, then of its text-only row."""
    batch = _batch(record, model)

    def call(method, *args):
        return jax.jit(lambda p, *a: model.apply({"params": p}, *a, method=method))(params, *args)

    pixels = nhwc(record.input("train/pixel_values"))
    features = call("encode_images", pixels[None])
    record.check("train/vit_embeds_all_tiles",
                 features.reshape(len(pixels), -1, features.shape[-1]))
    masks = nhwc(record.input("train/masks"))
    codes = call("tokenize", masks[None])[0]
    record.check("train/mask_token_ids", codes)
    record.check("train/visual_embed_0",
                 call(lambda m, c: m.vqvae.quantizer.teacher_inputs(c), codes[:1]))
    inputs = call("visual_inputs", codes)
    for m in record.names(r"train/visual_embed_llm_s(\d+)"):
        record.check(m[0], inputs[:, ::int(m[1])])

    _compare_targets(record, model, params, batch)
    _compare_losses(record, model, params, batch)
    row = int((batch["tokens"] == model.vocab.mask_context).sum(1).argmin())
    length = record.config["train_lengths"][row]
    text_only = {name: x[row:row + 1, :length] for name, x in batch.items()
                 if name not in ("tiles", "masks")}
    text_only |= {name: batch[name][row:row + 1, :0] for name in ("tiles", "masks")}
    task = losses.lm_task(model, losses.LMOptions())
    loss, _ = task.loss(params, None, text_only, jax.random.key(0), task.normalizer(text_only))
    record.check("train_textonly/loss", loss, LOSS)
    hidden = call("hidden", *(text_only[n] for n in ("tokens", "positions", "segment_ids")))
    record.check("train_textonly/logits", call("logits", hidden)[..., :model.vocab.size])


def _batch(record: Recording, model: ARGenSeg) -> dict[str, np.ndarray]:
    """The recorded batch in our form: each row's own tiles and masks, dummies left out."""
    arrays = {name: record.input(f"train/{name}") for name in (
        "input_ids", "labels", "attention_mask", "position_ids", "image_flags", "mask_flags")}
    tokens = arrays["input_ids"]
    tiles = nhwc(record.input("train/pixel_values"))[arrays["image_flags"] == 1]
    masks = nhwc(record.input("train/masks"))[arrays["mask_flags"] == 1]
    return {
        "tokens": tokens, "labels": arrays["labels"], "positions": arrays["position_ids"],
        "segment_ids": arrays["attention_mask"].astype(np.int32),
        "tiles": per_row(tiles, (tokens == model.vocab.img_context).sum(1) // model.image_tokens),
        "masks": per_row(masks, (tokens == model.vocab.ge_start).sum(1))}


def _compare_targets(record: Recording, model: ARGenSeg, params: Params, batch) -> None:
    """Labels with codes, logits, and the cross entropy of each place."""
    def forward(p, b):
        def run(method, *args):
            return model.apply({"params": p}, *args, method=method)

        codes = run("tokenize", b["masks"])
        hidden = run("hidden", b["tokens"], b["positions"], b["segment_ids"],
                     run("encode_images", b["tiles"]), codes)
        ids, is_code, _ = losses.targets(model, b["labels"], codes)
        _, nll, _ = losses.token_nll(model, p, hidden, ids, is_code, jnp.zeros(ids.shape), losses.LMOptions())
        return run("logits", hidden)[..., :model.vocab.size], ids, is_code, nll

    logits, ids, is_code, nll = jax.jit(forward)(params, batch)
    with_codes = jnp.concatenate([batch["labels"][:, :1], ids[:, :-1]], axis=1)
    for name in ("labels_with_codes", "labels_after_call_in_place"):
        record.check(f"train/{name}", with_codes)
    record.check("train/is_gen_target", is_code[:, :-1])
    record.check("train/token_ce", jnp.where(ids == IGNORE, 0.0, nll)[:, :-1])
    record.check("train/logsumexp", jax.nn.logsumexp(logits, axis=-1),
                 where=batch["segment_ids"] > 0)  # padding attends to nothing of meaning
    for m in record.names(r"train/logits_rows_(\d+)"):
        places = record.input(f"train/logits_pos_{m[1]}")
        record.check(m[0], logits[int(m[1]), places])


def _compare_losses(record: Recording, model: ARGenSeg, params: Params, batch) -> None:
    """The training loss as the training loop computes it, and its gradient under torch names."""
    task = losses.lm_task(model, losses.LMOptions())

    def loss(trained, frozen, b):
        value, aux = task.loss({**trained, **frozen}, None, b, jax.random.key(0),
                               task.normalizer(b))
        return value, aux.metrics

    frozen = {"vqvae": params["vqvae"]}
    trained = {name: part for name, part in params.items() if name not in frozen}
    (_, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained, frozen, batch)
    for name in ("loss", "text_loss", "gen_loss"):
        record.check(f"train/{name}", metrics[name], LOSS)
    named = dict(torch_convert.to_torch(grads, vocab_size=model.vocab.size))
    for m in record.names(r"train_grad/pos_1LC_s(\d+)"):
        named[f"pos_1LC_s{m[1]}"] = named["pos_1LC"][:, ::int(m[1])]
    embedding = np.asarray(grads["llm"]["embed"]["embedding"])
    named["tok_embeddings_special_rows"] = embedding[model.vocab.base:model.vocab.first_code]
    check_gradients(record, "train_grad/", named, record.config.get("train_grad_norms", {}))


def compare_model(record: Recording) -> None:
    """Training, then decoding."""
    model, params = load_model(record)
    if any(record.names(r"train/.*")):
        compare_training(record, model, params)
    compare_decoding(record, model, params)
