"""AP of instance masks by COCO's rules, record by record: numbers equal to pycocotools' COCOeval, flat memory.

COCOeval keeps every mask and every match (30 kB for each record); here a found mask leaves its score and two
bits for each size and threshold.
"""

from __future__ import annotations

import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from argenseg_jax.data.rle import checked_rle
from argenseg_jax.errors import UserError, brief, located

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
RECALLS = np.linspace(0, 1, 101)
SIZES = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))  # pixels: all, small, medium, large
MOST = 100  # found masks of a record that count, those of the highest scores


class _Found:
    """What a class has of its records: found masks in order of the records, and the number of true ones by size."""

    def __init__(self):
        self.image, self.score = array.array("q"), array.array("d")
        self.hit, self.ignored = array.array("q"), array.array("q")  # bit 10 * size + threshold
        self.truths = [0] * len(SIZES)

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """(hit, ignored) i64[N] from the highest score to the lowest, equal ones in order of the images."""
        image, score, hit, ignored = (np.array(values) for values in (self.image, self.score, self.hit, self.ignored))
        order = np.argsort(image, kind="stable")
        order = order[np.argsort(-score[order], kind="stable")]
        return hit[order], ignored[order]


class _Mask(NamedTuple):
    rle: dict[str, Any]
    area: int
    value: float  # score, or whether it is a crowd


class Instances:
    """COCO's AP over records, each about one class in one image; they are checked as they are added.

    A record: {image: name, kind: class, instances: [{segmentation: RLE, score}], truths:
    [{segmentation: RLE, iscrowd?}]}. Several records may share an image. Two records of one image and class
    are two questions: the masks of the one are not compared with those of the other.
    """

    def __init__(self):
        self._count = 0
        self._images: dict[Any, int] = {}
        self._classes: dict[Any, _Found] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes one more record; UserError names the key whose value is not what it should be."""
        image, kind = (_name(record, key) for key in ("image", "kind"))
        truths = _masks(record, "truths", _crowd)
        found = sorted(_masks(record, "instances", _score), key=lambda one: -one.value)[:MOST]
        sizes = [one.rle["size"] for one in (*truths, *found)]
        if other := next((size for size in sizes if size != sizes[0]), None):
            raise UserError(f"key `instances`: masks of {sizes[0]} and of {other} for one image")
        self._count += 1
        number = self._images.setdefault(image, len(self._images))
        of = self._classes.setdefault(kind, _Found())
        hits, ignored = _matched(truths, found)
        of.image.extend([number] * len(found))
        of.score.extend(one.value for one in found)
        of.hit.extend(hits)
        of.ignored.extend(ignored)
        for k, limits in enumerate(SIZES):
            of.truths[k] += sum(not _left_out(one, limits) for one in truths)

    def scores(self) -> dict[str, float | int | None]:
        """n (records), AP (mean over IoU 0.5..0.95 and classes), AP50, AP75 and AP by size of the object;
        None where COCO has nothing to average."""
        tables = [self._precision(k) for k in range(len(SIZES))]
        asked = [tables[0], tables[0][:1], tables[0][5:6], *tables[1:]]
        return {"n": self._count, **{name: float(np.mean(t)) if t.size else None for name, t in zip(NAMES, asked)}}

    def _precision(self, size: int) -> np.ndarray:
        """f64[10, 101, K] by threshold, recall and class, of the K classes with true masks of a size."""
        tables = []
        for of in self._classes.values():
            if of.truths[size]:
                hit, ignored = of.sorted()
                tables.append(
                    [
                        _precision(hit >> bit & 1, ignored >> bit & 1, of.truths[size])
                        for bit in range(10 * size, 10 * size + 10)
                    ]
                )
        return np.ascontiguousarray(np.moveaxis(np.array(tables).reshape(-1, len(THRESHOLDS), len(RECALLS)), 0, -1))


def _matched(truths: Sequence[_Mask], found: Sequence[_Mask]) -> tuple[list[int], list[int]]:
    """(hit, ignored) of each found mask, as bits: the best true one that is free, by COCOeval.evaluateImg."""
    hits, ignored = [0] * len(found), [0] * len(found)
    crowds = [int(one.value) for one in truths]
    ious = coco_mask.iou([d.rle for d in found], [t.rle for t in truths], crowds) if found and truths else []
    known: dict[tuple[bool, ...], list[list[int]]] = {}
    for size, limits in enumerate(SIZES):
        left_out = tuple(_left_out(one, limits) for one in truths)
        if left_out not in known:
            known[left_out] = _matches(ious, left_out, crowds, len(found))
        for k, matches in enumerate(known[left_out]):
            outside = not limits[0] <= found[k].area <= limits[1]
            for bit, truth in enumerate(matches, 10 * size):
                hits[k] |= (truth >= 0) << bit
                ignored[k] |= (left_out[truth] if truth >= 0 else outside) << bit
    return hits, ignored


def _matches(
    ious: Sequence[Sequence[float]], left_out: Sequence[bool], crowds: Sequence[int], count: int
) -> list[list[int]]:
    """The true mask that each found one is given at each threshold, -1 for none.

    Those that count come before those that are left out; of equally good ones the last; a crowd may be
    given often.
    """
    order = sorted(range(len(left_out)), key=lambda k: left_out[k])
    result = [[-1] * len(THRESHOLDS) for _ in range(count)]
    taken: list[set[int]] = [set() for _ in THRESHOLDS]
    for k, overlaps in enumerate(ious):
        near = [t for t in order if overlaps[t] >= THRESHOLDS[0]]
        for bit, threshold in enumerate(THRESHOLDS if near else ()):
            best, chosen = threshold, -1
            for truth in near:
                if chosen >= 0 and left_out[truth] and not left_out[chosen]:
                    break
                if overlaps[truth] >= best and (crowds[truth] or truth not in taken[bit]):
                    best, chosen = overlaps[truth], truth
            if chosen >= 0:
                taken[bit].add(chosen)
                result[k][bit] = chosen
    return result


def _precision(hit: np.ndarray, ignored: np.ndarray, truths: int) -> np.ndarray:
    """f64[101]: the highest precision at each recall or beyond, by COCOeval.accumulate."""
    counted = ignored == 0
    right, wrong = (np.cumsum(flags & counted).astype(float) for flags in (hit == 1, hit == 0))
    precision = right / (wrong + right + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(right / truths, RECALLS, side="left")
    return np.append(precision, 0.0)[places]


def _left_out(truth: _Mask, limits: tuple[float, float]) -> bool:
    """Whether a true mask counts for nothing: a crowd, or of another size."""
    return bool(truth.value) or not limits[0] <= truth.area <= limits[1]


def instance_scores(records: Iterable[Mapping[str, Any]]) -> dict[str, float | int | None]:
    """The scores of `Instances` over all records."""
    tally = Instances()
    for record in records:
        tally.add(record)
    return tally.scores()


def _name(record: Mapping[str, Any], key: str) -> str | int:
    value = record[key]
    if not isinstance(value, (str, int)):
        raise UserError(f"key `{key}`: a name or a number expected, not {brief(repr(value), 60)}")
    return value


def _masks(record: Mapping[str, Any], key: str, value: Callable[[Mapping[str, Any]], float]) -> list[_Mask]:
    items = record[key]
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, Mapping) for item in items):
        raise UserError(f"key `{key}`: a list of objects expected, not {brief(repr(items), 60)}")
    with located(f"key `{key}`", "list of {segmentation, score or iscrowd}", UserError):
        rles = [checked_rle(item["segmentation"]) for item in items]
        return [_Mask(rle, int(coco_mask.area(rle)), value(item)) for rle, item in zip(rles, items)]


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
