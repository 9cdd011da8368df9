"""Scores a model on a data set, beside a baseline, and adds it to the report.

  python -m argenseg_jax evaluate --workdir runs/nano --data shapes:simple:test
  python -m argenseg_jax evaluate --checkpoint nano --data val.jsonl --image-root pictures --out .

--data is an official JSONL, a PSALM evaluation JSON, or a named source: shapes:simple:test,
shapes:full:unseen, ...; shapes:test, shapes:unseen and nano:test are of the shipped model's level.
Writes OUT/eval/NAME/{scores.json, predictions.jsonl, coco_results.json, pictures/} and OUT/report.html, where OUT is
--out or else the workdir; with neither, nothing is written. --metric names other scores than the
data's own (eval/table.py). Saved predictions are scored again without the model:

  python -m argenseg_jax evaluate --rescore runs/nano/eval/val/predictions.jsonl --metric grefcoco

With --distributed the hosts share the samples, and the first of them writes; the scores are the same.
"""
from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

from argenseg_jax.cli import common
from argenseg_jax.errors import UserError

FLAGS = common.FLAGS
MAX_MASKS = 8  # of an answer whose masks are united
common.define_workdir("Run whose newest checkpoint is scored.")
common.define_checkpoint()
flags.DEFINE_string("data", None, "File or named source to evaluate on.")
flags.DEFINE_string("image_root", "", "Directory that file names in --data start from; default: "
                    "the directory of --data.")
flags.DEFINE_alias("image-root", "image_root")
flags.DEFINE_string("out", None, "Directory of the results; default: --workdir.")
flags.DEFINE_integer("limit", 0, "Score only the first so many samples; 0 = all.", lower_bound=0)
flags.DEFINE_integer("batch", 16, "Samples per call of the model.", lower_bound=1)
flags.DEFINE_string("metric", "", "Scores to compute: referring, grefcoco, semantic, boxes, instances, "
                    "interactive, anomaly, pope, vqav2, textvqa, mmmu, exact; default: what the data "
                    "asks for, or referring.")
flags.DEFINE_string("rescore", None, "A predictions.jsonl: computes its scores without the model.")
flags.DEFINE_bool("save_masks", False, "Also write every scored mask as a PNG.")
flags.DEFINE_enum("masks", None, ["first", "union"], "Which masks of an answer count; default: "
                  "eval.masks of the saved config, or first.")
flags.DEFINE_string("prompt", None, "Prompt of PSALM files: referring, semantic, reasoning, or a "
                    "text with {sent}; default: eval.prompt of the saved config, or referring.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
flags.DEFINE_integer("previews", 3, "How many answers the report shows scale by scale.",
                     lower_bound=0)
flags.DEFINE_bool("baseline", True, "Read the training data for the constant baseline, where the "
                  "data to evaluate does not bring a baseline of its own.")


def run() -> dict[str, Any]:
    """Evaluates; returns the scores, seconds, and the paths of what was written."""
    if FLAGS.rescore:
        return _rescore(FLAGS.rescore)
    common.require("data")
    if (FLAGS.workdir is None) == (FLAGS.checkpoint is None):
        raise UserError("give one of --workdir and --checkpoint")
    begin = time.perf_counter()
    from argenseg_jax import hosts
    from argenseg_jax.ckpt.checkpoint import open_checkpoint
    from argenseg_jax.data.sources import open_source
    from argenseg_jax.decode.predictor import Predictor
    from argenseg_jax.eval.evaluator import Evaluator

    checkpoint = FLAGS.checkpoint or FLAGS.workdir
    config = open_checkpoint(checkpoint).config
    settings = {"prompt": "referring", "masks": "first", **config.get("eval", {})}
    masks = FLAGS.masks or settings["masks"]
    source = open_source(FLAGS.data, prompt=FLAGS.prompt or settings["prompt"],
                         image_root=FLAGS.image_root)
    metric = FLAGS.metric or (source[0].meta.get("metric") if len(source) else "")
    several = masks != "first" or metric == "instances"
    answer = functools.partial(Predictor.load(checkpoint, FLAGS.dtype).segment_batch,
                               max_masks=MAX_MASKS if several else 1)
    previews = functools.partial(answer, previews=True) if FLAGS.previews else None
    result = Evaluator(answer, batch=FLAGS.batch, masks=masks, baseline=_baseline(config, source),
                       preview_fn=previews, previews=FLAGS.previews, metric=FLAGS.metric,
                       pad=config.get("data", {}).get("pad_to_square", False)).run(source, FLAGS.limit)
    scores = {"data": FLAGS.data, **result.scores}
    out = FLAGS.out or FLAGS.workdir
    written = _write(out, source, result, scores) if out and hosts.is_first() else {}
    return {**scores, **written, "seconds": round(time.perf_counter() - begin, 2)}


def _rescore(path: str) -> dict[str, Any]:
    """The scores of saved predictions."""
    from argenseg_jax.eval import saved

    begin = time.perf_counter()
    rows = saved.read_rows(path)
    scores = saved.summary(rows, FLAGS.metric, path)
    return {"data": path, **scores, "seconds": round(time.perf_counter() - begin, 2)}


def _baseline(config: Mapping[str, Any], source: Any) -> Any:
    """The constant baseline of the training data; None where it is needless or out of reach."""
    from argenseg_jax.data import sources
    from argenseg_jax.eval import evaluator

    trained_on = config.get("data", {}).get("sources")
    if not FLAGS.baseline or not trained_on or "all_objects_mask" in source[0].meta:
        return None
    try:
        parts = sources.open_mixture(trained_on, config["data"].get("root", ""))
        return evaluator.constant_baseline([part.source for part in parts])
    except UserError as error:
        common.log(f"no baseline: {error}")
        return None


def _write(out: str, source: Any, result: Any, scores: Mapping[str, Any]) -> dict[str, str]:
    """Writes everything below `out`; returns the paths."""
    from etils import epath

    from argenseg_jax import files
    from argenseg_jax.eval import pictures, report, saved

    named = not epath.Path(FLAGS.data).exists()
    name = re.sub(r"[^\w.-]+", "-", FLAGS.data if named else epath.Path(FLAGS.data).stem)
    folder = epath.Path(out) / "eval" / name
    lines = [record.row() for record in result.records]
    files.write(folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in lines))
    files.write(folder / "coco_results.json", json.dumps(saved.coco_results(lines)))
    for row in lines if FLAGS.save_masks else []:
        if row["prediction"]:
            files.write(folder / "masks" / f"{row['index']}.png",
                        pictures.encode_png(saved.mask_picture(row)))
    rows = report.save_pictures(folder / "pictures", source, result)
    files.write(folder / "scores.json", json.dumps({**scores, "pictures": rows}, indent=1))
    return {"report": str(report.write_report(out)),
            "predictions": str(folder / "predictions.jsonl")}
