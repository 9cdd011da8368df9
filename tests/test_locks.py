"""Locks: one holder, stale ones are taken, a stopped heartbeat is waited for; folders and files of several writers."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from argenseg_jax import files, locks, processes
from argenseg_jax.errors import UserError
from tests import bucket

OWN = processes.this()


@pytest.fixture(params=["local", "bucket"])
def path(request, tmp_path):
    """A lock file on a disk and in a bucket (fsspec's memory file system)."""
    if request.param == "local":
        yield epath.Path(tmp_path / "w" / locks.FILE)
        return
    with bucket.in_memory():
        yield epath.Path("gs://bucket/w") / locks.FILE


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.01)


def left(path, age=0.0, **process):
    """Writes the lock of another process."""
    holder = locks.Holder("other", dataclasses.replace(OWN, **process), time.time() - age)
    files.write(path, holder.content())


def dead():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_one_holder_and_nothing_left(path):
    with locks.Lock(path, "runs/w") as lock:
        saved = json.loads(path.read_bytes())
        assert (saved["pid"], saved["host"]) == (os.getpid(), OWN.host)
        with pytest.raises(UserError, match=rf"^runs/w is in use by process {os.getpid()} on {OWN.host}; wait"):
            locks.Lock(path, "runs/w").attempt()
        deadline = time.monotonic() + 5
        while json.loads(path.read_bytes())["heartbeat"] <= saved["heartbeat"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        lock.check()
    assert not path.exists()
    if not files.is_remote(path):
        assert not path.parent.exists()  # it was made for the lock, and stayed empty


def test_the_lock_of_a_dead_process_is_taken_at_once(path):
    left(path, pid=dead())
    with locks.Lock(path, "w", pytest.fail):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()


def test_another_process_with_the_same_number_is_not_the_holder(path):
    left(path, started=OWN.started - 1)  # a pid that was given away again
    with locks.Lock(path, "w", pytest.fail):
        pass
    left(path)  # the same start: this very process
    with pytest.raises(UserError, match="in use by process"):
        locks.Lock(path, "w").attempt()


def test_another_machine_is_waited_for(path):
    left(path, machine="elsewhere", host="node7", pid=5)
    reported = []
    with locks.Lock(path, "runs/w", reported.append):
        pass
    assert reported == ["runs/w is in use by process 5 on node7; waiting up to 0 s for its heartbeat to stop"]
    left(path, age=10_000, machine="elsewhere")  # an old one is watched for two heartbeats and a half
    begin = time.monotonic()
    with locks.Lock(path, "w", len):
        assert 0.125 <= time.monotonic() - begin < 0.5


def test_a_suspended_holder_on_this_machine_is_waited_for(path):
    left(path, age=1.0)  # it is alive, but its heartbeat is older than 0.5 s
    reported = []
    with locks.Lock(path, "w", reported.append):
        assert len(reported) == 1 and "waiting" in reported[0]


def test_a_holder_that_ends_while_it_is_waited_for(path):
    """Its last heartbeat came late in the wait: that one too must get old before the lock is taken."""
    left(path, machine="elsewhere")
    threading.Timer(0.4, lambda: left(path, machine="elsewhere")).start()
    begin = time.monotonic()
    with locks.Lock(path, "w", len):
        assert time.monotonic() - begin >= 0.85


@pytest.mark.parametrize("skew", [-300.0, 300.0])
def test_a_moving_heartbeat_is_alive_whatever_its_clock_says(path, skew):
    stop = threading.Event()
    left(path, skew, machine="elsewhere", host="node7", pid=5)

    def beat():
        while not stop.wait(0.02):
            left(path, skew, machine="elsewhere", host="node7", pid=5)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="^w is in use by process 5 on node7"), locks.Lock(path, "w", len):
            pass
    finally:
        stop.set()
        thread.join()


def test_a_release_ends_the_wait(path):
    left(path, machine="elsewhere")
    threading.Timer(0.1, path.unlink).start()
    begin = time.monotonic()
    with locks.Lock(path, "w", len):
        assert time.monotonic() - begin < 0.45


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b'{"id": "a"}', b"\xff" * 2000, b"[" * 2000])
def test_what_is_no_lock_locks_nothing(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with locks.Lock(path, "w"):
        pass


def test_whoever_was_taken_over_stops(path):
    with locks.Lock(path, "runs/w") as lock:
        left(path, machine="elsewhere", host="node7", pid=5)
        deadline = time.monotonic() + 5
        while lock._taker is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(UserError, match="^runs/w was taken over by process 5 on node7 because the heartbeat"):
            lock.check()
    assert json.loads(path.read_bytes())["host"] == "node7"  # it is not this process's to remove


def test_of_many_at_once_one_gets_it(tmp_path):
    """Processes of their own race for a stale lock; the winner keeps it until all have tried."""
    path = epath.Path(tmp_path / locks.FILE)
    left(path, pid=dead())
    code = (
        "import sys, time; from argenseg_jax import locks, errors\n"
        "lock = locks.Lock(sys.argv[1], 'w')\n"
        "sys.stdin.readline()\n"
        "try: print(lock.attempt(), flush=True)\n"
        "except errors.UserError: print('refused', flush=True)\n"
        "sys.stdin.readline()"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, path],
            stdin=subprocess.PIPE,
            text=True,
            stdout=subprocess.PIPE,
            cwd=pathlib.Path(__file__).parent.parent,
        )
        for _ in range(4)
    ]
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    reported = [child.stdout.readline().strip() for child in children]
    for child in children:
        child.communicate("\n")
    assert sorted(reported) == ["True", "refused", "refused", "refused"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/null", p)])
def test_a_lock_that_is_no_file_is_one_line(tmp_path, make):
    make(tmp_path / locks.FILE)
    with pytest.raises(UserError, match="regular file|cannot be written"):
        locks.Lock(tmp_path / locks.FILE, "w").attempt()


# ------------------------------------------------------------------------------------ folders and files


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with locks.new_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "x").exists()
        with pytest.raises(UserError, match="x is in use by process"), locks.new_folder(tmp_path / "x"):
            pytest.fail("two at once")
    assert (tmp_path / "x" / "a").read_text() == "1" and os.listdir(tmp_path) == ["x"]
    with pytest.raises(UserError, match="exists already"), locks.new_folder(tmp_path / "x"):
        pass
    with pytest.raises(KeyError), locks.new_folder(tmp_path / "y") as folder:
        raise KeyError
    assert os.listdir(tmp_path) == ["x"]


def test_a_new_folder_removes_what_a_killed_process_left_and_nothing_else(tmp_path):
    mine = tmp_path / f".x.argenseg-{'0' * 32}"
    others = [tmp_path / name for name in ("x.partial", ".x.argenseg-mine", f".y.argenseg-{'0' * 32}")]
    for folder in (mine, *others):
        folder.mkdir()
        (folder / "file").write_text("")
    left(epath.Path(tmp_path / ".x.lock"), pid=dead())
    with locks.new_folder(tmp_path / "x"):
        assert not mine.exists()
    assert all((folder / "file").exists() for folder in others)


def test_a_folder_that_came_meanwhile_stays(tmp_path):
    with pytest.raises(UserError, match="x cannot be written"), locks.new_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("1")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "b").write_text("2")
    assert (tmp_path / "x" / "b").read_text() == "2" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "fault, line",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Error writing file: No space left on device [OS error 28]"),
            "No space left on device",
        ),
        (OSError(30, "Read-only file system"), "Read-only file system"),
    ],
)
def test_a_full_or_read_only_disk_is_one_line(tmp_path, fault, line):
    with pytest.raises(UserError, match=f"x cannot be written \\({line}\\)$"), locks.new_folder(tmp_path / "x"):
        raise fault
    with pytest.raises(UserError, match=f"w cannot be written \\({line}\\)$"), files.writing("w"):
        raise fault
    with pytest.raises(UserError, match=line), files.writing("w"):  # as libraries hand it on
        try:
            raise fault
        except Exception as first:
            raise ValueError("save failed") from first
    with pytest.raises(ValueError, match="other"), files.writing("w"):
        raise ValueError("other")


def test_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """Each has a temporary file of its own; those of dead processes go, another's stay."""
    target = tmp_path / "a.json"
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(pathlib.Path(a).name), replace(a, b)))
    files.write(target, "1")
    files.write(target, "2")
    assert target.read_text() == "2" and len(set(seen)) == 2 and os.listdir(tmp_path) == ["a.json"]
    (tmp_path / "a.json.tmp").write_text("the user's own")
    alive = f".argenseg-{OWN.machine}-{OWN.pid}-{OWN.started}-00000000.tmp"
    gone = f".argenseg-{OWN.machine}-{dead()}-1-00000000.tmp"
    for name in (alive, gone):
        (tmp_path / name).write_text("")
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([alive, "a.json", "a.json.tmp"])


def test_a_bucket_that_refuses_is_one_line(monkeypatch):
    def refuse(*_):
        raise RuntimeError("403 Forbidden")

    target = epath.Path("gs://bucket/a")
    monkeypatch.setattr(type(target), "write_bytes", refuse)
    with pytest.raises(UserError, match=r"bucket/a cannot be written \(403 Forbidden\)"):
        files.write(target, "1")


@pytest.mark.parametrize("name", ["a\0b", "a\udcff"])
def test_what_is_no_file_name_is_one_line(name):
    with pytest.raises(UserError, match="no name of a file"):
        files.write(name, "1")


# ------------------------------------------------------------------------------------ children


@pytest.mark.parametrize(
    "start",
    [
        "subprocess.Popen([sys.executable, '-c', CHILD], env=processes.child_environment())",
        "multiprocessing.get_context('spawn').Process(target=tests.test_locks.child).start()",
    ],
)
def test_children_end_with_a_killed_parent(start, tmp_path):
    """The child holds the pipe open for as long as it lives."""
    text = (
        "import multiprocessing, subprocess, sys, time, tests.test_locks\n"
        "from argenseg_jax import processes\n"
        "CHILD = 'import tests.test_locks; tests.test_locks.child()'\n"
        f"if __name__ == '__main__':\n    {start}\n    time.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(text)
    root = str(pathlib.Path(__file__).parent.parent)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
        cwd=root,
    )
    assert parent.stdout.readline() == "alive\n"
    parent.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    assert parent.stdout.read() == ""  # until the last process that holds it is gone
    assert time.monotonic() - begin < 20
    parent.wait()


def child():
    """What the children of the test run."""
    processes.end_with_parent()
    print("alive", flush=True)
    time.sleep(60)
