"""The public API: images and phrases in, text and masks at the images' own size out.

predictor = argenseg_jax.load("nano")
result = predictor.segment(image, "Segment the red circle.")
result, history = predictor.chat("And the blue square?", image, history)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from argenseg_jax.ckpt.checkpoint import open_checkpoint
from argenseg_jax.data import prompt, transforms
from argenseg_jax.data.reader import Reader, Reading
from argenseg_jax.data.tokenizer import Tokenizer
from argenseg_jax.decode.engine import GREEDY, Engine, Generated
from argenseg_jax.decode.sampling import Sampling
from argenseg_jax.errors import UserError
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.vocab import MASK

PROMPT_MULTIPLE = 64  # prompts and batches are padded to such buckets: few shapes, few compilations
WEIGHTS = ("float32", "bfloat16", "int8")  # int8: the decoder's matrices; the rest is bfloat16
Turns = list[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
      image: u8[H, W, 3], a PIL image or a file (see `pixels`); None for a question without an image.
      conversations: the text of a single question, or [{'from', 'value'}] that end with one.
      name: names it in messages, such as file and line; by default its number.
      max_tiles: most tiles of the image's grid, where its data set says so (`max_dynamic_patch`); 0 = as
        the run's config.
    """

    image: Any
    conversations: str | Sequence[Mapping[str, str]]
    name: str = ""
    max_tiles: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """One answer.

    Attributes:
      masks: bool[H, W] each, in the order of the answer (the mask's own side without an image).
      scores: mean probability of each mask's codes.
      text: the answer, with `<mask>` where a mask was written.
      images: u8[R, R, 3] each, what the VQ-VAE drew before resizing and thresholding.
      scales: u8[K, R, R, 3] each, coarse to fine; empty unless asked for.
      floats: f32[R, R, 3] each, `images` in [-1, 1] before rounding; they come with the scales.
    """

    masks: list[np.ndarray]
    scores: list[float]
    text: str
    images: list[np.ndarray]
    scales: list[np.ndarray]
    floats: list[np.ndarray] = dataclasses.field(default_factory=list)


class Predictor:
    """A model with its weights, tokenizer and the settings that it was trained with."""

    def __init__(
        self,
        model: ARGenSeg,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        config: Mapping[str, Any],
        *,
        int8: bool = False,
    ):
        """config: nested dict; the sections `data` and `decode` of the training run are read."""
        data = config.get("data", {})
        self.model, self.tokenizer = model, tokenizer
        self.engine = Engine(model, params, int8=int8)
        self.system, self.image_last = data.get("system"), data.get("image_last", False)
        self.pad = data.get("pad_to_square", False)
        self.tiling = transforms.Tiling(
            model.image_size, data.get("max_tiles", 1), data.get("sample_tiles", 0), self.pad
        )
        self.reading = Reading.from_config(data)
        self.max_text = config.get("decode", {}).get("max_text_tokens", 64)

    @classmethod
    def load(cls, path: str, dtype: str = "float32", *, checksums: bool = True) -> Predictor:
        """From an Orbax step, a workdir, an HF folder, or `nano` for the shipped model.

        Args:
          dtype: of weights and computation, one of WEIGHTS.
          checksums: checks the files of an Orbax step before they are read.
        """
        if dtype not in WEIGHTS:
            raise UserError(f"dtype {dtype!r} is unknown; there are {', '.join(WEIGHTS)}")
        checkpoint, int8 = open_checkpoint(path, checksums=checksums), dtype == "int8"
        return cls(
            checkpoint.model(dtype="bfloat16" if int8 else dtype),
            checkpoint.load_params(),
            checkpoint.tokenizer(),
            checkpoint.config,
            int8=int8,
        )

    def segment(self, image: Any, text: str, *, max_masks: int = 8, **options: Any) -> Result:
        """One image (or None), one question; `<image>` is put in front where the text lacks one.

        The options are those of `segment_batch`.
        """
        return self.segment_batch([Request(image, text)], max_masks=max_masks, **options)[0]

    def chat(
        self, text: str, image: Any = None, history: Sequence[Mapping[str, str]] = (), **options: Any
    ) -> tuple[Result, Turns]:
        """The next turn of a conversation: (answer, history that now ends with it).

        The image is that of the whole conversation; of earlier answers the model sees the text, as
        in the original, not the masks. The options are those of `segment`.
        """
        turns = [*history, {"from": "human", "value": text}]
        result = self.segment(image, turns, **options)
        return result, [*turns, {"from": "gpt", "value": result.text}]

    def segment_batch(
        self,
        requests: Sequence[Request],
        *,
        max_masks: int = 1,
        previews: bool = False,
        guidance: float = 0.0,
        sampling: Sampling = GREEDY,
        code_sampling: Sampling = GREEDY,
    ) -> list[Result]:
        """Answers all requests at once; the answer of a row does not depend on its neighbours.

        Args:
          max_masks: an answer stops after this many masks.
          previews: fill in `Result.scales` and `Result.floats`.
          guidance: strength of classifier-free guidance of the codes; 0 = off.
          sampling, code_sampling: how words and codes are chosen.

        Raises:
          SampleError, UserError: an image or prompt that cannot be used, by the request's name.
        """
        if not requests:
            return []
        requests = [
            dataclasses.replace(r, image=pixels(r.image, self.reading), name=r.name or f"request {i}")
            for i, r in enumerate(requests)
        ]
        rows = [self._encode(request) for request in requests]
        size = 1 << (len(rows) - 1).bit_length()  # padded to a power of two by repeating row 0
        rows += rows[:1] * (size - len(rows))
        uncond_prompt = self._encode(Request(None, prompt.UNCONDITIONAL))[0] if guidance else ()
        lengths = np.array([len(tokens) for tokens, _ in rows], np.int32)
        longest = max(lengths.max(), len(uncond_prompt))
        tokens = np.full(
            (size, -(-int(longest) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE), self.tokenizer.vocab.pad, np.int32
        )
        side, most = self.model.image_size, max(len(t) for _, t in rows)
        tiles = np.zeros((size, most, side, side, 3), np.uint8) if most else None
        for i, (words, image_tiles) in enumerate(rows):
            tokens[i, : len(words)] = words
            if most:
                tiles[i, : len(image_tiles)] = image_tiles
        out = self.engine.generate(
            tokens,
            lengths,
            tiles,
            max_text=self.max_text,
            max_masks=max_masks,
            previews=previews,
            text=sampling,
            codes=code_sampling,
            guidance=guidance,
            uncond_prompt=uncond_prompt,
        )
        with ThreadPoolExecutor() as pool:  # Pillow resizes outside Python's lock
            return list(pool.map(lambda i: self._result(requests[i], out, i), range(len(requests))))

    def _encode(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
        """(prompt ids int32[T], tiles u8[P, S, S, 3])."""
        images = [] if request.image is None else [request.image]
        tiles, per_image = self.tiling(images, request.max_tiles, request.name)
        tokens = prompt.encode_query(
            request.conversations,
            self.tokenizer,
            per_image,
            image_tokens=self.model.image_tokens,
            system=self.system,
            image_last=self.image_last,
            name=request.name,
        )
        return tokens, tiles

    def _result(self, request: Request, out: Generated, row: int) -> Result:
        """Masks at the size of the image: bilinear, grey, foreground from 128 on (docs/reference.md, section 4)."""
        images = [out.images[row, j] for j in range(out.num_masks[row])]
        side = self.model.mask_size
        size = (side, side) if request.image is None else request.image.shape[1::-1]
        masks = [transforms.binarize(image, size, pad=self.pad) for image in images]
        ids = out.ids[row, : out.counts[row]].tolist()
        text = self.tokenizer.decode(ids, mask=MASK)
        scales, floats = (
            [] if x is None else [x[row, j] for j in range(len(images))] for x in (out.scales, out.floats)
        )
        return Result(
            masks, [float(c) for c in out.confidence[row, : len(images)]], text.strip(), images, scales, floats
        )


def pixels(image: Any, reading: Reading = Reading()) -> np.ndarray | None:
    """u8[H, W, 3] of whatever people call an image; None of None.

    A file and a PIL image are turned upright by their EXIF orientation. More than 8 bits become 8 by the
    window of the reading, or by the image's own values (data/reader.py).

    Args:
      image: a file's path, a PIL image of any mode, or an array: u8[H, W, 3], or as
        data/reader.array_levels takes it.
      reading: of the run; `Predictor.reading`.

    Raises:
      SampleError: a file that cannot be read or is too large.
      UserError: no image.
    """
    return None if image is None else Reader(reading).image(image)
