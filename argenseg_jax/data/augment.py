"""Changes of training images: geometry and colours of photographs, JPEG's losses, other colours.

A change never makes a text wrong: nothing moves where a text speaks of places or coordinates, and
colours stay where one names them.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re

import numpy as np
from PIL import Image, ImageEnhance
from PIL.JpegImagePlugin import JpegImageFile

from argenseg_jax.data.sample import Sample

_COLOURS = re.compile(
    r"\b(black|blue|brown|gr[ae]y|green|orange|pink|purple|red|white|yellow|beige|crimson|cyan|"
    r"gold(?:en)?|magenta|maroon|navy|olive|silver|teal|turquoise|violet|colou?r\w*)\b|"
    "[红紅橙黄黃绿綠青蓝藍紫粉黑白灰棕褐金银銀]|色",
    re.IGNORECASE,
)
_SIDES = re.compile(
    r"\b(left|right)(most|hand|wards?)?\b|\b(top|bottom|upper|lower)(most)?\b|"
    r"\b(middle|cent(er|re)|central|corners?|above|below|beneath|clockwise|counterclockwise|o'clock|"
    r"(north|south)?(east|west)(ern)?|north(ern)?|south(ern)?|links|rechts|oben|unten|gauche|droite|izquierd[ao]|"
    r"derech[ao]|arriba|abajo)\b|"
    "[左右上下]|中间|中間|中央|角落|왼쪽|오른쪽",
    re.IGNORECASE,
)
_COORDINATES = re.compile(r"<(box|quad|point)>|\[\[|[\[(]\s*-?\d[\d.]*\s*,\s*-?\d")
QUALITIES = (75, 100)  # of the reference's JPEG re-compression


def _speaks(sample: Sample, *patterns: re.Pattern[str]) -> bool:
    """Whether a question or an answer matches one of the patterns."""
    return any(p.search(turn["value"]) for turn in sample.conversations for p in patterns)


@dataclasses.dataclass(frozen=True)
class Augment:
    """How strongly photographs are changed (data.augment); masks move with their image.

    Attributes:
      flip: chance of a mirror image.
      scale: range of the crop's share of the area; (1, 1) keeps the whole image.
      ratio: range of the factor by which the crop's aspect ratio differs from the image's.
      jitter: brightness, contrast and saturation are multiplied by up to 1 ± this.
    """

    flip: float = 0.5
    scale: tuple[float, float] = (0.4, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    jitter: float = 0.3

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """A changed sample of one image; of several, masks need not belong to one of them.

        Nothing is moved where a text speaks of places or coordinates, nor without a mask: an answer
        in words may be about what a crop leaves out, or about writing.
        """
        if len(sample.images) != 1:
            return sample
        image, masks = sample.images[0], list(sample.masks)
        x, y, w, h = self._crop(image.shape[1], image.shape[0], rng)
        mirrored = rng.random() < self.flip
        if masks and not _speaks(sample, _SIDES, _COORDINATES):
            step = -1 if mirrored else 1
            image, *masks = (a[y : y + h, x : x + w][:, ::step] for a in (image, *masks))
        picture = Image.fromarray(np.ascontiguousarray(image))
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            picture = enhance(picture).enhance(1 + self.jitter * rng.uniform(-1, 1))
        return dataclasses.replace(sample, images=(np.array(picture),), masks=tuple(map(np.ascontiguousarray, masks)))

    def _crop(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(x, y, w, h) of a random part of the image."""
        area = width * height * rng.uniform(*self.scale)
        aspect = width / height * math.exp(rng.uniform(*map(math.log, self.ratio)))
        w = min(max(round(math.sqrt(area * aspect)), 1), width)
        h = min(max(round(math.sqrt(area / aspect)), 1), height)
        return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h


def recompress(sample: Sample, rng: np.random.Generator) -> Sample:
    """The images as JPEG of a random quality leaves them: `data_augment` of the official meta JSON."""

    def lossy(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(rng.integers(QUALITIES[0], QUALITIES[1] + 1)))
        return np.array(JpegImageFile(io.BytesIO(file.getvalue())))

    return dataclasses.replace(sample, images=tuple(map(lossy, sample.images)))


def recolour(sample: Sample, rng: np.random.Generator, strength: float = 0.75) -> Sample:
    """The images in other, paler colours, unless the text speaks of colours.

    A model that meets few combinations of colour and shape learns shapes from colours: that no
    circle is ever blue is easier to see than roundness. Saturation is multiplied by a random number
    within ±strength, so that on average a colour says nothing; below zero it becomes its complement.
    Brightness is a random mixture of the channels.
    """
    if _speaks(sample, _COLOURS):
        return sample
    saturation, mixture = rng.uniform(-strength, strength), rng.dirichlet(np.ones(3))
    matrix = saturation * np.eye(3) + (1 - saturation) * mixture[:, None]
    recoloured = (np.clip(image @ matrix, 0, 255).astype(np.uint8) for image in sample.images)
    return dataclasses.replace(sample, images=tuple(recoloured))
