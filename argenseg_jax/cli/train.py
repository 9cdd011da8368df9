"""Trains, or goes on with a run that was stopped.

  python -m argenseg_jax train --config configs/nano.py --workdir runs/nano

Writes WORKDIR/config.json, metrics.jsonl, tensorboard/, samples/ and checkpoints/. A second call
with the same config continues behind the newest checkpoint; SIGTERM saves first.
"""
from __future__ import annotations

import sys
from typing import Any

from argenseg_jax.cli import common

FLAGS = common.FLAGS
common.define_config()
common.define_workdir()
_SIGTERM_EXIT = 143  # 128 + 15, as the shell reports a process that SIGTERM ended


def run() -> dict[str, Any]:
    """Returns {step, loss, text_loss, gen_loss, seconds}."""
    common.require("config", "workdir")
    from argenseg_jax.train import loop
    from argenseg_jax.train import run as train_run

    try:
        return train_run.train(FLAGS.config.to_dict(), FLAGS.workdir)
    except loop.Preempted as stop:
        common.log(str(stop))
        sys.exit(_SIGTERM_EXIT)
