"""Scores a model on data sets, beside a baseline, and adds them to the report.

  python -m argenseg_jax evaluate --workdir runs/nano --data shapes:simple:test
  python -m argenseg_jax evaluate --checkpoint nano --data val.jsonl --image_root images --out .
  python -m argenseg_jax evaluate --workdir runs/mix            # all of eval.data in its config

--data is an official JSONL, a PSALM evaluation JSON, or a named source: shapes:simple:test,
shapes:full:unseen, ...; shapes:test, shapes:unseen and nano:test are of the shipped model's level. It
may be given several times, and METRIC@DATA scores it by a metric of eval/metrics/registry.py; --metric does so for
all. Writes OUT/eval/NAME/{scores.json, predictions.jsonl, coco_results.json, pictures/}, OUT/report.html
and OUT/table.md, where OUT is --out or else the workdir; with neither, nothing is written. NAME is that of
the file or source, with the folders above it in front where another data set has results under it. An
evaluation that was stopped resumes when the same command is started again; answers of other
weights, and to samples that have changed since, are not used. Saved predictions, also of other tools, are
scored again without the model:

  python -m argenseg_jax evaluate --rescore runs/nano/eval/val/predictions.jsonl --metric grefcoco

With --distributed the hosts share the samples, and the first of them writes; the scores are the same.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from argenseg_jax import config_keys
from argenseg_jax.cli import common
from argenseg_jax.errors import UserError

FLAGS = common.FLAGS
MAX_MASKS = 8  # of an answer whose masks are united
common.define_workdir("Run whose newest checkpoint is scored.")
common.define_checkpoint()
common.define_checksums()
flags.DEFINE_multi_string("data", None, "File or named source to evaluate on; default: eval.data of the saved config.")
flags.DEFINE_string(
    "image_root", "", "Directory that file names in --data start from; default: the directory of --data."
)
common.define_reading()
common.define_outside()
flags.DEFINE_string("out", None, "Directory of the results; default: --workdir.")
flags.DEFINE_integer("limit", 0, "Score the first N samples only; 0 = all.", lower_bound=0)
flags.DEFINE_integer("batch", 16, "Samples per call of the model.", lower_bound=1, upper_bound=65536)
flags.DEFINE_string(
    "metric",
    "",
    "Scores to compute: referring, grefcoco, semantic, boxes, instances, "
    "interactive, anomaly, fidelity, pope, vqav2, textvqa, mmmu, exact; default: "
    "eval.metric of the saved config, what the data asks for, or referring.",
)
flags.DEFINE_string("rescore", None, "A predictions.jsonl: computes its scores without the model.")
flags.DEFINE_bool("save_masks", False, "Also write every scored mask as a PNG.")
flags.DEFINE_string(
    "eval_prompt",
    "",
    "Instead of the saved config's: prompt of PSALM files: referring, semantic, reasoning, or a text with {sent}.",
)
flags.DEFINE_enum(
    "eval_masks", None, ["first", "union"], "Instead of the saved config's: which masks of an answer count."
)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
flags.DEFINE_integer("previews", 3, "How many answers the report shows scale by scale.", lower_bound=0)
flags.DEFINE_bool(
    "baseline",
    True,
    "Read the training data for the constant baseline, where the data to evaluate has no baseline of its own.",
)
flags.DEFINE_float("save_every", 10.0, "Seconds of answers that a stopped evaluation loses at most.", lower_bound=0.0)


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
    from argenseg_jax import distributed
    from argenseg_jax.ckpt.checkpoint import open_checkpoint
    from argenseg_jax.eval import report

    checkpoint = open_checkpoint(FLAGS.checkpoint or FLAGS.workdir, checksums=FLAGS.checksums)
    settings = {"prompt": "referring", "masks": "first", "metric": "", "data": (), **checkpoint.config.get("eval", {})}
    for key, flag in (("prompt", "eval_prompt"), ("masks", "eval_masks"), ("metric", "metric")):
        settings[key] = FLAGS[flag].value or settings[key]
    for key in ("masks", "data"):  # of the saved config; prompt and metric are checked with the data
        if problem := config_keys.fault(f"eval.{key}", settings[key]):
            raise UserError(f"{checkpoint.path}: {problem}")
    names = list(dict.fromkeys(FLAGS.data or settings["data"]))
    if not names:
        common.require("data")
    out, each = FLAGS.out or FLAGS.workdir, {}
    for job in _jobs(names, settings, checkpoint, out):
        start = time.perf_counter()
        each[job.name] = _evaluate(job)
        each[job.name]["seconds"] = round(time.perf_counter() - start, 2)
        if len(names) > 1:
            common.log(f"{job.name}: " + json.dumps(each[job.name]))
    written = {}
    if distributed.is_first():
        written = {"report": str(report.write_report(out))} if out else {}
        found = report.evaluations(out, note=lambda text: None) if out else each
        print(report.paper_table(found), file=sys.stderr)
    seconds = round(time.perf_counter() - begin, 2)
    if len(names) == 1:
        return {**each[names[0]], **written, "seconds": seconds}
    return {"n": sum(scores["n"] for scores in each.values()), "data": each, **written, "seconds": seconds}


class Job(NamedTuple):
    """One data set to evaluate.

    Attributes:
      name: as it was given.
      source, evaluator: opened, and known to fit.
      folder: of the results; None writes none.
      key: what the answers depend on.
    """

    name: str
    source: Any
    evaluator: Any
    folder: Any
    key: Mapping[str, Any]


def _jobs(names: Sequence[str], settings: Mapping[str, Any], checkpoint: Any, out: str | None) -> list[Job]:
    """Every data set with its folder and its evaluator. The model is loaded when all mistakes are known."""
    from argenseg_jax import distributed, files
    from argenseg_jax.ckpt.fingerprint import fingerprint
    from argenseg_jax.data.mixture import open_source, takes_prompt
    from argenseg_jax.data.reader import MIN_LIMIT
    from argenseg_jax.decode.predictor import Predictor
    from argenseg_jax.eval import folders

    metrics = {name: folders.split(name)[0] or settings["metric"] for name in names}
    reading = common.reading(checkpoint.config)._replace(max_images=MIN_LIMIT, max_masks=MIN_LIMIT)
    sources = {
        name: open_source(
            folders.split(name)[1], prompt=settings["prompt"], image_root=FLAGS.image_root, reading=reading
        )
        for name in names
    }
    if FLAGS.eval_prompt and not any(map(takes_prompt, sources.values())):
        raise UserError("--eval_prompt changes nothing: these data hold their own questions")
    result_folders = [None] * len(names)
    if out:  # the first process decides: others may see folders that it has made by then
        result_folders = [files.to_path(p) for p in distributed.gather([str(p) for p in folders.choose(out, names)])[0]]
        for folder in result_folders if distributed.is_first() else ():
            files.check_writable(folder)
    path = FLAGS.checkpoint or FLAGS.workdir
    predictor = functools.cache(lambda: Predictor.load(path, FLAGS.dtype, checksums=FLAGS.checksums))
    baseline = functools.cache(lambda: _baseline(checkpoint.config))  # reads the training data: only where needed
    weights = {
        "checkpoint": str(path),
        "step": checkpoint.step(),
        "weights": distributed.gather(fingerprint(checkpoint))[0],
    }
    config = json.dumps([checkpoint.config.get(k) for k in ("data", "decode")], sort_keys=True, default=str)
    jobs = []
    for name, folder in zip(names, result_folders):
        evaluator = _evaluator(
            {**settings, "metric": metrics[name]}, sources[name], checkpoint.config, predictor, baseline
        )
        evaluator.check(sources[name])
        jobs.append(
            Job(
                name,
                sources[name],
                evaluator,
                folder,
                {
                    "data": name,
                    folders.SOURCE: folders.identity(name),
                    **weights,
                    "config": config,
                    "window": FLAGS.window,
                    "image_root": FLAGS.image_root,
                    "dtype": FLAGS.dtype,
                    "baseline": FLAGS.baseline,
                    "prompt": settings["prompt"],
                    "masks": settings["masks"],
                    "metric": metrics[name],
                },
            )
        )
    predictor()
    return jobs


def _evaluator(
    settings: Mapping[str, Any],
    source: Any,
    config: Mapping[str, Any],
    predictor: Callable[[], Any],
    baseline: Callable[[], Any],
) -> Any:
    """The evaluator of one data set, whose model and baseline are loaded with the first question."""
    from argenseg_jax.eval.evaluator import Evaluator

    metric = settings["metric"] or (source[0].meta.get("metric") if len(source) else "")
    several = settings["masks"] != "first" or metric == "instances"

    def answer(requests: Sequence[Any], **options: Any) -> Sequence[Any]:
        return predictor().segment_batch(requests, max_masks=MAX_MASKS if several else 1, **options)

    def constant(question: str) -> Any:
        return baseline() and baseline()(question)

    return Evaluator(
        answer,
        batch=FLAGS.batch,
        masks=settings["masks"],
        metric=settings["metric"],
        baseline=constant if FLAGS.baseline and config.get("data", {}).get("sources") else None,
        preview_fn=functools.partial(answer, previews=True) if FLAGS.previews else None,
        previews=FLAGS.previews,
        pad=config.get("data", {}).get("pad_to_square", False),
    )


def _evaluate(job: Job) -> dict[str, Any]:
    """The scores of one data set, and the path of its predictions."""
    from argenseg_jax import distributed
    from argenseg_jax.eval.resume import Partial

    partial = Partial(job.folder / "partial", job.key, FLAGS.save_every) if job.folder else None
    result = job.evaluator.run(job.source, FLAGS.limit, partial)
    scores = {**{k: job.key[k] for k in ("data", "checkpoint", "step", "weights")}, **result.scores}
    if not partial or not distributed.is_first():
        return scores
    try:
        _write(job, result, scores)
    except UserError:
        common.log(json.dumps(scores))  # all answers are there; let nobody compute them for these again
        raise
    partial.remove()
    return {**scores, "predictions": str(job.folder / "predictions.jsonl")}


def _rescore(path: str) -> dict[str, Any]:
    """The scores of saved predictions."""
    from argenseg_jax.eval import predictions

    begin = time.perf_counter()
    return {"data": path, **predictions.rescore(path, FLAGS.metric), "seconds": round(time.perf_counter() - begin, 2)}


def _baseline(config: Mapping[str, Any]) -> Any:
    """The constant baseline of the training data; None where it is out of reach."""
    from argenseg_jax.data import mixture
    from argenseg_jax.eval import evaluator

    try:
        parts = mixture.open_mixture(
            config["data"]["sources"], config["data"].get("root", ""), reading=common.reading(config)
        )
        return evaluator.constant_baseline([part.source for part in parts])
    except UserError as error:
        common.log(f"no baseline: {error}")
        return None


def _write(job: Job, result: Any, scores: Mapping[str, Any]) -> None:
    """Writes what one evaluation found."""
    from argenseg_jax import files
    from argenseg_jax.eval import folders, predictions, report, visualize

    folder, records = job.folder, result.records.spool
    files.write(folder / "predictions.jsonl", records.lines())
    files.write(folder / "coco_results.json", predictions.coco_file(records.values()))
    for record in records.values() if FLAGS.save_masks else ():
        if record["prediction"]:
            files.write(
                folder / "masks" / f"{record['index']}.png", visualize.encode_png(predictions.mask_image(record))
            )
    shown = report.save_images(folder / "pictures", job.source, result)
    files.write(
        folder / "scores.json",
        json.dumps(
            {
                **scores,
                folders.SOURCE: job.key[folders.SOURCE],
                "coco_results": predictions.coco_ids(records.values()),
                "pictures": shown,
            },
            indent=1,
        ),
    )
