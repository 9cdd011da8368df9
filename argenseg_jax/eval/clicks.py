"""Interactive segmentation: where the next click goes, number of clicks, IoU after k clicks."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST = 20  # clicks after which a sample counts as failed, with this number
TARGETS = (0.85, 0.9)
AFTER = (1, 3, 5)


def innermost(mask: np.ndarray) -> tuple[int, int] | None:
    """(x, y) of a pixel of bool[H, W] that is farthest from its edge; None of an empty mask."""
    return _peel(mask)[1]


def next_click(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int, bool] | None:
    """(x, y, adds) of the click that a person would correct bool[H, W] with; None if it is right.

    It goes to the middle of the thicker of the two errors: what is missing (adds) or too much.
    """
    missing, extra = truth & ~prediction, prediction & ~truth
    (deep_m, at_m), (deep_e, at_e) = _peel(missing), _peel(extra)
    adds = (deep_m, int(missing.sum())) >= (deep_e, int(extra.sum()))
    spot = at_m if adds else at_e
    return None if spot is None else (*spot, adds)


def _peel(mask: np.ndarray) -> tuple[int, tuple[int, int] | None]:
    """(number of layers of one pixel, (x, y) of a pixel in the innermost one).

    A pixel goes when one of its 8 neighbours is outside of the mask or the picture; of those that
    go last the one nearest to their mean is taken.
    """
    layers, last, core = 0, None, np.asarray(mask, bool)
    while core.any():
        layers, last, padded = layers + 1, core, np.pad(core, 1)
        rows = padded[:-2] & padded[1:-1] & padded[2:]
        core = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    if last is None:
        return 0, None
    y, x = np.nonzero(last)
    best = np.argmin((x - x.mean()) ** 2 + (y - y.mean()) ** 2)
    return layers, (int(x[best]), int(y[best]))


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
