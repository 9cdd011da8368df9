"""The decoding half of kind F: greedy text and masks, step by step, with and without guidance.

The steps are spelled out here because a recording holds what is fed and what comes out at each of
them; then decode/ answers the same prompts in its own way.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax.decode import engine
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.parity.recording import EQUAL, IMAGE, IMAGE_U8, Recording
from argenseg_jax.parity.vq import nchw, nhwc

Params = Mapping[str, Any]


def compare_decoding(record: Recording, model: ARGenSeg, params: Params) -> None:
    """`infer/` (one row) and `infer_cfg/` (a conditional and an unconditional row)."""
    for part, scale in (("infer", 0.0), ("infer_cfg", record.config.get("cfg_scale", 0.0))):
        if f"{part}/input_ids" in record:
            _Replay(record, model, params, f"{part}/", scale).run()
            _compare_engine(record, model, params, f"{part}/", scale)


def _compare_engine(record: Recording, model: ARGenSeg, params: Params, name: str, scale: float
                    ) -> None:
    """The compiled decoder on the same prompt, and with guidance on the other one: ids, codes, images."""
    want = record.input(f"{name}generated_tokens")[:1]
    masks = int(record.input(f"{name}call_kinds_1_is_mask").sum())
    rows, lengths = unpadded(record.input(f"{name}input_ids"), record.input(f"{name}attention_mask"))
    counts = (rows == model.vocab.img_context).sum(1) // model.image_tokens
    tiles = per_row(nhwc(record.input(f"{name}pixel_values")), counts)
    twin = dict(guidance=scale, nothing=rows[1, :lengths[1]], reference=True) if scale else {}
    got = engine.Engine(model, params).generate(rows[:1], lengths[:1], tiles, max_text=want.shape[1],
                                                max_masks=masks + 1, **twin)
    ids = np.where(got.ids == model.vocab.ge_start, model.vocab.ge_end, got.ids)
    record.compare(f"{name}generated_tokens by decode/", ids, want, EQUAL)
    for j in range(masks):
        record.compare(f"{name}mask{j}_codes by decode/", got.codes[:, j],
                       record.input(f"{name}mask{j}_codes"), EQUAL)
        if f"{name}mask{j}_image_u8" in record:
            record.compare(f"{name}mask{j}_image_u8 by decode/", got.images[0, j],
                           record.input(f"{name}mask{j}_image_u8"), IMAGE_U8)


class _Replay:
    """One recorded call of generate(): a prompt, text steps and masks in between.

    Rows of the recording are padded on the left; ours start at place 0, which RoPE cannot tell.
    """

    def __init__(self, record: Recording, model: ARGenSeg, params: Params, name: str, cfg: float):
        self.record, self.model, self.params, self.name, self.cfg = record, model, params, name, cfg
        self.tokens = record.input(f"{name}input_ids")
        self.real = record.input(f"{name}attention_mask") == 1
        self.kinds = record.input(f"{name}call_kinds_1_is_mask")
        rows, self.places = self.tokens.shape  # places: so far, in the reference's padded rows
        self.num_masks = int(self.kinds.sum())
        self.cache = model.empty_cache(rows, self.places + len(self.kinds)
                                       + self.num_masks * model.scales.num_codes)
        self.calls: dict[str, list] = {"logits": [], "position": [], "length": [], "kind": []}
        self._apply = jax.jit(
            lambda p, args, method: model.apply({"params": p}, *args, method=method),
            static_argnames="method")
        self.decode = jax.jit(lambda f_hat: model.apply(
            {"params": params}, f_hat, method=lambda m, f: m.vqvae.decode(f)))

    def call(self, method: str, *args):
        """A method of the model, jitted."""
        return self._apply(self.params, args, method=method)

    def check(self, name: str, got, tolerance=None, where=None) -> None:
        self.record.check(self.name + name, got, tolerance, where)

    def run(self) -> None:
        """Follows our own choices; where they part from the recording the arrays below differ."""
        vocab, written, masks = self.model.vocab, [], 0
        logits = self.prefill()
        for _ in range(int((self.kinds == 0).sum()) - 1):
            token = logits.argmax(-1)
            if token[0] == vocab.ge_start and masks < self.num_masks:
                self.write_mask(masks, token)
                masks += 1
                token = np.full_like(token, vocab.ge_end)
            written.append(token)
            logits = self.text(token)
        token = logits.argmax(-1)
        written.append(np.where(token[0] == vocab.ge_start, vocab.ge_end, token))
        self.check("generated_tokens", np.stack(written, 1))
        self.check("raw_last_logits_per_text_call", np.stack(self.calls["logits"], 1))
        self.check("text_call_last_position", np.stack(self.calls["position"], 1))
        self.check("text_call_attention_len", self.calls["length"])
        self.check("call_kinds_1_is_mask", self.calls["kind"])

    def prefill(self) -> np.ndarray:
        """Runs the prompt; returns the logits f32[B, V] of its last place."""
        rows, lengths = unpadded(self.tokens, self.real)
        pixels = nhwc(self.record.input(f"{self.name}pixel_values"))
        tiles = (rows == self.model.vocab.img_context).sum(1) // self.model.image_tokens
        features = self.call("encode_images", per_row(pixels, tiles))
        one = features.reshape(len(rows), -1, self.model.image_tokens, features.shape[-1])
        self.check("vit_embeds",
                   np.concatenate([row[:n] for row, n in zip(np.asarray(one), tiles)]))
        x, coords = self.call("embed", rows, features)
        hidden, self.cache = self.call("extend", x, coords, self.cache, jnp.asarray(lengths))
        logits = self.logits(hidden)
        padded = np.zeros_like(logits)
        padded[self.real] = logits[np.arange(rows.shape[1]) < lengths[:, None]]
        self.check("prefill_logits", padded, where=self.real)
        self.check("prefill_position_ids", np.maximum(np.cumsum(self.real, 1) - 1, 0),
                   where=self.real)
        return self.note(logits[np.arange(len(rows)), lengths - 1])

    def text(self, token: np.ndarray) -> np.ndarray:
        """Feeds one token a row: logits f32[B, V]."""
        x, coords = self.call("embed", token[:, None])
        hidden, self.cache = self.call("extend", x, coords, self.cache)
        self.places += 1
        return self.note(self.logits(hidden)[:, 0])

    def logits(self, hidden) -> np.ndarray:
        """Without the padding of the vocabulary."""
        return np.asarray(self.call("logits", hidden))[..., :self.model.vocab.size]

    def note(self, logits: np.ndarray) -> np.ndarray:
        """Remembers a text call."""
        self.calls["logits"].append(logits)
        self.calls["position"].append(np.asarray(self.cache.length) - 1)
        self.calls["length"].append(self.places)
        self.calls["kind"].append(0)
        return logits

    def write_mask(self, number: int, first: np.ndarray) -> None:
        """The K scales of one mask.

        Args:
          number: of the mask in the answer.
          first: int32[B], what the reference feeds at scale 0: each row's own argmax, which for the
            unconditional row is not <ge_start>. Its recordings need that; nothing else does.
        """
        scales, rows = self.model.scales, len(first)
        positions = np.asarray(self.cache.length)[:, None] + np.arange(scales.num_codes)
        start, coords = self.call("embed", first[:, None])
        self.check("sog_ids_fed", first)
        self.check("ge_start_input_embed_fed", start)
        f_hat = jnp.zeros((1, scales.side, scales.side, self.model.vqvae.z_channels))
        fed, raw, mixed, codes, f_hats = [], [], [], [], []
        for k, (begin, end) in enumerate(scales.bounds):
            x = start if k == 0 else jnp.repeat(self.inputs(f_hat, k), rows, axis=0)
            yx = jnp.broadcast_to(scales.centers[begin:end], (rows, end - begin, 2))
            hidden, self.cache = self.call("extend", x, yx, self.cache)
            logits = self.call("code_logits", hidden)
            t = self.cfg * k / (len(scales) - 1)
            guided = logits[:1] if rows == 1 else (1 + t) * logits[:1] - t * logits[1:]
            code = jnp.argmax(guided, axis=-1)
            f_hat = self.model.apply({"params": self.params}, f_hat, code, k,
                                     method=lambda m, *a: m.vqvae.quantizer.accumulate(*a))
            f_hats.append(f_hat)
            for store, value in ((fed, x), (raw, logits), (mixed, guided), (codes, code)):
                store.append(np.asarray(value))
        self.places += scales.num_codes
        self.calls["kind"].append(1)
        self.check_mask(f"mask{number}_", positions, fed, raw, mixed, codes)
        self.check_images(f"mask{number}_", f_hats, number == self.num_masks - 1)

    def inputs(self, f_hat, k: int):
        """Decoder inputs of scale k >= 1."""
        return self.model.apply({"params": self.params}, f_hat, k, method="scale_inputs")

    def check_mask(self, name: str, positions, fed, raw, mixed, codes) -> None:
        """Compares everything about the codes; lists are by scale, raw and fed of all rows."""
        every = np.concatenate(mixed, axis=1)
        top = np.sort(every, axis=-1)
        self.check(f"{name}codes", np.concatenate(codes, axis=1), EQUAL)
        self.check(f"{name}code_margin", top[..., -1] - top[..., -2])
        self.check(f"{name}code_logit_max", top[..., -1])
        self.check(f"{name}code_logsumexp", jax.nn.logsumexp(every, axis=-1))
        self.check(f"{name}logits_mean_per_scale", [x.mean() for x in mixed])
        self.check(f"{name}logits_std_per_scale", [x.std(ddof=1) for x in mixed])
        self.check(f"{name}position_ids", positions)
        whose = {"code_logits": mixed, "cond_logits": [x[:1] for x in raw],
                 "uncond_logits": [x[1:2] for x in raw], "inputs_embeds": fed}
        for m in self.record.names(rf"{self.name}{name}({'|'.join(whose)})_scales0to(\d+)"):
            self.record.check(m[0], np.concatenate(whose[m[1]][:int(m[2]) + 1], axis=1))
        for m in self.record.names(rf"{self.name}{name}({'|'.join(whose)})_scale(\d+)_first(\d+)"):
            self.record.check(m[0], whose[m[1]][int(m[2])][:, :int(m[3])])

    def check_images(self, name: str, f_hats: list, is_last: bool) -> None:
        """Compares the mask's image, and for the last mask those after each scale."""
        image = np.asarray(self.decode(f_hats[-1]))[0]
        self.check(f"{name}image_u8", to_u8(image), IMAGE_U8)
        for m in self.record.names(rf"{self.name}{name}image_u8_s(\d+)"):
            self.record.check(m[0], to_u8(image)[::int(m[1]), ::int(m[1])], IMAGE_U8)
        for m in self.record.names(rf"{self.name}{name}image_float_s(\d+)"):
            self.record.check(m[0], nchw(image)[:, ::int(m[1]), ::int(m[1])], IMAGE)
        for m in self.record.names(rf"{self.name}last_mask_multi_results_u8_s(\d+)"):
            if is_last:
                every = to_u8(np.concatenate([self.decode(f_hat) for f_hat in f_hats]))
                self.record.check(m[0], every[:, ::int(m[1]), ::int(m[1])], IMAGE_U8)


def unpadded(tokens: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the left -> (int32[B, T] padded on the right, lengths int32[B])."""
    rows = np.zeros_like(tokens)
    lengths = np.sum(real != 0, axis=1)
    for row, source, keep, n in zip(rows, tokens, real != 0, lengths):
        row[:n] = source[keep]
    return rows, lengths


def to_u8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] -> u8 by truncation, as the reference casts."""
    return ((np.asarray(images) * 0.5 + 0.5).clip(0, 1) * 255).astype(np.uint8)


def per_row(items: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[sum(counts), ...] -> [B, max(counts), ...]: each row's own items, filled up with zeros."""
    out = np.zeros((len(counts), counts.max(), *items.shape[1:]), items.dtype)
    at = 0
    for row, n in zip(out, counts):
        row[:n] = items[at:at + n]
        at += n
    return out
