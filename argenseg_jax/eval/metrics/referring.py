"""Scores of referring segmentation, from integer sums that add up exactly over samples and hosts.

`gIoU` is the mean of the per-sample IoU, as in the gRefCOCO and LISA papers, not the box loss of
that name; `cIoU` is the sum of all intersections over the sum of all unions.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

PRECISIONS = (5, 6, 7, 8, 9)  # tenths: Pr@0.5 ... Pr@0.9
UNIT = 1 << 40  # per-sample IoU in fixed point: 2**23 samples fit an int64, in any order of adding


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over samples, all integers; `a + b` pools two shares of a data set.

    Attributes:
      n: samples.
      n_target: samples whose truth is not empty.
      intersection, union: pixels.
      iou: sum of IoU in units of 1/UNIT; a sample where truth and prediction are empty counts 1.
      iou_target: the same over the samples with a target.
      no_target_right: samples without a target for which nothing was predicted.
      target_right: samples with a target for which something was predicted.
      above: samples with IoU > X, for X = 0.5, 0.6, 0.7, 0.8, 0.9.
    """

    n: int = 0
    n_target: int = 0
    intersection: int = 0
    union: int = 0
    iou: int = 0
    iou_target: int = 0
    no_target_right: int = 0
    target_right: int = 0
    above: tuple[int, ...] = (0,) * len(PRECISIONS)

    @classmethod
    def of(cls, prediction: np.ndarray, truth: np.ndarray) -> Sums:
        """One sample: bool[H, W] against bool[H, W]."""
        if prediction.shape != truth.shape or prediction.dtype != bool or truth.dtype != bool:
            raise ValueError(
                f"masks must be bool and alike, not {prediction.dtype}{prediction.shape}, {truth.dtype}{truth.shape}"
            )
        return cls.of_areas(*areas(prediction, truth))

    @classmethod
    def of_areas(cls, intersection: int, prediction: int, truth: int) -> Sums:
        """One sample by the pixels of its intersection, its prediction and its truth."""
        union = prediction + truth - intersection
        iou = intersection * UNIT // union if union else UNIT
        return cls(
            n=1,
            n_target=int(truth > 0),
            intersection=intersection,
            union=union,
            iou=iou,
            iou_target=iou if truth else 0,
            no_target_right=int(not truth and not prediction),
            target_right=int(truth > 0 and prediction > 0),
            above=tuple(int(union == 0 or 10 * intersection > x * union) for x in PRECISIONS),
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            *map(operator.add, _numbers(self), _numbers(other)), above=tuple(map(operator.add, self.above, other.above))
        )

    def scores(self) -> dict[str, float | int | None]:
        """The published names -> values in 0..1; None where there is nothing to average.

        N-acc is the share of no-target samples answered by nothing, T-acc the share of samples with
        a target answered by something (gRefCOCO); Pr@X is the share of all samples with IoU > X.
        """
        return {
            "n": self.n,
            "cIoU": (self.intersection / self.union if self.union else 1.0) if self.n else None,
            "gIoU": _share(self.iou, self.n * UNIT),
            **{f"Pr@0.{x}": _share(k, self.n) for x, k in zip(PRECISIONS, self.above)},
            "gIoU_target": _share(self.iou_target, self.n_target * UNIT),
            "N-acc": _share(self.no_target_right, self.n - self.n_target),
            "T-acc": _share(self.target_right, self.n_target),
        }


_numbers = operator.attrgetter(*[f.name for f in dataclasses.fields(Sums)][:-1])  # all but `above`


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def areas(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """Pixels of the intersection, of the prediction and of the truth, bool[H, W] both."""
    return tuple(int(np.count_nonzero(mask)) for mask in (prediction & truth, prediction, truth))


def run_areas(prediction: np.ndarray, truth: np.ndarray, ignore: np.ndarray | None = None) -> tuple[int, int, int]:
    """`areas` of masks as run lengths i64[N]: background and foreground by turns, one scan order.

    What is in `ignore` counts for nothing. Exact, and the masks are never drawn.
    """
    ends = [np.cumsum(runs) for runs in (prediction, truth, ignore) if runs is not None]
    edges = np.sort(np.concatenate(ends))
    lengths = np.diff(edges, prepend=0)  # of stretches in which no mask changes
    drawn, true, *rest = (np.searchsorted(end, edges - lengths, side="right") % 2 == 1 for end in ends)
    if rest:
        lengths = np.where(rest[0], 0, lengths)
    return tuple(int(lengths[inside].sum()) for inside in (drawn & true, drawn, true))


class Pool:
    """Sums over samples, one at a time."""

    def __init__(self):
        self.sums = Sums()

    def add(self, one: Sums) -> None:
        """One sample, or a share of a data set."""
        self.sums += one

    def scores(self) -> dict[str, float | int | None]:
        """See `Sums.scores`."""
        return self.sums.scores()


def iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two bool[H, W]; 1 where both are empty."""
    return Sums.of(prediction, truth).iou / UNIT


# --------------------------------------------------------------------------- gRefCOCO and classes

FEW_PIXELS = 50  # an answer of fewer pixels counts as "no target"


class Generalized:
    """Scores by gRefCOCO's own rules, sample by sample.

    gIoU is the mean IoU where a sample without a target counts 1 if nothing is predicted and 0
    otherwise; cIoU has the pixels that are drawn without a target in its union; Pr@X is the share of
    the samples with a target whose IoU is X or more (elsewhere: above X). So in the benchmark's code,
    github.com/henghuiding/ReLA, gres_model/evaluation/refer_evaluation.py (`ReferEvaluator.evaluate`).

    That code asks a classifier whether there is a target. A model without one predicts "no target" by
    a mask of fewer than FEW_PIXELS pixels (GRES, Liu et al., CVPR 2023), which is cleared first.
    """

    def __init__(self):
        self._sums, self._hits = Sums(), [0] * len(PRECISIONS)

    def add(self, intersection: int, prediction: int, truth: int) -> None:
        """One sample by its areas; see `areas`."""
        if prediction < FEW_PIXELS:
            intersection = prediction = 0
        one = Sums.of_areas(intersection, prediction, truth)
        self._sums += one
        if truth:
            self._hits = [k + (10 * one.intersection >= x * one.union) for k, x in zip(self._hits, PRECISIONS)]

    def scores(self) -> dict[str, float | int | None]:
        """The scores of what was added."""
        targets = self._sums.n_target
        return {**self._sums.scores(), **{f"Pr@0.{x}": _share(k, targets) for x, k in zip(PRECISIONS, self._hits)}}


class ByClass:
    """Semantic scores: IoU of each class over all of its pixels, and their mean `mIoU`.

    A class that occurs neither in the truth nor in a prediction has no IoU. Asking every class of
    every image gives the mIoU of semantic segmentation; asking only the classes that an image shows
    overlooks what is drawn of absent ones.
    """

    def __init__(self):
        self._sums: dict[str, Sums] = {}

    def add(self, name: str, one: Sums) -> None:
        """One sample of a class."""
        self._sums[name] = self._sums.get(name, Sums()) + one

    def scores(self) -> dict[str, Any]:
        """The scores of what was added."""
        each = {k: s.intersection / s.union for k, s in sorted(self._sums.items()) if s.union}
        return {
            "n": sum(s.n for s in self._sums.values()),
            "classes": len(each),
            "mIoU": sum(each.values()) / len(each) if each else None,
            "IoU_by_class": each,
        }


def generalized(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, float | int | None]:
    """`Generalized` of (prediction, truth), bool[H, W] each."""
    tally = Generalized()
    for pair in pairs:
        tally.add(*areas(*pair))
    return tally.scores()


def by_class(triples: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """`ByClass` of (class, prediction, truth)."""
    tally = ByClass()
    for name, *pair in triples:
        tally.add(name, Sums.of(*pair))
    return tally.scores()
