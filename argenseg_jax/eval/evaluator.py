"""Runs a predictor over a data source: one record per sample, scores beside those of a baseline.

A baseline answers without looking at the question or the image; a score means something only by
its distance from it.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from argenseg_jax import distributed
from argenseg_jax.data import transforms
from argenseg_jax.data.mixture import Source
from argenseg_jax.data.prompt import is_human, query_turns
from argenseg_jax.data.rle import encode_rle
from argenseg_jax.data.sample import Sample
from argenseg_jax.decode.predictor import Request, Result
from argenseg_jax.errors import UserError
from argenseg_jax.eval import predictions
from argenseg_jax.eval.metrics import anomaly, fidelity, registry
from argenseg_jax.eval.metrics.referring import iou
from argenseg_jax.eval.resume import Partial
from argenseg_jax.eval.spool import Spool

PredictFn = Callable[[Sequence[Request]], Sequence[Result]]
Baseline = Callable[[str], np.ndarray | None]  # question -> bool[side, side]; None: no baseline
SCORED = ("first", "union")
SAMPLE = "sample"  # key of an answer that waits in Partial: the fingerprint of what was asked
GATHERED = 1000  # records of a process that are sent to the others at a time
NOT_ANSWERED = Result(masks=[], scores=[], text="", images=[], scales=[])


@dataclasses.dataclass(frozen=True)
class Record:
    """What was asked, answered and scored for one sample; one line of predictions.jsonl.

    Attributes:
      index: of the sample in the source.
      question: the human text, without `<image>`.
      answer: the text of the model, with `<mask>` where a mask was drawn.
      masks: number of masks in the answer.
      iou: of the scored mask; 1 where it and the truth are empty; None of a question about text.
      prediction, truth: the scored mask and the true one as COCO run lengths; None likewise.
      kind: kind of expression, where the source names one.
      id: the sample's own id, where it has one.
      more: what else the metrics read (see eval/metrics/registry.py), on the same level of the saved line.
    """

    index: int
    question: str
    answer: str
    masks: int
    iou: float | None
    prediction: Mapping[str, Any] | None
    truth: Mapping[str, Any] | None
    kind: str | None = None
    id: Any = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The line of predictions.jsonl."""
        entry = dataclasses.asdict(self)
        return {**entry, **entry.pop("more")}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Record:
        """The record of a line of predictions.jsonl."""
        own = {f.name for f in dataclasses.fields(cls)} - {"more"}
        return cls(
            **{key: entry[key] for key in own}, more={key: value for key, value in entry.items() if key not in own}
        )


class Records(Sequence[Record]):
    """The records of an evaluation in the order of their samples, read from a Spool when asked for."""

    def __init__(self, spool: Spool):
        self.spool, self._indices = spool, list(spool)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, k: int) -> Record:
        return Record.from_dict(self.spool[self._indices[k]])


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores by name (see `Evaluator.run`), the records that they are computed from, and a few answers by scale.

    `scales` maps the index of a sample to u8[K, R, R, 3]: its first mask, coarse to fine.
    """

    scores: dict[str, Any]
    records: Records
    scales: dict[int, np.ndarray]


class Evaluator:
    """Scores `predict_fn` on a source of segmentation samples.

    Args:
      predict_fn: a list of requests -> their results, masks at the size of each request's image.
      batch: requests per call.
      masks: which masks of an answer count: the 'first' (as in the reference) or their 'union'. The
        same choice is applied to the truth. No mask in the answer is the empty mask.
      baseline: question -> bool[side, side], used where a sample brings no text-blind mask of its
        own (`meta['all_objects_mask']`); None gives such data no baseline.
      preview_fn: as predict_fn, with the images by scale in its results; None shows no scales.
      previews: of how many samples the images by scale are kept.
      metric: a name in eval/metrics/registry.py; '' takes what the samples name, or 'referring'.
      pad: the model was trained on padded squares (data.pad_to_square).
    """

    def __init__(
        self,
        predict_fn: PredictFn,
        *,
        batch: int = 8,
        masks: str = "first",
        baseline: Baseline | None = None,
        preview_fn: PredictFn | None = None,
        previews: int = 3,
        metric: str = "",
        pad: bool = False,
    ):
        if masks not in SCORED:
            raise UserError(f"eval.masks is '{masks}'; it must be one of {', '.join(SCORED)}")
        self.predict_fn, self.batch, self.masks = predict_fn, batch, masks
        self.baseline, self.preview_fn, self.previews = baseline, preview_fn, previews
        if metric:
            registry.find(metric)
        self.metric, self.pad = metric, pad

    def run(self, source: Source, limit: int = 0, partial: Partial | None = None) -> Evaluation:
        """Evaluates the first `limit` samples (0: all).

        The scores are those of `predictions.summary`, with `baseline_gIoU` and `baseline_cIoU` (None without a
        baseline), and `seconds_per_image` (of all batches but the first, which compiles, where there
        are more; None where every answer was there already). Several processes share the samples,
        and each returns the complete result: the same scores, to the last bit, as one process.

        Args:
          partial: saves answers as they come, and returns those of an evaluation that was stopped.
        """
        n = self.check(source, limit)
        spool = Spool(n)
        if partial:
            self._resume(source, spool, partial)
        todo = [i for i in range(n) if i not in spool]
        mine = [todo[k] for k in distributed.share(len(todo))]
        times, drawn, ious = [], 0, 0.0
        bar = tqdm.tqdm(
            total=len(mine),
            unit=" samples",
            file=sys.stderr,
            dynamic_ncols=True,
            delay=1,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            disable=not distributed.is_first(),
        )
        with bar:
            for batch in _batched(mine, self.batch):
                samples = [source[i] for i in batch]
                requests = [request(s) for s in samples]
                start = time.perf_counter()
                results = self.predict_fn(requests)
                times.append((time.perf_counter() - start, len(batch)))
                made = [self._entry(*each, self.baseline) for each in zip(batch, samples, results, strict=True)]
                for index, entry in zip(batch, made):
                    spool.add(index, entry)
                if partial:
                    partial.add([{**entry, SAMPLE: _fingerprint(sample)} for entry, sample in zip(made, samples)])
                bar.update(len(batch))
                known = [entry["iou"] for entry in made if entry["iou"] is not None]
                drawn, ious = drawn + len(known), ious + sum(known)
                if drawn:
                    bar.set_postfix(gIoU=f"{ious / drawn:.3f}", refresh=False)
        if partial:
            partial.flush()
        seconds, count = _exchange(spool, mine, times[1:] or times)
        previews = self.preview_fn and distributed.is_first()
        return Evaluation(
            scores={
                "baseline_gIoU": None,
                "baseline_cIoU": None,
                **predictions.summary(spool.values(), self.metric),
                "seconds_per_image": seconds / count if count else None,
            },
            records=Records(spool),
            scales=self._previews(source, n) if previews else {},
        )

    def check(self, source: Source, limit: int = 0) -> int:
        """How many samples `run` takes; UserError now where the first of them could not be scored later.

        It is scored as if it had been answered by nothing.
        """
        n = min(len(source), limit) if limit else len(source)
        if not n:
            raise UserError("the data to evaluate holds no sample")
        sample = source[0]
        request(sample)
        self._entry(0, sample, NOT_ANSWERED, None)
        return n

    def _resume(self, source: Source, spool: Spool, partial: Partial) -> None:
        """Takes over the answers of an evaluation that was stopped, if their samples are as they were."""
        told = {}
        for entry in partial.open():
            index = entry["index"]
            if index < spool.count:
                told[index] = entry.pop(SAMPLE, None)
                spool.discard(index)  # a sample that has changed was answered twice
                spool.add(index, Record.from_dict(entry).to_dict())
        known = [index for index, fingerprint in told.items() if fingerprint]
        mine = [known[k] for k in distributed.share(len(known))]
        with ThreadPoolExecutor() as pool:  # reading an image releases the GIL
            found = pool.map(lambda index: _fingerprint(source[index]), mine)
            changed = [index for index, now in zip(mine, found) if now != told[index]]
        for index in itertools.chain(*distributed.gather(changed)):
            spool.discard(index)

    def _entry(self, index: int, sample: Sample, result: Result, baseline: Baseline | None) -> dict[str, Any]:
        """The line of predictions.jsonl, of which it is certain that it can be scored."""
        record = self._record(index, sample, result, baseline)
        entry = record.to_dict()
        predictions.Scorer(self.metric).add(entry, sample.name)
        return entry

    def _record(self, index: int, sample: Sample, result: Result, baseline: Baseline | None) -> Record:
        meta, drawn = sample.meta, [np.asarray(m, bool) for m in result.masks]
        metric = self.metric or meta.get("metric") or "referring"
        truth = self._truth(sample, metric)
        more = {
            "metric": metric,
            "reference": meta.get("reference"),
            "expression": " ".join(meta.get("sents") or []),
            "image": (meta.get("files") or [""])[0],
            **{k: meta[k] for k in ("image_id", "category_id") if k in meta},
        }
        if truth is None:
            prediction = None
        else:
            prediction = self._choose(drawn, truth.shape, metric)
            if meta.get("ignore_mask") is not None:
                ignored = np.asarray(meta["ignore_mask"]) > 0
                prediction, more["ignore"] = prediction & ~ignored, encode_rle(ignored)
            constant = _baseline_mask(sample, truth.shape, baseline)
            if constant is not None:
                more["baseline"] = [int((constant & truth).sum()), int((constant | truth).sum())]
        if metric == "instances":
            more["instances"] = [
                {"segmentation": encode_rle(m), "score": float(v)}
                for m, v in zip(drawn, result.scores, strict=True)
                if m.any()
            ]
            more["truths"] = [
                {"segmentation": encode_rle(m >= 128), "iscrowd": crowd}
                for crowd, group in enumerate((sample.masks, meta.get("crowds", ())))
                for m in group
                if m.any()
            ]
        elif metric == "anomaly":
            levels = (
                transforms.grey_at(result.images[0], truth.shape[::-1], self.pad)
                if len(result.images)
                else np.zeros(truth.shape, np.uint8)
            )
            more["levels"] = anomaly.sparse(anomaly.level_counts(levels, truth))
        elif metric == "interactive":
            more["ious"] = [iou(prediction, truth)]
        elif metric == "fidelity":
            more |= _likeness(result.images, sample, self.pad)
        known = truth is not None
        return Record(
            index=index,
            question=question(sample),
            answer=result.text,
            masks=len(drawn),
            iou=iou(prediction, truth) if known else None,
            kind=meta.get("kind"),
            id=meta.get("id"),
            prediction=encode_rle(prediction) if known else None,
            truth=encode_rle(truth) if known else None,
            more={k: v for k, v in more.items() if v not in (None, "")},
        )

    def _previews(self, source: Source, n: int) -> dict[int, np.ndarray]:
        """Images by scale of a few samples, out of one batch as large as the others.

        A smaller batch would have to be compiled first.
        """
        chosen = np.linspace(0, n - 1, min(self.batch, n)).astype(int).tolist()
        results = self.preview_fn([request(source[i]) for i in chosen])
        drawn = {i: r.scales[0] for i, r in zip(chosen, results, strict=True) if r.scales}
        return dict(itertools.islice(drawn.items(), self.previews))

    def _choose(self, masks: Sequence[np.ndarray], shape: tuple[int, ...], metric: str) -> np.ndarray:
        """The bool[H, W] that counts among several; of instances always all of them."""
        if not masks:
            return np.zeros(shape, bool)
        first = self.masks == "first" and metric != "instances"
        return masks[0] if first else np.logical_or.reduce(masks)

    def _truth(self, sample: Sample, metric: str) -> np.ndarray | None:
        """bool[H, W], the size of the image, without what is to be ignored; None of text and generated images."""
        if metric == "fidelity" or (not sample.masks and sample.meta.get("reference") is not None):
            return None
        if not sample.masks:
            raise UserError(f"{sample.name}: no mask to compare with; leave such samples out")
        shape = (*sample.images, *sample.masks)[0].shape[:2]
        if any(m.shape != shape for m in sample.masks):
            raise UserError(
                f"{sample.name}: masks of shape {[m.shape for m in sample.masks]}, "
                f"where the image needs grey ones of {shape}"
            )
        truth = self._choose([m >= 128 for m in sample.masks], shape, metric)
        ignored = sample.meta.get("ignore_mask")
        return truth if ignored is None else truth & (np.asarray(ignored) == 0)


# ---------------------------------------------------------------------------- requests and records


def request(sample: Sample) -> Request:
    """The sample's conversation up to its first answer with a mask, as a request."""
    if len(sample.images) > 1:
        raise UserError(f"{sample.name}: {len(sample.images)} images; evaluation takes samples with one or none")
    image = sample.images[0] if sample.images else None
    return Request(image, query_turns(sample.conversations, sample.name), sample.name, sample.meta.get("max_tiles", 0))


def question(sample: Sample) -> str:
    """The human text before the first answer with a mask, without `<image>`."""
    turns = query_turns(sample.conversations)
    text = " ".join(t["value"] for t in turns if is_human(t))
    return " ".join(text.replace("<image>", " ").split())


def _baseline_mask(sample: Sample, shape: tuple[int, ...], baseline: Baseline | None) -> np.ndarray | None:
    own = sample.meta.get("all_objects_mask")
    if own is not None:
        return np.asarray(own) > 0
    mask = None if baseline is None else baseline(question(sample))
    return None if mask is None else resize(mask, shape)


def _likeness(images: Sequence[np.ndarray], sample: Sample, pad: bool) -> dict[str, float]:
    """PSNR and SSIM of the first image of an answer (black, where there is none) and the true one.

    They are compared at the size of the former, where the true one is as training shows it.
    """
    if not sample.masks:
        raise UserError(f"{sample.name}: no image to compare with")
    side = images[0].shape[0] if len(images) else sample.masks[0].shape[0]
    true = transforms.resize_target(transforms.targets(sample)[0], side, pad=pad)
    drawn = images[0] if len(images) else np.zeros_like(true)
    return {"psnr": fidelity.psnr(drawn, true), "ssim": fidelity.ssim(drawn, true)}


def resize(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """bool[h, w] -> bool[H, W], nearest neighbour."""
    resized = Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST)
    return np.asarray(resized, bool)


def _fingerprint(sample: Sample) -> str:
    """Of everything that an answer and its scores depend on; another one where a file has changed."""
    told = {k: sample.meta.get(k) for k in ("kind", "id", "reference", "sents", "metric", "files")}
    arrays = [
        *sample.images,
        *sample.masks,
        *sample.meta.get("crowds", ()),
        *(sample.meta[k] for k in ("ignore_mask", "all_objects_mask") if sample.meta.get(k) is not None),
    ]
    digest = hashlib.blake2b(
        json.dumps([list(map(dict, sample.conversations)), told], default=str, sort_keys=True).encode(), digest_size=8
    )
    for array in arrays:
        digest.update(str(np.shape(array)).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _exchange(spool: Spool, mine: Sequence[int], times: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Gives the records of every process to all others; (seconds, samples) that were timed, of all."""
    told = {"seconds": sum(t for t, _ in times), "timed": sum(k for _, k in times)}
    for start in itertools.count(0, GATHERED):
        shares = distributed.gather(
            {
                "entries": [spool[i] for i in mine[start : start + GATHERED]],
                **told,
                "left": max(len(mine) - start - GATHERED, 0),
            }
        )
        for entry in itertools.chain(*(share["entries"] for share in shares)):
            spool.add(entry["index"], entry)
        if not any(share["left"] for share in shares):
            return tuple(sum(share[key] for share in shares) for key in told)


def _batched(items: Iterable[int], size: int) -> Iterator[list[int]]:
    it = iter(items)
    while batch := list(itertools.islice(it, size)):
        yield batch


# ------------------------------------------------------------------------------------- baselines


def constant_baseline(train: Sequence[Source], side: int = 64, threshold: float = 0.2, limit: int = 2000) -> Baseline:
    """The best constant answer per class: the mean training mask, cut at `threshold`.

    A class is the set of words of a question that not every training question has ('Segment the sky
    in the image.' -> sky). A new question gets the class with the most words that all occur in it,
    however it is worded around them, and the mean over all classes when there is none.

    Args:
      train: the training sources; of each at most `limit` samples, evenly spaced, are read.
      side: side of the constant masks.
    """
    totals: dict[frozenset[str], np.ndarray] = collections.defaultdict(lambda: np.zeros((side, side), np.float64))
    counts: dict[frozenset[str], int] = collections.Counter()
    samples = (
        source[int(i)] for source in train for i in np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int)
    )
    for sample in samples:
        if not sample.masks or sample.masks[0].ndim != 2:
            continue
        words = _words(question(sample))
        totals[words] += transforms.resize(sample.masks[0], (side, side), Image.Resampling.BOX) / 255
        counts[words] += 1
    if not totals:
        raise UserError("the training data holds no grey mask, so there is no constant baseline")
    common = frozenset.intersection(*totals)
    means: dict[frozenset[str], np.ndarray] = {
        words - common: totals[words] / counts[words] > threshold for words in totals
    }
    everything = sum(totals.values()) / sum(counts.values()) > threshold

    def answer(text: str) -> np.ndarray:
        asked = _words(text)
        fits = [words for words in means if words <= asked]
        best = max(fits, key=lambda words: (len(words), sorted(words)), default=None)
        return everything if best is None else means[best]

    return answer


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))
