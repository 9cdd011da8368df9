"""A folder of recorded numbers: its inputs, and the tally of what was compared with its outputs.

A recording is config.json (sizes; `case`, whose part before the first `_` is the kind), io.npz
(inputs and outputs) and weights[_VARIANT].safetensors[.xz] under the official names. Groups of arrays
may be absent; what is there is compared, read as an input, or listed as unused.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.errors import UserError, brief
from argenseg_jax.interop import hf_folder

_MAX_ARRAYS = 8 * 2**30  # bytes of all arrays of a recording, unpacked
# Keys of config.json that say how often something is repeated, and how often at most.
_REPEATS = {"patch_nums": 256, "ch_mult": 64, "num_res_blocks": 64, "num_hidden_layers": 1024, "share_quant_resi": 4096}


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
class Comparison:
    """One comparison: `error` in the tolerance's measure (nan when nothing could be compared)."""

    name: str
    shape: tuple[int, ...]
    error: float
    tolerance: Tolerance
    ok: bool
    note: str = ""


class Recording:
    """The arrays of one folder, the tally of the comparisons, and which arrays were not read.

    Attributes:
      folder, config: where it is, and its config.json.
      comparisons: made so far.
      last: name of the array that was read or compared last, for messages.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = files.to_path(folder)
        self.config = _config(self.folder / "config.json")
        self._arrays = _arrays(self.folder / "io.npz")
        self._seen: set[str] = set()
        self.comparisons: list[Comparison] = []
        self.last = ""

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def names(self, pattern: str) -> Iterator[re.Match[str]]:
        """Matches of a regex with whole array names, in the order of the file."""
        return (m for m in (re.fullmatch(pattern, name) for name in self._arrays) if m)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array, which counts as neither read nor compared by this."""
        return self._arrays[name].shape

    def input(self, name: str, ndim: int | None = None) -> np.ndarray:
        """An array that is fed to the model, of a number of axes.

        Raises:
          UserError: it is absent or has another number of axes.
        """
        if name not in self._arrays:
            raise UserError(f"{self.folder / 'io.npz'} has no array '{name}'")
        self._seen.add(name)
        self.last = name
        array = self._arrays[name]
        if ndim is not None and array.ndim != ndim:
            raise self.fault(name, f"has the shape {array.shape}, not {ndim} axes")
        return array

    def ints(self, name: str, ndim: int, below: int | None = None, default: Any = None) -> np.ndarray:
        """An input of whole numbers as int32; those of `below` (a size of vocabulary) are ids under it.

        Where the recording lacks the array this is `default`, if there is one.
        """
        if default is not None and name not in self:
            return np.asarray(default, np.int32)
        array = self.input(name, ndim)
        if array.dtype.kind not in "iub":
            raise self.fault(name, f"is {array.dtype}, not whole numbers")
        if below is not None and array.size and not 0 <= array.min() <= array.max() < below:
            raise self.fault(name, f"has values of {array.min()} to {array.max()}; ids are 0 to {below - 1}")
        return array.astype(np.int32)

    def floats(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """An input of floats, as f32, of a shape; None: any length."""
        array = self.input(name)
        if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
            raise self.fault(name, f"is {array.dtype}, not floats")
        if array.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, array.shape)):
            want = ", ".join("any" if n is None else str(n) for n in shape)
            raise self.fault(name, f"has the shape {array.shape}, not ({want})")
        return array.astype(np.float32)

    def fault(self, name: str, what: str) -> UserError:
        """The error that tells what is wrong with an array."""
        return UserError(f"{self.folder / 'io.npz'}: array '{name}' {what}")

    def weights(self, variant: str = "") -> hf_folder.Tensors:
        """The tensors of weights_VARIANT.safetensors[.xz], or of the weights that all variants share."""
        stems = [f"weights_{variant}"] * bool(variant) + ["weights"]
        for name in (stem + suffix for stem in stems for suffix in (".safetensors", ".safetensors.xz")):
            if (self.folder / name).exists():
                return hf_folder.open_tensors(self.folder / name)
        raise UserError(f"{self.folder} has no {' or '.join(f'{stem}.safetensors[.xz]' for stem in stems)}")

    def check(self, name: str, got: Any, tolerance: Tolerance | None = None, where: np.ndarray | None = None) -> None:
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
        self.last = name
        want = self._arrays[name]
        if tolerance is None:
            tolerance = EQUAL if want.dtype.kind in "iub" else FEATURE
        self.compare(name, got, want, tolerance, where)

    def compare(self, name: str, got: Any, want: Any, tolerance: Tolerance, where: np.ndarray | None = None) -> None:
        """Compares two arrays and notes the outcome under `name`."""
        got, want = np.asarray(got), np.asarray(want)
        if got.shape != want.shape:
            self.comparisons.append(
                Comparison(name, want.shape, math.nan, tolerance, False, f"the model gives {got.shape}")
            )
            return
        shape = want.shape
        if where is not None:
            got, want = got[where], want[where]
        error = _error(got.astype(np.float64), want.astype(np.float64), tolerance.measure)
        self.comparisons.append(Comparison(name, shape, error, tolerance, error <= tolerance.limit))

    def same(self, name: str, got: Any, want: Any) -> None:
        """Notes whether two things of any kind are equal."""
        equal = got == want
        self.comparisons.append(
            Comparison(
                name, (), 0.0 if equal else 1.0, EQUAL, equal, "" if equal else f"{got!r} instead of {want!r}"[:300]
            )
        )

    def miss(self, pattern: str, note: str) -> None:
        """Notes every array of that name that was not compared yet as a miss: the model gives none."""
        for m in self.names(pattern):
            if m[0] not in self._seen:
                self.absent(m[0], note)

    def absent(self, name: str, note: str) -> None:
        """Notes that the model has nothing to compare with `name`."""
        self._seen.add(name)
        shape = self.shape(name) if name in self else ()
        self.comparisons.append(Comparison(name, shape, math.nan, EQUAL, False, note))

    def unused(self) -> list[str]:
        """Arrays that were neither read nor compared, since no comparer knows them."""
        return [name for name in self._arrays if name not in self._seen]


class _Object(dict):
    """An object of config.json: a missing key is a UserError that names it with the objects around it."""

    def __init__(self, content: Mapping[str, Any], file: epath.Path, path: str = ""):
        super().__init__(
            {
                key: _Object(value, file, f"{path}{key}.") if isinstance(value, dict) else value
                for key, value in content.items()
            }
        )
        self._file, self._path = file, path
        for key in _REPEATS.keys() & self.keys():
            values = self[key] if isinstance(self[key], list) else [self[key]]
            if len(values) > 64 or not all(type(n) is int and 0 <= n <= _REPEATS[key] for n in values):
                raise UserError(
                    f"{file}: {path}{key}={brief(repr(self[key]), 60)}: whole numbers up to "
                    f"{_REPEATS[key]} are expected"
                )

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._file} has no key '{self._path}{key}'")


def _config(file: epath.Path) -> dict[str, Any]:
    if not file.exists():
        raise UserError(f"{file} does not exist; a recording has config.json and io.npz")
    config = files.read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"{file} is no object of JSON but a {type(config).__name__}")
    return _Object(config, file)


def _arrays(file: epath.Path) -> dict[str, np.ndarray]:
    """{name: array} of an .npz; what is neither numbers nor bools is refused, bfloat16 recognised."""
    if not file.exists():
        raise UserError(f"{file} does not exist; a recording has config.json and io.npz")
    name, out = "", {}
    try:
        with zipfile.ZipFile(io.BytesIO(files.read_bytes(file))) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > _MAX_ARRAYS:
                raise UserError(f"{file} unpacks to {size} bytes; at most {_MAX_ARRAYS} are read")
            for entry in archive.namelist():
                name = entry.removesuffix(".npy")
                out[name] = _numbers(np.lib.format.read_array(io.BytesIO(archive.read(entry))))
    except (
        ValueError,
        OSError,
        EOFError,
        KeyError,
        TypeError,
        SyntaxError,
        MemoryError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        where = f"{file}: array '{name}'" if name else str(file)
        raise UserError(f"{where} cannot be read: {brief(error) or type(error).__name__}") from None
    return out


def _numbers(array: np.ndarray) -> np.ndarray:
    """The array, if it holds real numbers or bools; numpy writes bfloat16 as two bytes without a type."""
    if array.dtype == np.dtype("V2"):
        return array.view(ml_dtypes.bfloat16)
    if array.dtype.kind not in "iufb":
        raise ValueError(f"it holds {array.dtype}, not numbers")
    return array


def _error(got: np.ndarray, want: np.ndarray, measure: str) -> float:
    if want.size == 0:
        return 0.0
    difference = np.subtract(got, want, out=np.zeros_like(want), where=got != want)  # inf equals inf
    if measure == "norm":
        return float(np.linalg.norm(difference) / max(np.linalg.norm(want), 1e-30))
    error = float(np.max(np.abs(difference)))
    if measure == "scaled":
        return error / max(1.0, float(np.max(np.abs(want))))
    if measure == "relative":
        return error / max(float(np.max(np.abs(want))), 1e-30)
    return error


def check_gradients(
    record: Recording, prefix: str, grads: Mapping[str, np.ndarray], norms: Mapping[str, float]
) -> None:
    """Compares gradients under their torch names: whole arrays, and the norm of every one.

    A norm below a millionth of the whole gradient's is a zero but for rounding (a bias in front of
    a normalisation); there ours must be such a zero too.
    """
    total = max(math.sqrt(sum(n * n for n in norms.values())), 1e-30)
    for name, norm in norms.items():
        label = f"norm of {prefix}{name}"
        if name not in grads:
            record.absent(label, "no such parameter here")
        elif norm < ZERO.limit * total:
            record.compare(label, np.linalg.norm(grads[name]) / total, 0.0, ZERO)
        else:
            record.compare(label, np.linalg.norm(grads[name].astype(np.float64)), norm, GRADIENT)
    for name, grad in grads.items():
        record.check(f"{prefix}{name}", grad, GRADIENT)
    record.miss(f"{re.escape(prefix)}.*", "no such parameter here")


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as text, one per line."""
    width = max((len(r.name) for r in comparisons), default=4)
    lines = [f"{'array':{width}s}  {'shape':>18s}  {'error':>9s}  {'allowed':>17s}"]
    for r in comparisons:
        shape = "x".join(map(str, r.shape)) or "scalar"
        limit = f"{r.tolerance.limit:g} {r.tolerance.measure}"
        allowed = "equal" if r.tolerance == EQUAL else limit
        lines.append(
            f"{r.name:{width}s}  {shape:>18s}  {r.error:9.2e}  {allowed:>17s}  "
            f"{'ok' if r.ok else 'MISS'} {r.note}".rstrip()
        )
    return "\n".join(lines)
