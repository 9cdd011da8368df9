"""Several turns about one image, or none, in a terminal; masks go to files.

  python -m argenseg_jax chat --image photo.jpg
  python -m argenseg_jax chat --image photo.jpg --prompt "Segment the cat." --prompt "And the dog."

With --prompt, those are the turns; otherwise they are read from the terminal until an empty line.
The masks of turn t are written to OUT/turn_t.png, turn_t_1.png, ...
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
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
flags.DEFINE_string("image", None, "Image file that the conversation is about.")
flags.DEFINE_multi_string("prompt", [], "A turn; may be given several times.")
flags.DEFINE_string("out", "chat", "Directory of the masks.")


def run() -> dict[str, Any]:
    """Returns {turns, answers, files}."""
    import argenseg_jax
    from argenseg_jax.ckpt.checkpoint import open_checkpoint
    from argenseg_jax.decode.predictor import pixels

    options = common.answering()
    names = ["turn_0.png", *re.findall(r"turn_\d+(?:_\d+)?\.png$", os.path.basename(FLAGS.image or ""))]
    common.check_outputs({"image": FLAGS.image}, {"out": [f"{FLAGS.out}/{name}" for name in names]})
    checkpoint = common.chosen_checkpoint()
    image = pixels(FLAGS.image, common.reading(open_checkpoint(checkpoint).config))  # before the weights are loaded
    predictor = argenseg_jax.load(checkpoint, FLAGS.dtype, checksums=FLAGS.checksums)
    history, answers, written = [], [], []
    for number, text in enumerate(FLAGS.prompt or _typed()):
        result, history = predictor.chat(text, image, history, **options)
        answers.append(result.text)
        common.log(f"> {text}\n{result.text}")
        for i, mask in enumerate(result.masks):
            written.append(common.write_image(f"{FLAGS.out}/turn_{number}.png", i, mask.astype("uint8") * 255))
            common.log(f"  {written[-1]}  score {result.scores[i]:.3f}")
    return {"turns": len(answers), "answers": answers, "files": written}


def _typed() -> Iterator[str]:
    """Lines of the terminal up to an empty one."""
    common.log("Type a question; an empty line ends the chat.")
    while True:
        try:
            line = input().strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("the typed line is no UTF-8 text") from None
        if not line:
            return
        yield line
