"""Processes of this machine: identity, whether one is alive, and children that end with their parent."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import pathlib
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Mapping

_PARENT = "ARGENSEG_PARENT"  # environment variable: the child ends when this process does
_POLL_SECONDS = 0.5
_TEMPORARY = re.compile(r"\.argenseg-([0-9a-f]{12})-(\d+)-(\d+)-[0-9a-f]{8}\.tmp")


@dataclasses.dataclass(frozen=True)
class Process:
    """The identity of a process, which distinguishes it from a later one with the same pid.

    Attributes:
      pid: process id.
      host: the name of its machine, for messages.
      machine: digest of host name, boot id and pid namespace; pids are comparable if it is equal.
      started: start in clock ticks since the boot; 0 if unknown.
    """

    pid: int
    host: str
    machine: str
    started: int

    def is_dead(self) -> bool:
        """Whether it has certainly ended; always False for another machine or container."""
        if self.machine != this_machine():
            return False
        state, started = _status(self.pid)
        if state is None:
            try:
                os.kill(self.pid, 0)
            except (ProcessLookupError, OverflowError):
                return True
            except OSError:  # of another user
                return False
            return False
        return state in "ZX" or bool(self.started and started and self.started != started)


def this() -> Process:
    """The process that runs this."""
    pid = os.getpid()
    return Process(pid, socket.gethostname(), this_machine(), _status(pid)[1])


@functools.cache
def this_machine() -> str:
    """See Process.machine."""
    parts = [socket.gethostname()]
    try:
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:  # another system than Linux
        pass
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _status(pid: int) -> tuple[str | None, int]:
    """(state letter, start in clock ticks) of a process; (None, 0) if unknown."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, LookupError, ValueError):
        return None, 0


# --------------------------------------------------------------------------- names of temporary files


def temporary_name() -> str:
    """A file name that no other process uses and that identifies its writer."""
    own = this()
    return f".argenseg-{own.machine}-{own.pid}-{own.started}-{uuid.uuid4().hex[:8]}.tmp"


def is_leftover(name: str) -> bool:
    """Whether this is the temporary name of a process of this machine that has ended."""
    found = _TEMPORARY.fullmatch(name)
    return bool(found) and Process(int(found[2]), "", found[1], int(found[3])).is_dead()


# --------------------------------------------------------------------------- children


def child_environment() -> Mapping[str, str]:
    """The environment for a command of this package that ends when this process does."""
    return {**os.environ, _PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Makes this process end when its parent ends, even by SIGKILL; to be called first in a child.

    The parent is that of `child_environment` or of multiprocessing; does nothing without either.
    """
    named, parent = os.environ.pop(_PARENT, ""), multiprocessing.parent_process()
    pid = int(named) if named.isdigit() else parent.pid if parent else None
    if pid is not None:
        _watch(pid)


def begin_worker(*_: int) -> None:
    """The initializer of a multiprocessing worker: it ends with its parent, and ignores Ctrl-C, which a
    terminal sends to both and the parent handles."""
    with contextlib.suppress(ValueError):  # not in the main thread: then Python hands no signal to it anyway
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


@functools.cache
def _watch(pid: int) -> None:
    """Starts, once per process, a thread that polls: the kernel's parent-death signal is sent when the thread
    that started the child ends, which is too early."""

    def poll() -> None:
        while os.getppid() == pid:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=poll, name="end_with_parent", daemon=True).start()
