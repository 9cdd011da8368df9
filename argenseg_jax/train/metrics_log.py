"""Writes a run's metrics: metrics.jsonl, TensorBoard, a progress bar on stderr, sample images."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from argenseg_jax import files
from argenseg_jax.errors import UserError
from argenseg_jax.eval.visualize import encode_png

METRICS = "metrics.jsonl"


class MetricsLog:
    """One line of JSON per logging interval, and the same values in TensorBoard."""

    def __init__(self, workdir: epath.Path, step: int, total: int, *, active: bool = True):
        """Opens the run's files at `step`; lines of later steps, written before a crash, are removed.

        Of several processes only the `active` one writes and shows anything.
        """
        self._path = workdir / METRICS
        self._lines = [line for line in read_lines(self._path) if line["step"] <= step]
        self._active = active
        self._remote = files.is_remote(workdir)  # buckets cannot append
        self._board = None
        if active:
            self._rewrite()
            if not self._remote:
                with files.writing(workdir / "tensorboard"):
                    self._board = SummaryWriter(os.fspath(workdir / "tensorboard"), purge_step=step + 1)
        self._bar: tqdm | None = None  # created by the first step, so that an early error is the only output
        self._new_bar = lambda: tqdm(
            total=total,
            initial=step,
            file=sys.stderr,
            dynamic_ncols=True,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 30,
            disable=not active,
        )

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Appends a line; values that are not finite become null."""
        line = {"step": step, **{k: _finite(v) for k, v in numbers.items()}}
        self._lines.append(line)
        if not self._active:
            return
        if self._remote:
            self._rewrite()
        else:
            with files.writing(self._path), open(self._path, "a") as f:
                f.write(json.dumps(line) + "\n")
            with files.writing(self._path.parent / "tensorboard"):
                for name, value in line.items():
                    if isinstance(value, (int, float)) and name != "step":
                        self._board.add_scalar(name, value, step)
        shown = {k: f"{v:.4f}" for k, v in line.items() if k.endswith("loss") and v is not None}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)

    def advance(self) -> None:
        """Advances the progress bar by one step."""
        if self._bar is None:
            self._bar = self._new_bar()
        self._bar.update()

    def message(self, text: str) -> None:
        """Prints a line on stderr, above the progress bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)

    def last(self) -> dict[str, Any]:
        """The newest line, or {}."""
        return self._lines[-1] if self._lines else {}

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            with files.writing(self._path.parent / "tensorboard"):
                self._board.close()

    def _rewrite(self) -> None:
        files.write(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))


class Interval:
    """Means over the steps since the last line; arrays are fetched from the devices only at its end."""

    def __init__(self):
        self._steps: list[Mapping[str, Any]] = []
        self._before = 0.0  # seconds of the steps before the run was resumed
        self._begin = time.perf_counter()
        self._waited = self._tokens = self._samples = self._positions = 0.0

    def begin(self) -> None:
        """Starts the clock."""
        self._begin = time.perf_counter()

    def get_state(self, get: Callable[[Any], Any]) -> dict[str, Any]:
        """What is not logged yet, JSON-able and exact; `get` fetches arrays to the host."""
        steps = [{k: _finite(float(v)) for k, v in step.items()} for step in get(self._steps)]
        return {
            "steps": steps,
            "seconds": self._before + time.perf_counter() - self._begin,
            "waited": self._waited,
            "tokens": float(self._tokens),
            "samples": float(self._samples),
            "places": float(self._positions),
        }

    def set_state(self, state: Mapping[str, Any] | None) -> None:
        """Restores the result of `get_state`; None, of an older version, starts a new interval."""
        if state is None:
            return
        self._steps = [
            {str(k): math.nan if v is None else float(v) for k, v in step.items()} for step in state["steps"]
        ]
        self._before, self._waited, self._tokens, self._samples, self._positions = (
            float(state[key]) for key in ("seconds", "waited", "tokens", "samples", "places")
        )

    def next(self, data: Iterator[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """The next batch; records the time it took, its samples, and its tokens without padding."""
        begin = time.perf_counter()
        batch = next(data)
        self._waited += time.perf_counter() - begin
        if "segment_ids" in batch:
            segments = batch["segment_ids"]
            self._tokens += np.count_nonzero(segments)
            self._samples += segments.max(axis=1).sum()
            self._positions += segments.size
        return batch

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Adds one step's metrics, as arrays on the device."""
        self._steps.append(metrics)

    def mean(self, get: Callable[[Any], Any]) -> dict[str, float]:
        """Means over the finite values, seconds_per_step, and of this process tokens_per_second,
        samples_per_second, padding (fraction of the positions) and data_wait (fraction of the time); `get`
        fetches arrays to the host."""
        steps, self._steps = get(self._steps), []
        now = time.perf_counter()
        elapsed = self._before + now - self._begin
        speeds = {"data_wait": self._waited / elapsed}
        if self._tokens:
            speeds["tokens_per_second"] = self._tokens / elapsed
            speeds["samples_per_second"] = self._samples / elapsed
            speeds["padding"] = 1 - self._tokens / self._positions
        self._before = self._waited = self._tokens = self._samples = self._positions = 0.0
        seconds, self._begin = elapsed / len(steps), now
        values = {k: np.asarray([s[k] for s in steps], np.float64) for k in steps[-1]}
        means = {k: float(v[np.isfinite(v)].mean()) if np.isfinite(v).any() else math.nan for k, v in values.items()}
        return {**means, "seconds_per_step": seconds, **speeds}


def save_images(folder: epath.Path, images: Mapping[str, np.ndarray], step: int) -> None:
    """Writes images u8[h, w, 3] as STEP_NAME.png."""
    for name, image in images.items():
        files.write(folder / f"{step:07d}_{name}.png", encode_png(image))


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, [] without a file; an incomplete last line (after a kill) is left out.

    Raises UserError with the number of a damaged line.
    """
    if not path.exists():
        return []
    lines = []
    texts = files.read_bytes(path).split(b"\n")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = files.parse_json(text, f"{path}:{number}")
            if not isinstance(line, dict) or type(line.get("step")) is not int:
                raise UserError(f"{path}:{number} is not a line of metrics: it has no integer `step`")
        except UserError as fault:
            if number == len(texts):  # incomplete: after a kill, or on a full disk
                break
            raise UserError(f"{fault}; mend or remove the line") from None
        lines.append(line)
    return lines


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
