"""What the loop, the step and the tasks pass to each other: TrainState, Task, Aux, Phase."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

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
    """

    step: jax.Array
    skipped: jax.Array
    params: Params
    opt_state: Any
    ema: Params


class Aux(NamedTuple):
    """What a loss returns beside its value.

    Attributes:
      metrics: {name: f32[]}. Like the loss, each is this microbatch's part of a mean over the whole
        batch: the parts add up to it.
      overrides: {'a/b/c': array}, parameters set directly after the update, such as a codebook that
        is a moving average. They must be among the task's `held` ones.
    """

    metrics: dict[str, jax.Array]
    overrides: dict[str, jax.Array] = {}


@dataclasses.dataclass(frozen=True)
class Task:
    """A thing to train: initial parameters and a loss.

    Attributes:
      name: of the phase, in logs and checkpoints.
      init: rng -> params; parameters that are there already (from an earlier phase or
        `init_from`) are not drawn again.
      loss: (params, microbatch, rng, norm) -> (f32[], Aux); a part of the whole batch's loss.
      normalizer: batch -> {name: array}, the counts over the whole batch that `loss` divides by.
      held: regexes of params that get no gradient in this task.
      samples: (params, batch) -> {name: u8[H, W, 3]}, pictures for people, or None.
    """

    name: str
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Batch, jax.Array, dict[str, jax.Array]], tuple[jax.Array, Aux]]
    normalizer: Callable[[Batch], dict[str, jax.Array]]
    held: tuple[str, ...] = ()
    samples: Callable[[Params, Batch], dict[str, np.ndarray]] | None = None


@dataclasses.dataclass(frozen=True)
class Phase:
    """A task with its length, batches and optimizer section.

    Attributes:
      steps: number of updates.
      global_batch, microbatch: rows per update and per forward pass, over all devices.
      optim: keys of configs/common.py `optimizer`.
      data: () -> endless iterator of this process's batches (numpy trees), with get_state() ->
        JSON-able or bytes, and set_state().
    """

    task: Task
    steps: int
    global_batch: int
    microbatch: int
    optim: Mapping[str, Any]
    data: Callable[[], Iterator[Batch]]
