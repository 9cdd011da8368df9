"""AUROC and F1-max of anomaly scores, exact from integer counts per level.

A predicted mask image has 256 grey levels, so the pixels of any number of images are summed into
one histogram per class, and the area under the curve follows from it without keeping the pixels.
"""

from __future__ import annotations

import array

import numpy as np

LEVELS = 256


def level_counts(levels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """i64[2, 256]: how many pixels of u8[H, W] have each level where bool[H, W] is False, True."""
    if levels.shape != truth.shape or levels.dtype != np.uint8 or truth.dtype != bool:
        raise ValueError(
            f"u8 levels and a bool truth alike, not {levels.dtype}{levels.shape}, {truth.dtype}{truth.shape}"
        )
    return np.stack([np.bincount(levels[truth == side].ravel(), minlength=LEVELS) for side in (False, True)])


def auroc(counts: np.ndarray) -> float | None:
    """Area under the ROC curve of counts i64[2, n] per rising score; None with one class only.

    It is the chance that a positive scores above a negative, ties counting one half.
    """
    negatives, positives = (row.astype(object) for row in np.asarray(counts))  # no overflow
    total = negatives.sum() * positives.sum()
    if not total:
        return None
    below = np.cumsum(negatives) - negatives
    return float((positives * (2 * below + negatives)).sum() / (2 * total))


def f1_max(counts: np.ndarray) -> float | None:
    """The largest F1 over all thresholds of counts i64[2, n]; None without a positive."""
    negatives, positives = np.asarray(counts, np.int64)
    if not positives.sum():
        return None
    hits = np.cumsum(positives[::-1])
    return float(np.max(2 * hits / (hits + np.cumsum(negatives[::-1]) + positives.sum())))


def rank_counts(scores: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """i64[2, n] of single scores f[k] with their truths bool[k]: one column per distinct score."""
    _, rank = np.unique(np.asarray(scores), return_inverse=True)
    truths = np.asarray(truths, bool)
    n = int(rank.max()) + 1 if len(rank) else 0
    return np.stack([np.bincount(rank[truths == side], minlength=n) for side in (False, True)])


def sparse(counts: np.ndarray) -> list[list[int]]:
    """i64[2, n] -> [[level, negatives, positives], ...] of the levels that occur, fit for JSON."""
    return [[int(k), int(counts[0, k]), int(counts[1, k])] for k in np.flatnonzero(counts.any(axis=0))]


def dense(rows: list[list[int]]) -> np.ndarray:
    """The inverse of `sparse`, i64[2, 256]."""
    counts = np.zeros((2, LEVELS), np.int64)
    for level, negatives, positives in rows:
        counts[:, level] += (negatives, positives)
    return counts


class Anomaly:
    """Image AUROC by the highest level of an image; pixel AUROC and F1-max over all pixels."""

    def __init__(self):
        self._pixels = np.zeros((2, LEVELS), np.int64)
        self._top, self._defect = array.array("B"), array.array("B")

    def add(self, counts: np.ndarray) -> None:
        """One image: its i64[2, 256] of `level_counts`."""
        self._pixels += counts
        self._top.append(int(np.flatnonzero(counts.any(axis=0)).max(initial=0)))
        self._defect.append(bool(counts[1].any()))

    def scores(self) -> dict[str, float | int | None]:
        """The scores of what was added; None where there is one class only."""
        images = rank_counts(self._top, self._defect)
        return {
            "n": len(self._top),
            "image_AUROC": auroc(images),
            "image_F1": f1_max(images),
            "pixel_AUROC": auroc(self._pixels),
            "pixel_F1": f1_max(self._pixels),
        }
