"""Scores a model on data sets, beside a baseline, and adds them to the report.

  python -m argenseg_jax evaluate --workdir runs/nano --data shapes:simple:test
  python -m argenseg_jax evaluate --checkpoint nano --data val.jsonl --image-root pictures --out .
  python -m argenseg_jax evaluate --workdir runs/mix            # all of eval.data in its config

--data is an official JSONL, a PSALM evaluation JSON, or a named source: shapes:simple:test,
shapes:full:unseen, ...; shapes:test, shapes:unseen and nano:test are of the shipped model's level. It
may be given several times, and METRIC@DATA scores it by a metric of eval/table.py; --metric does so for
all. Writes OUT/eval/NAME/{scores.json, predictions.jsonl, coco_results.json, pictures/}, OUT/report.html
and OUT/table.md, where OUT is --out or else the workdir; with neither, nothing is written. An evaluation
that was stopped goes on where it was when the same command comes again. Saved predictions are scored
again without the model:

  python -m argenseg_jax evaluate --rescore runs/nano/eval/val/predictions.jsonl --metric grefcoco

With --distributed the hosts share the samples, and the first of them writes; the scores are the same.
"""
from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from argenseg_jax.cli import common
from argenseg_jax.errors import UserError

FLAGS = common.FLAGS
MAX_MASKS = 8  # of an answer whose masks are united
common.define_workdir("Run whose newest checkpoint is scored.")
common.define_checkpoint()
flags.DEFINE_multi_string("data", None, "File or named source to evaluate on; default: eval.data of the "
                          "saved config.")
flags.DEFINE_string("image_root", "", "Directory that file names in --data start from; default: "
                    "the directory of --data.")
flags.DEFINE_alias("image-root", "image_root")
flags.DEFINE_string("out", None, "Directory of the results; default: --workdir.")
flags.DEFINE_integer("limit", 0, "Score only the first so many samples; 0 = all.", lower_bound=0)
flags.DEFINE_integer("batch", 16, "Samples per call of the model.", lower_bound=1)
flags.DEFINE_string("metric", "", "Scores to compute: referring, grefcoco, semantic, boxes, instances, "
                    "interactive, anomaly, fidelity, pope, vqav2, textvqa, mmmu, exact; default: "
                    "eval.metric of the saved config, what the data asks for, or referring.")
flags.DEFINE_string("rescore", None, "A predictions.jsonl: computes its scores without the model.")
flags.DEFINE_bool("save_masks", False, "Also write every scored mask as a PNG.")
flags.DEFINE_string("config.eval.prompt", "", "Instead of the saved config's: prompt of PSALM files: referring, "
                    "semantic, reasoning, or a text with {sent}.")
flags.DEFINE_enum("config.eval.masks", None, ["first", "union"], "Instead of the saved config's: which masks of "
                  "an answer count.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
flags.DEFINE_integer("previews", 3, "How many answers the report shows scale by scale.",
                     lower_bound=0)
flags.DEFINE_bool("baseline", True, "Read the training data for the constant baseline, where the "
                  "data to evaluate does not bring a baseline of its own.")
flags.DEFINE_float("save_every", 10.0, "Seconds of answers that a stopped evaluation loses at most.",
                   lower_bound=0.0)


def run() -> dict[str, Any]:
    """Evaluates; returns the scores, seconds, and the paths of what was written.

    Of several data sets: {data: {name: scores}}, and the sums n and seconds.
    """
    if FLAGS.rescore:
        return _rescore(FLAGS.rescore)
    if not FLAGS.workdir and not FLAGS.checkpoint:
        common.require("data")
    if (FLAGS.workdir is None) == (FLAGS.checkpoint is None):
        raise UserError("give one of --workdir and --checkpoint")
    begin = time.perf_counter()
    from argenseg_jax import hosts
    from argenseg_jax.ckpt.checkpoint import open_checkpoint
    from argenseg_jax.decode.predictor import Predictor
    from argenseg_jax.eval import report

    checkpoint = FLAGS.checkpoint or FLAGS.workdir
    config = open_checkpoint(checkpoint).config
    settings = {"prompt": "referring", "masks": "first", "metric": "", "data": (), **config.get("eval", {})}
    names = FLAGS.data or list(settings["data"])
    if not names:
        common.require("data")
    for key, flag in (("prompt", "config.eval.prompt"), ("masks", "config.eval.masks"), ("metric", "metric")):
        settings[key] = FLAGS[flag].value or settings[key]
    sources = {name: _open(_plain(name), settings["prompt"]) for name in names}  # mistakes before the work
    predictor = Predictor.load(checkpoint, FLAGS.dtype)
    baseline = functools.cache(lambda: _baseline(config))  # reads the training data: only where needed
    out = FLAGS.out or FLAGS.workdir
    each = {}
    for name, source in sources.items():
        start = time.perf_counter()
        metric = name.removesuffix(_plain(name)).rstrip("@") or settings["metric"]
        each[name] = _evaluate(name, source, predictor, config, {**settings, "metric": metric}, baseline, out)
        each[name]["seconds"] = round(time.perf_counter() - start, 2)
        if len(names) > 1:
            common.log(f"{name}: " + json.dumps(each[name]))
    written = {"report": str(report.write_report(out))} if out and hosts.is_first() else {}
    if hosts.is_first():
        print(report.paper_table(report.evaluations(out) if out else each), file=sys.stderr)
    seconds = round(time.perf_counter() - begin, 2)
    if len(names) == 1:
        return {**each[names[0]], **written, "seconds": seconds}
    return {"n": sum(scores["n"] for scores in each.values()), "data": each, **written, "seconds": seconds}


def _plain(name: str) -> str:
    """The name of a data set without the METRIC@ before it."""
    from argenseg_jax.eval.table import METRICS

    metric, _, rest = name.partition("@")
    return rest if rest and metric in METRICS else name


def _open(name: str, prompt: str) -> Any:
    from argenseg_jax.data.sources import open_source

    return open_source(name, prompt=prompt, image_root=FLAGS.image_root)


def _evaluate(name: str, source: Any, predictor: Any, config: Mapping[str, Any],
              settings: Mapping[str, Any], baseline: Callable[[], Any], out: str | None
              ) -> dict[str, Any]:
    """The scores of one data set, and the path of its predictions."""
    from etils import epath

    from argenseg_jax import hosts
    from argenseg_jax.ckpt import orbax_io
    from argenseg_jax.eval.evaluator import Evaluator
    from argenseg_jax.eval.partial import Partial

    first = source[0] if len(source) else None
    metric = settings["metric"] or (first.meta.get("metric") if first else "")
    needs = (FLAGS.baseline and first and first.masks and "all_objects_mask" not in first.meta
             and config.get("data", {}).get("sources"))
    several = settings["masks"] != "first" or metric == "instances"
    answer = functools.partial(predictor.segment_batch, max_masks=MAX_MASKS if several else 1)
    previews = functools.partial(answer, previews=True) if FLAGS.previews else None
    folder = _folder(out, name) if out else None
    kept = None
    if folder:
        checkpoint = FLAGS.checkpoint or FLAGS.workdir
        path = epath.Path(_plain(name))
        key = {"data": name, "samples": len(source), "image_root": FLAGS.image_root,
               "file": [path.stat().length, path.stat().mtime] if path.is_file() else None,
               "checkpoint": str(checkpoint), "step": orbax_io.newest_step(checkpoint),
               "dtype": FLAGS.dtype, "baseline": FLAGS.baseline,
               **{k: settings[k] for k in ("prompt", "masks", "metric")}}
        kept = Partial(folder / "partial", key, FLAGS.save_every)
    result = Evaluator(answer, batch=FLAGS.batch, masks=settings["masks"],
                       baseline=baseline() if needs else None, preview_fn=previews, previews=FLAGS.previews,
                       metric=settings["metric"], pad=config.get("data", {}).get("pad_to_square", False),
                       ).run(source, FLAGS.limit, kept)
    scores = {"data": name, **result.scores}
    if not folder or not hosts.is_first():
        return scores
    _write(folder, source, result, scores)
    kept.remove()
    return {**scores, "predictions": str(folder / "predictions.jsonl")}


def _rescore(path: str) -> dict[str, Any]:
    """The scores of saved predictions."""
    from argenseg_jax.eval import saved

    begin = time.perf_counter()
    return {"data": path, **saved.rescore(path, FLAGS.metric), "seconds": round(time.perf_counter() - begin, 2)}


def _baseline(config: Mapping[str, Any]) -> Any:
    """The constant baseline of the training data; None where it is out of reach."""
    from argenseg_jax.data import sources
    from argenseg_jax.eval import evaluator

    try:
        parts = sources.open_mixture(config["data"]["sources"], config["data"].get("root", ""))
        return evaluator.constant_baseline([part.source for part in parts])
    except UserError as error:
        common.log(f"no baseline: {error}")
        return None


def _folder(out: str, name: str) -> Any:
    """OUT/eval/NAME of a file or a named source."""
    from etils import epath

    plain = _plain(name)
    if epath.Path(plain).exists():
        name = name.removesuffix(plain) + epath.Path(plain).stem
    return epath.Path(out) / "eval" / re.sub(r"[^\w.-]+", "-", name)


def _write(folder: Any, source: Any, result: Any, scores: Mapping[str, Any]) -> None:
    """Writes what one evaluation found."""
    from argenseg_jax import files
    from argenseg_jax.eval import pictures, report, saved

    lines = [record.row() for record in result.records]
    files.write(folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in lines))
    files.write(folder / "coco_results.json", json.dumps(saved.coco_results(lines)))
    for row in lines if FLAGS.save_masks else []:
        if row["prediction"]:
            files.write(folder / "masks" / f"{row['index']}.png",
                        pictures.encode_png(saved.mask_picture(row)))
    rows = report.save_pictures(folder / "pictures", source, result)
    files.write(folder / "scores.json", json.dumps({**scores, "pictures": rows}, indent=1))
