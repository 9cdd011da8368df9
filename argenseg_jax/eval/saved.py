"""Saved predictions: rows of predictions.jsonl, their scores without the model, COCO's result file."""
from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from argenseg_jax.errors import UserError
from argenseg_jax.eval import table
from argenseg_jax.eval.metrics import UNIT, Sums
from argenseg_jax.eval.rle import decode_rle

Row = Mapping[str, Any]
SIZES = ((0.0, "none"), (0.01, "below 1 %"), (0.05, "1-5 %"), (0.2, "5-20 %"), (1.0, "above 20 %"))
LENGTHS = ((2, "1-2 words"), (5, "3-5 words"), (10, "6-10 words"), (10**9, "above 10 words"))
BINS = 10  # of the histogram of IoU


def read_rows(path: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a predictions.jsonl; UserError names the line that is none."""
    path, rows = epath.Path(path), []
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    for k, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{k}: malformed JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{k}: not a prediction but {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no predictions")
    return rows


def summary(rows: Sequence[Row], metric: str = "", where: str = "predictions") -> dict[str, Any]:
    """The scores of rows: those of `metric`, beside those of masks where every row has one.

    Args:
      rows: of one data set; those of several hosts or runs are joined in any order.
      metric: a name in table.METRICS; '' takes the one that the rows name, or 'referring'.
      where: names the rows in messages.

    Returns:
      The scores, `metric`, `by_kind` {kind: {n, gIoU or accuracy}}, those of a baseline where the rows
      hold one, and `breakdown` (see `breakdown`).
    """
    metric = metric or (rows[0].get("metric") if rows else None) or "referring"
    scores = {**table.score(metric, rows, where), "metric": metric}
    kinds: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        if row.get("kind") is not None:
            kinds[row["kind"]].append(row)
    if not all(row.get("prediction") and row.get("truth") for row in rows):
        return {**scores, **_answers(rows, kinds, scores)}
    pairs = [table.masks(row) for row in rows]
    sums = [Sums.of(*pair) for pair in pairs]
    pooled = {k: sum((one for one, row in zip(sums, rows) if row.get("kind") == k), Sums()) for k in kinds}
    by_kind = {k: {"n": s.n, "gIoU": s.scores()["gIoU"]} for k, s in sorted(pooled.items())}
    return {**sum(sums, Sums()).scores(), **scores, **_baseline(rows),
            **({"by_kind": by_kind} if by_kind else {}),
            "breakdown": breakdown(rows, sums, [float(truth.mean()) for _, truth in pairs])}


def _baseline(rows: Sequence[Row]) -> dict[str, float]:
    """gIoU and cIoU of the constant answers, where every row has the pixels of one."""
    blind = [row["baseline"] for row in rows if row.get("baseline")]
    if not blind or len(blind) < len(rows):
        return {}
    ious = [UNIT * inner // outer if outer else UNIT for inner, outer in blind]
    outer = sum(pixels for _, pixels in blind)
    return {"baseline_gIoU": sum(ious) / (UNIT * len(ious)),
            "baseline_cIoU": sum(pixels for pixels, _ in blind) / outer if outer else 1.0}


def _answers(rows: Sequence[Row], kinds: Mapping[str, Sequence[Row]], scores: Mapping[str, Any]
             ) -> dict[str, Any]:
    """Accuracy by kind, and that of the commonest reference of each kind as the answer to all of it.

    The latter, chosen in hindsight, is the best that an answer without looking can do.
    """
    if scores.get("accuracy") is None or not kinds:
        return {}
    each = {k: {"n": len(of), "accuracy": table.score(scores["metric"], of)["accuracy"]}
            for k, of in sorted(kinds.items())}
    found: dict[str, Any] = {"by_kind": each}
    if scores["metric"] in ("exact", "pope"):
        common = sum(max(collections.Counter(row["reference"] for row in of).values())
                     for of in kinds.values())
        found["baseline_accuracy"] = common / sum(map(len, kinds.values()))
    return found


def breakdown(rows: Sequence[Row], sums: Sequence[Sums], areas: Sequence[float]) -> dict[str, Any]:
    """Where the IoU comes from.

    Returns:
      histogram: how many samples have IoU in each tenth of 0..1 (1 belongs to the last).
      by_size, by_length: {label: {n, gIoU}} by the share of the picture that the true mask covers
      and by the words of the expression (of the question where a row names no expression).
    """
    ious = [one.iou / UNIT for one in sums]
    # In integers: 2 of 10 pixels are IoU 0.2, whatever the rounding.
    tenths = [BINS * s.intersection // s.union if s.union else BINS for s in sums]
    histogram = np.bincount(np.minimum(tenths, BINS - 1).astype(int), minlength=BINS)
    words = [len(str(row.get("expression") or row.get("question") or "").split()) for row in rows]
    return {"histogram": histogram.tolist(), "by_size": _grouped(areas, ious, SIZES),
            "by_length": _grouped(words, ious, LENGTHS)}


def coco_results(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """[{image_id, category_id, segmentation, score}] of every drawn mask, for COCO.loadRes.

    image_id is the row's own `image_id`, or else its index; category_id likewise, or else 1.
    """
    found = []
    for k, row in enumerate(rows):
        ids = {"image_id": row.get("image_id", row.get("index", k)),
               "category_id": row.get("category_id", 1)}
        drawn = row.get("instances")
        if drawn is None:
            drawn = [{"segmentation": row["prediction"], "score": 1.0}] if row.get("masks") else []
        found += [{**ids, "segmentation": d["segmentation"], "score": d["score"]} for d in drawn]
    return found


def mask_picture(row: Row) -> np.ndarray:
    """u8[H, W] of 0 and 255: the scored mask of a row."""
    return decode_rle(row["prediction"]).astype(np.uint8) * 255


def _grouped(values: Sequence[float], ious: Sequence[float],
             steps: Sequence[tuple[float, str]]) -> dict[str, dict[str, Any]]:
    """{label: {n, gIoU}} of the first step whose bound is not below the value; empty ones left out."""
    groups: dict[str, list[float]] = {label: [] for _, label in steps}
    for value, iou in zip(values, ious, strict=True):
        groups[next(label for bound, label in steps if value <= bound)].append(iou)
    return {label: {"n": len(group), "gIoU": sum(group) / len(group)}
            for label, group in groups.items() if group}
