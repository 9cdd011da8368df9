"""Resumed == uninterrupted, bit for bit, after kill -9 in either phase and while files are written."""

import json
import os
import random
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from argenseg_jax import trees
from argenseg_jax.ckpt import orbax_io
from argenseg_jax.train import loop
from tests.train import toy

TIMES = ("seconds_per_step", "rows_per_second", "data_wait")


def train(workdir):
    cfg = toy.config(steps=10, checkpoint_every=2, log_every=3, microbatch=4)
    return loop.run(cfg, str(workdir), toy.phases(cfg, 3), toy.init, devices=jax.devices()[:1])


def everything(workdir):
    """All arrays of the last checkpoint, and the place in the data."""
    with orbax_io.Checkpointer(str(workdir), read_only=True) as checkpoints:
        step = checkpoints.latest()
        data = checkpoints.meta(step)["data"]
    flat = {"params": orbax_io.restore_params(str(workdir), ema=False), "ema": orbax_io.restore_params(str(workdir))}
    return step, data, trees.flatten(flat), orbax_io.read_train(str(workdir))


def lines(workdir):
    """metrics.jsonl without what takes its time."""
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return train(workdir), workdir


@pytest.mark.slow
@pytest.mark.parametrize("moment, number", [("batch", 2), ("batch", 7), ("save", 8), ("frozen", 4), ("files", None)])
def test_resume_after_kill_is_bit_exact(moment, number, whole, tmp_path):
    number = number or random.randrange(20, 110)
    print("killed at", moment, number)  # pytest shows it where the test fails
    env = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # as conftest.py sets it here
    child = subprocess.run(
        [sys.executable, "-m", "tests.train.resume_child", str(tmp_path), moment, str(number)],
        env=env,
        capture_output=True,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-2000:]
    if moment == "save":
        assert orbax_io.newest_step(tmp_path) == 6
        assert list((tmp_path / "checkpoints").glob("8.*"))
    if moment == "frozen":
        assert orbax_io.newest_step(tmp_path) in (2, 3)  # of step 3 the files may not have come
        assert list((tmp_path / "checkpoints").glob("frozen/4/*tmp*"))
    result = train(tmp_path)
    assert result["step"] == 13
    step, data, params, rest = everything(tmp_path)
    want_step, want_data, want_params, want_rest = everything(whole[1])
    assert (step, data) == (want_step, want_data)
    for path in want_params:
        assert np.asarray(params[path]).tobytes() == np.asarray(want_params[path]).tobytes(), path
    jax.tree.map(np.testing.assert_array_equal, rest, want_rest)
    assert [p.name for p in (tmp_path / "checkpoints" / "frozen").iterdir()] == ["4"]
    assert lines(tmp_path) == lines(whole[1])


@pytest.mark.parametrize("batch", [1, 5, 8])
def test_a_resumed_run_logs_the_same_numbers(whole, tmp_path, batch):
    """Checkpoints come every 2 steps, lines every 3: what was not logged yet is in the checkpoint."""

    class Ending(toy.Data):
        def __next__(self):
            if self.index == batch:
                raise KeyError
            return super().__next__()

    cfg = toy.config(steps=10, checkpoint_every=2, log_every=3, microbatch=4)
    with pytest.raises(KeyError):
        loop.run(cfg, str(tmp_path), toy.phases(cfg, 3, Ending), toy.init, devices=jax.devices()[:1])
    result = train(tmp_path)
    assert lines(tmp_path) == lines(whole[1]) and result["loss"] == whole[0]["loss"]


def test_the_metrics_file_has_no_gap_and_no_double(whole, tmp_path):
    steps = [json.loads(x)["step"] for x in (whole[1] / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 9, 12, 13]
