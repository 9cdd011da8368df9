"""One image and a prompt to mask files, or a prompt alone to an image.

  python -m argenseg_jax segment --image photo.jpg --prompt "Segment the red circle." --out mask.png
  python -m argenseg_jax segment --raw --prompt "Draw a red circle." --out drawn.png --guidance 4

An answer may hold several masks: mask.png, mask_1.png, ...; without any, no file is written.
"""

from __future__ import annotations

import time
from typing import Any

from absl import flags

from argenseg_jax.cli import common
from argenseg_jax.errors import UserError

common.define_workdir("Run whose newest checkpoint is used.")
common.define_checkpoint()
common.define_checksums()
common.define_answering()
common.define_reading()
FLAGS = flags.FLAGS
flags.DEFINE_string("image", None, "Image file; not needed with --raw.")
flags.DEFINE_string("prompt", None, "What to segment, or to draw.")
flags.DEFINE_string("out", "mask.png", "Mask file; further masks are numbered.")
flags.DEFINE_bool("raw", False, "Write what the model draws, neither resized nor thresholded.")
flags.DEFINE_string("overlay", None, "Also write the image with the mask highlighted (PNG).")
flags.DEFINE_string("scales", None, "Also write the mask coarse to fine, as a strip (PNG).")


def run() -> dict[str, Any]:
    """Returns {masks, text, seconds, files, scores}."""
    common.require("prompt", *([] if FLAGS.raw else ["image"]))
    if not FLAGS.prompt.strip():
        raise UserError("--prompt is empty; say what to segment")
    for flag in ("out", "overlay", "scales"):
        if FLAGS[flag].value and not FLAGS[flag].value.endswith(".png"):
            raise UserError(f"--{flag}={FLAGS[flag].value}: the file is a PNG; name it so")
    if FLAGS.overlay and not FLAGS.image:
        raise UserError(f"--overlay={FLAGS.overlay} needs --image")
    common.check_outputs(
        {"image": FLAGS.image},
        {
            flag: [common.numbered(FLAGS[flag].value, i) for i in range(FLAGS.max_masks)]
            for flag in ("out", "overlay", "scales")
            if FLAGS[flag].value
        },
    )

    options = common.answering()

    import argenseg_jax
    from argenseg_jax.ckpt.checkpoint import open_checkpoint
    from argenseg_jax.decode.predictor import pixels
    from argenseg_jax.eval import visualize

    checkpoint = common.chosen_checkpoint()
    image = pixels(FLAGS.image, common.reading(open_checkpoint(checkpoint).config))  # before the weights are loaded
    predictor = argenseg_jax.load(checkpoint, FLAGS.dtype, checksums=FLAGS.checksums)
    begin = time.perf_counter()
    result = predictor.segment(image, FLAGS.prompt, previews=bool(FLAGS.scales), **options)
    seconds = time.perf_counter() - begin

    written = []
    for i, mask in enumerate(result.masks):
        drawn = result.images[i] if FLAGS.raw else mask.astype("uint8") * 255
        written.append(common.write_image(FLAGS.out, i, drawn))
        if FLAGS.overlay:
            written.append(common.write_image(FLAGS.overlay, i, visualize.overlay(image, mask)))
        if FLAGS.scales:
            strip = [*([] if image is None else [image]), *result.scales[i]]
            written.append(common.write_image(FLAGS.scales, i, visualize.strip(strip)))
    return {
        "masks": len(result.masks),
        "text": result.text,
        "seconds": round(seconds, 3),
        "files": written,
        "scores": [round(s, 4) for s in result.scores],
    }
