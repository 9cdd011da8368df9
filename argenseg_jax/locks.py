"""Locks on folders: one process may write, and holds a lock file with its pid, host and heartbeat.

The holder renews its heartbeat from a thread. A lock is stale when its holder has ended on this machine, or
has not renewed the heartbeat for STALE_SECONDS: a process that finds another machine's lock waits that
long. A holder that is alive on this machine is detected at once. On a disk the file is changed under
`flock`, so that only one of several processes gets the lock. Buckets have no equivalent: of processes that
write at the same time, the last one has the lock, and each reads the file again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import re
import stat
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from argenseg_jax import files, processes
from argenseg_jax.errors import UserError, brief

FILE = "lock.json"  # within a workdir
STALE_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0
SETTLE_SECONDS = 2.0  # in a bucket: longer than a small file takes to appear
_WATCHED = 2.5  # heartbeats: a moving one is seen in this time
_MAX_BYTES = 1 << 16
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@dataclasses.dataclass(frozen=True)
class Holder:
    """The content of a lock file.

    Attributes:
      id: of this acquisition of the lock.
      process: the process that acquired it.
      heartbeat: time of the last renewal, in seconds since 1970 by the clock of its machine.
    """

    id: str
    process: processes.Process
    heartbeat: float

    @classmethod
    def parse(cls, content: bytes) -> Holder | None:
        """None if it is not a lock: half-written, empty, or another file."""
        try:
            fields = json.loads(content)
            process = processes.Process(
                int(fields["pid"]), str(fields["host"]), str(fields["machine"]), int(fields["started"])
            )
            heartbeat = float(fields["heartbeat"])
            if process.pid < 1:
                return None
            return cls(str(fields["id"]), process, heartbeat if math.isfinite(heartbeat) else 0.0)
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
            return None

    def content(self) -> bytes:
        """The file's bytes; their number is constant, so that a renewal needs no disk space."""
        fields = {"id": self.id, **dataclasses.asdict(self.process), "heartbeat": round(self.heartbeat, 3)}
        return json.dumps(fields, indent=1).encode().ljust(1000) + b"\n"


class Lock:
    """The right of one process to write to a folder; a context manager.

    Attributes:
      path: the lock file.
    """

    def __init__(self, path: epath.PathLike, what: str, report: Callable[[str], None] | None = None):
        """Does not acquire the lock yet.

        Args:
          path: the file, local or in a bucket; its folder is created.
          what: the folder that it protects, for messages.
          report: receives the line that explains why it waits; default: prints it on stderr.
        """
        self.path, self._what = files.to_path(path), what
        self._report = report or (lambda text: print(text, file=sys.stderr, flush=True))
        self._own = Holder(uuid.uuid4().hex, processes.this(), 0.0)
        self._begin: float | None = None  # of waiting
        self._seen: tuple[float, Holder] | None = None  # when another heartbeat was first seen, and which
        self._taker: Holder | None = None  # the process that has taken the lock from this one
        self._stop, self._thread = threading.Event(), None
        self._made: list[epath.Path] = []  # folders, the innermost first

    def __enter__(self) -> Lock:
        while not self.attempt():
            time.sleep(self.pause)
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    @property
    def pause(self) -> float:
        """Seconds between attempts."""
        return min(1.0, STALE_SECONDS / 20)

    def attempt(self) -> bool:
        """Acquires the lock if it is free or stale; False: wait for `pause` and try again.

        Raises:
          UserError: the holder is alive, or the file cannot be written.
        """
        holder = self._take(self._stale)
        if holder is None:
            self._thread = threading.Thread(target=self._renew, name="heartbeat", daemon=True)
            self._thread.start()
            return True
        if self._begin is None and _may_be_stopped(holder):
            self._begin = time.monotonic()
            self._report(
                f"{self._what} is in use by {_named(holder)}; waiting up to {STALE_SECONDS:.0f} s "
                "for its heartbeat to stop"
            )
        if self._begin is not None:
            seen = time.monotonic() - self._unchanged(holder)
            if seen < self._begin + STALE_SECONDS:  # a heartbeat that moves after that time is alive
                return False
        raise UserError(f"{self._what} is in use by {_named(holder)}; wait for its end, or use another folder")

    def check(self) -> None:
        """UserError if another process has taken the lock meanwhile: this one must not write any more."""
        if self._taker is not None:
            raise UserError(
                f"{self._what} was taken over by {_named(self._taker)} because the heartbeat of "
                "this process had stopped (was it suspended?); this one ends, and writes nothing"
            )

    def release(self) -> None:
        """Removes the file, and the folders created for it that are still empty."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        try:
            if files.is_remote(self.path):
                if _read(self.path, self._own.id):
                    self.path.unlink()
            else:
                with _opened(self.path, create=False) as file:
                    if (holder := Holder.parse(os.pread(file, _MAX_BYTES, 0))) and holder.id == self._own.id:
                        os.unlink(self.path)
            for folder in self._made:
                os.rmdir(folder)
        except Exception:  # a folder is no longer empty, or was removed; a remaining lock becomes stale
            pass

    # ------------------------------------------------------------------ one look at the file

    def _stale(self, holder: Holder) -> bool:
        """Whether the lock may be taken over from its holder."""
        if holder.process.is_dead():
            return True
        if not _may_be_stopped(holder):
            return False
        # The clocks of two machines differ, and machines sleep: the heartbeat must have stopped here too.
        unchanged = self._unchanged(holder)
        return unchanged >= STALE_SECONDS or (
            time.time() - holder.heartbeat >= STALE_SECONDS and unchanged >= _WATCHED * HEARTBEAT_SECONDS
        )

    def _unchanged(self, holder: Holder) -> float:
        """For how many seconds this process has seen this very heartbeat."""
        if self._seen is None or self._seen[1] != holder:
            self._seen = time.monotonic(), holder
        return time.monotonic() - self._seen[0]

    def _take(self, stale: Callable[[Holder], bool]) -> Holder | None:
        """None if this process has acquired the lock, else the holder."""
        own = dataclasses.replace(self._own, heartbeat=time.time())
        try:
            self._make_folder()
            if files.is_remote(self.path):
                holder = _read(self.path)
                if holder is not None and not stale(holder):
                    return holder
                self.path.write_bytes(own.content())
                time.sleep(SETTLE_SECONDS)
                holder = _read(self.path)
                return None if holder is None or holder.id == own.id else holder
            with _opened(self.path) as file:
                holder = Holder.parse(os.pread(file, _MAX_BYTES, 0))
                if holder is not None and not stale(holder):
                    return holder
                try:
                    _overwrite(file, own)
                except OSError:
                    if holder is None:
                        os.unlink(self.path)
                    raise
            return None
        except (OSError, ValueError) as fault:
            raise UserError(f"{self._what} cannot be written ({files.reason(fault)})") from None
        except UserError:
            raise
        except Exception as fault:  # clients of buckets have their own exceptions
            if not files.is_remote(self.path):
                raise
            raise UserError(f"{self._what} cannot be written ({files.reason(fault)})") from None

    def _make_folder(self) -> None:
        if files.is_remote(self.path):
            return
        folder = self.path.parent
        while not folder.exists():
            self._made.append(folder)
            folder = folder.parent
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def _renew(self) -> None:
        """The thread: renews the heartbeat until `release`, or until another process has the lock."""
        while not self._stop.wait(HEARTBEAT_SECONDS) and self._taker is None:
            own = dataclasses.replace(self._own, heartbeat=time.time())
            try:
                if files.is_remote(self.path):
                    holder = _read(self.path)
                    if holder is None or holder.id == own.id:
                        self.path.write_bytes(own.content())
                        continue
                else:
                    with _opened(self.path) as file:
                        holder = Holder.parse(os.pread(file, _MAX_BYTES, 0))
                        if holder is None or holder.id == own.id:
                            _overwrite(file, own)
                            continue
                self._taker = holder
            except Exception:  # a full disk, a bucket out of reach: the next heartbeat may come through
                continue


def _may_be_stopped(holder: Holder) -> bool:
    """Whether only its heartbeat can tell if a holder works: it is elsewhere, or here but has not renewed it."""
    return holder.process.machine != processes.this_machine() or time.time() - holder.heartbeat >= STALE_SECONDS


def _named(holder: Holder) -> str:
    return f"process {holder.process.pid} on {brief(holder.process.host)}"


def _read(path: epath.Path, own: str | None = None) -> Holder | None:
    """The holder in a bucket's file; None without one, or if it is not `own`."""
    try:
        holder = Holder.parse(path.read_bytes()[:_MAX_BYTES])
    except FileNotFoundError:
        return None
    return holder if own is None or (holder and holder.id == own) else None


def _overwrite(file: int, holder: Holder) -> None:
    content = holder.content()
    if os.pwrite(file, content, 0) < len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(file, len(content))


@contextlib.contextmanager
def _opened(path: epath.Path, create: bool = True) -> Iterator[int]:
    """A descriptor of the local lock file, locked with flock so that no other process changes it."""
    while True:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        file = os.open(path, flags, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise UserError(f"{path} is not a regular file")
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as fault:
                if fault.errno not in _NO_FLOCK:  # a file system without flock: no better than a bucket
                    raise
            try:
                same = os.path.samestat(os.fstat(file), os.stat(path))
            except FileNotFoundError:
                same = False
            if not same:  # it was removed, or replaced, while this process waited
                continue
            yield file
            return
        finally:
            os.close(file)


# ---------------------------------------------------------------------------------- new folders


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """A folder to fill, renamed to `path` when the block ends without an exception, and removed otherwise.

    Only one process at a time creates it. Leftovers of killed processes are removed. In a bucket, where a
    folder cannot be renamed, it has its final name from the start. Raises UserError if `path` exists,
    another process is creating it, or it cannot be written.
    """
    path = files.to_path(path)

    def check() -> None:
        with files.writing(path):
            if path.exists():
                raise UserError(f"{path} exists already; choose another name or remove it")

    check()
    with Lock(path.parent / f".{path.name}.lock", str(path)) as lock:
        check()  # the process that held the lock may have created it
        temporary = path if files.is_remote(path) else path.parent / f".{path.name}.argenseg-{uuid.uuid4().hex}"
        try:
            with files.writing(path):
                if temporary != path:
                    _remove_attempts(path)
                temporary.mkdir(parents=True)
            yield temporary
            with files.writing(path):
                lock.check()
                if temporary != path:
                    os.rename(temporary, path)
        except BaseException as fault:
            temporary.rmtree(missing_ok=True)
            if not isinstance(fault, UserError) and (found := files.disk_fault(fault)):
                raise UserError(f"{path} cannot be written ({found})") from None
            raise


def _remove_attempts(path: epath.Path) -> None:
    """Removes leftovers of killed processes for `path`; call it with the lock, so that none is running."""
    name = re.compile(rf"\.{re.escape(path.name)}\.argenseg-[0-9a-f]{{32}}")
    for left in path.parent.iterdir():
        if name.fullmatch(left.name):
            left.rmtree()
