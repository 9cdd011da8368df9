"""Files, local or gs://: checked reading of untrusted files, and atomic writing."""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import io
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec
import numpy as np
from etils import epath

from argenseg_jax import processes
from argenseg_jax.errors import UserError, brief

MAX_BYTES = 512 * 2**20  # of a file that is read at once, unless its reader sets another limit
MAX_JSON = 2 * 2**30  # instances_train2017.json has 0.45 GB
MAX_LINE = 64 * 2**20  # characters of one line of a file that is read line by line
MAX_DEPTH = 64  # of nested lists and objects in JSON
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # UTF-16's begins as UTF-32's
_LARGE_NUMBER = re.compile(rb"\d{19}|[eE]\+?\d{3}")  # may be outside of 64 bits or of a float
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_NESTING = np.zeros(256, np.int8)
_NESTING[[ord("["), ord("{")]], _NESTING[[ord("]"), ord("}")]] = 1, -1


def is_remote(path: epath.PathLike) -> bool:
    """Whether this is in a bucket (gs://): no appending, no renaming, atomic writes."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root, as Orbax wants it; `resolve` would put gs:// below the working directory."""
    path = epath.Path(path)
    return path if is_remote(path) else path.resolve()


def to_path(path: epath.PathLike, error: type[UserError] = UserError) -> epath.Path:
    """The path as an object; `error` where its scheme (gs://, s3://, ...) has no file system here, or where it
    is no name of a file (a null byte, bytes that are no UTF-8)."""
    text = os.fspath(path)
    try:
        if "\0" in text:
            raise ValueError
        text.encode()
    except ValueError:
        raise error(f"{brief(text)!r} is no name of a file: it has a null byte or is no UTF-8") from None
    try:
        return epath.Path(path)
    except (KeyError, ImportError) as fault:
        raise error(f"{path}: {_no_file_system(path, fault)}") from None


def check_file_system(path: epath.PathLike) -> None:
    """UserError where what opens gs://, s3://, ... is not installed, which `to_path` cannot tell yet."""
    path = to_path(path)
    if is_remote(path):
        try:
            fsspec.get_filesystem_class(os.fspath(path).partition("://")[0])
        except (ImportError, ValueError) as fault:
            raise UserError(f"{path}: {_no_file_system(path, fault)}") from None


def join(root: epath.PathLike, path: epath.PathLike, error: type[UserError] = UserError) -> epath.Path:
    """root/path; a path with `://` or from the root (/...) stands alone, unchanged."""
    root, path = os.fspath(root), os.fspath(path)
    if is_remote(path) or os.path.isabs(path) or not root:
        return to_path(path, error)
    if not is_remote(root):
        return to_path(os.path.join(root, path), error)
    joined = to_path(root, error)
    for step in pathlib.PurePosixPath(path).parts:
        joined = joined.parent if step == ".." else joined / step  # buckets have no `..`
    return joined


def inside(
    root: epath.PathLike, path: epath.PathLike, allow_outside: bool = False, error: type[UserError] = UserError
) -> epath.Path:
    """As `join`, for a path that a data file names: `error` if a relative one leads out of `root`,
    by `..` or by a symbolic link. Absolute paths and `://` are explicit and allowed.
    """
    root, path = os.fspath(root), os.fspath(path)
    joined = join(root, path, error)
    if allow_outside or is_remote(path) or os.path.isabs(path):
        return joined
    way = ""
    if os.path.normpath(path).split(os.sep)[0] == os.pardir:
        way = "`..`"
    elif not is_remote(root):
        with _reading(joined, error):
            base = _real(os.path.join(os.getcwd(), root))
            full = os.path.join(base, path)
            folder, name = os.path.split(full)
            plain = name not in ("", os.curdir, os.pardir) and not os.path.islink(full)
            real = f"{_real(folder)}/{name}" if plain else os.path.realpath(full)
        if not f"{real}/".startswith(f"{base.rstrip('/')}/"):
            way = f"a symbolic link to {real}"
    if way:
        raise error(
            f"{path}: leads out of {root} ({way}); data.allow_outside=true (--allow_outside) reads it nevertheless"
        )
    return joined


@functools.lru_cache(maxsize=1024)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def kind_of(path: epath.PathLike, error: type[UserError] = UserError) -> str:
    """ "file", "folder", or "" if neither exists; `error` if that cannot be determined."""
    path = to_path(path, error)
    with _reading(path, error):
        return "folder" if path.is_dir() else "file" if path.exists() else ""


def listed(folder: epath.PathLike, error: type[UserError] = UserError) -> list[epath.Path]:
    """The entries of a folder, sorted, without hidden ones: macOS, Jupyter and others leave theirs in data."""
    folder = to_path(folder, error)
    with _reading(folder, error):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


# ---------------------------------------------------------------------------------- reading


def read_bytes(path: epath.PathLike, limit: int = MAX_BYTES, error: type[UserError] = UserError) -> bytes:
    """The content of a regular file of at most `limit` bytes; else one line as `error`.

    Devices, pipes and sockets are refused: they may never end.
    """
    path = to_path(path, error)
    with _reading(path, error):
        size = check_regular(path, limit, error)
        if is_remote(path):
            return path.read_bytes()
        with path.open("rb") as file:
            return file.read(size)  # not to the end: files of /proc (kmsg) have a size of 0 and may have none


@contextlib.contextmanager
def _reading(path: epath.Path, error: type[UserError]) -> Iterator[None]:
    """Turns whatever prevents reading a file into `error`, in one line."""
    try:
        yield
    except (OSError, ValueError) as fault:  # ValueError: a null byte in the name
        raise error(f"{path}: cannot be read ({reason(fault)})") from None
    except UserError:
        raise
    except ImportError as fault:
        raise error(f"{path}: {_no_file_system(path, fault)}") from None
    except Exception as fault:  # clients of buckets have their own exceptions
        if not is_remote(path):
            raise
        raise error(f"{path}: cannot be read ({type(fault).__name__}: {brief(fault)})") from None


def check_regular(path: epath.PathLike, limit: int | None = None, error: type[UserError] = UserError) -> int:
    """The size in bytes of a regular file; `error` where it is another kind of file or over `limit`."""
    path = epath.Path(path)
    if is_remote(path):
        size = path.stat().length
    else:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = (
                "Is a directory" if stat.S_ISDIR(status.st_mode) else ("a device, pipe or socket, not a regular file")
            )
            raise error(f"{path}: cannot be read ({kind})")
        size = status.st_size
    if limit is not None and size > limit:
        raise error(f"{path} has {size} bytes; at most {limit} are read")
    return size


def check_all_regular(path: epath.PathLike, error: type[UserError] = UserError) -> None:
    """`error` where a local file is, or a folder holds at any depth, a device, pipe or socket: libraries would wait."""
    if is_remote(path):
        return
    within = (os.path.join(directory, name) for directory, _, names in os.walk(path) for name in names)
    for file in within if os.path.isdir(path) else (path,):
        if os.path.exists(file):  # a link that leads nowhere is its reader's matter
            check_regular(file, None, error)


def read_text(path: epath.PathLike, limit: int = MAX_BYTES, error: type[UserError] = UserError) -> str:
    """The text of a file: UTF-8, with or without a byte order mark, or UTF-16 with one."""
    return decode_text(read_bytes(path, limit, error), str(path), error)


def decode_text(content: bytes, where: str, error: type[UserError] = UserError) -> str:
    """bytes -> text by its byte order mark, UTF-8 without one; `error` names `where` and the byte."""
    encoding = next((name for mark, name in _BOMS.items() if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and (at := content.find(b"\0")) >= 0:
        raise error(f"{where}: byte {at} is 0, as in UTF-16 without a byte order mark; save the file as UTF-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as fault:
        raise error(
            f"{where}: byte {fault.start} is no {encoding.removesuffix('-sig').upper()} text; save the file as UTF-8"
        ) from None


def read_lines(path: epath.PathLike, error: type[UserError] = UserError) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of every line of a regular file that is not blank, one at a time.

    The file may be of any size; its encoding is found as by `read_text`. `error` names the line that
    is no text or longer than MAX_LINE.
    """
    path, number = to_path(path, error), 0
    with _reading(path, error):
        if not check_regular(path, None, error):  # as /proc/kmsg, whose end never comes
            return
        with path.open("rb") as file:
            start = file.read(4)
            encoding = next((name for mark, name in _BOMS.items() if start.startswith(mark)), "utf-8")
            file.seek(len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
            plain = encoding.startswith("utf-8")  # a line break is one byte, and no other has its value
            lines = file if plain else io.TextIOWrapper(file, encoding, newline="\n")
            try:
                while line := lines.readline(MAX_LINE):
                    number += 1
                    if len(line) == MAX_LINE:
                        raise error(f"{path}:{number}: longer than {MAX_LINE} characters")
                    text = line.decode() if plain else line
                    if text.strip():
                        yield number, text
            except UnicodeError:
                raise error(
                    f"{path}:{number if plain else number + 1}: no "
                    f"{encoding.removesuffix('-sig').upper()} text; save the file as UTF-8"
                ) from None


def read_json(path: epath.PathLike, limit: int = MAX_JSON, error: type[UserError] = UserError, **options: bool) -> Any:
    """The parsed file; `error` if it is not there or `parse_json` refuses it."""
    return parse_json(read_bytes(path, limit, error), str(path), error, **options)


def parse_json(
    content: bytes | str, where: str, error: type[UserError] = UserError, *, unique: bool = False, large: bool = False
) -> Any:
    """Parsed JSON of any Unicode encoding; `error` names `where`.

    Refused is what no data needs and later code cannot handle: NaN and Infinity, integers beyond 64
    bits, nesting deeper than MAX_DEPTH; with `unique` also a key that an object has twice.
    With `large` integers of up to 40 digits pass: transformers writes 10**30 for "no limit".
    """
    text = decode_text(content, where, error) if isinstance(content, bytes) else content.lstrip("\ufeff")
    one_byte = isinstance(content, bytes) and b"\0" not in content[:4]  # otherwise UTF-16 or UTF-32
    raw = content if one_byte else text.encode("utf-8", "surrogatepass")
    hooks = (
        {"parse_int": _long_number if large else _whole_number, "parse_float": _finite_number}
        if _LARGE_NUMBER.search(raw)
        else {}
    )
    if unique:
        hooks["object_pairs_hook"] = _unique
    try:
        if _depth(raw) > MAX_DEPTH and _depth(_STRING.sub(b"", raw)) > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        return json.loads(text, parse_constant=_refuse_constant, **hooks)
    except (ValueError, RecursionError) as fault:
        raise error(f"{where} is no valid JSON: {brief(fault)}") from None


def _depth(content: bytes, block: int = 1 << 20) -> int:
    """Upper bound of the nesting of JSON in one-byte units; brackets within strings count too."""
    if content.count(b"[") + content.count(b"{") <= MAX_DEPTH:
        return 0
    depth = deepest = 0
    for start in range(0, len(content), block):
        levels = np.cumsum(
            _NESTING[np.frombuffer(content, np.uint8, min(block, len(content) - start), start)], dtype=np.int32
        )
        deepest = max(deepest, depth + int(levels.max()))
        depth += int(levels[-1])
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)[:100]}' occurs twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _whole_number(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"the whole number {text[:30]}... is beyond 64 bits")
    return int(text)


def _long_number(text: str) -> int:
    if len(text) > 40:
        raise ValueError(f"the whole number {text[:30]}... has {len(text)} digits")
    return int(text)


def _finite_number(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:30]} is infinite")
    return number


# ---------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
    """What keeps the block from writing below `path` becomes one line, a UserError: a full or read-only disk,
    missing rights, a bucket out of reach. Other exceptions pass."""
    try:
        yield
    except (OSError, ImportError) as fault:
        raise UserError(f"{path} cannot be written ({reason(fault)})") from fault
    except UserError:
        raise
    except Exception as fault:  # libraries wrap the system's errors, and clients of buckets have their own
        if (found := disk_fault(fault)) is None:
            raise
        raise UserError(f"{path} cannot be written ({found})") from fault


def disk_fault(error: BaseException) -> str | None:
    """The system's message about the disk in an exception of a library, or in one that caused it; else None."""
    seen: list[BaseException] = []
    fault: BaseException | None = error
    while fault is not None and fault not in seen:
        seen.append(fault)
        if isinstance(fault, OSError) and fault.errno in _DISK_ERRORS:
            return os.strerror(fault.errno)
        text = str(fault).lower()
        for number in _DISK_ERRORS:
            if os.strerror(number).lower() in text:
                return os.strerror(number)
        fault = fault.__cause__ or fault.__context__
    return None


def write(path: epath.PathLike, content: str | bytes | Iterable[str]) -> None:
    """Writes under a temporary name and renames: readers see either the old or the new file.

    In a bucket every file is written so. Makes the folder. Of an iterable one part after the other is in
    memory; in a bucket, all of it. The temporary name belongs to this process, so that several may write at
    once; the last one's file stays. Raises UserError where the file cannot be written.
    """
    path = to_path(path)
    parts = (
        part.encode() if isinstance(part, str) else part
        for part in ([content] if isinstance(content, (str, bytes)) else content)
    )
    if is_remote(path):
        data = b"".join(parts)
        try:
            path.write_bytes(data)
        except Exception as fault:  # clients of buckets have their own exceptions
            raise UserError(f"{path} cannot be written ({reason(fault)})") from None
        return
    temporary = path.parent / processes.temporary_name()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.writelines(parts)
        temporary.replace(path)
    except BaseException as fault:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()
        if isinstance(fault, OSError):
            raise UserError(f"{path} cannot be written ({reason(fault)})") from None
        raise


def check_writable(folder: epath.PathLike) -> None:
    """UserError now where files could not be written into `folder` later; leaves nothing there."""
    folder = to_path(folder)
    try:
        new = [] if is_remote(folder) else [f for f in (folder, *folder.parents) if not f.exists()]
        trial = folder / processes.temporary_name()
        if new:
            folder.mkdir(parents=True)
        try:
            trial.write_bytes(bytes(4096))  # an empty file can be created on a full disk
        finally:
            trial.unlink(missing_ok=True)
        for made in new:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                made.rmdir()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"{folder} cannot be written ({reason(error)})") from None


def remove_leftovers(folder: epath.PathLike) -> None:
    """Removes from a local folder the temporary files of `write` whose processes have ended."""
    folder = epath.Path(folder)
    for path in folder.iterdir() if not is_remote(folder) and folder.is_dir() else ():
        if processes.is_leftover(path.name):
            path.unlink(missing_ok=True)


def reason(error: BaseException) -> str:
    """A short text for an exception of a file system."""
    if isinstance(error, ImportError):
        return f"a package is missing: {brief(error)}"
    return getattr(error, "strerror", None) or brief(error) or type(error).__name__


def _no_file_system(path: epath.PathLike, error: Exception) -> str:
    scheme = os.fspath(path).partition("://")[0]
    if isinstance(error, ImportError) and scheme == "gs":
        return "gs:// needs gcsfs: pip install 'argenseg_jax[tpu]'"
    return f"there is no file system for {scheme}:// here"
