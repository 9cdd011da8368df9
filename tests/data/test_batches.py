"""Batches: a saved state that is damaged or of another batch is refused; workers end with their parent."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from argenseg_jax.data.nano_tokenizer import nano_tokenizer
from argenseg_jax.data.synthetic import shapes
from argenseg_jax.errors import UserError
from tests.data.test_pipeline import iterate, numbered


@pytest.fixture(scope="module")
def tokenizer():
    return nano_tokenizer(16, shapes.corpus())


@pytest.mark.parametrize(
    "change, line",
    [
        ({"taken": {str(p): 1 for p in range(4)}}, "of 4 sequences per batch, not of the 6 of this run"),
        ({"taken": {str(p): 1 for p in range(12)}}, "of 12 sequences per batch, not of the 6 of this run"),
        ({"taken": None}, "not a state of the data"),
        ({"waiting": []}, "not a state of the data"),
        ({"taken": {str(p): "1" for p in range(6)}}, "slot 0 has an invalid number of samples"),
        ({"waiting": {"1": [7]}}, "slot 1 has pending samples that it has not consumed"),
        ({"broken": {"0": {"a.jsonl:1": -1}}}, "slot 0 has an invalid number of samples"),
    ],
)
def test_a_state_of_another_batch_or_damaged_is_refused(change, line, tokenizer, tmp_path):
    config = {"sources": numbered(tmp_path, [24]), "max_tokens": 64, "system": ""}
    iterator = iterate(config, tokenizer, batch_size=6)
    state = {"taken": {str(p): 1 for p in range(6)}, "waiting": {}, "broken": {}}
    with pytest.raises(UserError, match=f"^the saved iterator state: .*{line}"):
        iterator.set_state(state | change)
    iterator.set_state(state)
    iterator.close()


@pytest.mark.slow
def test_worker_processes_end_with_a_killed_parent(tmp_path):
    """They hold the pipe open for as long as they live."""
    (tmp_path / "parent.py").write_text(
        "import pathlib, sys, time\n"
        "from tests.data import test_pipeline as t\n"
        "if __name__ == '__main__':\n"
        "    sources = t.numbered(pathlib.Path(sys.argv[1]), [24])\n"
        "    config = {'sources': sources, 'max_tokens': 64, 'system': '', 'workers': 2}\n"
        "    next(t.iterate(config, t.nano_tokenizer(16, t.shapes.corpus())))\n"
        "    print('read', flush=True)\n"
        "    time.sleep(60)\n"
    )
    root = str(pathlib.Path(__file__).parent.parent.parent)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
        cwd=root,
    )
    assert parent.stdout.readline() == "read\n"
    parent.kill()
    begin = time.monotonic()
    assert parent.stdout.read() == "" and time.monotonic() - begin < 15
    parent.wait()
