"""Trains, or resumes a run that was stopped.

  python -m argenseg_jax train --config configs/nano.py --workdir runs/nano

Writes WORKDIR/config.json, metrics.jsonl, tensorboard/, samples/ and checkpoints/. A second call
with the same config resumes from the newest checkpoint; SIGTERM and Ctrl-C save first. One run at a time
writes to a workdir: WORKDIR/lock.json names its process. With --distributed the same command runs on every
host; it may resume with another number of them.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from absl import flags

from argenseg_jax.cli import common
from argenseg_jax.errors import UserError, brief

FLAGS = common.FLAGS
common.define_config()
common.define_workdir()
common.define_checksums()
flags.DEFINE_string("profile", None, "FIRST..LAST: writes a trace of these steps to WORKDIR/profile.")
_LOST_EXIT = 75  # EX_TEMPFAIL of sysexits.h: try again


def run() -> dict[str, Any]:
    """Returns {step, loss, text_loss, gen_loss, seconds}."""
    common.require("config", "workdir")
    profile = FLAGS.profile and re.fullmatch(r"([0-9]{1,9})\.\.([0-9]{1,9})", FLAGS.profile)
    steps = (int(profile[1]), int(profile[2])) if profile else None
    if FLAGS.profile and not (steps and 0 < steps[0] <= steps[1]):
        raise UserError(f"--profile {brief(FLAGS.profile, 60)}: FIRST..LAST is expected, such as 10..12")
    from argenseg_jax.train import loop
    from argenseg_jax.train import run as train_run

    try:
        return train_run.train(FLAGS.config.to_dict(), FLAGS.workdir, profile=steps, checksums=FLAGS.checksums)
    except loop.Preempted as stop:
        common.log(str(stop))
        sys.exit(128 + stop.signal)  # as the shell reports a process that the signal ended: 143, 130
    except loop.HostLost as lost:
        common.log(f"error: {lost}")
        common.leave(_LOST_EXIT)
