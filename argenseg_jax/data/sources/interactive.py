"""Interactive segmentation built from any mask source: a point, box, scribble or mask as the prompt.

`point` and `box` are written into the question in thousandths of the width and height; the other
prompts, and `point-drawn` and `box-drawn`, are drawn into the image in one colour.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import templates
from argenseg_jax.errors import SampleError, UserError

Change = Callable[[Sample, np.random.Generator], Sample]
INK = (255, 0, 0)
GRID = 1000
QUESTIONS = {
    "point": "<image>\n Please segment the object at the point [[{}]] in this image.",
    "box": "<image>\n Please segment the object in <box>[[{}]]</box> in this image.",
    "point-drawn": "<image>\n Please segment the object under the red point in this image.",
    "box-drawn": "<image>\n Please segment the object in the red box in this image.",
    "scribble": "<image>\n Please segment the object under the red scribble in this image.",
    "mask": "<image>\n Please segment the object that the red area covers roughly in this image.",
}


class InteractiveSource:
    """The samples of a source with a drawn or written prompt instead of their question.

    Reading by index is for evaluation: the first mask, the point in its middle. `draw` is for
    training: a random mask and a random point inside it.

    Args:
      inner: a source of samples with one image and grey masks at its size.
      prompt: a key of QUESTIONS.
    """

    def __init__(self, inner: Any, prompt: str):
        if prompt not in QUESTIONS:
            raise UserError(f"interactive: no prompt '{prompt}'; there are {', '.join(QUESTIONS)}")
        self.inner, self.prompt = inner, prompt

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Sample:
        return self._build(self.inner[index], np.random.default_rng(index), central=True)

    def draw(self, index: int, rng: np.random.Generator, change: Change | None = None) -> Sample:
        """The sample with a random prompt.

        Args:
          index: of the inner source.
          rng: chooses the mask and the prompt.
          change: (sample, rng) -> sample, such as augmentation: applied before the prompt is drawn, so that
            they agree; skipped where it would leave no object.
        """
        inner = self.inner
        sample = inner.draw(index, rng) if hasattr(inner, "draw") else inner[index]
        if change:
            changed = change(sample, rng)
            sample = changed if any((m >= 128).any() for m in changed.masks) else sample
        return self._build(sample, rng, central=False)

    def _build(self, sample: Sample, rng: np.random.Generator, central: bool) -> Sample:
        where = sample.meta.get("line") or sample.meta.get("id")
        masks = [m for m in sample.masks if m.ndim == 2 and (m >= 128).any()]
        if len(sample.images) != 1 or not masks:
            raise SampleError(f"{where}: an interactive prompt needs one image and a mask that is not empty")
        mask = masks[0 if central else rng.integers(len(masks))]
        inside = mask >= 128
        if inside.shape != sample.images[0].shape[:2]:
            raise SampleError(f"{where}: the mask is no grey mask at the size of its image")
        image, text = prompted(sample.images[0], inside, self.prompt, rng, central)
        meta = {k: v for k, v in sample.meta.items() if k != "sents"}
        return Sample(templates.turns(text), (image,), (mask,), {**meta, "kind": self.prompt, "metric": "interactive"})


def prompted(
    image: np.ndarray, mask: np.ndarray, prompt: str, rng: np.random.Generator, central: bool = True
) -> tuple[np.ndarray, str]:
    """(image u8[H, W, 3], question) that ask for the object bool[H, W].

    The image is a copy where something is drawn. `central` puts a point into the middle.
    """
    height, width = mask.shape
    stroke_width = max(1, round(max(height, width) / 150))
    kind, text = prompt.removesuffix("-drawn"), QUESTIONS[prompt]
    if kind == "point":
        x, y = (innermost(mask) if central else None) or subset(mask, rng, 1)[0]
        if prompt == kind:
            return image, text.format(_thousandths((x + 0.5, y + 0.5), width, height))
        return _with_stroke(
            image,
            lambda d: d.ellipse(
                (x - 2 * stroke_width, y - 2 * stroke_width, x + 2 * stroke_width, y + 2 * stroke_width), INK
            ),
        ), text
    if kind == "box":
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
        if prompt == kind:
            return image, text.format(_thousandths(box, width, height))
        # Around the object, not over its outline, unless the image ends there.
        corners = (
            max(box[0] - stroke_width, 0),
            max(box[1] - stroke_width, 0),
            min(box[2] - 1 + stroke_width, width - 1),
            min(box[3] - 1 + stroke_width, height - 1),
        )
        return _with_stroke(image, lambda d: d.rectangle(corners, outline=INK, width=stroke_width)), text
    if kind == "scribble":
        area = _scribble(mask, rng, stroke_width)
    else:  # about half of the mask, around one of its pixels
        x, y = subset(mask, rng, 1)[0]
        ys, xs = np.mgrid[:height, :width]
        distance = np.where(mask, (xs - x) ** 2 + (ys - y) ** 2, np.inf)
        area = mask & (distance <= np.median(distance[mask]))
    return np.where(area[..., None], np.array(INK, np.uint8), image), text


def peel(mask: np.ndarray) -> tuple[int, tuple[int, int] | None]:
    """(number of layers of one pixel, (x, y) of a pixel in the innermost one) of bool[H, W].

    Each layer removes the pixels with one of their 8 neighbours outside of the mask or the image; of the
    innermost layer, the pixel nearest to its mean is returned.
    """
    layers, last, core = 0, None, np.asarray(mask, bool)
    while core.any():
        layers, last, padded = layers + 1, core, np.pad(core, 1)
        vertical = padded[:-2] & padded[1:-1] & padded[2:]
        core = vertical[:, :-2] & vertical[:, 1:-1] & vertical[:, 2:]
    if last is None:
        return 0, None
    y, x = np.nonzero(last)
    best = np.argmin((x - x.mean()) ** 2 + (y - y.mean()) ** 2)
    return layers, (int(x[best]), int(y[best]))


def innermost(mask: np.ndarray) -> tuple[int, int] | None:
    """(x, y) of a pixel of bool[H, W] that is farthest from its edge; None of an empty mask."""
    return peel(mask)[1]


def subset(mask: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """i64[count, 2]: (x, y) of random pixels inside the mask."""
    ys, xs = np.nonzero(mask)
    indices = rng.integers(len(ys), size=count)
    return np.stack([xs[indices], ys[indices]], axis=1)


def _scribble(mask: np.ndarray, rng: np.random.Generator, stroke_width: int) -> np.ndarray:
    """bool[H, W]: a line through pixels of the mask, clipped to it, never empty."""
    points = subset(mask, rng, 4)
    canvas = Image.new("L", mask.shape[::-1])
    ImageDraw.Draw(canvas).line([tuple(map(int, p)) for p in points], fill=255, width=stroke_width)
    area = (np.asarray(canvas) > 0) & mask
    area[points[:, 1], points[:, 0]] = True
    return area


def _with_stroke(image: np.ndarray, stroke: Callable[[Any], None]) -> np.ndarray:
    drawn = Image.fromarray(image).copy()
    stroke(ImageDraw.Draw(drawn))
    return np.array(drawn)


def _thousandths(values: tuple[float, ...], width: int, height: int) -> str:
    """x and y alternating -> '12,345,...'."""
    return ",".join(str(round(v * GRID / (height if k % 2 else width))) for k, v in enumerate(values))
