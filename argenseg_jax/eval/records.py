"""Records of predictions.jsonl: read one at a time, their values checked, their masks measured.

A file may come from another tool or another hand: what a score reads is checked where it is read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.data.rle import decode_rle, read_runs
from argenseg_jax.errors import UserError, brief, located
from argenseg_jax.eval.metrics import anomaly, referring

RecordDict = Mapping[str, Any]
MAX_COUNT = 2**40  # of pixels; sums over 2**22 samples fit an int64


def read(path: epath.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE:LINE, record) of every line of a predictions.jsonl; UserError names the line that is none."""
    number = 0
    for number, text in files.read_lines(path):
        where = f"{path}:{number}"
        record = files.parse_json(text, where)
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a prediction but {type(record).__name__}")
        yield where, record
    if not number:
        raise UserError(f"{path}: no predictions")


class Item:
    """A record as a metric reads it: a value is checked when it is asked for; masks are read once.

    Attributes:
      record: as saved.
    """

    def __init__(self, record: RecordDict):
        self.record = record

    def get(self, key: str, check: Callable[[Any], Any] | None = None) -> Any:
        """The value of a key after its check (by default that of CHECKS); None where the record has none.

        UserError names the key, and tells what was expected.
        """
        value = self.record.get(key)
        if value is None:
            return None
        with located(f"key `{key}`", "value that a prediction has", UserError):
            return (check or CHECKS[key])(value)

    def has_masks(self) -> bool:
        """Whether there are a scored mask and a true one."""
        return bool(self.record.get("prediction") and self.record.get("truth"))

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """(H, W) of the masks."""
        return self._truth[1:]

    @functools.cached_property
    def areas(self) -> tuple[int, int, int]:
        """Pixels of the intersection, of the prediction and of the truth, without ignored ones."""
        return referring.run_areas(self._runs("prediction"), self._truth[0], self._runs("ignore"))

    @functools.cached_property
    def sums(self) -> referring.Sums:
        """The record's share of the sums over masks."""
        return referring.Sums.of_areas(*self.areas)

    def mask(self, key: str) -> np.ndarray:
        """bool[H, W] of `prediction` or `truth`."""
        return self.get(key, functools.partial(decode_rle, size=self.size))

    @functools.cached_property
    def _truth(self) -> tuple[np.ndarray, int, int]:
        return self.get("truth", functools.partial(read_runs, size=None))

    def _runs(self, key: str) -> np.ndarray | None:
        found = self.get(key, functools.partial(read_runs, size=self.size))
        return found and found[0]


# ------------------------------------------------------------------------------------- values


def _expected(what: str, value: Any) -> UserError:
    return UserError(f"{what} expected, not {brief(repr(value), 60)}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _expected("a text", value)
    return value


def _name(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _expected("a name or a number", value)
    return str(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _expected("a finite number", value)
    return value


def _counts(value: Any, length: int, what: str) -> list[int]:
    """A list of `length` whole numbers from 0 on."""
    if len(_as_list(value, what)) != length or not all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= MAX_COUNT for v in value
    ):
        raise _expected(what, value)
    return value


def _as_list(value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise _expected(what, value)
    return value


def _pixels(value: Any) -> list[int]:
    what = "[pixels of the intersection, pixels of the union]"
    if _counts(value, 2, what)[0] > value[1]:
        raise _expected(what, value)
    return value


def _levels(value: Any) -> np.ndarray:
    what = "a list of [level from 0 to 255, quiet pixels, defect pixels]"
    for entry in _as_list(value, what):
        if _counts(entry, 3, what)[0] >= anomaly.LEVELS:
            raise _expected(what, entry)
    return anomaly.dense(value)


def _ious(value: Any) -> list[float]:
    what = "a list of the IoU, 0 to 1, after each click"
    if not _as_list(value, what) or not all(0 <= v <= 1 for v in map(_number, value)):
        raise _expected(what, value)
    return value


# What metrics read, references aside -> what they get, or an error that tells what was expected.
CHECKS: dict[str, Callable[[Any], Any]] = {
    "metric": _text,
    "answer": _text,
    "kind": _name,
    "baseline": _pixels,
    "levels": _levels,
    "ious": _ious,
    "psnr": _number,
    "ssim": _number,
}


def yes_or_no(value: Any) -> str:
    """A reference of POPE."""
    if value not in ("yes", "no"):
        raise _expected("'yes' or 'no'", value)
    return value


def texts(value: Any) -> list[str]:
    """References of VQA: the answers of one person or more."""
    what = "a list of texts, the answers of people,"
    if not _as_list(value, what) or not all(isinstance(v, str) for v in value):
        raise _expected(what, value)
    return value


def choice(value: Any) -> Mapping[str, Any]:
    """A reference of MMMU."""
    what = "{answer: letter, options: {letter: wording} or [wording, ...]}"
    options = value.get("options") if isinstance(value, Mapping) else None
    wordings = list(options.values()) if isinstance(options, Mapping) else options
    if not isinstance(wordings, list) or not all(isinstance(v, str) for v in (*wordings, value.get("answer"))):
        raise _expected(what, value)
    return value


def scalar(value: Any) -> str | int | float:
    """A reference that an answer equals."""
    if not isinstance(value, (str, int, float)):
        raise _expected("a text or a number", value)
    return value
