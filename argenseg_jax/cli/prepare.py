"""Any data source -> a folder of ArrayRecord shards, which is a source itself.

  python -m argenseg_jax prepare --source data/meta.json --out prepared/train --workers 8
  python -m argenseg_jax prepare --source refer:refer_seg/refcoco:train --out prepared/refcoco \
      --codes runs/start --resize 448
  python -m argenseg_jax prepare --source data/meta.json --out gs://bucket/train \
      --runner DataflowRunner --beam_options project=P --beam_options region=R
  python -m argenseg_jax prepare --verify prepared/train

Every form of a source will do (see argenseg_jax/data/mixture.py); --source may be repeated, and a
mixture stays one, with its weights. Samples that training would refuse are left out, counted and
named in summary.json. An interrupted preparation resumes when the same command is started again:
finished shards are kept. Train on it by data.sources=("FOLDER",); with --codes also data.codes=true.
"""

from __future__ import annotations

import time
from typing import Any

from absl import flags

from argenseg_jax.cli import common
from argenseg_jax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("source", None, "What to prepare; may be repeated, each with `*W` as a weight.")
flags.DEFINE_string("out", None, "Folder to make, local or gs://.")
flags.DEFINE_string("root", "", "Directory that relative paths of the sources start from.")
flags.DEFINE_string("image_root", "", "As of `evaluate`.")
flags.DEFINE_string(
    "prompt", "referring", "Of PSALM and refer sources: referring, semantic, reasoning, or a text with {sent}."
)
flags.DEFINE_integer(
    "draws",
    0,
    "Write every sample N times, each with another class, point, ... "
    "where the source draws one; 0: once, as evaluation sees it.",
    lower_bound=0,
    upper_bound=10**6,
)
flags.DEFINE_integer(
    "resize",
    0,
    "Side S: images and masks become S x S, as a model with one tile of this side reads them; 0 = unchanged.",
    lower_bound=0,
    upper_bound=8192,
)
common.define_reading()
common.define_outside()
flags.DEFINE_string("codes", None, "Checkpoint whose mask tokenizer writes the codes of the masks too.")
flags.DEFINE_enum(
    "codes_dtype",
    "",
    ["", "float32", "bfloat16"],
    "train.dtype of the training that will read the codes; default: that of the checkpoint's own run, or bfloat16.",
)
common.define_checksums()
flags.DEFINE_integer("shard_samples", 1000, "Samples of a shard.", lower_bound=1, upper_bound=10**7)
flags.DEFINE_integer("workers", 1, "Processes that write shards.", lower_bound=1, upper_bound=1024)
flags.DEFINE_string(
    "runner",
    "",
    "Runner of Apache Beam (DirectRunner, DataflowRunner, FlinkRunner, "
    "SparkRunner) in place of --workers; needs pip install 'argenseg_jax[beam]'.",
)
flags.DEFINE_multi_string("beam_options", [], "name=value, an option of the runner; may be repeated.")
flags.DEFINE_string("verify", None, "Check all checksums of this prepared folder, and nothing else.")


def run() -> dict[str, Any]:
    """Returns {samples, broken, shards, bytes, out, summary, seconds}, or of --verify {ok, faults, ...}."""
    if FLAGS.verify:
        return _verify(FLAGS.verify)
    common.require("source", "out")
    begin = time.perf_counter()
    from argenseg_jax import files
    from argenseg_jax.data import prepare, statistics

    files.check_writable(FLAGS.out)

    coder = None
    if FLAGS.codes:
        from argenseg_jax.decode.mask_tokenizer import MaskTokenizer

        coder = MaskTokenizer.from_checkpoint(FLAGS.codes, FLAGS.codes_dtype, checksums=FLAGS.checksums)
    elif FLAGS.codes_dtype:
        raise UserError("--codes_dtype goes with --codes")
    if FLAGS.beam_options and not FLAGS.runner:
        raise UserError("--beam_options goes with --runner")
    reading = common.reading()
    job = prepare.Job(
        tuple(FLAGS.source),
        FLAGS.out,
        FLAGS.root,
        FLAGS.prompt,
        FLAGS.image_root,
        FLAGS.draws,
        FLAGS.resize,
        FLAGS.shard_samples,
        coder,
        reading.window,
        reading.max_pixels,
        reading.allow_outside,
    )
    summary = prepare.prepare(job, workers=FLAGS.workers, runner=FLAGS.runner, beam_options=FLAGS.beam_options)
    common.log(statistics.format_summary(summary))
    for fault in summary["broken_samples"][:5]:
        common.log(f"broken: {fault['reason']}")
    return {
        **{key: summary[key] for key in ("samples", "broken", "shards", "bytes")},
        "out": FLAGS.out,
        "summary": f"{FLAGS.out}/{prepare.SUMMARY}",
        "seconds": round(time.perf_counter() - begin, 2),
    }


def _verify(folder: str) -> dict[str, Any]:
    """Whether every byte of the shards is as it was written."""
    from etils import epath

    from argenseg_jax.data.sources import prepared

    manifest = prepared.read_manifest(epath.Path(folder))
    faults = list(prepared.faults(epath.Path(folder), manifest, checksums=True))
    for fault in faults:
        common.log(fault)
    return {
        "ok": not faults,
        "samples": manifest["samples"],
        "broken": manifest["broken"],
        "shards": len(manifest["shards"]),
        "faults": faults,
    }
