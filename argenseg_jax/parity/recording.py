"""A folder of recorded numbers: its inputs, and the tally of what was compared with its outputs.

A recording is config.json (sizes; `case`, whose part before the first `_` is the kind), io.npz
(inputs and outputs) and weights[_VARIANT].safetensors[.xz] under the official names.
"""
from __future__ import annotations

import dataclasses
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_folder


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the recording; fixed, never relaxed.

    `measure` is 'absolute' (max abs error), 'scaled' (the same over max(1, max |reference|)),
    'relative' or 'norm' (norm of the error over the norm of the reference).
    """

    measure: str
    limit: float


EQUAL = Tolerance("absolute", 0)
FEATURE = Tolerance("scaled", 2e-4)
LOSS = Tolerance("relative", 1e-5)
GRADIENT = Tolerance("norm", 1e-3)
ZERO = Tolerance("absolute", 1e-6)  # as a share of the whole gradient's norm
IMAGE = Tolerance("absolute", 1e-3)
IMAGE_U8 = Tolerance("absolute", 1)  # the cast truncates


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: `error` in the tolerance's measure (nan when nothing could be compared)."""

    name: str
    shape: tuple[int, ...]
    error: float
    tolerance: Tolerance
    ok: bool
    note: str = ""


class Recording:
    """The arrays of one folder. Every array must be read as an input or compared as an output."""

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder)
        self.config = _read(self.folder / "config.json", lambda f: json.loads(f.read_text()))
        self._arrays = dict(_read(self.folder / "io.npz", lambda f: np.load(f.open("rb"))))
        self._seen: set[str] = set()
        self.rows: list[Row] = []

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def names(self, pattern: str) -> Iterator[re.Match[str]]:
        """Matches of a regex with whole array names, in the order of the file."""
        return (m for m in (re.fullmatch(pattern, name) for name in self._arrays) if m)

    def input(self, name: str) -> np.ndarray:
        """An array that is fed to the model."""
        if name not in self._arrays:
            raise UserError(f"{self.folder / 'io.npz'} has no array '{name}'")
        self._seen.add(name)
        return self._arrays[name]

    def weights(self, variant: str = "") -> hf_folder.Tensors:
        """The tensors of weights[_VARIANT].safetensors[.xz]."""
        stem = f"weights_{variant}" if variant else "weights"
        for suffix in (".safetensors", ".safetensors.xz"):
            if (self.folder / (stem + suffix)).exists():
                return hf_folder.open_tensors(self.folder / (stem + suffix))
        raise UserError(f"{self.folder} has no {stem}.safetensors or {stem}.safetensors.xz")

    def check(self, name: str, got: Any, tolerance: Tolerance | None = None,
              where: np.ndarray | None = None) -> None:
        """Compares with the array `name`, if the recording has it.

        Args:
          name: of the array.
          got: the result. Integers and bools must be equal unless a tolerance is given; floats are
            features.
          tolerance: of this array.
          where: bool mask over the leading axes; the rest is not compared.
        """
        if name not in self._arrays:
            return
        self._seen.add(name)
        want = self._arrays[name]
        if tolerance is None:
            tolerance = FEATURE if want.dtype.kind == "f" else EQUAL
        self.compare(name, got, want, tolerance, where)

    def compare(self, name: str, got: Any, want: Any, tolerance: Tolerance,
                where: np.ndarray | None = None) -> None:
        """Compares two arrays and notes the outcome under `name`."""
        got, want = np.asarray(got), np.asarray(want)
        if got.shape != want.shape:
            self.rows.append(Row(name, want.shape, math.nan, tolerance, False,
                                 f"the model gives {got.shape}"))
            return
        shape = want.shape
        if where is not None:
            got, want = got[where], want[where]
        error = _error(got.astype(np.float64), want.astype(np.float64), tolerance.measure)
        self.rows.append(Row(name, shape, error, tolerance, error <= tolerance.limit))

    def same(self, name: str, got: Any, want: Any) -> None:
        """Notes whether two things of any kind are equal."""
        equal = got == want
        self.rows.append(Row(name, (), 0.0 if equal else 1.0, EQUAL, equal,
                             "" if equal else f"{got!r} instead of {want!r}"[:300]))

    def finish(self) -> None:
        """Notes every array that nothing looked at as a miss."""
        for name in self._arrays:
            if name not in self._seen:
                self.rows.append(Row(name, self._arrays[name].shape, math.nan, FEATURE, False,
                                     "not compared: unknown to this kind of recording"))


def _read(file: epath.Path, read):
    if not file.exists():
        raise UserError(f"{file} does not exist; a recording has config.json and io.npz")
    try:
        return read(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _error(got: np.ndarray, want: np.ndarray, measure: str) -> float:
    if want.size == 0:
        return 0.0
    difference = got - want
    if measure == "norm":
        return float(np.linalg.norm(difference) / max(np.linalg.norm(want), 1e-30))
    error = float(np.max(np.abs(difference)))
    if measure == "scaled":
        return error / max(1.0, float(np.max(np.abs(want))))
    if measure == "relative":
        return error / max(float(np.max(np.abs(want))), 1e-30)
    return error


def check_gradients(record: Recording, prefix: str, grads: Mapping[str, np.ndarray],
                    norms: Mapping[str, float]) -> None:
    """Compares gradients under their torch names: whole arrays, and the norm of every one.

    A norm below a millionth of the whole gradient's is a zero but for rounding (a bias in front of
    a normalisation); there ours must be such a zero too.
    """
    total = math.sqrt(sum(n * n for n in norms.values()))
    for name, norm in norms.items():
        row = f"norm of {prefix}{name}"
        if name not in grads:
            record.rows.append(Row(row, (), math.nan, GRADIENT, False, "no such parameter here"))
        elif norm < ZERO.limit * total:
            record.compare(row, np.linalg.norm(grads[name]) / total, 0.0, ZERO)
        else:
            record.compare(row, np.linalg.norm(grads[name].astype(np.float64)), norm, GRADIENT)
    for name, grad in grads.items():
        record.check(f"{prefix}{name}", grad, GRADIENT)


def table(rows: list[Row]) -> str:
    """The comparisons as text, one a line."""
    width = max((len(r.name) for r in rows), default=4)
    lines = [f"{'array':{width}s}  {'shape':>18s}  {'error':>9s}  {'allowed':>17s}"]
    for r in rows:
        shape = "x".join(map(str, r.shape)) or "scalar"
        limit = f"{r.tolerance.limit:g} {r.tolerance.measure}"
        allowed = "equal" if r.tolerance == EQUAL else limit
        lines.append(f"{r.name:{width}s}  {shape:>18s}  {r.error:9.2e}  {allowed:>17s}  "
                     f"{'ok' if r.ok else 'MISS'} {r.note}".rstrip())
    return "\n".join(lines)
