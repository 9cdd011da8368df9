"""Interactive segmentation: where the next click goes, number of clicks, IoU after k clicks."""

from __future__ import annotations

import array
from collections.abc import Iterable, Sequence

import numpy as np

from argenseg_jax.data.sources.interactive import peel

MOST = 20  # clicks after which a sample counts as failed, with this number
TARGETS = (0.85, 0.9)
AFTER = (1, 3, 5)


def next_click(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int, bool] | None:
    """(x, y, adds) of the click that a person would correct bool[H, W] with; None if it is right.

    It goes to the middle of the thicker of the two errors: what is missing (adds) or too much.
    """
    missing, extra = truth & ~prediction, prediction & ~truth
    (deep_m, at_m), (deep_e, at_e) = peel(missing), peel(extra)
    adds = (deep_m, int(missing.sum())) >= (deep_e, int(extra.sum()))
    spot = at_m if adds else at_e
    return None if spot is None else (*spot, adds)


class Interactive:
    """Scores of sequences of IoU after click 1, 2, ...

    NoC@x is the mean number of clicks until IoU >= x, MOST where it is never reached; IoU@k the mean
    IoU after k clicks (after the last one where there were fewer), given where any sample has k.
    """

    def __init__(self):
        self._n = self._longest = 0
        self._clicks = [0] * len(TARGETS)
        self._after = [array.array("d") for _ in AFTER]

    def add(self, ious: Sequence[float]) -> None:
        """One sample: the IoU after each of its clicks."""
        if not len(ious):
            raise ValueError("a sample without a click")
        self._n, self._longest = self._n + 1, max(self._longest, len(ious))
        for i, target in enumerate(TARGETS):
            self._clicks[i] += next((k for k, v in enumerate(ious, 1) if v >= target), MOST)
        for k, values in zip(AFTER, self._after):
            values.append(ious[min(k, len(ious)) - 1])

    def scores(self) -> dict[str, float | int | None]:
        """The scores of what was added."""
        n = self._n
        scores: dict[str, float | int | None] = {"n": n}
        for target, clicks in zip(TARGETS, self._clicks):
            scores[f"NoC@{round(100 * target)}"] = clicks / n if n else None
        return scores | {f"IoU@{k}": sum(values) / n for k, values in zip(AFTER, self._after) if k <= self._longest}


def interactive(ious: Iterable[Sequence[float]]) -> dict[str, float | int | None]:
    """`Interactive` of all samples."""
    tally = Interactive()
    for row in ious:
        tally.add(row)
    return tally.scores()
