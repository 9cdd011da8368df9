"""Recordings of kind F, the whole model: training here, decoding in parity/decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax.interop import hf_config, hf_folder
from argenseg_jax.interop import state_dict as torch_convert
from argenseg_jax.models import variants
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.parity.decoding import compare_decoding, flagged_tiles, per_row, tile_counts
from argenseg_jax.parity.recording import LOSS, Recording, check_gradients
from argenseg_jax.parity.vq import nhwc
from argenseg_jax.train import losses
from argenseg_jax.vocab import IGNORE, SPECIAL_TOKENS

Params = Mapping[str, Any]
# Official name -> ours.
_VAE = {
    "vocab_size": "codebook_size",
    "share_quant_resi": "num_phi",
    "quant_resi": "phi_ratio",
    **{name: name for name in ("ch", "ch_mult", "num_res_blocks", "z_channels", "beta", "using_sa", "using_mid_sa")},
}


def model_section(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A recording's config.json -> the `model` section of our configuration."""
    vae = {_VAE[name]: value for name, value in cfg["vae"].items() if name in _VAE}
    return hf_config.model_cfg_from_hf(
        {
            "downsample_ratio": cfg.get("downsample_ratio", 0.5),
            "ps_version": cfg.get("ps_version", "v2"),
            **cfg,
            hf_config.OWN: {
                "vqvae": {**vae, "patch_nums": cfg["patch_nums"]},
                "vocab": {
                    "base": cfg["tokens"][SPECIAL_TOKENS[0]],
                    "eos": cfg["eos_token_id_in_generate"],
                    "pad": cfg["pad_token_id_in_generate"],
                },
            },
        }
    )


def load_model(record: Recording) -> tuple[ARGenSeg, Params]:
    """The model of the recording's config.json, with its weights."""
    model = variants.build(model_section(record.config))
    params = torch_convert.to_jax(
        record.weights(), hf_folder.param_shapes(model), vocab_size=model.vocab.size, source=str(record.folder)
    )
    return model, jax.tree.map(jnp.asarray, params)


def compare_training(record: Recording, model: ARGenSeg, params: Params) -> None:
    """Codes, inputs, logits, losses and gradients of one batch, then of its row without masks."""
    batch = _batch(record, model)

    def call(method, *args):
        return jax.jit(lambda p, *a: model.apply({"params": p}, *a, method=method))(params, *args)

    if "train/vit_embeds_all_tiles" in record:
        pixels = nhwc(record.input("train/pixel_values", 4))
        features = call("encode_images", pixels[None])
        record.check("train/vit_embeds_all_tiles", features.reshape(len(pixels), -1, features.shape[-1]))
    if "train/masks" in record and len(masks := nhwc(record.input("train/masks", 4))):
        codes = call("tokenize", masks[None])[0]
        record.check("train/mask_token_ids", codes)
        record.check("train/visual_embed_0", call(lambda m, c: m.vqvae.quantizer.teacher_inputs(c), codes[:1]))
        inputs = call("visual_inputs", codes)
        for m in record.names(r"train/visual_embed_llm(?:_s(\d+))?"):
            record.check(m[0], inputs[:, :: int(m[1] or 1)])

    _compare_targets(record, model, params, batch)
    _compare_losses(record, model, params, batch)
    if any(record.names("train_textonly/.*")):
        text_only = _text_only(record, model, batch)
        task = losses.lm_task(model, losses.LMOptions())
        loss, _ = task.loss(params, None, text_only, jax.random.key(0), task.normalizer(text_only))
        record.check("train_textonly/loss", loss, LOSS)
        features = call("encode_images", text_only["tiles"]) if text_only["tiles"].shape[1] else None
        hidden = call("hidden", *(text_only[n] for n in ("tokens", "positions", "segment_ids")), features)
        record.check("train_textonly/logits", call("logits", hidden)[..., : model.vocab.size])


def _batch(record: Recording, model: ARGenSeg) -> dict[str, np.ndarray]:
    """The recorded batch in our form: each row's own tiles and masks, dummies left out."""
    tokens = record.ints("train/input_ids", 2, below=model.vocab.size)
    ones = np.ones_like(tokens)
    real = record.ints("train/attention_mask", 2, default=ones)
    batch = {
        "tokens": tokens,
        "labels": record.ints("train/labels", 2),
        "positions": record.ints("train/position_ids", 2, default=np.maximum(np.cumsum(real, 1) - 1, 0)),
        "segment_ids": real,
    }
    for name, array in (("labels", "labels"), ("positions", "position_ids"), ("segment_ids", "attention_mask")):
        if batch[name].shape != tokens.shape:
            raise record.fault(
                f"train/{array}", f"has the shape {batch[name].shape}, not that of the input_ids {tokens.shape}"
            )
    empty = np.zeros((0, 1, 1, 3), np.float32)
    counts = tile_counts(record, "train/input_ids", tokens, model)
    tiles = flagged_tiles(record, "train/", model) if counts.any() else empty
    if len(tiles) != counts.sum():
        raise record.fault("train/pixel_values", f"has {len(tiles)} tiles for the {counts.sum()} in the rows")
    batch["tiles"] = per_row(tiles, counts)
    counts = (tokens == model.vocab.ge_start).sum(1)
    masks = _flagged_masks(record, model) if counts.any() else empty
    if len(masks) != counts.sum():
        raise record.fault("train/masks", f"has {len(masks)} masks for the {counts.sum()} in the rows")
    batch["masks"] = per_row(masks, counts)
    return batch


def _flagged_masks(record: Recording, model: ARGenSeg) -> np.ndarray:
    side = model.mask_size
    masks = nhwc(record.floats("train/masks", (None, 3, side, side)))
    flags = record.ints("train/mask_flags", 1, default=np.ones(len(masks)))
    if len(flags) != len(masks):
        raise record.fault("train/mask_flags", f"has {len(flags)} flags for {len(masks)} masks")
    return masks[flags == 1]


def _text_only(record: Recording, model: ARGenSeg, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The row without masks, cut to its length, with the tiles that it has."""
    row = int((batch["tokens"] == model.vocab.mask_context).sum(1).argmin())
    length = int((batch["segment_ids"][row] > 0).sum())
    tiles = tile_counts(record, "train/input_ids", batch["tokens"][row : row + 1], model)[0]
    cut = {"tiles": tiles, "masks": 0}
    return {name: x[row : row + 1, : cut.get(name, length)] for name, x in batch.items()}


def _compare_targets(record: Recording, model: ARGenSeg, params: Params, batch) -> None:
    """Labels with codes, logits, and the cross entropy of each place."""

    def forward(p, b):
        def run(method, *args):
            return model.apply({"params": p}, *args, method=method)

        codes = run("tokenize", b["masks"]) if b["masks"].shape[1] else None
        features = run("encode_images", b["tiles"]) if b["tiles"].shape[1] else None
        hidden = run("hidden", b["tokens"], b["positions"], b["segment_ids"], features, codes)
        ids, is_code, _ = losses.targets(model, b["labels"], codes)
        _, nll, _ = losses.token_nll(model, p, hidden, ids, is_code, jnp.zeros(ids.shape), losses.LMOptions())
        return run("logits", hidden)[..., : model.vocab.size], ids, is_code, nll

    logits, ids, is_code, nll = jax.jit(forward)(params, batch)
    with_codes = jnp.concatenate([batch["labels"][:, :1], ids[:, :-1]], axis=1)
    for name in ("labels_with_codes", "labels_after_call_in_place"):
        record.check(f"train/{name}", with_codes)
    record.check("train/is_gen_target", is_code[:, :-1])
    record.check("train/token_ce", jnp.where(ids == IGNORE, 0.0, nll)[:, :-1])
    record.check(
        "train/logsumexp", jax.nn.logsumexp(logits, axis=-1), where=batch["segment_ids"] > 0
    )  # padding attends to nothing of meaning
    for m in record.names(r"train/logits_rows_(\d+)"):
        places = record.ints(f"train/logits_pos_{m[1]}", 1, below=logits.shape[1])
        if int(m[1]) < len(logits):
            record.check(m[0], logits[int(m[1]), places])


def _compare_losses(record: Recording, model: ARGenSeg, params: Params, batch) -> None:
    """The training loss as the training loop computes it, and its gradient under torch names."""
    task = losses.lm_task(model, losses.LMOptions())

    def loss(trained, frozen, b):
        value, aux = task.loss({**trained, **frozen}, None, b, jax.random.key(0), task.normalizer(b))
        return value, aux.metrics

    frozen = {"vqvae": params["vqvae"]}
    trained = {name: part for name, part in params.items() if name not in frozen}
    (_, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained, frozen, batch)
    for name in ("loss", "text_loss", "gen_loss"):
        record.check(f"train/{name}", metrics[name], LOSS)
    named = dict(torch_convert.to_torch(grads, vocab_size=model.vocab.size))
    for m in record.names(r"train_grad/pos_1LC_s([1-9]\d*)"):
        named[f"pos_1LC_s{m[1]}"] = named["pos_1LC"][:, :: int(m[1])]
    embedding = np.asarray(grads["llm"]["embed"]["embedding"])
    named["tok_embeddings_special_rows"] = embedding[model.vocab.base : model.vocab.first_code]
    check_gradients(record, "train_grad/", named, record.config.get("train_grad_norms", {}))


def compare_model(record: Recording) -> None:
    """Training, then decoding."""
    model, params = load_model(record)
    if any(record.names(r"train/.*")):
        compare_training(record, model, params)
    compare_decoding(record, model, params)
