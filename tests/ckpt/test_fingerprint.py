"""The fingerprint of weights: other weights, another one; the same weights elsewhere, the same."""

import os
import shutil

import numpy as np
import pytest

from argenseg_jax import trees
from argenseg_jax.ckpt import fingerprint as module
from argenseg_jax.ckpt import orbax_io
from argenseg_jax.ckpt.checkpoint import open_checkpoint
from tests import tiny


def of(path):
    return module.fingerprint(open_checkpoint(str(path)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.workdir(tmp_path_factory.mktemp("runs") / "run")


def test_a_retrained_step_of_the_same_number(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    assert of(run) == of(tmp_path / "copy") == of(run / "checkpoints" / "1")
    last = list(trees.flatten(tiny.made()[1]))[-1]
    weights = trees.map_named(lambda name, x: x + np.float32(name == last), tiny.made()[1])
    orbax_io.save_params(str(tmp_path / "copy" / "checkpoints" / "1"), weights, force=True)
    assert of(run) != of(tmp_path / "copy")


def test_a_folder_that_is_overwritten_in_place(run, tmp_path):
    folder = tiny.hf(tmp_path / "hf", run)
    before = of(folder)
    (folder / "README.md").write_text("notes")
    os.utime(folder / "model.safetensors", (1, 1))
    assert of(folder) == before
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert of(folder) != before


def test_large_files_are_sampled(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WHOLE", 1000)
    for folder in (tiny.hf(tmp_path / "hf", run), shutil.copytree(run, tmp_path / "run")):
        before = of(folder)
        assert of(folder) == before
        path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        content, times = bytearray(path.read_bytes()), path.stat()
        content[-5] ^= 1
        path.write_bytes(content)
        changed = of(folder)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert len({before, changed, of(folder)}) == 3  # the time alone shows it, and so do the bytes
