"""Weight files of any kind: tensors are read one at a time, safetensors written one at a time.

Files may be .safetensors, .safetensors.xz, or PyTorch's own .pth/.bin/.pt (interop/torch_file).
Plain safetensors are read by seeking, not through the safetensors library: that maps whole files
into memory, where every page once read counts as used. A header is believed only where it accounts
for every byte of the file, as the official reader demands.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import lzma
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.errors import DATA_FAULTS, UserError, brief
from argenseg_jax.interop import torch_file

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", ".safetensors.xz", *TORCH_SUFFIXES)
# Names of the safetensors format -> numpy.
_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, as in the official reader
MAX_TENSORS = 100_000  # of a file
_MAX_RANK = 32
_MAX_XZ_RATIO = 100  # weights compress to a half or so; what decompresses to more is a bomb,
_FREE_XZ_BYTES = 64 << 20  # unless it is no more than this
_MAX_XZ_MEMORY = 256 << 20  # of the decompressor: `xz -9` needs 65 MiB
_BLOCK = 128  # rows and columns transposed at once


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is read when it is asked for.

    Attributes:
      read: the complete array.
      rows: n -> its first n rows; None where these cannot be read alone.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    rows: Callable[[int], np.ndarray] | None = None

    @classmethod
    def of(cls, array: np.ndarray) -> Lazy:
        """An array that is in memory already."""
        return cls(array.shape, array.dtype, lambda: array)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def head(self, count: int) -> np.ndarray:
        """The first rows."""
        count = min(count, self.shape[0])
        return self.rows(count) if self.rows else self.read()[:count]


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

    def only(self, select: Callable[[str], bool]) -> Tensors:
        """Those whose key is selected."""
        return Tensors({key: lazy for key, lazy in self._lazy.items() if select(key)})


def open_file(file: epath.PathLike) -> Tensors:
    """The tensors of a file; nothing but names, shapes and dtypes is read yet.

    Raises:
      UserError: not there, no weight file, broken, or a PyTorch file where torch is absent.
    """
    file = files.to_path(file)
    try:
        if not file.exists():
            raise UserError(f"{file} does not exist")
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"{file} is no weight file: expected .safetensors, .pth or .bin")
        size = files.check_regular(file)
        if file.name.endswith(TORCH_SUFFIXES):
            return Tensors({key: Lazy(*found) for key, found in torch_file.open_tensors(file, size).items()})
        if file.name.endswith(".xz"):
            return Tensors(_open_xz(file, size))
        return Tensors(_open_safetensors(file, size))
    except (lzma.LZMAError, EOFError, OSError, *DATA_FAULTS) as error:
        raise UserError(f"{file} is broken or incomplete: {brief(error)}") from None


def write_safetensors(
    file: epath.PathLike, tensors: Mapping[str, Lazy], done: Callable[[int], None] = lambda n: None
) -> None:
    """Writes the header, then each tensor as it is read; done(bytes) is called after each."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, lazy in tensors.items():
        start, end = end, end + lazy.nbytes
        header[key] = {"dtype": _NAMES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    with epath.Path(file).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key, lazy in tensors.items():
            array = contiguous(lazy.read())
            if array.nbytes != lazy.nbytes or array.dtype != lazy.dtype:
                raise ValueError(f"'{key}' is {array.dtype}{array.shape}, not as in its header")
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
                    out[j : j + _BLOCK, i : i + _BLOCK] = rows[i : i + _BLOCK, j : j + _BLOCK].T
            return out.reshape(array.shape)
    return np.ascontiguousarray(array, dtype).reshape(array.shape)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor as a header describes it; `start` and `end` count from the header's end."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def _header_length(first: bytes) -> int:
    """Of the first eight bytes of a file."""
    if len(first) < 8:
        raise ValueError("it has less than 8 bytes")
    length = int.from_bytes(first, "little")
    if first.isascii() and first.decode().isprintable():
        raise ValueError(
            f"it is a text that begins with {first.decode()!r}, such as a page or a pointer of Git LFS, "
            "and no tensors: download it again"
        )
    if length > MAX_HEADER:
        raise ValueError(f"its header would have {length} bytes; at most {MAX_HEADER} are read")
    return length


def _parse_header(content: bytes, size: int | None) -> dict[str, _Entry]:
    """The checked entries of a header, in the order of their bytes.

    Args:
      content: the JSON.
      size: bytes of all tensors together; None where it is not known.

    Raises:
      ValueError: what the official reader refuses: the tensors must follow each other without gap or
        overlap, and end with the file. Also a dtype that numpy has no name for.
      UserError: no JSON.
    """
    if not content.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    header = files.parse_json(content, "its header", _HeaderError, unique=True)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it lists {len(header)} tensors; at most {MAX_TENSORS} are read")
    entries = {key: _entry(key, value) for key, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    end = 0
    for key, entry in entries.items():
        if entry.start != end:
            raise ValueError(
                f"'{key}' begins at byte {entry.start} of the tensors, not at {end}, where the one before it ends"
            )
        end = entry.end
    if size is not None and end != size:
        raise ValueError(
            f"its tensors end at byte {end}, the file has {size} for them: "
            f"it is {'cut off' if end > size else 'longer than its header says'}"
        )
    return entries


class _HeaderError(UserError, ValueError):
    """A ValueError here: the caller names the file."""


def _entry(key: str, value: Any) -> _Entry:
    if not isinstance(value, Mapping) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise ValueError(f"'{key}' has no dtype, shape and data_offsets")
    name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"'{key}' has the unknown dtype {brief(repr(name), 40)}")
    dtype = _DTYPES[name]
    if not _are_counts(shape) or len(shape) > _MAX_RANK:
        raise ValueError(f"'{key}' has the shape {brief(repr(shape), 80)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"'{key}' has the data_offsets {brief(repr(offsets), 80)}")
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 63:
        raise ValueError(f"'{key}' has the shape {shape}")
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"'{key}' has {end - start} bytes; {name}{shape} needs {math.prod(shape) * dtype.itemsize}")
    return _Entry(dtype, tuple(shape), start, end)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _open_safetensors(file: epath.Path, size: int) -> dict[str, Lazy]:
    with file.open("rb") as stream:
        length = _header_length(stream.read(8))
        if length > size - 8:
            raise ValueError("its header is cut off")
        entries = _parse_header(stream.read(length), size - 8 - length)

    def reader(entry: _Entry) -> Callable[[int], np.ndarray]:
        return lambda rows: _read(file, 8 + length + entry.start, (rows, *entry.shape[1:]), entry.dtype)

    return {
        key: Lazy(
            entry.shape,
            entry.dtype,
            functools.partial(_read, file, 8 + length + entry.start, entry.shape, entry.dtype),
            reader(entry),
        )
        for key, entry in entries.items()
    }


def _open_xz(file: epath.Path, size: int) -> dict[str, Lazy]:
    """The header is decompressed now, the tensors, all of them, when the first is read."""
    with file.open("rb") as stream:
        content = _Decompressed(stream)
        length = _header_length(content.read(8))
        entries = _parse_header(content.read(length), None)
    total = max((entry.end for entry in entries.values()), default=0)
    if total > _FREE_XZ_BYTES and total > _MAX_XZ_RATIO * size:
        raise ValueError(f"{size} bytes of xz would become {total}; decompress it with `xz -d` if that is right")

    @functools.cache
    def tensors() -> np.ndarray:
        try:
            with file.open("rb") as stream:
                content = _Decompressed(stream)
                content.read(8 + length)
                data = np.frombuffer(content.read(total), np.uint8)
                if len(data) < total or content.read(1):
                    raise ValueError(f"it does not hold {total} bytes of tensors")
                return data
        except (lzma.LZMAError, EOFError, OSError, ValueError) as error:
            raise UserError(f"{file} is broken or incomplete: {brief(error)}") from None

    def read(entry: _Entry) -> np.ndarray:
        return tensors()[entry.start : entry.end].view(entry.dtype).reshape(entry.shape)

    return {key: Lazy(entry.shape, entry.dtype, functools.partial(read, entry)) for key, entry in entries.items()}


class _Decompressed:
    """What .xz holds, read forwards: no more is decompressed than is asked for, but for a block."""

    def __init__(self, stream: Any, block: int = 1 << 20):
        self._stream, self._block, self._held = stream, block, b""
        self._decoder = lzma.LZMADecompressor(memlimit=_MAX_XZ_MEMORY)

    def read(self, count: int) -> bytes:
        """So many bytes, fewer where the content ends."""
        parts, have = [self._held], len(self._held)
        while have < count and (part := self._next()):
            parts.append(part)
            have += len(part)
        joined = b"".join(parts)
        self._held = joined[count:]
        return joined[:count]

    def _next(self) -> bytes:
        """The next bytes; b'' at the end of the last stream."""
        while True:
            data = b""
            if self._decoder.eof:  # another stream may follow, or zeros
                data = (self._decoder.unused_data or self._stream.read(self._block)).lstrip(b"\0")
                if not data:
                    return b""
                self._decoder = lzma.LZMADecompressor(memlimit=_MAX_XZ_MEMORY)
            elif self._decoder.needs_input and not (data := self._stream.read(self._block)):
                raise EOFError("it is cut off")
            if part := self._decoder.decompress(data, self._block):
                return part


def _read(file: epath.Path, offset: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    array = np.empty(shape, dtype)
    with file.open("rb") as stream:
        stream.seek(offset)
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, data.size, 1 << 30):  # some file systems read no more at once
            part = data[start : start + (1 << 30)]
            if stream.readinto(part.data) != part.size:
                raise UserError(f"{file} ended while it was read")
    return array
