"""The program of a phase: its jitted step, and the shardings of the step's arguments and results.

train/loop.py runs it; `compile` lowers the same object for a topology that is not attached.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from argenseg_jax import sharding, trees
from argenseg_jax.errors import UserError
from argenseg_jax.train import optim
from argenseg_jax.train import step as step_lib
from argenseg_jax.train.state import Params, Phase, TrainState

_LARGE = 64 << 20  # bytes; less may be replicated without an error
_MAX_REPLICATED = 0.02  # of the trained bytes


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a phase.

    Attributes:
      new_state: jitted, params (donated) -> the first state.
      step: jitted, (state (donated), batch) -> (state, metrics); see step.make_train_step.
      shapes, layout: TrainStates of ShapeDtypeStruct and of NamedSharding.
      schedule: update of the phase, from 0 -> learning rate.
      trainable: path -> whether the optimizer changes the parameter.
      changes: path -> whether the optimizer or the loss changes it; the other parameters are saved once.
      flops: operations of one step over all devices, None if unknown.
      sizes: a text for the log: the trained parameters, and the bytes replicated on every device.
    """

    new_state: Callable[[Params], TrainState]
    step: Callable
    shapes: TrainState
    layout: TrainState
    schedule: Callable[[Any], Any]
    trainable: Callable[[str], bool]
    changes: Callable[[str], bool]
    flops: float | None
    sizes: str

    def abstract_state(self) -> TrainState:
        """The state as ShapeDtypeStructs with their shardings."""
        return sharding.placed(self.shapes, self.layout)


def build(
    cfg: Mapping[str, Any],
    phase: Phase,
    shapes: Params,
    mesh: Mesh,
    rules: Sequence[sharding.Rule] = sharding.PARAM_RULES,
    begin: int = 0,
) -> Program:
    """The program of a phase that starts at step `begin`; nothing runs or compiles yet.

    Args:
      cfg: nested dict; `seed` is read here.
      shapes: of all parameters of the model.

    Raises:
      UserError: sizes that do not match each other or the mesh, or a mistake in the optimizer's section.
    """
    micro = phase.microbatch or phase.global_batch
    if phase.global_batch % micro:
        raise UserError(
            f"{phase.task.name}: the microbatch {micro} does not divide the global batch {phase.global_batch}"
        )
    sharding.check_rows(micro, mesh, f"{phase.task.name}: sequences per forward pass")
    task, ema = phase.task, phase.optim["ema"]
    trainable = optim.trainable(shapes, phase.optim["freeze"], task.frozen)
    trained, _ = trees.split(shapes, trainable)
    schedule = optim.schedule(phase.optim, phase.steps)
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) / 1e6
    replicated = check_replicated(shapes, trainable, mesh, rules)
    sizes = f"{count(trained):.2f} M of {count(shapes):.2f} M parameters" + (
        f", {replicated / 2**20:,.1f} MiB replicated on each of {mesh.size} devices" if mesh.size > 1 else ""
    )
    tx = optim.build(phase.optim, phase.steps, trained)

    def new_state(params: Params) -> TrainState:
        return step_lib.init_state(params, tx, trainable, begin, ema=ema, extra=task.init_extra(params))

    state = jax.eval_shape(new_state, shapes)
    layout = step_lib.state_shardings(state, mesh, rules)
    step = step_lib.make_train_step(
        task, tx, trainable, seed=cfg["seed"], ema=ema, begin=begin, microbatches=phase.global_batch // micro
    )
    return Program(
        new_state=jax.jit(new_state, out_shardings=layout, donate_argnums=0),
        step=jax.jit(step, donate_argnums=0, out_shardings=(layout, None)),
        shapes=state,
        layout=layout,
        schedule=schedule,
        trainable=trainable,
        changes=lambda path: trainable(path) or trees.match(task.overridden, path),
        flops=phase.flops(shapes, trainable) if phase.flops else None,
        sizes=sizes,
    )


def check_replicated(
    shapes: Params, trainable: Callable[[str], bool], mesh: Mesh, rules: Sequence[sharding.Rule]
) -> int:
    """Bytes of the parameters, trained or not, that are replicated on every device of the mesh.

    UserError if those of trained parameters are more than 2 % of the trained bytes although weights are sharded.
    """
    layout = trees.flatten(sharding.shardings(shapes, mesh, rules))
    size = {path: math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in trees.flatten(shapes).items()}
    replicated = {path: size[path] for path, sharding in layout.items() if sharding.is_fully_replicated}
    trained = {path: n for path, n in replicated.items() if trainable(path)}
    limit = _MAX_REPLICATED * sum(n for path, n in size.items() if trainable(path))
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 and sum(trained.values()) > max(limit, _LARGE):
        largest = sorted(trained, key=lambda path: trained[path], reverse=True)[:3]
        raise UserError(
            f"{sum(trained.values()) / 2**20:,.0f} MiB of trained parameters would be replicated on every "
            f"device, more than {_MAX_REPLICATED:.0%} of them: {', '.join(largest)}, ...; give them a "
            "rule in sharding.PARAM_RULES"
        )
    return sum(replicated.values())
