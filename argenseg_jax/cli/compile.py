"""Compiles for TPUs without having one: does it fit, and how fast can it be at best.

  python -m argenseg_jax compile --config configs/argenseg_8b.py --topology v5e:16x16 \
      --config.data.max_tokens=2048 --config.train.global_batch=512
  python -m argenseg_jax compile --config configs/argenseg_8b.py --topology v5e:2x2 \
      --phase decode --batch 32 --config.mesh.fsdp=1 --config.mesh.tensor=4

The TPU compiler comes with libtpu, which needs no TPU: `pip install libtpu==0.0.52`. No weights and no
data are read. What is lowered is the very step that `train` runs (VQ-VAE encoder and vision tower
included), or the phases that decoding runs. Memory is what the compiler reports; times and MFU are
estimates: bounds by the chip's data sheet. A step that does not fit is exit code 0, `fits: false`, with
advice. --search tries meshes, batches and remat policies, and lists the best that fit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from absl import flags

from argenseg_jax import config_keys, processes
from argenseg_jax.cli import common
from argenseg_jax.errors import UserError

FLAGS = common.FLAGS
common.define_config()
flags.DEFINE_string(
    "topology",
    None,
    "v4, v5e, v5p, v6e or tpu7x and a shape: v5e:16x16, v5p:4x4x4; or a cloud name: v5p-128 (cores), v6e-256 (chips).",
)
flags.DEFINE_integer(
    "slices", 1, "Number of slices; mesh.dcn_data splits the batch over them.", lower_bound=1, upper_bound=4096
)
flags.DEFINE_enum("phase", "train", ["train", "decode"], "The training step, or the phases of decoding.")
flags.DEFINE_integer("batch", 1, "decode: images at a time.", lower_bound=1, upper_bound=65536)
flags.DEFINE_integer(
    "prompt_tokens", 512, "decode: positions that prompts are padded to.", lower_bound=1, upper_bound=2**20
)
flags.DEFINE_bool("search", False, "train: also try other meshes, batches and remat policies.")
flags.DEFINE_multi_string("xla", [], "NAME=VALUE, an option of the TPU compiler; may be repeated.")
flags.DEFINE_string("hlo", None, "Write the compiled program to this file (v5e and v6e only).")
# libtpu looks for a TPU machine's description in these.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def setup_devices() -> None:
    """Keeps jax and libtpu from looking for a TPU; the mesh is of devices that are not here."""
    os.environ.update(_ENVIRONMENT)


def run() -> dict[str, Any]:
    """Returns {fits, hbm_gib, flops, bound, mfu, ...}; with --search also {candidates, best}."""
    common.require("config", "topology")
    if FLAGS.hlo:
        common.check_outputs({"config": FLAGS["config"].spec.partition(":")[0]}, {"hlo": [FLAGS.hlo]})
    if FLAGS.search:
        return _search()
    from argenseg_jax.compile import aot

    cfg, options = FLAGS.config.to_dict(), _options()
    aot.topology(FLAGS.topology)  # or a UserError now
    where = f"{FLAGS.topology}" + (f" x {FLAGS.slices} slices" if FLAGS.slices > 1 else "")
    common.log(f"{FLAGS.phase}: compiles for {where}, minutes where it fits")
    if FLAGS.phase == "decode":
        report = aot.decode_report(cfg, FLAGS.topology, batch=FLAGS.batch, prompt=FLAGS.prompt_tokens, keep=FLAGS.hlo)
    else:
        report = aot.train_report(cfg, FLAGS.topology, FLAGS.slices, options, FLAGS.hlo)
    _say(report)
    return report


def _options() -> dict[str, str]:
    if wrong := [option for option in FLAGS.xla if "=" not in option]:
        raise UserError(f"--xla {wrong[0]}: NAME=VALUE is expected")
    return dict(option.split("=", 1) for option in FLAGS.xla)


def _say(report: dict[str, Any]) -> None:
    """The report for people."""
    for name, part in report.get("phases", {"step": report}).items():
        verdict = "fits" if part["fits"] else "DOES NOT FIT"
        line = f"{name}: {verdict}, {part['hbm_gib']:.2f} of {part['hbm_limit_gib']:.2f} GiB a device"
        if part["fits"]:
            line += (
                f" (arguments {part['argument_gib']:.2f}, temporary {part['temporary_gib']:.2f}); "
                f"estimate: at least {part['step_seconds']:.4g} s, bound by {part['bound']}, MFU at "
                f"most {part['mfu']:.0%}"
            )
        common.log(line)
    for item in report.get("advice", []):
        word = "would be enough" if item["enough"] else "would help"
        common.log(f"  {item['change']}: about {item['saves_gib']:.2f} GiB less, {word}")


# ---------------------------------------------------------------------------------- search


def _search() -> dict[str, Any]:
    """Compiles one candidate after the other, each in a process of its own, and lists them."""
    from tqdm import tqdm

    from argenseg_jax.compile import candidates

    if FLAGS.phase != "train":
        raise UserError("--search is for --phase train")
    cfg = FLAGS.config.to_dict()
    tried: list[tuple[candidates.Candidate, dict[str, Any]]] = []
    listed = candidates.expand(cfg, FLAGS.topology, FLAGS.slices)
    for candidate in tqdm(listed, desc="compiles", file=sys.stderr):
        if candidates.hopeless(candidate, tried):
            continue
        tried.append((candidate, _compile(candidate.overrides())))
        common.log(candidates.line(*tried[-1]))
    best = candidates.ranked(tried)
    common.log("\n".join(["best first (estimates):", *(candidates.line(*item) for item in best[:5])]))
    top = best[0] if best else None
    return {
        **(top[1] if top else {"fits": False, "hbm_gib": None, "flops": None, "bound": None, "mfu": None}),
        "candidates": len(tried),
        "fitting": len(best),
        "best": top[0].overrides() if top else None,
    }


def _compile(overrides: list[str]) -> dict[str, Any]:
    """The report of this command with other settings; an error is {'fits': False, 'error': line}."""
    config = FLAGS["config"]
    given = [f"--config.{key}={config_keys.spell(value)}" for key, value in config.overrides.items()]
    args = [
        "compile",
        f"--config={config.spec}",
        *given,
        *overrides,
        f"--topology={FLAGS.topology}",
        f"--slices={FLAGS.slices}",
        *(f"--xla={option}" for option in FLAGS.xla),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "argenseg_jax", *args], capture_output=True, text=True, env=processes.child_environment()
    )
    try:
        if not done.returncode:
            return json.loads(done.stdout.splitlines()[-1])
        message = done.stderr.strip().splitlines()[-1]
    except (ValueError, LookupError):
        message = (
            f"the compiler was killed by signal {-done.returncode}; is there enough memory?"
            if done.returncode < 0
            else f"the compiler ended with exit code {done.returncode}, without a word"
        )
    return {"fits": False, "error": message}
