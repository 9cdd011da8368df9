"""SHA-256 of every stored file of a checkpoint: written when it is complete, checked before it is read.

FOLDER/checksums-00000.json, ..., one per process that wrote files: {"processes": their number,
"files": {path in FOLDER: [bytes, SHA-256 in hex]}}. Folders without any, as older versions wrote them, are
read unchecked.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures

from etils import epath

from argenseg_jax import files
from argenseg_jax.errors import UserError

_NAME = re.compile(r"checksums-[0-9]{5}\.json")
_WRITER = re.compile(r"(?:ocdbt\.)?process_([0-9]+)")  # how Orbax names the folders of process K
_BLOCK = 1 << 22
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 3600.0  # for a save that does not become complete


def write(folder: epath.Path, process: int = 0, processes: int = 1) -> None:
    """Writes the checksums of the files that `process` wrote into a complete folder."""
    own = [path for path in _files(folder) if _writer(path) % processes == process]
    listed = _map(lambda name: (name, _digest(folder / name)), own)
    files.write(
        folder / f"checksums-{process:05d}.json",
        json.dumps({"processes": processes, "files": dict(listed)}, indent=0) + "\n",
    )


def remove(folder: epath.Path) -> None:
    """Removes the checksums of a folder that is going to be overwritten."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _NAME.fullmatch(path.name):
            path.unlink()


def check(folder: epath.Path, items: Sequence[str], share: tuple[int, int] = (0, 1)) -> None:
    """UserError that names the first file of `items` that was changed since it was written.

    Args:
      folder: of a step, or of frozen parameters.
      items: names in the folder, of files, or of folders with all of their files.
      share: (k, n): this process checks every n-th file, from the k-th on.
    """
    wanted: dict[str, tuple[int, str, str]] = {}
    for note in sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name)):
        try:
            for name, (size, digest) in files.read_json(note)["files"].items():
                if name.split("/")[0] in items:
                    wanted[name] = int(size), str(digest), note.name
        except (LookupError, TypeError, ValueError, AttributeError):
            raise UserError(f"{note} is damaged: remove it to read {folder} without checking it") from None

    def fault(name: str) -> str | None:
        size, digest, note = wanted[name]
        try:
            files.check_regular(folder / name)
            found = _digest(folder / name)
        except UserError as reason:
            return str(reason)
        except OSError:
            return f"{folder / name} is missing or cannot be read"
        if found != [size, digest]:
            return f"{folder / name} is damaged: its bytes do not match its checksum in {note}"
        return None

    largest = sorted(wanted, key=lambda name: (-wanted[name][0], name))
    for found in _map(fault, largest[share[0] :: share[1]]):
        if found:
            raise UserError(f"{found}; copy it again or use another step (--checksums=false reads it unchecked)")


class Writer:
    """A thread that writes the checksums of folders once they are complete."""

    def __init__(self, process: int = 0, processes: int = 1):
        """`process` of `processes`: the files that this one wrote."""
        self._process, self._processes = process, processes
        self._queue: queue.Queue[tuple[epath.Path, Callable[[], bool]] | None] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checksums", daemon=True)
        self._thread.start()

    def add(self, folder: epath.Path, complete: Callable[[], bool] = lambda: True) -> None:
        """Requests the checksums of a folder, once it is `complete`."""
        self._queue.put((folder, complete))

    def wait(self) -> None:
        """Waits until all that were requested are written."""
        self._queue.join()

    def close(self) -> None:
        """Waits for the checksums of the folders that are complete by now."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (asked := self._queue.get()) is not None:
            folder, complete = asked
            deadline = time.monotonic() + _PATIENCE_SECONDS
            try:
                while (
                    not (done := complete()) and time.monotonic() < deadline and not self._closing.wait(_POLL_SECONDS)
                ):
                    pass
                if done or complete():
                    write(folder, self._process, self._processes)
            except Exception as fault:  # clients of buckets have their own exceptions; training continues
                print(f"{folder}: no checksums ({files.reason(fault)})", file=sys.stderr, flush=True)
            finally:
                self._queue.task_done()


def _files(folder: epath.Path, within: str = "") -> list[str]:
    """Paths within a folder, without checksums and temporary files."""
    names = []
    for path in folder.iterdir():
        if path.is_dir():
            names += _files(path, f"{within}{path.name}/")
        elif not _NAME.fullmatch(path.name) and not path.name.startswith(".argenseg-"):
            names.append(within + path.name)
    return sorted(names)


def _writer(name: str) -> int:
    """The process that wrote a file: Orbax has it in the path; other files are written by process 0."""
    found = [_WRITER.fullmatch(part) for part in name.split("/")]
    return next((int(match[1]) for match in found if match), 0)


def _digest(path: epath.Path) -> list[int | str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)  # releases the GIL
            size += len(block)
    return [size, digest.hexdigest()]


def _map(function: Callable, names: Iterable[str]) -> list:
    with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, names))
