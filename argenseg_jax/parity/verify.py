"""Runs one recording: picks the comparer by its kind, and reports every array."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import flax.errors
import jax
from etils import epath

from argenseg_jax.errors import DATA_FAULTS, UserError, brief
from argenseg_jax.parity import end_to_end, lm, preprocess, vit, vq
from argenseg_jax.parity.recording import Comparison, Recording

# Kind (the letter of `case` before the first underscore) -> comparer.
KINDS = {
    "A": vq.compare_vqvae,
    "B": vq.compare_vqvae,
    "C": vq.compare_operators,
    "D": vit.compare_vit,
    "E": lm.compare_lm,
    "F": end_to_end.compare_model,
    "G": preprocess.compare_preprocessing,
}


# What odd sizes and shapes raise on their way through flax, jax and numpy.
_FAULTS = (*DATA_FAULTS, MemoryError, RuntimeError, AssertionError, StopIteration, flax.errors.FlaxError)


def verify(folder: epath.PathLike) -> tuple[dict[str, Any], list[Comparison]]:
    """Compares every output of a recording.

    Returns:
      ({case, ok, arrays, misses, unused, worst, errors, seconds}, the comparisons): `errors` maps each array
      to its error, `worst` is the largest share of an allowed error that was used up, `unused` names
      the arrays that no comparer knows (they are no misses, but say nothing about the model either).

    Raises:
      UserError: the folder is no recording, its arrays and sizes do not fit each other, or the weights
        do not fit the sizes in its config.json.
    """
    start = time.monotonic()
    record = Recording(folder)
    case = str(record.config.get("case", ""))
    found = re.match(r"([A-Z])\d*(?:_|$)", case)  # F_argenseg, or another of the kind: F2_argenseg
    kind = found[1] if found else ""
    if kind not in KINDS:
        raise UserError(
            f"{record.folder / 'config.json'}: case '{brief(case)}' is of no known kind; there are {', '.join(KINDS)}"
        )
    try:
        with jax.default_matmul_precision("highest"):
            KINDS[kind](record)
    except UserError as error:
        named = str(record.folder) in str(error)
        raise error if named else UserError(f"{record.folder}: {error}") from error
    except _FAULTS as error:
        raise UserError(_where(record, error)) from error
    misses = [one.name for one in record.comparisons if not one.ok]
    used = [one.error / one.tolerance.limit for one in record.comparisons if one.tolerance.limit > 0]
    return {
        "case": case,
        "ok": not misses and bool(record.comparisons),
        "arrays": len(record.comparisons),
        "misses": misses,
        "unused": record.unused(),
        "worst": _number(max(used, default=0.0)),
        "errors": {one.name: _number(one.error) for one in record.comparisons},
        "seconds": round(time.monotonic() - start, 2),
    }, record.comparisons


def _where(record: Recording, error: BaseException) -> str:
    """The message of a replay that failed: the last array that it reached, and the error."""
    after = f" after array '{record.last}'" if record.last else ""
    return (
        f"{record.folder}: config.json and io.npz do not describe a recording of this kind; the replay "
        f"stopped{after} ({type(error).__name__}: {brief(error)})"
    )


def _number(x: float) -> float | None:
    """Short, and null instead of nan and infinity, which JSON lacks."""
    return float(f"{x:.3g}") if math.isfinite(x) else None
