"""Speeds of an interval: tokens and samples that are no padding, and the wait for them."""
import numpy as np
import pytest

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
    assert got == pytest.approx({"loss": 2.0, "seconds_per_step": 2.0, "data_wait": 0.25, "padding": 0.25,
                                 "tokens_per_second": 12 / 4, "samples_per_second": 7 / 4})
