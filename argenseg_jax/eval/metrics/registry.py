"""The metrics by name: records of predictions.jsonl -> scores.

A metric reads saved records only, so that scores of a run and scores of a file made
earlier are the same computation, and shares of a data set are pooled by joining their records. It takes
them one at a time and keeps sums, so that a data set may have any number of records.

Keys of a record: question, answer, kind, image, reference (text answers), prediction, truth, ignore
(COCO run lengths; ignored pixels count for nothing), instances and truths (lists of {segmentation,
score | iscrowd}), levels (anomaly.sparse), ious (after each click), psnr, ssim, baseline (pixels of
intersection and union of a constant answer).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from argenseg_jax.errors import UserError, located
from argenseg_jax.eval import records
from argenseg_jax.eval.metrics import anomaly, boxes, fidelity, instances, interactive, referring, text
from argenseg_jax.eval.records import Item, RecordDict


class Tally(Protocol):
    """What a metric sums up; each has its own `add` as well."""

    def scores(self) -> dict[str, Any]:
        """The scores of what was added."""
        ...


@dataclasses.dataclass(frozen=True)
class Metric:
    """One entry of METRICS.

    Attributes:
      tally: makes an empty tally.
      needs: keys that every record must have.
      add: puts a record into a tally; UserError names the key that is faulty.
      text: it scores answers in words against a `reference`.
    """

    tally: Callable[[], Tally]
    needs: tuple[str, ...]
    add: Callable[[Any, Item], None]
    text: bool = False


def find(name: str) -> Metric:
    """The metric of a name; UserError where it is unknown."""
    if name not in METRICS:
        raise UserError(f"metric '{name}' is unknown; there are {', '.join(METRICS)}")
    return METRICS[name]


def require(name: str, record: RecordDict) -> None:
    """UserError where a record lacks a key that metric `name` needs."""
    if missing := [key for key in find(name).needs if record.get(key) is None]:
        raise UserError(f"metric '{name}' needs the key `{missing[0]}`")


def score(name: str, of: Iterable[RecordDict], where: str = "predictions") -> dict[str, Any]:
    """The scores of metric `name`; UserError where it is unknown, or names the record and key at fault."""
    metric = find(name)
    tally = metric.tally()
    for k, record in enumerate(of, 1):
        with located(f"{where}:{k}", "prediction", UserError):
            require(name, record)
            metric.add(tally, Item(record))
    return tally.scores()


def _boxes(tally: boxes.BoxAccuracy, item: Item) -> None:
    """The first box that the answer writes, or else the extent of its mask."""
    height, width = item.size
    written = boxes.parse_boxes(item.get("answer"), width, height)
    predicted = written[0] if written else boxes.mask_box(item.mask("prediction"))
    tally.add(predicted, boxes.mask_box(item.mask("truth")))


def _text(tally: Callable[[], Tally], reference: Callable[[Any], Any]) -> Metric:
    return Metric(
        tally,
        ("answer", "reference"),
        text=True,
        add=lambda tally, item: tally.add(item.get("answer"), item.get("reference", reference)),
    )


def _judged(judge: Callable[[str, Any], float]) -> Callable[[], Tally]:
    return functools.partial(text.Accuracy, judge)


_MASKS = ("prediction", "truth")
METRICS: dict[str, Metric] = {
    "referring": Metric(referring.Pool, _MASKS, lambda tally, item: tally.add(item.sums)),
    "grefcoco": Metric(referring.Generalized, _MASKS, lambda tally, item: tally.add(*item.areas)),
    "semantic": Metric(
        referring.ByClass, ("kind", *_MASKS), lambda tally, item: tally.add(item.get("kind"), item.sums)
    ),
    "boxes": Metric(boxes.BoxAccuracy, ("answer", *_MASKS), _boxes),
    "instances": Metric(
        instances.Instances, ("image", "kind", "instances", "truths"), lambda tally, item: tally.add(item.record)
    ),
    "interactive": Metric(interactive.Interactive, ("ious",), lambda tally, item: tally.add(item.get("ious"))),
    "anomaly": Metric(anomaly.Anomaly, ("levels",), lambda tally, item: tally.add(item.get("levels"))),
    "fidelity": Metric(
        fidelity.Fidelity, ("psnr", "ssim"), lambda tally, item: tally.add(item.get("psnr"), item.get("ssim"))
    ),
    "pope": _text(text.Pope, records.yes_or_no),
    "vqav2": _text(_judged(text.vqa_accuracy), records.texts),
    "textvqa": _text(_judged(functools.partial(text.vqa_accuracy, tokenize=True)), records.texts),
    "mmmu": _text(_judged(text.chooses), records.choice),
    "exact": _text(_judged(text.equals), records.scalar),
}
