"""Damaged workdirs: whatever is deleted, cut, flipped or put there, what is read was written, or there is one line."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import tempfile

import jax
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from argenseg_jax import files, locks, processes, trees
from argenseg_jax.ckpt import orbax_io, steps
from argenseg_jax.errors import UserError
from argenseg_jax.train import loop, metrics_log
from tests.hostile import mutated
from tests.train import toy

KINDS = ("delete", "cut", "empty", "flip", "append", "folder", "pipe", "link")
FOREIGN = (
    "checkpoints/²",
    "checkpoints/9",
    "checkpoints/9/params",
    "checkpoints/007",
    "checkpoints/4/params/x",
    "checkpoints/notes",
    "checkpoints/frozen/9",
    "checkpoints/4/checksums-00009.json",
    "lock.json",
    "tensorboard",
    ".argenseg-0-1-2-0.tmp",
    "metrics.jsonl.tmp",
)
CONTENTS = (b"", b"{}", b"[]", b"null", b'{"files": 3}', b"\xff\x00")


def config():
    return toy.config(steps=4, checkpoint_every=2, log_every=3)


def run(folder):
    cfg = config()
    return loop.run(cfg, str(folder), toy.phases(cfg), toy.init, devices=jax.devices()[:1])


@functools.cache
def made():
    """A finished run with steps 2 and 4, its files, and the weights that each step gives."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="argenseg-hostile-")) / "w"
    run(folder)
    return (
        folder,
        sorted(str(p.relative_to(folder)) for p in folder.rglob("*")),
        {step: trees.flatten(orbax_io.restore_params(folder / "checkpoints" / str(step))) for step in (2, 4)},
    )


@contextlib.contextmanager
def damaged(changes):
    """A copy of it with some changes: (kind, which file, where in it) or (foreign name, content)."""
    source, names, _ = made()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder, "w")
        shutil.copytree(source, root)
        steps._log_once.cache_clear()
        for change in changes:
            if len(change) == 2:
                put(root / change[0], change[1])
            else:
                damage(root / names[change[1] % len(names)], change[0], change[2])
        yield root


def put(path, content):
    if path.parent.is_dir() and not path.exists():
        path.mkdir() if content is None else path.write_bytes(content)


def damage(path, kind, where):
    if not os.path.lexists(path):
        return
    if (path.is_dir() and not path.is_symlink()) or kind == "delete":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    if kind in ("folder", "pipe", "link"):
        path.unlink()
        {"folder": os.mkdir, "pipe": os.mkfifo, "link": lambda p: os.symlink("/dev/zero", p)}[kind](path)
        return
    content = bytearray(path.read_bytes()) if path.is_file() else bytearray()
    at = where % max(len(content), 1)
    if kind == "flip" and content:
        content[at] ^= 1 << where % 8
    content = {"cut": content[:at], "empty": b"", "append": content + b"x"}.get(kind, content)
    if path.is_file():
        path.write_bytes(content)


def one_line(fault):
    text = str(fault)
    assert "\n" not in text and 0 < len(text) < 900 and " at 0x" not in text, text


def same(got, want):
    return got.keys() == want.keys() and all(np.array_equal(got[name], want[name]) for name in want)


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(KINDS), st.integers(0, 500), st.integers(0, 10**6)),
        st.tuples(st.sampled_from(FOREIGN), st.one_of(st.none(), st.sampled_from(CONTENTS))),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=settings().max_examples)
@given(CHANGES)
@example([("checkpoints/9", None), ("checkpoints/9/params", None)])  # F11
@example([("checkpoints/²", None)])  # F25
def test_weights_are_those_of_a_whole_step_or_refused(changes):
    with damaged(changes) as root:
        try:
            got = trees.flatten(orbax_io.restore_params(root))
        except UserError as fault:
            one_line(fault)
            return
        wanted = made()[2]
        if list(root.glob("checkpoints/*/checksums-*")) == list(root.glob("checkpoints/[24]/checksums-00000.json")):
            assert any(same(got, want) for want in wanted.values())


@settings(max_examples=max(settings().max_examples // 5, 8))
@given(CHANGES)
@example([("checkpoints/9", None), ("checkpoints/9/params", None)])
@example([("lock.json", b"\xff\x00"), ("tensorboard", b"")])
def test_a_run_ends_with_the_same_weights_or_one_line(changes):
    """From step 4, from step 2, or from the beginning: all give the same, bit for bit."""
    with damaged(changes) as root:
        unchecked = len(list(root.glob("checkpoints/*/checksums-00000.json"))) < 2
        try:
            assert run(root)["step"] == 4
        except UserError as fault:
            one_line(fault)
            assert not (root / locks.FILE).is_file() or "lock" in str(changes)
            return
        got = trees.flatten(orbax_io.restore_params(root / "checkpoints" / "4"))
        assert unchecked or same(got, made()[2][4])


@given(
    st.lists(
        st.one_of(
            st.sampled_from([b'{"step": 1, "loss": 2.0}', b'{"step": 2}', b"", b"{", b"\0", b"null"]),
            st.binary(max_size=20),
        ),
        max_size=4,
    ).map(b"\n".join)
)
def test_metrics_give_lines_or_the_number_of_a_line(content):
    with tempfile.TemporaryDirectory() as folder:
        path = files.to_path(folder) / "metrics.jsonl"
        path.write_bytes(content)
        try:
            lines = metrics_log.read_lines(path)
        except UserError as fault:
            one_line(fault)
            assert "metrics.jsonl:" in str(fault)
            return
        assert all(type(line["step"]) is int for line in lines)


@given(mutated(json.loads(locks.Holder("a", processes.this(), 1e9).content())))
def test_a_lock_of_any_content_is_judged(row):
    """It is no lock, or its holder is alive, dead or elsewhere; nothing else comes of it."""
    holder = locks.Holder.parse(json.dumps(row).encode("utf-8", "surrogateescape"))
    if holder is not None:
        assert holder.process.is_dead() in (True, False) and holder.process.pid > 0
        assert locks.Holder.parse(holder.content()) is not None
