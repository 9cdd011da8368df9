"""Converts weights without loss; the direction is seen from what --from is.

  argenseg convert --from=InternVL-style-folder --to=workdir      official names -> Orbax
  argenseg convert --from=workdir --to=folder [--save_dtype=bfloat16]  Orbax -> official names
  argenseg convert --from=workdir --to=folder --layout=hf         Orbax -> names of transformers
  argenseg convert --from=InternVL2_5-8B --vqvae=vae_ch160v4096z32.pth --to=workdir
                                                  the released parts -> a model to train

--from may also be a weight file (.safetensors, .safetensors.xz, .pth, .bin) with its config.json
beside it, and a folder in the layout of transformers (`-hf`). Tensors are moved one by one, in
little memory. Nothing appears under --to before it is complete; an interrupted conversion is simply
started again.
"""

from __future__ import annotations

import time
from typing import Any

from absl import flags

from argenseg_jax.cli import common
from argenseg_jax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("from", None, "HF folder, weight file, workdir, Orbax step, or 'nano'.")
flags.DEFINE_string("to", None, "Workdir or HF folder to make.")
flags.DEFINE_string("vqvae", None, "Weight file of the VQ-VAE, for a --from without one.")
flags.DEFINE_enum(
    "save_dtype", None, ["float32", "bfloat16", "float16"], "Of the written weights; default: as they are."
)
common.define_checksums()
flags.DEFINE_enum(
    "layout",
    "official",
    ["official", "hf"],
    "Key names and config.json of a written folder: those of the official code, or of transformers' own InternVL.",
)


def run() -> dict[str, Any]:
    """Returns {from, to, direction, params, bytes, unmatched, seconds}."""
    from etils import epath

    from argenseg_jax import files
    from argenseg_jax.ckpt import checkpoint, transfer

    common.require("from", "to")
    start = time.monotonic()
    origin, target = epath.Path(FLAGS["from"].value), epath.Path(FLAGS.to)
    if target.exists():
        raise UserError(f"--to: {target} exists already; choose another name or remove it")
    files.check_writable(target.parent)
    source = checkpoint.open_checkpoint(
        str(origin.parent) if origin.is_file() else FLAGS["from"].value, checksums=FLAGS.checksums
    )
    if FLAGS.vqvae and not source.is_hf:
        raise UserError("--vqvae completes a released folder; this --from is an Orbax checkpoint")
    common.log(f"{FLAGS['from'].value} -> {target} ({'Orbax' if source.is_hf else FLAGS.layout + ' key names'})")
    if source.is_hf:
        sizes = transfer.to_orbax(
            source, origin if origin.is_file() else source.path, target, vqvae=FLAGS.vqvae, dtype=FLAGS.save_dtype
        )
    else:
        sizes = transfer.to_hf(source, target, layout=FLAGS.layout, dtype=FLAGS.save_dtype)
    return {
        "from": FLAGS["from"].value,
        "to": str(target),
        "direction": "torch to orbax" if source.is_hf else "orbax to torch",
        **sizes,
        "unmatched": 0,
        "seconds": round(time.monotonic() - start, 2),
    }
