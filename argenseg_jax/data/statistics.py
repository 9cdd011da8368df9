"""Statistics of a data set: counts, classes, mask areas, image sizes, text lengths; they can be added."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from argenseg_jax.data.sample import Sample

AREAS = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)  # upper ends of the bins, share of the image
WORDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # upper ends of the bins
_SHOWN = 50  # classes of a summary; the others are only counted


@dataclasses.dataclass
class Statistics:
    """Sums over samples; `+` of two is that of all their samples.

    Attributes:
      counts: samples, images, masks, empty masks, masks in colour (images to generate), samples
        without an image, without a mask, dropped polygons (of fewer than 3 points, see data/rle.py).
      classes: samples per class: the source's own kind or phrase, else the question.
      areas: grey masks by the share of the image that they fill, in the bins of AREAS.
      widths, heights: images by their size.
      questions, answers: samples by the number of words of all human or model turns, in the bins of WORDS.
    """

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    classes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    areas: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    widths: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    heights: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    questions: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    answers: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, sample: Sample) -> None:
        """Adds one sample."""
        grey = [m for m in sample.masks if m.ndim == 2]
        shares = [float(np.mean(m >= 128)) for m in grey]
        self.counts.update(
            {
                "samples": 1,
                "pictures": len(sample.images),
                "masks": len(sample.masks),
                "empty_masks": shares.count(0.0),
                "colour_masks": len(sample.masks) - len(grey),
                "without_picture": int(not sample.images),
                "without_mask": int(not sample.masks),
                "dropped_polygons": sample.meta.get("dropped_polygons", 0),
            }
        )
        self.areas.update(_bin(AREAS, share) for share in shares)
        self.widths.update(str(image.shape[1]) for image in sample.images)
        self.heights.update(str(image.shape[0]) for image in sample.images)
        asked, answered = (_text(sample, roles) for roles in (("human", "user"), ("gpt", "assistant")))
        self.questions[_bin(WORDS, len(asked.split()))] += 1
        self.answers[_bin(WORDS, len(answered.split()))] += 1
        self.classes[_class(sample, asked)] += 1

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})

    def to_json(self) -> dict[str, dict[str, int]]:
        """As `from_json` reads it."""
        return {f.name: dict(sorted(getattr(self, f.name).items())) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Mapping[str, int]]) -> Statistics:
        return cls(**{name: collections.Counter(counts) for name, counts in content.items()})

    def summary(self) -> dict[str, Any]:
        """For people and summary.json: counts, the most common classes, histograms in order."""
        common = self.classes.most_common(_SHOWN)
        return {
            **{
                k: self.counts[k]
                for k in (
                    "pictures",
                    "masks",
                    "empty_masks",
                    "colour_masks",
                    "without_picture",
                    "without_mask",
                    "dropped_polygons",
                )
            },
            "classes": dict(common),
            "distinct_classes": len(self.classes),
            "mask_area": _ordered(self.areas, AREAS),
            "question_words": _ordered(self.questions, WORDS),
            "answer_words": _ordered(self.answers, WORDS),
            "width": _range(self.widths),
            "height": _range(self.heights),
        }


def format_summary(summary: Mapping[str, Any], num_classes: int = 12) -> str:
    """The summary as lines of text, with its most common classes."""
    classes = list(summary["classes"].items())
    rest = summary["distinct_classes"] - min(num_classes, len(classes))
    lines = [
        f"{summary['pictures']} images, {summary['masks']} masks ({summary['empty_masks']} empty, "
        f"{summary['colour_masks']} in colour); {summary['without_picture']} samples without an "
        f"image, {summary['without_mask']} without a mask"
    ]
    if summary["dropped_polygons"]:
        lines.append(f"{summary['dropped_polygons']} polygons of fewer than 3 points were left out")
    if summary["width"]:
        lines.append(
            "image size: "
            + ", ".join(
                f"{axis} {r['min']} to {r['max']} (mean {r['mean']:.0f})"
                for axis, r in (("width", summary["width"]), ("height", summary["height"]))
            )
        )
    lines += [
        f"{name}: " + ", ".join(f"{k}: {v}" for k, v in summary[key].items())
        for name, key in (
            ("share of the image that a mask fills", "mask_area"),
            ("words of a question", "question_words"),
            ("words of an answer", "answer_words"),
        )
        if summary[key]
    ]
    lines += [f"{count:8d}  {name}" for name, count in classes[:num_classes]]
    return "\n".join(lines + ([f"{'':8s}  and {rest} more classes"] if rest > 0 else []))


def _class(sample: Sample, asked: str) -> str:
    kind, sents = sample.meta.get("kind"), sample.meta.get("sents")
    return str(kind or " ".join(sents or ()) or asked)


def _text(sample: Sample, roles: Sequence[str]) -> str:
    """The text of these roles, without the placeholders of images and masks."""
    text = " ".join(turn["value"] for turn in sample.conversations if turn["from"] in roles)
    return " ".join(re.sub(r"<(image|mask|video)>", " ", text).split())


def _bin(ends: Sequence[float], value: float) -> str:
    """'<= END' of the first end that is not below the value, '> END' after the last."""
    index = bisect.bisect_left(ends, value)
    return f"<= {ends[index]:g}" if index < len(ends) else f"> {ends[-1]:g}"


def _ordered(counts: Mapping[str, int], ends: Sequence[float]) -> dict[str, int]:
    names = [*(f"<= {end:g}" for end in ends), f"> {ends[-1]:g}"]
    return {name: counts[name] for name in names if counts.get(name)}


def _range(sizes: Mapping[str, int]) -> dict[str, float] | None:
    if not sizes:
        return None
    values = {int(size): count for size, count in sizes.items()}
    mean = sum(size * count for size, count in values.items()) / sum(values.values())
    return {"min": min(values), "mean": round(mean, 1), "max": max(values)}
