"""THE table of metrics by name: rows of predictions.jsonl -> scores.

A metric reads saved rows and nothing else, so that scores of a run and scores of a file made
earlier are the same computation, and shares of a data set are pooled by joining their rows.

Keys of a row: question, answer, kind, image, reference (text answers), prediction, truth, ignore
(COCO run lengths; ignored pixels count for nothing), instances and truths (lists of {segmentation,
score | iscrowd}), levels (ranking.sparse), ious (after each click), psnr, ssim, baseline (pixels of
intersection and union of a constant answer).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from argenseg_jax.errors import UserError
from argenseg_jax.eval import answers, boxes, clicks, instances, metrics, ranking
from argenseg_jax.eval.rle import decode_rle

Row = Mapping[str, Any]
Rows = Sequence[Row]


def score(name: str, rows: Rows, where: str = "predictions") -> dict[str, Any]:
    """The scores of metric `name`; UserError where it is unknown or a row lacks what it needs."""
    if name not in METRICS:
        raise UserError(f"metric '{name}' is unknown; there are {', '.join(METRICS)}")
    metric, needs = METRICS[name]
    for k, row in enumerate(rows, 1):
        if missing := [key for key in needs if row.get(key) is None]:
            raise UserError(f"{where}:{k}: metric '{name}' needs the key `{missing[0]}`")
    return metric(rows)


def masks(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """(prediction, truth), bool[H, W] each, both empty where the truth says to ignore."""
    prediction, truth = decode_rle(row["prediction"]), decode_rle(row["truth"])
    if row.get("ignore") is not None:
        keep = ~decode_rle(row["ignore"])
        prediction, truth = prediction & keep, truth & keep
    return prediction, truth


def _referring(rows: Rows) -> dict[str, Any]:
    return sum((metrics.Sums.of(*masks(r)) for r in rows), metrics.Sums()).scores()


def _generalized(rows: Rows) -> dict[str, Any]:
    return metrics.generalized(map(masks, rows))


def _semantic(rows: Rows) -> dict[str, Any]:
    return metrics.by_class((r["kind"], *masks(r)) for r in rows)


def _boxes(rows: Rows) -> dict[str, Any]:
    """The first box that the answer writes, or else the extent of its mask."""
    def predicted() -> Iterator[Any]:
        for row in rows:
            height, width = row["truth"]["size"]
            written = boxes.parse_boxes(row["answer"], width, height)
            yield written[0] if written else boxes.mask_box(decode_rle(row["prediction"]))
    return boxes.box_accuracy(list(predicted()),
                              [boxes.mask_box(decode_rle(r["truth"])) for r in rows])


def _anomaly(rows: Rows) -> dict[str, Any]:
    """Image AUROC by the highest level of an image; pixel AUROC and F1-max over all pixels."""
    counts = [ranking.dense(r["levels"]) for r in rows]
    top = [int(np.flatnonzero(c.any(axis=0)).max(initial=0)) for c in counts]
    defect = [bool(c[1].any()) for c in counts]
    pixels, images = sum(counts, ranking.dense([])), ranking.rank_counts(top, defect)
    return {"n": len(rows), "image_AUROC": ranking.auroc(images), "image_F1": ranking.f1_max(images),
            "pixel_AUROC": ranking.auroc(pixels), "pixel_F1": ranking.f1_max(pixels)}


def _interactive(rows: Rows) -> dict[str, Any]:
    return clicks.interactive([r["ious"] for r in rows])


def _fidelity(rows: Rows) -> dict[str, Any]:
    return {"n": len(rows), **{name: float(np.mean([r[key] for r in rows])) if rows else None
                               for name, key in (("PSNR", "psnr"), ("SSIM", "ssim"))}}


def _text(function: Callable[..., dict[str, Any]], **options: Any) -> Callable[[Rows], dict]:
    def of_rows(rows: Rows) -> dict[str, Any]:
        return function([r["answer"] for r in rows], [r["reference"] for r in rows], **options)
    return of_rows


# name -> (rows -> scores, keys that every row must have)
METRICS: dict[str, tuple[Callable[[Rows], dict[str, Any]], tuple[str, ...]]] = {
    "referring": (_referring, ("prediction", "truth")),
    "grefcoco": (_generalized, ("prediction", "truth")),
    "semantic": (_semantic, ("kind", "prediction", "truth")),
    "boxes": (_boxes, ("answer", "prediction", "truth")),
    "instances": (instances.instance_scores, ("image", "kind", "instances", "truths")),
    "interactive": (_interactive, ("ious",)),
    "anomaly": (_anomaly, ("levels",)),
    "fidelity": (_fidelity, ("psnr", "ssim")),
    "pope": (_text(answers.pope), ("answer", "reference")),
    "vqav2": (_text(answers.vqa), ("answer", "reference")),
    "textvqa": (_text(answers.vqa, tokenize=True), ("answer", "reference")),
    "mmmu": (_text(answers.mmmu), ("answer", "reference")),
    "exact": (_text(answers.exact), ("answer", "reference")),
}
