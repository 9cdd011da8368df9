"""Boxes of referring comprehension: read from text, taken from masks, and Acc@0.5."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

GRID = 1000  # boxes in text are written in thousandths of the width and height
_BOX = re.compile(r"<box>\s*(\[.*?\])\s*</box>", re.DOTALL)
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_FOUR = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels; x2, y2 are outer edges


def parse_boxes(text: str, width: int, height: int) -> list[Box]:
    """The boxes of every `<box>[[x1,y1,x2,y2], ...]</box>` in a text, from 0..1000 to pixels.

    Whatever is no list of four numbers is passed over: an answer without a box is a wrong answer,
    not an error. Corners in the wrong order are put right.
    """
    boxes = []
    for inside in _BOX.findall(text):
        for found in _FOUR.findall(inside):
            x1, y1, x2, y2 = (float(v) for v in found)
            boxes.append(
                (
                    min(x1, x2) * width / GRID,
                    min(y1, y2) * height / GRID,
                    max(x1, x2) * width / GRID,
                    max(y1, y2) * height / GRID,
                )
            )
    return boxes


def format_box(box: Sequence[float], width: int, height: int) -> str:
    """The inverse of `parse_boxes` for one box, rounded to thousandths."""
    x1, y1, x2, y2 = box
    scaled = (x1 * GRID / width, y1 * GRID / height, x2 * GRID / width, y2 * GRID / height)
    return "<box>[[" + ",".join(str(round(v)) for v in scaled) + "]]</box>"


def mask_box(mask: np.ndarray) -> Box | None:
    """The extent of a bool[H, W] in pixel edges; None of an empty mask."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return float(cols[0]), float(rows[0]), float(cols[-1] + 1), float(rows[-1] + 1)


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes; 0 where both have no area."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    tall = min(a[3], b[3]) - max(a[1], b[1])
    inner = max(wide, 0) * max(tall, 0)
    outer = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    return inner / outer if outer > 0 else 0.0


class BoxAccuracy:
    """Acc@0.5: the share of samples whose box has IoU >= 0.5; a missing box is wrong.

    A sample without a true box counts as right where no box was given.
    """

    def __init__(self):
        self._n = self._right = 0

    def add(self, predicted: Sequence[float] | None, truth: Sequence[float] | None) -> None:
        """One sample."""
        self._n += 1
        if truth is None:
            self._right += predicted is None
        else:
            self._right += predicted is not None and box_iou(predicted, truth) >= 0.5

    def scores(self) -> dict[str, float | int | None]:
        """{n, Acc@0.5}; None without a sample."""
        return {"n": self._n, "Acc@0.5": self._right / self._n if self._n else None}


def box_accuracy(
    predicted: Sequence[Sequence[float] | None], truths: Sequence[Sequence[float] | None]
) -> dict[str, float | int | None]:
    """`BoxAccuracy` of all samples."""
    tally = BoxAccuracy()
    for pair in zip(predicted, truths, strict=True):
        tally.add(*pair)
    return tally.scores()
