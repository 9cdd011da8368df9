"""One training step: gradients over microbatches, update, overrides; the same for every task.

Axes: A microbatches, b rows of a microbatch, B = A * b rows of the batch.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from argenseg_jax import sharding, trees
from argenseg_jax.train.state import Batch, Params, Task, TrainState

StepFn = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def init_state(params: Params, tx: optax.GradientTransformation, trainable: Callable[[str], bool],
               step: jax.Array | int = 0, ema: float = 0.0) -> TrainState:
    """State at the start of a phase; also under `jax.eval_shape`."""
    trained, _ = trees.split(params, trainable)
    return TrainState(step=jnp.asarray(step, jnp.int32), skipped=jnp.zeros((), jnp.int32),
                      params=params, opt_state=tx.init(trained),
                      ema=jax.tree.map(jnp.copy, trained) if ema else {})


def state_shardings(shapes: TrainState, mesh: jax.sharding.Mesh,
                    rules: tuple = sharding.PARAM_RULES) -> TrainState:
    """Tree of NamedSharding for a whole TrainState: moments lie where their parameters lie."""
    params = sharding.shardings(shapes.params, mesh, rules)
    flat = trees.flatten(params)
    sizes = {path: leaf.shape for path, leaf in trees.flatten(shapes.params).items()}

    def place(path: tuple, leaf: Any) -> jax.sharding.NamedSharding:
        names = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
        for i in range(len(names)):  # .../adam/llm/norm/scale -> llm/norm/scale
            name = "/".join(names[i:])
            if sizes.get(name) == leaf.shape:
                return flat[name]
        return sharding.replicated(mesh)

    others = jax.tree_util.tree_map_with_path(place, shapes.replace(params={}))
    return others.replace(params=params)


def make_train_step(task: Task, tx: optax.GradientTransformation, trainable: Callable[[str], bool],
                    *, seed: int, microbatches: int = 1, ema: float = 0.0) -> StepFn:
    """The function (state, batch) -> (state, metrics), to be jitted with the state donated.

    Gradients are those of the whole batch, whatever the number of microbatches: the loss parts are
    divided by counts over the whole batch, then summed. Where the loss or the gradient is not
    finite, parameters and optimizer stay as they were and `skipped` counts one. Frozen parameters
    are neither differentiated nor touched. The rng depends on seed, step and microbatch only.
    """
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        trained, rest = trees.split(state.params, trainable)
        norm = task.normalizer(batch)
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_fn(trained: Params, overrides: Params, rows: Batch, key: jax.Array):
            params = trees.merge(trained, trees.replace(rest, overrides))
            return task.loss(params, rows, key, norm)

        def part(overrides: Params, rows: Batch, index: jax.Array):
            """One microbatch: ({loss, metrics, grads} to be summed, overrides for the next)."""
            (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                trained, overrides, rows, jax.random.fold_in(key, index))
            return {"loss": loss, "metrics": aux.metrics, "grads": grads}, aux.overrides

        if microbatches == 1:
            total, overrides = part({}, batch, jnp.zeros((), jnp.int32))
        else:
            total, overrides = _accumulate(part, rest, batch, microbatches)

        grads, norm_of_grads = total["grads"], optax.global_norm(total["grads"])
        ok = jnp.isfinite(total["loss"]) & jnp.isfinite(norm_of_grads)
        updates, opt_state = tx.update(grads, state.opt_state, trained)
        new = optax.apply_updates(trained, updates)
        keep = lambda after, before: jax.tree.map(lambda a, b: jnp.where(ok, a, b), after, before)
        overridden = {n: trees.flatten(rest)[n] for n in overrides}
        new = keep(new, trained)
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + (1 - ok.astype(jnp.int32)),
            params=trees.merge(new, trees.replace(rest, keep(overrides, overridden))),
            opt_state=keep(opt_state, state.opt_state),
            ema=jax.tree.map(lambda m, p: m + (1 - ema) * (p - m), state.ema, new) if ema else {})
        return state, {"loss": total["loss"], "grad_norm": norm_of_grads, **total["metrics"]}

    return step


def _accumulate(part: Callable, rest: Params, batch: Batch, count: int) -> tuple[Any, Params]:
    """Sum of `part` over `count` microbatches; overrides pass from each one to the next."""
    def rows(x: jax.Array) -> jax.Array:
        # Strided, so that every device keeps its own rows: [B, ...] -> [b, A, ...] -> [A, b, ...].
        x = jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
        return sharding.constrain(x, None, "act_batch", *(None,) * (x.ndim - 2))

    split = jax.tree.map(rows, batch)
    first = jax.tree.map(lambda x: x[0], split)
    shapes, names = jax.eval_shape(part, {}, first, jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    held = {name: trees.flatten(rest)[name] for name in names}

    def body(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        total, overrides = carry
        more, overrides = part(overrides, *xs)
        return (jax.tree.map(jnp.add, total, more), overrides), None

    (total, overrides), _ = jax.lax.scan(body, (zeros, held), (split, jnp.arange(count)))
    return total, overrides
