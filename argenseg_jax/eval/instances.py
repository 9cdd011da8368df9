"""AP of instance masks, by pycocotools."""
from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from argenseg_jax.errors import UserError

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # the first of COCOeval.stats


def instance_scores(rows: Iterable[Mapping[str, Any]]) -> dict[str, float | int | None]:
    """COCO's AP over rows, each about one class in one image.

    Args:
      rows: {image: name, kind: class, instances: [{segmentation: RLE, score}], truths:
        [{segmentation: RLE, iscrowd?}]}. Several rows may share an image.

    Returns:
      n (rows), AP (mean over IoU 0.5..0.95 and classes), AP50, AP75 and AP by size of the object;
      None where COCO has nothing to average.
    """
    rows = list(rows)
    images = {name: k for k, name in enumerate(dict.fromkeys(r["image"] for r in rows), 1)}
    classes = {name: k for k, name in enumerate(dict.fromkeys(r["kind"] for r in rows), 1)}
    truths, found, sizes = [], [], {}
    for row in rows:
        ids = {"image_id": images[row["image"]], "category_id": classes[row["kind"]]}
        for item in row["truths"]:
            rle = item["segmentation"]
            truths.append({**ids, "id": len(truths) + 1, "iscrowd": int(item.get("iscrowd", 0)),
                           "segmentation": rle, "area": float(coco_mask.area(rle)),
                           "bbox": coco_mask.toBbox(rle).tolist()})
        for item in (*row["truths"], *row["instances"]):
            sizes[ids["image_id"]] = item["segmentation"]["size"]
        found += [{**ids, "segmentation": item["segmentation"], "score": float(item["score"])}
                  for item in row["instances"]]
    if any(not np.isfinite(item["score"]) for item in found):
        raise UserError("AP: an instance without a finite score")
    if not truths or not found:  # pycocotools cannot load an empty list of results
        return {"n": len(rows), **{k: 0.0 if truths and k in NAMES[:3] else None for k in NAMES}}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        data = COCO()
        data.dataset = {"images": [{"id": k, "height": h, "width": w}
                                   for k, (h, w) in sizes.items()],
                        "annotations": truths, "categories": [
                            {"id": k, "name": n} for n, k in classes.items()]}
        data.createIndex()
        run = COCOeval(data, data.loadRes(found), "segm")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {"n": len(rows), **{name: float(v) if v >= 0 else None  # -1: nothing of that size
                               for name, v in zip(NAMES, run.stats)}}
