"""Augmentation of training images: geometry and colours of photographs, JPEG artefacts, recolouring.

It never makes a text wrong: nothing moves if a text mentions sides or coordinates, and colours do not
change if it names one.
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


def _mentions(sample: Sample, *patterns: re.Pattern[str]) -> bool:
    """Whether a question or an answer matches one of the patterns."""
    return any(p.search(turn["value"]) for turn in sample.conversations for p in patterns)


@dataclasses.dataclass(frozen=True)
class Augment:
    """Strength of the augmentation of photographs (data.augment); masks are transformed with their image.

    Attributes:
      flip: probability of a horizontal flip.
      scale: range of the crop's share of the area; (1, 1) keeps the image uncropped.
      ratio: range of the factor by which the crop's aspect ratio differs from the image's.
      jitter: brightness, contrast and saturation are multiplied by up to 1 ± this.
    """

    flip: float = 0.5
    scale: tuple[float, float] = (0.4, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    jitter: float = 0.3

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The augmented sample; samples of several images, whose masks may belong to any of them, are not changed.

        Nothing is moved if a text mentions sides or coordinates, nor without a mask: a text answer may be
        about what the crop removes, or about writing in the image.
        """
        if len(sample.images) != 1:
            return sample
        image, masks = sample.images[0], list(sample.masks)
        x, y, w, h = self._crop(image.shape[1], image.shape[0], rng)
        flipped = rng.random() < self.flip
        if masks and not _mentions(sample, _SIDES, _COORDINATES):
            step = -1 if flipped else 1
            image, *masks = (a[y : y + h, x : x + w][:, ::step] for a in (image, *masks))
        jittered = Image.fromarray(np.ascontiguousarray(image))
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            jittered = enhance(jittered).enhance(1 + self.jitter * rng.uniform(-1, 1))
        return dataclasses.replace(sample, images=(np.array(jittered),), masks=tuple(map(np.ascontiguousarray, masks)))

    def _crop(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(x, y, w, h) of a random part of the image."""
        area = width * height * rng.uniform(self.scale[0], self.scale[1])
        aspect = width / height * math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
        w = min(max(round(math.sqrt(area * aspect)), 1), width)
        h = min(max(round(math.sqrt(area / aspect)), 1), height)
        return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h


def recompress(sample: Sample, rng: np.random.Generator) -> Sample:
    """The images after JPEG compression of random quality: `data_augment` of the official meta JSON."""

    def lossy(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(rng.integers(QUALITIES[0], QUALITIES[1] + 1)))
        return np.array(JpegImageFile(io.BytesIO(file.getvalue())))

    return dataclasses.replace(sample, images=tuple(map(lossy, sample.images)))


def recolour(sample: Sample, rng: np.random.Generator, strength: float = 0.75) -> Sample:
    """The images in other, paler colours, unless the text mentions a colour.

    A model trained on few combinations of colour and shape learns shapes from colours: that no circle is
    ever blue is easier to learn than roundness. Saturation is multiplied by a random number within
    ±strength, so that on average colours are uninformative; below zero a colour becomes its complement.
    Brightness is a random mixture of the channels.
    """
    if _mentions(sample, _COLOURS):
        return sample
    saturation, mixture = rng.uniform(-strength, strength), rng.dirichlet(np.ones(3))
    matrix = saturation * np.eye(3) + (1 - saturation) * mixture[:, None]
    recoloured = (np.clip(image @ matrix, 0, 255).astype(np.uint8) for image in sample.images)
    return dataclasses.replace(sample, images=tuple(recoloured))
