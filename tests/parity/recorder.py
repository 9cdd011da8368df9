"""Makes recordings of kind F of a tiny model: whole passes over whole rows, by the definition.

Nothing here uses a cache, a batch of different rows, or decode/: that is what the recordings test.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax.interop import state_dict as torch_convert
from argenseg_jax.interop import tensor_files
from argenseg_jax.models import variants
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.attention import Mask
from argenseg_jax.parity.end_to_end import model_section
from argenseg_jax.vocab import IGNORE, SPECIAL_TOKENS
from tests import tiny

TEXT, EOS, PAD = 9, 7, 8  # ids of text are below nine
PROMPT = 4  # tokens of a training row that are no targets
SCALE = 4.0
LENGTH = 64  # of the rows that a pass reads: what stands behind a causal row's end changes nothing


def config(patch_nums: tuple[int, ...] = (1, 2, 4), **llm: Any) -> dict[str, Any]:
    """config.json under the official names: width 32, images of one token, masks of four pixels."""
    codes = 16
    return {
        "case": "F_tiny",
        "cfg_scale": SCALE,
        "patch_nums": list(patch_nums),
        "n_codes": codes,
        "tokens": {name: TEXT + i for i, name in enumerate(SPECIAL_TOKENS)},
        "eos_token_id_in_generate": EOS,
        "pad_token_id_in_generate": PAD,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "image_size": 16,
            "num_attention_heads": 2,
            "patch_size": 8,
            "initializer_factor": 0.1,
        },
        "llm_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "rms_norm_eps": 1e-5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_theta": 1e4,
            "vocab_size": TEXT + len(SPECIAL_TOKENS) + codes,
            **llm,
        },
        "vae": {"vocab_size": codes, "z_channels": 4, "ch": 32, "ch_mult": [1], "num_res_blocks": 0},
    }


class Recorder:
    """Draws weights, and writes what a folder of a recording holds.

    Attributes:
      config, arrays: the content of config.json and io.npz, to be changed before `save`.
    """

    def __init__(self, chain: dict[int, int] | None = None, seed: int = 0, **sizes: Any):
        """chain: which text follows which token, see tiny.scripted."""
        self.config = config(**sizes)
        self.model: ARGenSeg = variants.build(model_section(self.config))
        weights = tiny.params(self.model, seed)
        self.params = tiny.scripted(chain, (self.model, weights))[1] if chain else weights
        self.arrays: dict[str, np.ndarray] = {}
        self.rng = np.random.default_rng(seed)

    def call(self, method: str, *args, module: Any = None, part: str = ""):
        """A method of the model, or of a part of it, compiled once."""
        params = self.params[part] if part else self.params
        with jax.default_matmul_precision("highest"):
            return _apply(module or self.model, params, args, method)

    def save(self, folder: pathlib.Path) -> pathlib.Path:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = torch_convert.to_torch(self.params, vocab_size=self.model.vocab.size)
        tensor_files.write_safetensors(
            folder / "weights.safetensors", {key: tensor_files.Lazy.of(x) for key, x in tensors}
        )
        (folder / "config.json").write_text(json.dumps(self.config))
        np.savez(folder / "io.npz", **self.arrays)
        return folder

    def pixels(self, tiles: int) -> np.ndarray:
        return self.rng.standard_normal((tiles, 3, 16, 16), np.float32)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """f32[P, n, D] of f32[P, 3, S, S]."""
        y = self.call("encode_images", np.moveaxis(pixels, 1, -1)[None])
        return np.asarray(y).reshape(len(pixels), self.model.image_tokens, -1)

    # ---- decoding --------------------------------------------------------------------------------

    def generate(self, part: str, prompts: list[list[int]], pixels: np.ndarray | None, calls: int) -> None:
        """Greedy answers by the rules of the reference; with two rows under guidance in `infer_cfg`."""
        vocab, guided = self.model.vocab, part == "infer_cfg"
        features = list(self.features(pixels)) if pixels is not None else []
        rows, left = [], max(map(len, prompts))
        for ids in prompts:
            own = [features.pop(0) for _ in range(ids.count(vocab.img_context))]
            rows.append(self.embedded(ids, vocab.img_context, own))
        kinds, logits, tokens = [], [], []
        out = {
            "input_ids": [[PAD] * (left - len(ids)) + ids for ids in prompts],
            "attention_mask": [[0] * (left - len(ids)) + [1] * len(ids) for ids in prompts],
        }
        for call in range(calls):
            last = np.stack([self.logits(x)[-1] for x in rows])
            kinds.append(0)
            logits.append(last)
            token = last.argmax(-1)
            if token[0] == vocab.ge_start:
                rows = self.mask(part, kinds.count(1), rows, token, guided)
                kinds.append(1)
                token[:] = vocab.ge_end
            tokens.append(token)
            if call < calls - 1:
                rows = [np.concatenate([x, self.embedded([t])]) for x, t in zip(rows, token)]
        out |= {
            "generated_tokens": np.stack(tokens, 1),
            "raw_last_logits_per_text_call": np.stack(logits, 1),
            "call_kinds_1_is_mask": kinds,
        }
        if pixels is not None:
            out |= {"pixel_values": pixels, "vit_embeds": self.features(pixels)}
        self.arrays |= {f"{part}/{name}": np.asarray(x) for name, x in out.items()}

    def embedded(self, ids: list[int], place: int | None = None, values: list[np.ndarray] = ()) -> np.ndarray:
        """[T, D]: rows of the table, and in turn `values` [n, D] where the id is `place`."""
        x = np.asarray(self.params["llm"]["embed"]["embedding"])[np.asarray(ids)].copy()
        if len(values):
            x[np.asarray(ids) == place] = np.concatenate(values)
        return x

    def logits(self, x: np.ndarray) -> np.ndarray:
        """f32[T, V] of embedded inputs [T, D], read in one pass."""
        line = np.arange(LENGTH)[None]
        padded = np.pad(x, ((0, LENGTH - len(x)), (0, 0)))[None]
        hidden, _, _ = self.call("__call__", padded, line, Mask(np.ones_like(line)), module=self.model.llm, part="llm")
        head = np.asarray(self.params["llm"]["lm_head"]["kernel"])[:, : self.model.vocab.size]
        return np.asarray(hidden)[0, : len(x)] @ head

    def mask(self, part: str, number: int, rows: list[np.ndarray], first: np.ndarray, guided: bool) -> list[np.ndarray]:
        """The codes of one mask; returns the rows with all its inputs."""
        scales, first_code = self.model.scales, self.model.vocab.first_code
        quantizer = self.model.bind({"params": self.params}).vqvae.quantizer
        f_hat = jnp.zeros((1, scales.side, scales.side, self.model.vqvae.z_channels))
        codes, best, tops = [], [], []
        for k, (begin, end) in enumerate(scales.bounds):
            shared = self.scale_inputs(quantizer, f_hat, k) if k else None
            rows = [np.concatenate([x, shared if k else self.embedded([t])]) for x, t in zip(rows, first)]
            logits = [self.logits(x)[None, begin - end :, first_code:] for x in rows]
            t = SCALE * k / (len(scales) - 1) if guided and len(scales) > 1 else 0.0
            mixed = (1 + t) * logits[0] - t * logits[-1] if guided else logits[0]
            codes.append(np.asarray(mixed.argmax(-1)))
            best.append(np.asarray(mixed.max(-1)))
            f_hat = quantizer.accumulate(f_hat, codes[-1], k)
            tops.append(np.sort(mixed, -1)[..., -1] - np.sort(mixed, -1)[..., -2])
        assert np.concatenate(tops, 1).min() > 1e-4, "choose another seed: the codes are no clear choice"
        image = self.call("decode", f_hat, module=self.model.vqvae, part="vqvae")[0]
        name = f"{part}/mask{number}_"
        self.arrays |= {
            name + "codes": np.concatenate(codes, 1),
            name + "code_logit_max": np.concatenate(best, 1),
            name + "image_u8": np.asarray((image + 1) / 2 * 255).astype(np.uint8),
        }
        self.arrays |= {f"{part}/sog_ids_fed": first.copy()}
        return rows

    def scale_inputs(self, quantizer: Any, f_hat: jax.Array, k: int) -> np.ndarray:
        """[n, D] of scale k: word_embed of what f_hat is there, lvl_embed and pos_1LC."""
        (begin, end), visual = self.model.scales.bounds[k], self.params["visual"]
        word = {name: np.asarray(x) for name, x in visual["word_embed"].items()}
        return (
            np.asarray(quantizer.scale_input(f_hat, k))[0] @ word["kernel"]
            + word["bias"]
            + visual["lvl_embed"][k]
            + visual["pos_embed"][begin:end]
        )

    # ---- training --------------------------------------------------------------------------------

    def train(self, rows: list[list[int]], pixels: np.ndarray | None, masks: np.ndarray | None) -> None:
        """The losses of a batch by their definition; every token behind the prompt is a target."""
        vocab = self.model.vocab
        width = max(map(len, rows))
        tokens = np.full((len(rows), width), PAD)
        real = np.zeros_like(tokens)
        labels = np.full_like(tokens, IGNORE)
        for b, ids in enumerate(rows):
            tokens[b, : len(ids)], real[b, : len(ids)] = ids, 1
            labels[b, PROMPT : len(ids)] = ids[PROMPT:]
        labels[labels == vocab.ge_end] = vocab.mask_context
        positions = np.maximum(np.cumsum(real, 1) - 1, 0)
        codes, left = None, []
        if masks is not None:
            codes = np.asarray(self.call("tokenize", np.moveaxis(masks, 1, -1)[None]))[0]
            left = list(codes)
        images = list(self.features(pixels)) if pixels is not None else []
        text, coded = [], []
        for b, ids in enumerate(rows):
            own = [left.pop(0) for _ in range(ids.count(vocab.ge_start))]
            x = self.embedded(ids, vocab.img_context, [images.pop(0) for _ in range(ids.count(vocab.img_context))])
            if own:
                x[np.asarray(ids) == vocab.mask_context] = np.asarray(
                    self.call("visual_inputs", np.stack(own))
                ).reshape(-1, x.shape[1])
            nll = -np.asarray(jax.nn.log_softmax(self.logits(x)))
            at = iter(np.asarray(own, int).reshape(-1))
            for i in range(PROMPT, len(ids)):
                if labels[b, i] == vocab.mask_context:
                    coded.append(nll[i - 1, vocab.first_code + next(at)])
                else:
                    text.append(nll[i - 1, labels[b, i]])
        losses = {"text_loss": np.mean(text), "gen_loss": np.mean(coded) if coded else 0.0}
        out = {
            "input_ids": tokens,
            "labels": labels,
            "attention_mask": real,
            "position_ids": positions,
            "loss": sum(losses.values()),
            **losses,
        }
        if masks is not None:
            out |= {"masks": masks, "mask_token_ids": codes}
        if pixels is not None:
            out |= {"pixel_values": pixels}
        self.arrays |= {
            f"train/{name}": np.asarray(x, np.float32 if "loss" in name else None) for name, x in out.items()
        }


@functools.partial(jax.jit, static_argnames=("module", "method"))
def _apply(module: Any, params: Any, args: tuple, method: str) -> Any:
    if method == "__call__":  # the decoder's layers
        x, positions, mask = args
        return module.apply({"params": params}, x, positions, mask=mask)
    return module.apply({"params": params}, *args, method=method)
