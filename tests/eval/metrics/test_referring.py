"""Scores against cases worked out by hand."""

import itertools

import numpy as np
import pytest

from argenseg_jax.eval.metrics.referring import Sums, iou


def row(text: str) -> np.ndarray:
    return np.array([[c == "#" for c in text]])


HIT = Sums.of(row("####...."), row("####...."))  # IoU 1
HALF = Sums.of(row("##......"), row("####...."))  # 2 of 4: exactly 0.5, so not above it
MOST = Sums.of(row("####...."), row("#####..."))  # 4 of 5: exactly 0.8
MISS = Sums.of(row("........"), row("##......"))  # 0 of 2, target overlooked
QUIET = Sums.of(row("........"), row("........"))  # no target, none drawn
NOISE = Sums.of(row("###....."), row("........"))  # no target, 3 pixels drawn


def test_scores_by_hand():
    s = (HIT + HALF + MOST + MISS + QUIET + NOISE).scores()
    assert s["n"] == 6
    assert s["cIoU"] == pytest.approx((4 + 2 + 4) / (4 + 4 + 5 + 2 + 0 + 3))
    assert s["gIoU"] == pytest.approx((1 + 0.5 + 0.8 + 0 + 1 + 0) / 6)
    assert s["gIoU_target"] == pytest.approx((1 + 0.5 + 0.8 + 0) / 4)
    assert s["N-acc"] == 0.5
    assert s["T-acc"] == 0.75
    assert [s[f"Pr@0.{x}"] for x in (5, 6, 7, 8, 9)] == pytest.approx([3 / 6] * 3 + [2 / 6] * 2)


def test_empty_truth_and_prediction_count_one():
    assert iou(row("..."), row("...")) == 1.0
    assert iou(row("#.."), row("...")) == 0.0
    assert QUIET.scores()["gIoU"] == 1.0 and QUIET.scores()["cIoU"] == 1.0


def test_nothing_to_average_is_none():
    assert HIT.scores()["N-acc"] is None
    assert QUIET.scores()["gIoU_target"] is None and QUIET.scores()["T-acc"] is None
    assert Sums().scores()["gIoU"] is None and Sums().scores()["cIoU"] is None


def test_pooling_is_exact_in_any_order():
    rng = np.random.default_rng(0)
    parts = [Sums.of(rng.random((7, 9)) < 0.4, rng.random((7, 9)) < 0.3) for _ in range(5)]
    pooled = {sum(order, Sums()) for order in itertools.permutations(parts)}
    assert len(pooled) == 1


def test_shape_mismatch_is_refused():
    with pytest.raises(ValueError, match="alike"):
        Sums.of(row("##"), row("###"))
    with pytest.raises(ValueError, match="bool"):
        Sums.of(row("##").astype(np.uint8), row("##"))
