"""Saved predictions: their scores without the model, record by record, and COCO's result file."""

from __future__ import annotations

import array
import collections
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from argenseg_jax.data.rle import decode_rle
from argenseg_jax.errors import UserError, located
from argenseg_jax.eval import records as records_lib
from argenseg_jax.eval.metrics import registry
from argenseg_jax.eval.metrics.referring import UNIT, Pool, Sums
from argenseg_jax.eval.records import Item, RecordDict

SIZES = ((0.0, "none"), (0.01, "below 1 %"), (0.05, "1-5 %"), (0.2, "5-20 %"), (1.0, "above 20 %"))
LENGTHS = ((2, "1-2 words"), (5, "3-5 words"), (10, "6-10 words"), (10**9, "above 10 words"))
BINS = 10  # of the histogram of IoU
RETROSPECT = ("exact", "pope")  # metrics of answers that can be guessed without looking


def read_records(path: epath.PathLike) -> list[dict[str, Any]]:
    """The records of a file of few predictions; UserError names the line that is none."""
    return [record for _, record in records_lib.read(path)]


def rescore(path: epath.PathLike, metric: str = "") -> dict[str, Any]:
    """`Scorer` of a predictions.jsonl of any size, in flat memory."""
    scorer = Scorer(metric)
    for where, record in records_lib.read(path):
        scorer.add(record, where)
    return scorer.scores()


def summary(records: Iterable[RecordDict], metric: str = "", where: str = "predictions") -> dict[str, Any]:
    """`Scorer` of records of one data set; messages call them WHERE:1, WHERE:2, ..."""
    scorer = Scorer(metric)
    for k, record in enumerate(records, 1):
        scorer.add(record, f"{where}:{k}")
    return scorer.scores()


class Scorer:
    """The scores of records: those of a metric, beside those of masks where every record has one.

    Rows of one data set, of several hosts or runs in any order, are added one at a time; of each some
    numbers are kept only.
    """

    def __init__(self, metric: str = ""):
        """metric: a name in registry.METRICS; '' takes the one that the first record names, or 'referring'."""
        if metric:
            registry.find(metric)
        self._metric = metric
        self._tally: registry.Tally | None = None
        self._masks: _Masks | None = _Masks()  # None from the first record without masks on
        self._words = _Words()

    def add(self, record: RecordDict, where: str) -> None:
        """Adds a record; UserError begins with `where` and names the key that is missing or faulty."""
        with located(where, "prediction", UserError):
            item = Item(record)
            if self._tally is None:
                self._start(item.get("metric"))
            registry.require(self._metric, record)
            metric = registry.find(self._metric)
            metric.add(self._tally, item)
            if metric.text:
                self._words.add(metric, item)
            if not item.has_masks():
                self._masks = None
            elif self._masks:
                self._masks.add(item)

    def scores(self) -> dict[str, Any]:
        """The scores, `metric`, `by_kind` {kind: {n, gIoU or accuracy}}, those of a baseline where the
        records hold one, and `breakdown`: where the IoU comes from.

        breakdown: `histogram`, how many samples have IoU in each tenth of 0..1 (1 belongs to the last);
        `by_size` and `by_length`, {label: {n, gIoU}} by the share of the image that the true mask
        covers and by the words of the expression (of the question where a record names no expression).
        """
        if self._tally is None:
            self._start(None)
        scores = {**self._tally.scores(), "metric": self._metric}
        if self._masks:
            return {**self._masks.pool.scores(), **scores, **self._masks.scores()}
        return {**scores, **self._words.scores(self._metric)}

    def _start(self, named: str | None) -> None:
        self._metric = self._metric or named or "referring"
        self._tally = registry.find(self._metric).tally()


class _Masks:
    """Sums over masks: of all, by kind, by size and length, and those of the constant answers."""

    def __init__(self):
        self.pool = Pool()
        self._kinds: dict[str, Sums] = {}
        self._blind = [0, 0, 0, 0]  # records, IoU in units of 1/UNIT, pixels of intersections, of unions
        self._histogram = [0] * BINS
        self._sizes, self._lengths = _Groups(SIZES), _Groups(LENGTHS)

    def add(self, item: Item) -> None:
        one, record = item.sums, item.record
        self.pool.add(one)
        kind = item.get("kind")
        if kind is not None:
            self._kinds[kind] = self._kinds.get(kind, Sums()) + one
        if record.get("baseline"):
            inner, outer = item.get("baseline")
            added = (1, UNIT * inner // outer if outer else UNIT, inner, outer)
            self._blind = [a + b for a, b in zip(self._blind, added)]
        # In integers: 2 of 10 pixels are IoU 0.2, whatever the rounding.
        tenth = BINS * one.intersection // one.union if one.union else BINS
        self._histogram[min(tenth, BINS - 1)] += 1
        height, width = item.size
        self._sizes.add(item.areas[2] / (height * width), one.iou / UNIT)
        self._lengths.add(len(str(record.get("expression") or record.get("question") or "").split()), one.iou / UNIT)

    def scores(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        records, iou, inner, outer = self._blind
        if records and records == self.pool.sums.n:
            found = {"baseline_gIoU": iou / (UNIT * records), "baseline_cIoU": inner / outer if outer else 1.0}
        if self._kinds:
            found["by_kind"] = {k: {"n": s.n, "gIoU": s.scores()["gIoU"]} for k, s in sorted(self._kinds.items())}
        return {
            **found,
            "breakdown": {
                "histogram": self._histogram,
                "by_size": self._sizes.means(),
                "by_length": self._lengths.means(),
            },
        }


class _Words:
    """Accuracy by kind, and that of the commonest reference of each kind as the answer to all of it.

    The latter, chosen in hindsight, is the best that an answer without looking can do.
    """

    def __init__(self):
        self._tallies: dict[str, registry.Tally] = {}
        self._references: dict[str, collections.Counter] = {}

    def add(self, metric: registry.Metric, item: Item) -> None:
        kind = item.get("kind")
        if kind is None:
            return
        if kind not in self._tallies:
            self._tallies[kind], self._references[kind] = metric.tally(), collections.Counter()
        metric.add(self._tallies[kind], item)
        self._references[kind][str(item.record["reference"])] += 1

    def scores(self, metric: str) -> dict[str, Any]:
        if not self._tallies:
            return {}
        each = {kind: tally.scores() for kind, tally in sorted(self._tallies.items())}
        found: dict[str, Any] = {"by_kind": {k: {"n": s["n"], "accuracy": s["accuracy"]} for k, s in each.items()}}
        if metric in RETROSPECT:
            right = sum(max(references.values()) for references in self._references.values())
            found["baseline_accuracy"] = right / sum(s["n"] for s in each.values())
        return found


class _Groups:
    """IoU grouped by a value: {label: {n, gIoU}} of the first step whose bound is not below the value."""

    def __init__(self, steps: Sequence[tuple[float, str]]):
        self._steps, self._ious = steps, {label: array.array("d") for _, label in steps}

    def add(self, value: float, iou: float) -> None:
        self._ious[next(label for bound, label in self._steps if value <= bound)].append(iou)

    def means(self) -> dict[str, dict[str, Any]]:
        return {
            label: {"n": len(group), "gIoU": sum(group) / len(group)} for label, group in self._ious.items() if group
        }


def coco_results(records: Iterable[RecordDict]) -> Iterator[dict[str, Any]]:
    """{image_id, category_id, segmentation, score} of every drawn mask, for COCO.loadRes.

    image_id is the record's own `image_id`, or else its index; category_id likewise, or else 1.
    """
    for k, record in enumerate(records):
        ids = {"image_id": record.get("image_id", record.get("index", k)), "category_id": record.get("category_id", 1)}
        drawn = record.get("instances")
        if drawn is None:
            drawn = [{"segmentation": record["prediction"], "score": 1.0}] if record.get("masks") else []
        for one in drawn:
            yield {**ids, "segmentation": one["segmentation"], "score": one["score"]}


def coco_file(records: Iterable[RecordDict]) -> Iterator[str]:
    """`coco_results` as the parts of one JSON list."""
    before = "["
    for one in coco_results(records):
        yield before + json.dumps(one)
        before = ", "
    yield "]" if before == ", " else "[]"


def coco_ids(records: Iterable[RecordDict]) -> str:
    """What the ids in COCO's result file are."""
    lacking = {key for record in records for key in ("image_id", "category_id") if key not in record}
    notes = {"image_id": "image_id is the index of the sample", "category_id": "category_id is 1"}
    if not lacking:
        return "image_id and category_id are those of the data"
    return " and ".join(notes[key] for key in sorted(lacking, reverse=True)) + ": the data names none"


def mask_image(record: RecordDict) -> np.ndarray:
    """u8[H, W] of 0 and 255: the scored mask of a record."""
    return decode_rle(record["prediction"]).astype(np.uint8) * 255
