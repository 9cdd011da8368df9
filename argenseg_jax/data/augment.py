"""Augmentation of photographs: flip, random crop, colour jitter; masks move with the image."""
from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
from PIL import Image, ImageEnhance

from argenseg_jax.data import prompt
from argenseg_jax.data.sample import Sample

_COLOURS = re.compile(r"\b(black|blue|brown|gr[ae]y|green|orange|pink|purple|red|white|yellow|"
                      r"colou?r\w*)\b", re.IGNORECASE)
_SIDES = re.compile(r"\b(left|right)(most|hand|wards?)?\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Augment:
    """How strongly to disturb.

    Attributes:
      flip: chance of a mirror image; never where the text speaks of left or right.
      scale: range of the crop's share of the area; (1, 1) keeps the whole picture.
      ratio: range of the factor by which the crop's aspect ratio differs from the picture's.
      jitter: brightness, contrast and saturation are multiplied by up to 1 ± this.
    """

    flip: float = 0.5
    scale: tuple[float, float] = (0.4, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    jitter: float = 0.3

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """A disturbed sample of one image. Others stay: their masks need not lie on an image."""
        if len(sample.images) != 1:
            return sample
        image, masks = sample.images[0], list(sample.masks)
        x, y, w, h = self._crop(image.shape[1], image.shape[0], rng)
        cut = (slice(y, y + h), slice(x, x + w))
        image, masks = image[cut], [mask[cut] for mask in masks]
        sided = any(_SIDES.search(turn["value"]) for turn in sample.conversations)
        if rng.random() < self.flip and not sided:
            image, masks = image[:, ::-1], [mask[:, ::-1] for mask in masks]
        picture = Image.fromarray(np.ascontiguousarray(image))
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            picture = enhance(picture).enhance(1 + self.jitter * rng.uniform(-1, 1))
        return dataclasses.replace(sample, images=(np.array(picture),),
                                   masks=tuple(map(np.ascontiguousarray, masks)))

    def _crop(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(x, y, w, h) of a random part of the picture."""
        area = width * height * rng.uniform(*self.scale)
        aspect = width / height * math.exp(rng.uniform(*map(math.log, self.ratio)))
        w = min(max(round(math.sqrt(area * aspect)), 1), width)
        h = min(max(round(math.sqrt(area / aspect)), 1), height)
        return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h


def recolour(sample: Sample, rng: np.random.Generator, strength: float = 0.75) -> Sample:
    """The pictures in other, paler colours, unless the text speaks of colours.

    A model that meets few combinations of colour and shape learns shapes from colours: that no
    circle is ever blue is easier to see than roundness. Saturation is multiplied by a random number
    within ±strength, so that on average a colour says nothing; below zero it becomes its complement.
    Brightness is a random mixture of the channels.
    """
    if any(_COLOURS.search(turn["value"]) for turn in sample.conversations if prompt.is_human(turn)):
        return sample
    saturation, mixture = rng.uniform(-strength, strength), rng.dirichlet(np.ones(3))
    matrix = saturation * np.eye(3) + (1 - saturation) * mixture[:, None]
    recoloured = (np.clip(image @ matrix, 0, 255).astype(np.uint8) for image in sample.images)
    return dataclasses.replace(sample, images=tuple(recoloured))
