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

from argenseg_jax.data.rle import checked_rle
from argenseg_jax.errors import UserError, brief, located

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # the first of COCOeval.stats


class Instances:
    """COCO's AP over rows, each about one class in one image; they are checked as they are added.

    A row: {image: name, kind: class, instances: [{segmentation: RLE, score}], truths:
    [{segmentation: RLE, iscrowd?}]}. Several rows may share an image.
    """

    def __init__(self):
        self._rows = 0
        self._images: dict[Any, int] = {}
        self._classes: dict[Any, int] = {}
        self._sizes: dict[int, list[int]] = {}  # by image
        self._truths: list[dict[str, Any]] = []
        self._found: list[dict[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes one more row; UserError names the key whose value is not what it should be."""
        image, kind = (_name(row, key) for key in ("image", "kind"))
        ids = {"image_id": self._images.setdefault(image, len(self._images) + 1),
               "category_id": self._classes.setdefault(kind, len(self._classes) + 1)}
        self._rows += 1
        for item in _items(row, "truths"):
            with located("key `truths`", "list of {segmentation, iscrowd}", UserError):
                rle = self._checked(item, ids)
                self._truths.append({**ids, "id": len(self._truths) + 1, "iscrowd": _crowd(item),
                                     "segmentation": rle, "area": float(coco_mask.area(rle)),
                                     "bbox": coco_mask.toBbox(rle).tolist()})
        for item in _items(row, "instances"):
            with located("key `instances`", "list of {segmentation, score}", UserError):
                self._found.append({**ids, "segmentation": self._checked(item, ids), "score": _score(item)})

    def scores(self) -> dict[str, float | int | None]:
        """n (rows), AP (mean over IoU 0.5..0.95 and classes), AP50, AP75 and AP by size of the object;
        None where COCO has nothing to average."""
        if not self._truths or not self._found:  # pycocotools cannot load an empty list of results
            return {"n": self._rows, **{k: 0.0 if self._truths and k in NAMES[:3] else None for k in NAMES}}
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            data = COCO()
            data.dataset = {"images": [{"id": k, "height": h, "width": w}
                                       for k, (h, w) in self._sizes.items()],
                            "annotations": self._truths, "categories": [
                                {"id": k, "name": n} for n, k in self._classes.items()]}
            data.createIndex()
            run = COCOeval(data, data.loadRes(self._found), "segm")
            run.evaluate()
            run.accumulate()
            run.summarize()
        return {"n": self._rows, **{name: float(v) if v >= 0 else None  # -1: nothing of that size
                                    for name, v in zip(NAMES, run.stats)}}

    def _checked(self, item: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
        rle = checked_rle(item["segmentation"])
        known = self._sizes.setdefault(ids["image_id"], rle["size"])
        if known != rle["size"]:
            raise UserError(f"a mask of {rle['size']}, where another of the same image has {known}")
        return rle


def instance_scores(rows: Iterable[Mapping[str, Any]]) -> dict[str, float | int | None]:
    """The scores of `Instances` over all rows."""
    tally = Instances()
    for row in rows:
        tally.add(row)
    return tally.scores()


def _name(row: Mapping[str, Any], key: str) -> str | int:
    value = row[key]
    if not isinstance(value, (str, int)):
        raise UserError(f"key `{key}`: a name or a number expected, not {brief(repr(value), 60)}")
    return value


def _items(row: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    items = row[key]
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, Mapping) for item in items):
        raise UserError(f"key `{key}`: a list of objects expected, not {brief(repr(items), 60)}")
    return items


def _score(item: Mapping[str, Any]) -> float:
    value = item["score"]
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not np.isfinite(float(value)):
        raise UserError(f"an instance without a finite score: {brief(repr(value), 60)}")
    return float(value)


def _crowd(item: Mapping[str, Any]) -> int:
    value = item.get("iscrowd", 0)
    if value not in (0, 1):
        raise UserError(f"`iscrowd` is 0 or 1, not {brief(repr(value), 60)}")
    return int(value)
