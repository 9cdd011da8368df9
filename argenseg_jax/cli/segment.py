"""One picture and a prompt to mask files.

  python -m argenseg_jax segment --image photo.jpg --prompt "Segment the red circle." --out mask.png

An answer may hold several masks: mask.png, mask_1.png, ...; without any, no file is written.
"""
from __future__ import annotations

import time
from typing import Any

from absl import flags
from etils import epath

from argenseg_jax.cli import common
from argenseg_jax.errors import UserError

common.define_workdir("Run whose newest checkpoint is used.")
common.define_checkpoint()
FLAGS = flags.FLAGS
flags.DEFINE_string("image", None, "Picture file.")
flags.DEFINE_string("prompt", None, "What to segment, in words.")
flags.DEFINE_string("out", "mask.png", "Mask file; further masks are numbered.")
flags.DEFINE_string("overlay", None, "Also write the picture with the mask in the light (PNG).")
flags.DEFINE_string("scales", None, "Also write the mask coarse to fine, as a strip (PNG).")
flags.DEFINE_integer("max_masks", 8, "The answer ends behind so many masks.", lower_bound=1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")


def run() -> dict[str, Any]:
    """Returns {masks, text, seconds, files, scores}."""
    common.require("image", "prompt")
    if not FLAGS.prompt.strip():
        raise UserError("--prompt is empty; say what to segment")
    for flag in ("out", "overlay", "scales"):
        if FLAGS[flag].value and not FLAGS[flag].value.endswith(".png"):
            raise UserError(f"--{flag}={FLAGS[flag].value}: the file is a PNG; name it so")

    from argenseg_jax import files
    from argenseg_jax.data.transforms import read_image
    from argenseg_jax.decode.predictor import Predictor
    from argenseg_jax.eval import pictures

    image = read_image(FLAGS.image)
    predictor = Predictor.load(FLAGS.checkpoint or FLAGS.workdir or "nano", FLAGS.dtype)
    begin = time.perf_counter()
    result = predictor.segment(image, FLAGS.prompt, max_masks=FLAGS.max_masks,
                               previews=bool(FLAGS.scales))
    seconds = time.perf_counter() - begin

    written = []

    def write(target: str, number: int, picture: Any) -> None:
        path = epath.Path(target)
        if number:
            path = path.with_name(f"{path.stem}_{number}{path.suffix}")
        files.write(path, pictures.encode_png(picture))
        written.append(str(path))

    for i, mask in enumerate(result.masks):
        write(FLAGS.out, i, mask.astype("uint8") * 255)
        if FLAGS.overlay:
            write(FLAGS.overlay, i, pictures.overlay(image, mask))
        if FLAGS.scales:
            write(FLAGS.scales, i, pictures.strip([image, *result.scales[i]]))
    return {"masks": len(result.masks), "text": result.text, "seconds": round(seconds, 3),
            "files": written, "scores": [round(s, 4) for s in result.scores]}
