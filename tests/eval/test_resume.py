"""A stopped evaluation goes on where it was, and ends with the scores of one that was not."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest

from argenseg_jax import distributed
from argenseg_jax.data.synthetic.shapes import ShapesSource
from argenseg_jax.eval.evaluator import Evaluator
from argenseg_jax.eval.resume import Partial

KILLED = textwrap.dedent("""
    import os, signal, sys, types
    from argenseg_jax.data.synthetic.shapes import ShapesSource
    from argenseg_jax.eval.evaluator import Evaluator
    from argenseg_jax.eval.resume import Partial
    calls = []
    def predict(requests):
        calls.append(requests)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return [types.SimpleNamespace(masks=[r.image[..., 0] > 120], text="Sure.", scales=[]) for r in requests]
    Evaluator(predict, batch=3).run(ShapesSource("full", "test", 20), partial=Partial(sys.argv[1], {"k": 1}, 0))
""")


class Counting:
    """A predictor whose answer is a function of the image, and that counts what it was asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self, requests):
        self.asked += len(requests)
        return [types.SimpleNamespace(masks=[r.image[..., 0] > 120], text="Sure.", scales=[]) for r in requests]


def run(predict, folder=None, key=1, batch=3, limit=0):
    partial = Partial(folder, {"k": key}, 0) if folder else None
    return Evaluator(predict, batch=batch).run(ShapesSource("full", "test", 20), limit, partial)


def same(one, other):
    assert [r.to_dict() for r in one.records] == [r.to_dict() for r in other.records]
    a, b = ({k: v for k, v in e.scores.items() if k != "seconds_per_image"} for e in (one, other))
    assert a == b and a["baseline_gIoU"] > 0


def test_a_killed_evaluation_resumes(tmp_path):
    folder = tmp_path / "partial"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)],
        capture_output=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert sorted(p.name for p in folder.glob("*.jsonl")) == ["0.jsonl", "3.jsonl", "6.jsonl"]
    predict = Counting()
    got = run(predict, folder, batch=4)  # in other batches, too
    assert predict.asked == 11
    same(got, run(Counting()))
    assert run(again := Counting(), folder).scores["seconds_per_image"] is None and again.asked == 0


def test_rows_of_another_evaluation_are_not_used(tmp_path):
    run(Counting(), tmp_path / "p", limit=6)
    other = Counting()
    run(other, tmp_path / "p", key=2)
    assert other.asked == 20
    heads = [json.loads(p.read_text().split("\n")[0]) for p in (tmp_path / "p").glob("*.jsonl")]
    assert len(heads) == 7 and all(head == {"k": 2} for head in heads)


def test_other_processes_take_over_what_was_done(tmp_path, monkeypatch):
    """Two processes stop, each with some answers; three go on with the rest, each with its share."""
    folder, whole = tmp_path / "p", run(Counting())
    for index in (0, 1):  # as if after four answers each
        partial = Partial(folder, {"k": 1}, 0)
        partial.open()
        partial.add([whole.records[k].to_dict() for k in range(index, 8, 2)])
    monkeypatch.setattr(distributed, "share", lambda count: range(0, count, 3))
    predict = Counting()
    run(predict, folder)
    assert predict.asked == 4  # every third of the twelve that are left
    Partial(folder, {}).remove()
    assert not folder.exists()


def test_answers_to_samples_that_have_changed_are_not_used(tmp_path):
    """A file of the data was replaced while the evaluation was stopped: its sample is asked again, twice over."""
    source = [ShapesSource("full", "test", 8)[i] for i in range(8)]
    whole = Evaluator(Counting(), batch=2).run(source, partial=Partial(tmp_path / "p", {}, 0))
    for changed in (source[4], source[3]):
        source[5] = changed
        predict = Counting()
        got = Evaluator(predict, batch=2).run(source, partial=Partial(tmp_path / "p", {}, 0))
        assert predict.asked == 1 and len(got.records) == 8
        assert got.records[5].question == Evaluator(Counting()).run([changed]).records[0].question
        assert [r.to_dict() for r in got.records][:5] == [r.to_dict() for r in whole.records][:5]
    longer = [*source, *source[:2]]
    Evaluator(predict := Counting(), batch=2).run(longer, partial=Partial(tmp_path / "p", {}, 0))
    assert predict.asked == 2  # data that grew: what was there counts


@pytest.mark.parametrize("every, files", [(0, 2), (3600, 0)])
def test_answers_are_written_when_it_is_time(tmp_path, every, files):
    partial = Partial(tmp_path / "p", {}, every)
    assert not list(partial.open()) and not (tmp_path / "p").exists()
    partial.add([{"index": 3}])
    partial.add([{"index": 4}, {"index": 5}])
    assert len(list((tmp_path / "p").glob("*.jsonl"))) == files


def test_rows_survive_json():
    record = run(Counting(), limit=3).records[2]
    assert type(record).from_dict(json.loads(json.dumps(record.to_dict()))).to_dict() == record.to_dict()
    assert np.isfinite(record.iou)
