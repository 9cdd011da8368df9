"""Files, local or gs://: JSON that must be readable, and writing whole files or none."""
from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from argenseg_jax.errors import UserError


def is_remote(path: epath.PathLike) -> bool:
    """Whether this is in a bucket (gs://): no appending, no renaming, and files appear whole."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root, as Orbax wants it; `resolve` would put gs:// below the working directory."""
    path = epath.Path(path)
    return path if is_remote(path) else path.resolve()


def read_json(path: epath.PathLike) -> Any:
    """The parsed file; UserError if it is not there or no JSON."""
    path = epath.Path(path)
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({_reason(error)})") from None
    except ValueError as error:  # malformed JSON, or no text at all
        raise UserError(f"{path} is no valid JSON: {error}") from None


def write(path: epath.PathLike, content: str | bytes) -> None:
    """Writes under a temporary name and renames: readers see the old or the new file, whole.

    In a bucket every file is written so. Makes the folder. Raises UserError where the file cannot be
    written.
    """
    path = epath.Path(path)
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.parent / f"{path.name}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise UserError(f"{path} cannot be written ({_reason(error)})") from None


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """A folder to fill, which takes its name `path` when the block ends well, and else vanishes.

    What an interrupted process left of an earlier attempt is removed first. In a bucket, where a
    folder cannot be renamed, it has its name from the start. Raises UserError where `path` exists.
    """
    path = epath.Path(path)
    if path.exists():
        raise UserError(f"{path} exists already; choose another name or remove it")
    temporary = path if is_remote(path) else path.parent / f"{path.name}.partial"
    temporary.rmtree(missing_ok=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({_reason(error)})") from None
    try:
        yield temporary
        if temporary != path:
            temporary.rename(path)
    except BaseException:
        temporary.rmtree(missing_ok=True)
        raise


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
