"""The public API: pictures and phrases in, text and masks at the pictures' own size out.

  predictor = Predictor.load("nano")
  result = predictor.segment(image, "Segment the red circle.")
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from argenseg_jax.ckpt.checkpoint import open_checkpoint
from argenseg_jax.data import prompt, transforms
from argenseg_jax.data.tokenizer import Tokenizer
from argenseg_jax.decode.engine import Engine, Generated
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.vocab import MASK

PROMPT_MULTIPLE = 64  # prompts and batches are padded to such buckets: few shapes, few compilations


@dataclasses.dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
      image: u8[H, W, 3], or None for a question without a picture.
      conversations: the text of a single question, or [{'from', 'value'}] that end with one.
      name: names it in messages, such as file and line; by default its number.
    """

    image: np.ndarray | None
    conversations: str | Sequence[Mapping[str, str]]
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """One answer.

    Attributes:
      masks: bool[H, W] each, in the order of the answer (the mask's own side without a picture).
      scores: mean probability of each mask's codes.
      text: the answer, with `<mask>` where a mask was written.
      images: u8[R, R, 3] each, what the VQ-VAE drew before resizing and thresholding.
      scales: u8[K, R, R, 3] each, coarse to fine; empty unless asked for.
    """

    masks: list[np.ndarray]
    scores: list[float]
    text: str
    images: list[np.ndarray]
    scales: list[np.ndarray]


class Predictor:
    """A model with its weights, tokenizer and the settings that it was trained with."""

    def __init__(self, model: ARGenSeg, params: Mapping[str, Any], tokenizer: Tokenizer,
                 config: Mapping[str, Any]):
        """config: nested dict; the sections `data` and `decode` of the training run are read."""
        data = config.get("data", {})
        self.model, self.tokenizer = model, tokenizer
        self.engine = Engine(model, params)
        self.system, self.image_last = data.get("system"), data.get("image_last", False)
        self.pad, self.max_tiles = data.get("pad_to_square", False), data.get("max_tiles", 1)
        self.max_text = config.get("decode", {}).get("max_text_tokens", 64)

    @classmethod
    def load(cls, path: str, dtype: str = "float32") -> Predictor:
        """From an Orbax step, a workdir, an HF folder, or `nano` for the shipped model."""
        checkpoint = open_checkpoint(path)
        return cls(checkpoint.model(dtype=dtype), checkpoint.load_params(), checkpoint.tokenizer(),
                   checkpoint.config)

    def segment(self, image: np.ndarray | None, text: str, *, max_masks: int = 8,
                previews: bool = False) -> Result:
        """One picture, one question; `<image>` is put in front of the text where it lacks one."""
        return self.segment_batch([Request(image, text)], max_masks=max_masks, previews=previews)[0]

    def segment_batch(self, requests: Sequence[Request], *, max_masks: int = 1,
                      previews: bool = False) -> list[Result]:
        """Answers all requests at once; the answer of a row does not depend on its neighbours.

        Raises:
          SampleError, UserError: a picture or prompt that cannot be used, by the request's name.
        """
        if not requests:
            return []
        rows = [self._encode(request, request.name or f"request {i}") for i, request in enumerate(requests)]
        lengths = np.array([len(tokens) for tokens, _ in rows], np.int32)
        width = -(-int(lengths.max()) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        size = 1 << (len(rows) - 1).bit_length()  # padded to a power of two by repeating row 0
        tokens = np.full((size, width), self.tokenizer.vocab.pad, np.int32)
        for i in range(size):
            row = rows[i if i < len(rows) else 0][0]
            tokens[i, :len(row)] = row
        lengths = np.concatenate([lengths, np.full(size - len(rows), lengths[0], np.int32)])
        tiles = None
        if any(len(t) for _, t in rows):
            side = self.model.image_size
            tiles = np.zeros((size, max(len(t) for _, t in rows), side, side, 3), np.uint8)
            for i in range(size):
                row = rows[i if i < len(rows) else 0][1]
                tiles[i, :len(row)] = row
        out = self.engine.generate(tokens, lengths, tiles, max_text=self.max_text,
                                   max_masks=max_masks, previews=previews)
        return [self._result(request, out, i) for i, request in enumerate(requests)]

    def _encode(self, request: Request, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(prompt ids int32[T], tiles u8[P, S, S, 3])."""
        side = self.model.image_size
        tiles = np.zeros((0, side, side, 3), np.uint8)
        if request.image is not None:
            tiles = np.stack(transforms.image_tiles(request.image, side, max(self.max_tiles - 1, 1),
                                                    pad=self.pad))
        tokens = prompt.encode_query(
            request.conversations, self.tokenizer, [len(tiles)] if len(tiles) else [],
            image_tokens=self.model.image_tokens, system=self.system, image_last=self.image_last,
            name=name)
        return tokens, tiles

    def _result(self, request: Request, out: Generated, row: int) -> Result:
        """Masks at the size of the picture: bilinear, grey, foreground from 128 on (SPEC 4.3)."""
        images = [out.images[row, j] for j in range(out.num_masks[row])]
        side = self.model.mask_size
        size = (side, side) if request.image is None else request.image.shape[1::-1]
        masks = [transforms.binarize(image, size, pad=self.pad) for image in images]
        ids = out.ids[row, :out.counts[row]].tolist()
        text = self.tokenizer.decode(ids, mask=MASK)
        scales = [] if out.scales is None else [out.scales[row, j] for j in range(len(images))]
        return Result(masks, [float(c) for c in out.confidence[row, :len(images)]], text.strip(),
                      images, scales)
