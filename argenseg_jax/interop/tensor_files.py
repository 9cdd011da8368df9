"""Weight files of any kind: tensors are read one at a time, safetensors written one at a time.

Files may be .safetensors, .safetensors.xz, or PyTorch's own .pth/.bin/.pt, which need torch and are
read with weights_only=True: nothing is unpickled freely. Plain safetensors are read by seeking, not
through the safetensors library: that maps whole files into memory, where every page once read
counts as used.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import lzma
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath

from argenseg_jax.errors import UserError

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", ".safetensors.xz", *TORCH_SUFFIXES)
# Names of the safetensors format -> numpy.
_DTYPES = {name: np.dtype(dtype) for name, dtype in {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32,
    "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_}.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# So much of a PyTorch file may be mapped into memory before it is mapped anew.
_MAPPED_BYTES = 1 << 30
_BLOCK = 128  # rows and columns transposed at once


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is read when it is asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> Lazy:
        """An array that is in memory already."""
        return cls(array.shape, array.dtype, lambda: array)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors(Mapping[str, np.ndarray]):
    """{torch key: array} over one or several files; an array is read when it is asked for."""

    def __init__(self, lazy: Mapping[str, Lazy]):
        self._lazy = dict(lazy)

    def __getitem__(self, key: str) -> np.ndarray:
        return self._lazy[key].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._lazy)

    def __len__(self) -> int:
        return len(self._lazy)

    def lazy(self, key: str) -> Lazy:
        """Shape and dtype of an array, without reading it."""
        return self._lazy[key]


def open_file(file: epath.PathLike) -> Tensors:
    """The tensors of a file.

    Raises:
      UserError: not there, no weight file, broken, or a PyTorch file where torch is absent.
    """
    file = epath.Path(file)
    if not file.exists():
        raise UserError(f"{file} does not exist")
    try:
        if file.name.endswith(TORCH_SUFFIXES):
            return Tensors(_open_torch(file))
        if file.name.endswith(".xz"):
            arrays = safetensors.numpy.load(lzma.decompress(file.read_bytes()))
            return Tensors({key: Lazy.of(array) for key, array in arrays.items()})
        if file.name.endswith(".safetensors"):
            return Tensors(_open_safetensors(file))
    except (safetensors.SafetensorError, lzma.LZMAError, EOFError, OSError, ValueError, KeyError,
            TypeError, AttributeError) as error:
        raise UserError(f"{file} is broken or incomplete: {error}") from None
    raise UserError(f"{file} is no weight file: expected .safetensors, .pth or .bin")


def write_safetensors(file: epath.PathLike, tensors: Mapping[str, Lazy],
                      done: Callable[[int], None] = lambda n: None) -> None:
    """Writes the header, then each tensor as it is read; done(bytes) is called after each."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, lazy in tensors.items():
        start, end = end, end + lazy.nbytes
        header[key] = {"dtype": _NAMES[lazy.dtype], "shape": list(lazy.shape),
                       "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    with epath.Path(file).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key, lazy in tensors.items():
            array = contiguous(lazy.read())
            if array.nbytes != lazy.nbytes or array.dtype != lazy.dtype:
                raise ValueError(f"'{key}' is {array.dtype}{array.shape}, not as its header says")
            stream.write(array.reshape(-1).view(np.uint8).data)
            done(array.nbytes)


def contiguous(array: np.ndarray, dtype: Any = None) -> np.ndarray:
    """np.ascontiguousarray, twice as fast for a transposed matrix (also with its heads split)."""
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    for axis, to in ((0, -1), (-1, 0)) if array.ndim > 1 and not array.flags.c_contiguous else ():
        base = np.moveaxis(array, axis, to)
        if base.flags.c_contiguous:
            rows = base.reshape((-1, array.shape[0]) if axis == 0 else (array.shape[-1], -1))
            out = np.empty(rows.shape[::-1], dtype)
            for i in range(0, rows.shape[0], _BLOCK):  # blocks that fit into the cache
                for j in range(0, rows.shape[1], _BLOCK):
                    out[j:j + _BLOCK, i:i + _BLOCK] = rows[i:i + _BLOCK, j:j + _BLOCK].T
            return out.reshape(array.shape)
    return np.ascontiguousarray(array, dtype).reshape(array.shape)


def _open_safetensors(file: epath.Path) -> dict[str, Lazy]:
    size = file.stat().length
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise ValueError("its header is cut off")
        header = json.loads(stream.read(length))
    lazy = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"'{key}' has the unknown dtype {entry['dtype']}")
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if end - start != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise ValueError(f"'{key}' is cut off")
        read = functools.partial(_read, file, 8 + length + start, shape, dtype)
        lazy[key] = Lazy(shape, dtype, read)
    return lazy


def _read(file: epath.Path, offset: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    array = np.empty(shape, dtype)
    with file.open("rb") as stream:
        stream.seek(offset)
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, data.size, 1 << 30):  # some file systems read no more at once
            part = data[start:start + (1 << 30)]
            if stream.readinto(part.data) != part.size:
                raise UserError(f"{file} ended while it was read")
    return array


class _TorchFile:
    """A PyTorch state dict, mapped into memory anew whenever much of it has been read."""

    def __init__(self, file: epath.Path):
        self._file, self._touched = file, 0
        self.state = self._load()

    def read(self, key: str) -> np.ndarray:
        """A copy as a numpy array, bit for bit (bfloat16 included)."""
        import torch

        if self._touched > _MAPPED_BYTES:
            self.state, self._touched = self._load(), 0
        tensor = self.state[key].detach().contiguous()
        self._touched += tensor.nbytes
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
        return tensor.numpy().copy()

    def _load(self) -> dict[str, Any]:
        try:
            import torch  # pylint: disable=g-import-not-at-top
        except ImportError:
            raise UserError(f"{self._file} needs PyTorch to be read: `pip install torch`, or "
                            "convert it to .safetensors elsewhere") from None
        load = functools.partial(torch.load, map_location="cpu", weights_only=True)
        try:
            if os.path.exists(self._file) and zipfile.is_zipfile(self._file):
                state = load(os.fspath(self._file), mmap=True)
            else:  # a remote file, or the format of torch before 1.6
                with self._file.open("rb") as stream:
                    state = load(stream)
        except Exception as error:  # torch raises many kinds; all mean that the file is not usable
            raise UserError(f"{self._file} cannot be read as PyTorch weights (weights_only): "
                            f"{str(error).splitlines()[0]}") from None
        while isinstance(state, Mapping) and not any(torch.is_tensor(v) for v in state.values()):
            inner = next((state[k] for k in ("state_dict", "model", "module") if k in state), None)
            if inner is None:
                raise UserError(f"{self._file} holds no tensors under their names")
            state = inner
        if not isinstance(state, Mapping):
            raise UserError(f"{self._file} holds no tensors under their names")
        return {key: t for key, t in state.items() if torch.is_tensor(t)}


def _open_torch(file: epath.Path) -> dict[str, Lazy]:
    opened = _TorchFile(file)

    def describe(key: str) -> Lazy:
        tensor = opened.state[key]
        name = str(tensor.dtype).removeprefix("torch.")
        dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
        return Lazy(tuple(tensor.shape), dtype, functools.partial(opened.read, key))

    return {key: describe(key) for key in opened.state}
