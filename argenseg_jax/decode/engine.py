"""The compiled phases of decoding, and the order in which they run for a batch.

prefill -> text -> (mask -> text)*: one jit each, shapes in buckets, nothing recompiled for another
prompt, image, answer length or number of masks. Axes as in text_decode, scale_decode.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from argenseg_jax import distributed, sharding
from argenseg_jax.decode import scale_decode, text_decode
from argenseg_jax.decode.inference_weights import for_inference
from argenseg_jax.decode.sampling import DecodeConfig, Sampling
from argenseg_jax.errors import UserError
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.kv_cache import BLOCK

GREEDY = Sampling()
_MAX_GUIDANCE = 1e4


@dataclasses.dataclass(frozen=True)
class Generated:
    """Answers of a batch, on the host.

    Attributes:
      ids: int32[B, A] with <ge_start> for each mask;  counts: int32[B], tokens of each answer.
      images: u8[B, M, R, R, 3];  num_masks: int32[B], how many of the M each sequence has.
      codes: int32[B, M, U];  confidence: f32[B, M], mean probability of the codes.
      scales: u8[B, M, Z, R, R, 3] coarse to fine, or None if not asked for.
      floats: f32[B, M, R, R, 3] in [-1, 1], the images before rounding; comes with the scales.
    """

    ids: np.ndarray
    counts: np.ndarray
    images: np.ndarray
    num_masks: np.ndarray
    codes: np.ndarray
    confidence: np.ndarray
    scales: np.ndarray | None
    floats: np.ndarray | None


class Phases:
    """The jitted functions that an answer is made of; the `compile` command lowers these same ones.

    Attributes:
      model: with the decoder's layers split where that is faster (`split`): everywhere but on TPUs.
      prefill, text, mask: take {"params": weights of inference_weights.for_inference} first.
    """

    def __init__(self, model: ARGenSeg):
        self.split = sharding.platform() != "tpu"
        self.model = model.clone(llm=model.llm.clone(split=self.split))
        options = compiler_options(sharding.platform())
        self.prefill = jax.jit(
            nn.apply(text_decode.prefill, self.model), static_argnums=(5, 6), compiler_options=options
        )
        self.text = jax.jit(nn.apply(text_decode.write_text, self.model), donate_argnums=1, compiler_options=options)
        self.mask = jax.jit(
            nn.apply(_mask_phase, self.model), donate_argnums=1, static_argnums=2, compiler_options=options
        )

    def capacity(self, width: int, max_text: int, max_masks: int) -> int:
        """Positions of the cache for prompts padded to `width`: whole blocks, so few sizes occur."""
        need = width + max_text + max_masks * (self.model.scales.num_codes + 1)
        return -(-need // BLOCK) * BLOCK


class Engine:
    """Decodes batches. `params` may be exchanged (while training, say): nothing recompiles."""

    def __init__(self, model: ARGenSeg, params: Mapping[str, Any], *, int8: bool = False):
        """int8: keep the decoder's matrices in eight bits (decode/inference_weights)."""
        self.phases, self._int8 = Phases(model), int8
        self.model, self.capacity = self.phases.model, self.phases.capacity
        self.params = params

    @property
    def params(self) -> Mapping[str, Any]:
        """The weights as they are decoded with; to be set as they are trained."""
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        self._params = for_inference(self.model, params, int8=self._int8, split=self.phases.split)

    # ---- phases ----------------------------------------------------------------------------------

    def prefill(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        tiles: np.ndarray | None,
        config: DecodeConfig,
        capacity: int,
        max_text: int,
    ) -> text_decode.Answer:
        """See text_decode.prefill."""
        return self.phases.prefill({"params": self.params}, tokens, lengths, tiles, config, capacity, max_text)

    def text(self, answer: text_decode.Answer) -> text_decode.Answer:
        """Writes until every sequence has ended or is waiting for a mask."""
        return self.phases.text({"params": self.params}, answer)

    def mask(
        self, answer: text_decode.Answer, previews: bool = False
    ) -> tuple[text_decode.Answer, dict[str, jax.Array]]:
        """Writes the mask of every sequence that is waiting for one: (answer, fields of Generated)."""
        return self.phases.mask({"params": self.params}, answer, previews)

    # ---- complete answers ---------------------------------------------------------------------------

    def generate(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        tiles: np.ndarray | None,
        *,
        max_text: int,
        max_masks: int,
        previews: bool = False,
        text: Sampling = GREEDY,
        codes: Sampling = GREEDY,
        guidance: float = 0.0,
        uncond_prompt: np.ndarray | None = None,
        reference: bool = False,
    ) -> Generated:
        """Answers a batch of prompts.

        Args:
          tokens: int32[B, T], right padded;  lengths: int32[B];  tiles: u8[B, P, I, I, 3] or None.
          max_text: A, tokens of an answer, each mask counted as one.
          max_masks: M; an answer stops after M masks.
          previews: also decode the image after every scale, and give the last one in floats.
          text, codes: how tokens and codes are chosen.
          guidance: strength of classifier-free guidance; 0 = off.
          uncond_prompt: int32[<= T], the unconditional prompt that guidance needs.
          reference: guidance with the fault of the original; see sampling.DecodeConfig.

        Raises:
          UserError: the prompt is too long (model.llm.max_positions), or the guidance is no such number.
        """
        longest, available = int(np.max(lengths)), self.model.llm.max_positions
        answer_positions = max_text + max_masks * (self.model.scales.num_codes + 1)
        if longest + answer_positions > available:
            raise UserError(
                f"a prompt of {longest} tokens with up to {max_masks} masks needs "
                f"{longest + answer_positions} positions, the model has {available} "
                "(model.llm.max_positions); shorten the prompt"
            )
        config = DecodeConfig(text.on_device(len(tokens)), codes.on_device(len(tokens), "codes"), None, reference)
        if not 0 <= guidance <= _MAX_GUIDANCE:
            raise UserError(f"guidance={guidance}: a number from 0 to {_MAX_GUIDANCE:g} is expected")
        if guidance:
            config = config.replace(guidance=np.float32(guidance))
            uncond = np.zeros_like(tokens)
            uncond[:, : len(uncond_prompt)] = uncond_prompt
            tokens = np.concatenate([tokens, uncond])
            lengths = np.concatenate([lengths, np.full_like(lengths, len(uncond_prompt))])
        answer = self.text(
            self.prefill(tokens, lengths, tiles, config, self.capacity(tokens.shape[1], max_text, max_masks), max_text)
        )
        found: list[tuple[np.ndarray, Any]] = []
        while len(found) < max_masks:
            at_mask = distributed.fetch(answer.at_mask)
            if not at_mask.any():
                break
            answer, mask = self.mask(answer, previews)
            found.append((at_mask, mask))
            if len(found) < max_masks:
                answer = self.text(answer)
        return self._collect(answer, found, previews)

    def _collect(self, answer: text_decode.Answer, found: list, previews: bool) -> Generated:
        """Assigns the masks of each round to their sequences."""
        b, k = len(answer.at_mask), len(self.model.scales)
        side, n = self.model.mask_size, self.model.scales.num_codes
        num = sum((at for at, _ in found), np.zeros(b, np.int32))
        m = max(int(num.max(initial=0)), 1)
        out = {
            "images": np.zeros((b, m, side, side, 3), np.uint8),
            "codes": np.zeros((b, m, n), np.int32),
            "confidence": np.zeros((b, m), np.float32),
        }
        if previews:
            out["scales"] = np.zeros((b, m, k, side, side, 3), np.uint8)
            out["floats"] = np.zeros((b, m, side, side, 3), np.float32)
        seen = np.zeros(b, np.int32)
        for at_mask, mask in found:
            mask = distributed.fetch(mask)
            for b_index in np.flatnonzero(at_mask):
                for key, array in out.items():
                    array[b_index, seen[b_index]] = mask[key][b_index]
            seen += at_mask
        return Generated(
            ids=distributed.fetch(answer.ids),
            counts=distributed.fetch(answer.count),
            num_masks=num,
            **{"scales": None, "floats": None, **out},
        )


@functools.cache
def compiler_options(platform: str) -> dict[str, str] | None:
    """Options of XLA for CPUs: convolutions are not left to a library.

    By default YNNPACK runs those of few channels on one thread.
    None on other platforms, or where this XLA does not know the option.
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


def _mask_phase(
    m: ARGenSeg, answer: text_decode.Answer, previews: bool
) -> tuple[text_decode.Answer, dict[str, jax.Array]]:
    """All scales, <ge_end>, and the VQ-VAE's images: the last one, or that of every scale."""
    mask, cache = scale_decode.decode_codes(m, answer)
    f_hats = mask.f_hats if previews else mask.f_hats[:, -1:]
    b, k = f_hats.shape[:2]
    floats = scale_decode.to_floats(m, f_hats.reshape(b * k, *f_hats.shape[2:]))
    floats = floats.reshape(b, k, *floats.shape[1:])
    images = scale_decode.to_bytes(floats)
    out = {"images": images[:, -1], "codes": mask.codes, "confidence": mask.confidence}
    if previews:
        out |= {"scales": images, "floats": floats[:, -1]}
    return text_decode.after_mask(m, answer.replace(cache=cache)), out
