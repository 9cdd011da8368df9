"""The decoding half of kind F: greedy text and masks, step by step, with and without guidance.

The steps are spelled out here because a recording holds what is fed and what comes out at each of
them; then decode/ answers the same prompts in its own way.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax.decode import engine
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.parity.recording import EQUAL, FEATURE, IMAGE, IMAGE_U8, Recording
from argenseg_jax.parity.vq import nchw, nhwc

Params = Mapping[str, Any]


def compare_decoding(record: Recording, model: ARGenSeg, params: Params) -> None:
    """Parts as `infer/` (rows of their own) and `infer_cfg/` (conditional rows, then unconditional ones)."""
    for m in record.names(r"(infer\w*)/input_ids"):
        guidance = float(record.config["cfg_scale"]) if "cfg" in m[1] else None
        replay = _Replay(record, model, params, f"{m[1]}/", guidance)
        replay.run()
        _compare_engine(record, model, params, replay)


def _compare_engine(record: Recording, model: ARGenSeg, params: Params, replay: _Replay) -> None:
    """The compiled decoder on the same prompts, and with guidance on the others: ids, codes, images."""
    name, b, masks = replay.name, replay.answers, replay.num_masks
    rows, lengths = unpadded(replay.tokens, replay.real)
    twin = {}
    if replay.guidance is not None:
        if not (lengths[b:] == lengths[b]).all() or not (rows[b:] == rows[b]).all():
            raise record.fault(f"{name}input_ids", "has unconditional rows that differ from each other")
        twin = {"guidance": replay.guidance, "uncond_prompt": rows[b, : lengths[b]], "reference": True}
    got = engine.Engine(model, params).generate(
        rows[:b], lengths[:b], replay.tiles, max_masks=masks + 1, max_text=replay.text_calls, **twin
    )
    if f"{name}generated_tokens" in record:
        ids = np.where(got.ids == model.vocab.ge_start, model.vocab.ge_end, got.ids)
        ids = np.where(np.arange(ids.shape[1]) < got.counts[:, None], ids, model.vocab.pad)
        record.compare(f"{name}generated_tokens by decode/", ids, record.ints(f"{name}generated_tokens", 2)[:b], EQUAL)
    for j in range(masks):
        for kind, values, tolerance in (("codes", got.codes, EQUAL), ("image_u8", got.images, IMAGE_U8)):
            array = f"{name}mask{j}_{kind}"
            if array not in record:
                continue
            if j >= got.num_masks.min():
                record.absent(f"{array} by decode/", f"the answers have {got.num_masks.tolist()} masks")
                continue
            record.compare(f"{array} by decode/", _like(record, array, values[:, j]), record.input(array), tolerance)


def _like(record: Recording, name: str, rows: np.ndarray) -> np.ndarray:
    """Values of all rows as the recording has them: of all rows, or of the first alone."""
    return rows if rows.ndim == len(record.shape(name)) else rows[0]


@functools.partial(jax.jit, static_argnames=("module", "method"))
def _apply(module: nn.Module, params: Params, args: tuple, method: str) -> Any:
    return module.apply({"params": params}, *args, method=method)


class _Replay:
    """One recorded call of generate(): prompts, text steps and masks in between.

    Rows of the recording are padded on the left; ours start at position 0, which RoPE cannot tell. A
    part may have no images at all, or none in some of its rows.

    Attributes:
      tokens, real: int32[R, T] and bool[R, T], the prompts and where they are no padding.
      answers: B, rows that are answered: R, or R / 2 with guidance.
      guidance: strength of classifier-free guidance, or None.
      text_calls, num_masks: how many tokens and masks the recorded answers have.
      tiles: f32[R, P, S, S, 3], each row's own images filled up with zeros; None where no row has any.
    """

    def __init__(self, record: Recording, model: ARGenSeg, params: Params, name: str, guidance: float | None):
        self.record, self.model, self.params, self.name = record, model, params, name
        self.guidance = guidance
        self.tokens = record.ints(f"{name}input_ids", 2, below=model.vocab.size)
        self.real = record.ints(f"{name}attention_mask", 2, default=np.ones_like(self.tokens)) == 1
        if self.real.shape != self.tokens.shape or not self.real.any(1).all():
            raise record.fault(
                f"{name}attention_mask",
                f"{self.real.shape} does not fit the input_ids {self.tokens.shape}, or leaves nothing of a row",
            )
        rows, self.length = self.tokens.shape  # length: so far, in the reference's padded rows
        if guidance is not None and rows % 2:
            raise record.fault(f"{name}input_ids", f"has {rows} rows; guidance needs pairs of them")
        self.answers = rows // 2 if guidance is not None else rows
        self.text_calls, self.num_masks = self.count_calls()
        self.tiles, self.features = self.encode()
        self.cache = model.empty_cache(
            rows, self.length + self.text_calls + self.num_masks * (model.scales.num_codes + 1)
        )
        self.done = np.zeros(rows, bool)
        self.starts: list[tuple[np.ndarray, np.ndarray]] = []
        self.calls: dict[str, list] = {"logits": [], "position": [], "length": [], "kind": []}

    def count_calls(self) -> tuple[int, int]:
        """How many text calls and masks there were, by their kinds or else by what was recorded of them."""
        record, name = self.record, self.name
        if f"{name}call_kinds_1_is_mask" in record:
            kinds = record.ints(f"{name}call_kinds_1_is_mask", 1, below=2)
            return int((kinds == 0).sum()), int(kinds.sum())
        found = [int(m[1]) for m in record.names(rf"{name}mask(\d+)_codes")]
        return record.ints(f"{name}generated_tokens", 2).shape[1], max(found, default=-1) + 1

    def encode(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Each row's own tiles and their features, [R, P, ...]; None, None where no row has an image."""
        record, name, model = self.record, self.name, self.model
        rows, _ = unpadded(self.tokens, self.real)
        counts = tile_counts(record, f"{name}input_ids", rows, model)
        if not counts.any() and not (f"{name}vit_embeds" in record and f"{name}pixel_values" in record):
            return None, None
        pixels = flagged_tiles(record, name, model)
        features = np.zeros((0, model.image_tokens, model.llm.width), np.float32)
        if len(pixels):
            features = np.asarray(self.call("encode_images", pixels[None])).reshape(-1, *features.shape[1:])
        self.check("vit_embeds", features)
        if not counts.any():
            return None, None
        if counts.sum() != len(pixels):
            raise record.fault(f"{name}pixel_values", f"has {len(pixels)} tiles for the {counts.sum()} in the prompts")
        return per_row(pixels, counts), per_row(features, counts).reshape(len(counts), -1, features.shape[-1])

    def call(self, method: str, *args):
        """A method of the model, compiled once for all parts."""
        return _apply(self.model, self.params, args, method)

    def decode(self, f_hat: jax.Array) -> jax.Array:
        """f_hat [B, S, S, C] -> images f32[B, R, R, 3] in [-1, 1]."""
        return _apply(self.model.vqvae, self.params["vqvae"], (f_hat,), "decode")

    def check(self, name: str, got, tolerance=None, where=None) -> None:
        self.record.check(self.name + name, got, tolerance, where)

    def run(self) -> None:
        """Follows our own choices; where they part from the recording the arrays below differ."""
        vocab, written, masks = self.model.vocab, [], 0
        logits = self.prefill()
        for call in range(self.text_calls):
            token = logits.argmax(-1)
            last = call == self.text_calls - 1
            if token[0] == vocab.ge_start and (last or masks < self.num_masks):
                if masks < self.num_masks:
                    self.write_mask(masks, token)
                    masks += 1
                token = np.full_like(token, vocab.ge_end)
            token = np.where(self.done, vocab.pad, token)
            self.done |= token == vocab.eos
            written.append(token)
            if not last:
                logits = self.text(token)
        for j in range(masks, self.num_masks):
            self.record.miss(rf"{self.name}mask{j}_.*", f"the model's answer has {masks} masks")
        self.check("generated_tokens", np.stack(written, 1))
        self.check("raw_last_logits_per_text_call", np.stack(self.calls["logits"], 1))
        self.check("text_call_last_position", np.stack(self.calls["position"], 1))
        self.check("text_call_attention_len", self.calls["length"])
        self.check("call_kinds_1_is_mask", self.calls["kind"])
        self.check_starts()

    def prefill(self) -> np.ndarray:
        """Runs the prompt; returns the logits f32[R, V] of its last position."""
        rows, lengths = unpadded(self.tokens, self.real)
        x, coords = self.call("embed", rows, self.features)
        hidden, self.cache = self.call("extend", x, coords, self.cache, jnp.asarray(lengths))
        logits = self.logits(hidden)
        padded = np.zeros_like(logits)
        padded[self.real] = logits[np.arange(rows.shape[1]) < lengths[:, None]]
        self.check("prefill_logits", padded, where=self.real)
        self.check("prefill_position_ids", np.maximum(np.cumsum(self.real, 1) - 1, 0), where=self.real)
        return self.note(logits[np.arange(len(rows)), lengths - 1])

    def text(self, token: np.ndarray) -> np.ndarray:
        """Feeds one token per sequence: logits f32[R, V]."""
        x, coords = self.call("embed", token[:, None])
        hidden, self.cache = self.call("extend", x, coords, self.cache)
        self.length += 1
        return self.note(self.logits(hidden)[:, 0])

    def logits(self, hidden) -> np.ndarray:
        """Without the padding of the vocabulary."""
        return np.asarray(self.call("logits", hidden))[..., : self.model.vocab.size]

    def note(self, logits: np.ndarray) -> np.ndarray:
        """Remembers a text call."""
        self.calls["logits"].append(logits)
        self.calls["position"].append(np.asarray(self.cache.length) - 1)
        self.calls["length"].append(self.length)
        self.calls["kind"].append(0)
        return logits

    def write_mask(self, number: int, first: np.ndarray) -> None:
        """The K scales of one mask.

        Args:
          number: of the mask in the answer.
          first: int32[R], what the reference feeds at scale 0: each row's own argmax, which for the
            unconditional row is not <ge_start>. Its recordings need that; nothing else does.
        """
        scales, b = self.model.scales, self.answers
        positions = np.asarray(self.cache.length)[:, None] + np.arange(scales.num_codes)
        start, _ = self.call("embed", first[:, None])
        self.starts.append((first, np.asarray(start)))
        f_hat = jnp.zeros((b, scales.side, scales.side, self.model.vqvae.z_channels))
        fed, raw, mixed, codes, f_hats = [], [], [], [], []
        for k, (begin, end) in enumerate(scales.bounds):
            x = start if k == 0 else self.paired(self.inputs(f_hat, k))
            yx = jnp.broadcast_to(scales.centers[begin:end], (len(x), end - begin, 2))
            hidden, self.cache = self.call("extend", x, yx, self.cache)
            logits = self.call("code_logits", hidden)
            guided = logits
            if self.guidance is not None:
                t = self.guidance * k / max(len(scales) - 1, 1)
                guided = (1 + t) * logits[:b] - t * logits[b:]
            code = jnp.argmax(guided, axis=-1)
            f_hat = self.model.apply(
                {"params": self.params}, f_hat, code, k, method=lambda m, *a: m.vqvae.quantizer.accumulate(*a)
            )
            f_hats.append(f_hat)
            for store, value in ((fed, x), (raw, logits), (mixed, guided), (codes, code)):
                store.append(np.asarray(value))
        self.length += scales.num_codes
        self.calls["kind"].append(1)
        self.check_mask(f"mask{number}_", positions, fed, raw, mixed, codes)
        self.check_images(f"mask{number}_", f_hats, number == self.num_masks - 1)

    def paired(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> [R, ...]: unconditional rows get the same."""
        return x if self.guidance is None else jnp.concatenate([x, x])

    def inputs(self, f_hat, k: int):
        """Decoder inputs of scale k >= 1."""
        return self.model.apply({"params": self.params}, f_hat, k, method="scale_inputs")

    def check_starts(self) -> None:
        """What was fed at scale 0: <ge_start> for every mask, but under guidance words that differ from mask
        to mask, of which a recording has one mask's and does not say whose."""
        for name, index, tolerance in (("sog_ids_fed", 0, EQUAL), ("ge_start_input_embed_fed", 1, FEATURE)):
            if f"{self.name}{name}" not in self.record:
                continue
            want = self.record.input(f"{self.name}{name}")
            same = [start[index] for start in self.starts if start[index].shape == want.shape]
            if not same:
                self.record.absent(f"{self.name}{name}", f"{len(self.starts)} masks, none with the shape {want.shape}")
                continue
            if self.guidance is not None:
                same = [min(same, key=lambda got: np.abs(got - want).max(initial=0))]
            for got in same:
                self.check(name, got, tolerance)

    def check_mask(self, name: str, positions, fed, raw, mixed, codes) -> None:
        """Compares everything about the codes; lists are by scale, raw and fed of all rows."""
        every, b = np.concatenate(mixed, axis=1), self.answers
        top = np.sort(every, axis=-1)
        self.check(f"{name}codes", np.concatenate(codes, axis=1), EQUAL)
        if top.shape[-1] > 1:
            self.check(f"{name}code_margin", top[..., -1] - top[..., -2])
        self.check(f"{name}code_logit_max", top[..., -1])
        self.check(f"{name}code_logsumexp", jax.nn.logsumexp(every, axis=-1))
        self.check(f"{name}logits_mean_per_scale", [x.mean() for x in mixed])
        self.check(f"{name}logits_std_per_scale", [x.std(ddof=1) for x in mixed])
        self.check(f"{name}position_ids", positions)
        whose = {
            "code_logits": mixed,
            "cond_logits": [x[:b] for x in raw],
            "uncond_logits": [x[b:] for x in raw],
            "inputs_embeds": fed,
        }
        for m in self.record.names(rf"{self.name}{name}({'|'.join(whose)})_scales0to(\d+)"):
            self.record.check(m[0], np.concatenate(whose[m[1]][: int(m[2]) + 1], axis=1))
        for m in self.record.names(rf"{self.name}{name}({'|'.join(whose)})_scale(\d+)_first(\d+)"):
            if int(m[2]) < len(fed):
                self.record.check(m[0], whose[m[1]][int(m[2])][:, : int(m[3])])

    def check_images(self, name: str, f_hats: list, is_last: bool) -> None:
        """Compares the mask's images, and for the last mask those of the first row after each scale."""
        record, images = self.record, np.asarray(self.decode(f_hats[-1]))
        for m in record.names(rf"{self.name}{name}image_u8(?:_s(\d+))?"):
            step = int(m[1] or 1)
            record.check(m[0], _like(record, m[0], to_u8(images)[:, ::step, ::step]), IMAGE_U8)
        for m in record.names(rf"{self.name}{name}image_float(?:_s(\d+))?"):
            step = int(m[1] or 1)
            record.check(m[0], _like(record, m[0], nchw(images)[..., ::step, ::step]), IMAGE)
        for m in record.names(rf"{self.name}last_mask_multi_results_u8(?:_s(\d+))?"):
            if is_last:
                step = int(m[1] or 1)
                every = to_u8(np.concatenate([self.decode(f_hat[:1]) for f_hat in f_hats]))
                record.check(m[0], every[:, ::step, ::step], IMAGE_U8)


def tile_counts(record: Recording, name: str, rows: np.ndarray, model: ARGenSeg) -> np.ndarray:
    """int[R], tiles that each sequence of ids has placeholders for; `name` is the array they are from."""
    placeholders = (rows == model.vocab.img_context).sum(1)
    if (placeholders % model.image_tokens).any():
        raise record.fault(
            name, f"has {placeholders.tolist()} <IMG_CONTEXT> in its rows; a tile has {model.image_tokens}"
        )
    return placeholders // model.image_tokens


def flagged_tiles(record: Recording, name: str, model: ARGenSeg) -> np.ndarray:
    """f32[P, S, S, 3]: a part's pixel_values without the dummies that its image_flags name."""
    side = model.image_size
    pixels = nhwc(record.floats(f"{name}pixel_values", (None, 3, side, side)))
    flags = record.ints(f"{name}image_flags", 1, default=np.ones(len(pixels)))
    if len(flags) != len(pixels):
        raise record.fault(f"{name}image_flags", f"has {len(flags)} flags for {len(pixels)} tiles")
    return pixels[flags == 1]


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
    out = np.zeros((len(counts), counts.max(initial=0), *items.shape[1:]), items.dtype)
    at = 0
    for row, n in zip(out, counts):
        row[:n] = items[at : at + n]
        at += n
    return out
