"""Compares a recording of the official PyTorch code with our modules, array by array.

  argenseg verify --case=tests/golden/D_internvit

The folder holds config.json, io.npz and the weights. Exit code 1 when any array is off. Arrays that this
kind of recording does not know are listed under `unused`.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from argenseg_jax.cli import common

FLAGS = flags.FLAGS
flags.DEFINE_string("case", None, "Folder of the recording.")


def run() -> dict[str, Any]:
    """Prints the table on stderr; returns {case, ok, arrays, misses, unused, worst, errors, seconds}."""
    from argenseg_jax.parity import recording, verify

    common.require("case")
    result, comparisons = verify.verify(FLAGS.case)
    common.log(recording.table(comparisons))
    if result["unused"]:
        common.log(f"not compared, unknown to this kind of recording: {', '.join(result['unused'])}")
    return result
