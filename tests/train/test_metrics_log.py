"""The numbers of an interval, also of one that a checkpoint cut in two; lines that are damaged."""

import json

import numpy as np
import pytest
from etils import epath

from argenseg_jax.errors import UserError
from argenseg_jax.train import metrics_log


def test_padding_tokens_and_samples(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics_log.time, "perf_counter", lambda: now[0])

    def batches():
        for segments in ([[1, 1, 2, 0], [1, 0, 0, 0]], [[1, 2, 3, 3], [1, 1, 1, 1]]):
            now[0] += 0.5  # to read it
            yield {"segment_ids": np.asarray(segments)}

    interval, data = metrics_log.Interval(), batches()
    for loss in (2.0, np.nan):
        interval.next(data)
        now[0] += 1.5
        interval.add({"loss": loss})
    got = interval.mean(lambda steps: steps)
    assert got == pytest.approx(
        {
            "loss": 2.0,
            "seconds_per_step": 2.0,
            "data_wait": 0.25,
            "padding": 0.25,
            "tokens_per_second": 12 / 4,
            "samples_per_second": 7 / 4,
        }
    )


def test_an_open_interval_comes_back_exactly():
    """Through JSON, in another process: the same means, bit for bit, and the time of both."""
    segments = {"segment_ids": np.asarray([[1, 1, 2, 0], [1, 0, 0, 0]])}
    losses = [np.float32(0.1), np.float32(np.nan), np.float32(1e-30), np.float32(7 / 3)]
    whole, first, second = (metrics_log.Interval() for _ in range(3))
    for interval, part in ((whole, losses), (first, losses[:3])):
        for loss in part:
            interval.next(iter([segments]))
            interval.add({"loss": loss})
    first._begin -= 100.0
    second.set_state(json.loads(json.dumps(first.get_state(lambda steps: steps), allow_nan=False)))
    second.next(iter([segments]))
    second.add({"loss": losses[3]})
    got, want = second.mean(lambda steps: steps), whole.mean(lambda steps: steps)
    assert got["loss"] == want["loss"] and got["padding"] == want["padding"] == 0.5
    assert 25.0 <= got["seconds_per_step"] < 35.0


GOOD = '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize("cut", ['{"step": 2, "lo', "\0\0\0\0", "{", "\udc80"])
def test_a_last_line_that_was_cut_is_left_out_and_rewritten(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((GOOD + "\n" + cut).encode("utf-8", "surrogateescape"))
    assert metrics_log.read_lines(path) == [{"step": 1, "loss": 2.0}]
    with metrics_log.MetricsLog(epath.Path(tmp_path), 5, 9):
        assert path.read_text() == GOOD


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[1]",
        "null",
        '{"loss": 1}',
        '{"step": "2"}',
        '{"step": NaN}',
        "\0\0",
        "\udc80",
        "[" * 5000,
        '{"step": 1' + "0" * 5000 + "}",
    ],
)
def test_a_damaged_line_is_named_by_its_number(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((GOOD + bad + "\n" + GOOD).encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"metrics.jsonl:2.*; mend or remove the line$"):
        metrics_log.read_lines(path)


def test_things_in_the_place_of_files_are_one_line(tmp_path):
    (tmp_path / "a" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tensorboard").write_text("")
    for name, line in (("a", "metrics.jsonl.*[Dd]irectory|folder"), ("b", "tensorboard cannot be written")):
        with pytest.raises(UserError, match=line):
            metrics_log.MetricsLog(epath.Path(tmp_path / name), 0, 9)
