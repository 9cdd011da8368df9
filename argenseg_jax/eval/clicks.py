"""Interactive segmentation: where the next click goes, number of clicks, IoU after k clicks."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from argenseg_jax.data.interactive import peel

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


def interactive(ious: Sequence[Sequence[float]]) -> dict[str, float | int | None]:
    """Scores of sequences of IoU after click 1, 2, ...

    NoC@x is the mean number of clicks until IoU >= x, MOST where it is never reached; IoU@k the mean
    IoU after k clicks (after the last one where there were fewer), given where any sample has k.
    """
    if any(not len(row) for row in ious):
        raise ValueError("a sample without a click")
    n, longest = len(ious), max(map(len, ious), default=0)
    scores: dict[str, float | int | None] = {"n": n}
    for target in TARGETS:
        clicks = [next((k for k, v in enumerate(row, 1) if v >= target), MOST) for row in ious]
        scores[f"NoC@{round(100 * target)}"] = sum(clicks) / n if n else None
    for k in AFTER:
        if k <= longest:
            scores[f"IoU@{k}"] = sum(row[min(k, len(row)) - 1] for row in ious) / n
    return scores
