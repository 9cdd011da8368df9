"""What the loop and the step pass to each other: TrainState, and Phase, one stretch of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh

from argenseg_jax.train.losses import Task

Params = dict[str, Any]
Batch = Mapping[str, Any]  # every array has the rows of the batch first


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes; a checkpoint holds it whole.

    Attributes:
      step: int32[], updates tried so far, over all phases.
      skipped: int32[], how many of this phase's were left out because they were not finite.
      params: nested dict, f32; trained and frozen ones.
      opt_state: of the trained params only.
      ema: moving average of the trained params; empty where optim.ema is 0.
      extra: the task's own state, or None.
    """

    step: jax.Array
    skipped: jax.Array
    params: Params
    opt_state: Any
    ema: Params
    extra: Any = None


@dataclasses.dataclass(frozen=True)
class Phase:
    """One task of a run, with its length, batches and optimizer section.

    Attributes:
      steps: number of updates.
      global_batch, microbatch: rows per update and per forward pass, over all devices (microbatch
        0 = global_batch).
      optim: keys of configs/common.py `optimizer`.
      data: mesh -> endless iterator of this process's rows of the batches (dicts of numpy arrays,
        see sharding.local_rows), with get_state() -> JSON-able dict of what this process knows, and
        set_state() of the union of all processes' dicts. None in a phase that is only compiled.
      samples: params -> {name: u8[H, W, 3]}, pictures for people; None draws nothing.
      flops: (shapes of all parameters, path -> trained?) -> operations of one step over all
        devices, for the utilisation; None where nobody counted.
    """

    task: Task
    steps: int
    global_batch: int
    microbatch: int
    optim: Mapping[str, Any]
    data: Callable[[Mesh], Iterator[Batch]] | None
    samples: Callable[[Params], dict[str, np.ndarray]] | None = None
    flops: Callable[[Params, Callable[[str], bool]], float] | None = None
