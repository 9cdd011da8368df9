"""The types that loop, step and losses share: TrainState, Task and its Aux, and Phase, one part of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh

Params = dict[str, Any]
Batch = Mapping[str, Any]  # the first axis of every array is B, the sequences (or images) of the batch


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and all of it is checkpointed.

    Attributes:
      step: int32[], updates tried so far, over all phases.
      skipped: int32[], updates of this phase that were skipped because they were not finite.
      params: nested dict, f32; trained and frozen ones.
      opt_state: optax state of the trained params only.
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
class Aux:
    """What a loss returns in addition to its value.

    Attributes:
      metrics: scalars whose sum over microbatches is the metric of the batch.
      overrides: {leaf path: array} parameters set after the update (EMA codebook, restarted codes).
      extra: the task's own state after this step (EMA sums), or None.
    """

    metrics: dict[str, jax.Array]
    overrides: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    extra: Any = None


jax.tree_util.register_dataclass(Aux, ["metrics", "overrides", "extra"], [])


@dataclasses.dataclass(frozen=True)
class Task:
    """The objective of a phase.

    Attributes:
      name: 'vqvae' or 'lm'; also the kind of batch it takes.
      frozen: regexes of parameter paths that this task never changes.
      init_extra: params -> the task's own state (None if it has none).
      normalizer: batch, before it is split -> denominators, so that accumulated microbatches give exact means.
      loss: (params, extra, microbatch, rng, norm) -> (loss, Aux).
      overridden: regexes of those `frozen` parameters that the loss sets itself, by Aux.overrides.
    """

    name: str
    frozen: tuple[str, ...]
    init_extra: Callable[[Params], Any]
    normalizer: Callable[[Batch], dict[str, jax.Array]]
    loss: Callable[[Params, Any, Batch, jax.Array, dict[str, jax.Array]], tuple[jax.Array, Aux]]
    overridden: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Phase:
    """One task of a run, with its length, batches and optimizer section.

    Attributes:
      steps: number of updates.
      global_batch, microbatch: sequences per update and per forward pass, over all devices
        (microbatch 0 = global_batch).
      optim: keys of configs/common.py `optimizer`.
      data: mesh -> endless iterator over this process's share of the batches (dicts of numpy arrays,
        see sharding.local_rows), with get_state() -> JSON-able dict of what this process knows, and
        set_state() of the union of all processes' dicts. None in a phase that is only compiled.
      samples: params -> {name: u8[h, w, 3]}, images to look at; None = no images.
      flops: (shapes of all parameters, path -> trained?) -> operations of one step over all
        devices, for the MFU; None if unknown.
    """

    task: Task
    steps: int
    global_batch: int
    microbatch: int
    optim: Mapping[str, Any]
    data: Callable[[Mesh], Iterator[Batch]] | None
    samples: Callable[[Params], dict[str, np.ndarray]] | None = None
    flops: Callable[[Params, Callable[[str], bool]], float] | None = None
