"""Runs one recording: picks the comparer by its kind, and reports every array."""
from __future__ import annotations

import time
from typing import Any

import jax
from etils import epath

from argenseg_jax.errors import UserError
from argenseg_jax.parity import lm, preprocess, vit, vq, whole
from argenseg_jax.parity.recording import Recording, Row

# Kind (the part of `case` before the first underscore) -> comparer.
KINDS = {
    "A": vq.compare_vqvae,
    "B": vq.compare_vqvae,
    "C": vq.compare_operators,
    "D": vit.compare_vit,
    "E": lm.compare_lm,
    "F": whole.compare_model,
    "G": preprocess.compare_preprocessing,
}


def verify(folder: epath.PathLike) -> tuple[dict[str, Any], list[Row]]:
    """Compares every output of a recording.

    Returns:
      ({case, ok, arrays, misses, worst, errors, seconds}, the rows): `errors` maps each array to
      its error, `worst` is the largest share of an allowed error that was used up.

    Raises:
      UserError: the folder is no recording, or the weights do not fit the sizes in its config.json.
    """
    start = time.monotonic()
    record = Recording(folder)
    case = str(record.config.get("case", ""))
    kind = case.partition("_")[0]
    if kind not in KINDS:
        raise UserError(f"{record.folder / 'config.json'}: case '{case}' is of no known kind; "
                        f"there are {', '.join(KINDS)}")
    try:
        with jax.default_matmul_precision("highest"):
            KINDS[kind](record)
    except KeyError as error:
        raise UserError(f"{record.folder / 'config.json'} has no key {error}") from error
    record.finish()
    misses = [row.name for row in record.rows if not row.ok]
    used = [row.error / row.tolerance.limit for row in record.rows if row.tolerance.limit > 0]
    return {
        "case": case,
        "ok": not misses and bool(record.rows),
        "arrays": len(record.rows),
        "misses": misses,
        "worst": _number(max(used, default=0.0)),
        "errors": {row.name: _number(row.error) for row in record.rows},
        "seconds": round(time.monotonic() - start, 2),
    }, record.rows


def _number(x: float) -> float | None:
    """Short, and null instead of nan, which JSON lacks."""
    return float(f"{x:.3g}") if x == x else None
