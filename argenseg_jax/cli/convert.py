"""Converts weights without loss; the direction is seen from what --from is.

  argenseg convert --from=InternVL-style-folder --to=workdir      official names -> Orbax
  argenseg convert --from=workdir --to=folder [--save_dtype=bfloat16]  Orbax -> official names
  argenseg convert --from=InternVL2_5-8B --vqvae=vae_ch160v4096z32.pth --to=workdir
                                                  the released parts -> a model to train

--from may also be a weight file (.safetensors, .safetensors.xz, .pth, .bin) with its config.json
beside it. Nothing appears under --to before it is complete.
"""
from __future__ import annotations

import json
import time
import uuid
from typing import Any

from absl import flags

from argenseg_jax.cli import common
from argenseg_jax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("from", None, "HF folder, weight file, workdir, Orbax step, or 'nano'.")
flags.DEFINE_string("to", None, "Workdir or HF folder to make.")
flags.DEFINE_string("vqvae", None, "Weight file of the VQ-VAE, for a --from without one.")
flags.DEFINE_enum("save_dtype", None, ["float32", "bfloat16", "float16"],
                  "Of the written weights; default: as they are.")


def run() -> dict[str, Any]:
    """Returns {from, to, direction, params, bytes, unmatched, seconds}."""
    from etils import epath

    from argenseg_jax import trees
    from argenseg_jax.ckpt import checkpoint

    common.require("from", "to")
    start = time.monotonic()
    target = epath.Path(FLAGS.to)
    if target.exists():
        raise UserError(f"--to: {target} exists already; choose another name or remove it")
    origin = epath.Path(FLAGS["from"].value)
    source = checkpoint.open_checkpoint(str(origin.parent) if origin.is_file()
                                        else FLAGS["from"].value)
    to_orbax = source.is_hf
    if FLAGS.vqvae and not to_orbax:
        raise UserError("--vqvae completes a released folder; this --from is an Orbax checkpoint")
    common.log(f"reading {FLAGS['from'].value}")
    params = _load(source, origin if origin.is_file() else source.path)
    common.log(f"writing {target} ({'Orbax' if to_orbax else 'official key names'})")
    (_write_orbax if to_orbax else _write_hf)(target, source, params)
    leaves = trees.flatten(params).values()
    return {"from": FLAGS["from"].value, "to": str(target),
            "direction": "torch to orbax" if to_orbax else "orbax to torch",
            "params": int(sum(leaf.size for leaf in leaves)),
            "bytes": int(sum(leaf.nbytes for leaf in leaves)),
            "unmatched": 0, "seconds": round(time.monotonic() - start, 2)}


def _load(source, path) -> dict[str, Any]:
    """Parameters; a key without a place or a leaf without a key is a UserError."""
    from argenseg_jax.interop import hf_folder

    if not source.is_hf:
        return source.load_params()
    if FLAGS.vqvae:
        return hf_folder.load_base(path, FLAGS.vqvae, source.model(), FLAGS.save_dtype)
    return hf_folder.load_params(path, source.model(), dtype=FLAGS.save_dtype)


def _write_orbax(target, source, params) -> None:
    """Workdir with one checkpoint, the config and the tokenizer."""
    from argenseg_jax.ckpt import checkpoint, orbax_io
    from argenseg_jax.interop import hf_folder

    part = target.parent / f"{target.name}.partial-{uuid.uuid4().hex[:8]}"
    part.mkdir(parents=True)
    try:
        orbax_io.save_params(str(part / orbax_io.DIRECTORY / "0"), params)
        (part / orbax_io.CONFIG).write_text(json.dumps(dict(source.config), indent=2) + "\n")
        if hf_folder.tokenizer_files(source.path):
            source.tokenizer().save(part / checkpoint.TOKENIZER)
        else:
            common.log(f"{source.path} has no tokenizer: none is written")
        part.rename(target)
    except BaseException:
        part.rmtree(missing_ok=True)
        raise


def _write_hf(target, source, params) -> None:
    """HF-style folder; the run's config rides along: config.json has no name for all of it."""
    from argenseg_jax.ckpt import checkpoint
    from argenseg_jax.interop import hf_folder

    config = {key: value for key, value in source.config.items() if key != "model"}
    above = (source.path, *list(source.path.parents)[:2])
    folders = [f / checkpoint.TOKENIZER for f in above if (f / checkpoint.TOKENIZER).is_dir()]
    words = hf_folder.tokenizer_files(folders[0]) if folders else ()
    hf_folder.save_folder(target, params, source.config["model"], words, FLAGS.save_dtype,
                          {checkpoint.RUN_CONFIG: json.dumps(config, indent=2) + "\n"})
