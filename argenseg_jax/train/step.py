"""One training step: gradients over microbatches, update, overrides; the same for every task.

Axes: B sequences of the batch. It is split into A = `microbatches` microbatches of B / A sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from argenseg_jax import sharding, trees
from argenseg_jax.train.state import Batch, Params, Task, TrainState

StepFn = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    trainable: Callable[[str], bool],
    step: jax.Array | int = 0,
    *,
    ema: float = 0.0,
    extra: Any = None,
) -> TrainState:
    """State at the start of a phase; can be traced by `jax.eval_shape`."""
    trained, _ = trees.split(params, trainable)
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(trained),
        ema=jax.tree.map(jnp.copy, trained) if ema else {},
        extra=extra,
    )


def state_shardings(
    shapes: TrainState, mesh: jax.sharding.Mesh, rules: Sequence[sharding.Rule] = sharding.PARAM_RULES
) -> TrainState:
    """Tree of NamedSharding for a TrainState: moments are sharded like their parameters."""
    params = sharding.shardings(shapes.params, mesh, rules)
    flat = trees.flatten(params)
    param_shapes = {path: leaf.shape for path, leaf in trees.flatten(shapes.params).items()}

    def sharding_of(path: tuple, leaf: Any) -> jax.sharding.NamedSharding:
        names = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
        for i in range(len(names)):  # .../adam/llm/norm/scale -> llm/norm/scale
            name = "/".join(names[i:])
            if param_shapes.get(name) == leaf.shape:
                return flat[name]
        return sharding.replicated(mesh)

    others = jax.tree_util.tree_map_with_path(sharding_of, shapes.replace(params={}))
    return others.replace(params=params)


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    trainable: Callable[[str], bool],
    *,
    seed: int,
    microbatches: int = 1,
    ema: float = 0.0,
    begin: int = 0,
) -> StepFn:
    """The function (state, batch) -> (state, metrics), to be jitted with the state donated.

    Gradients are those of the full batch for any number of microbatches: the loss terms are divided
    by counts over the full batch, then summed. If the loss or the gradient is not finite, parameters
    and optimizer are unchanged and `skipped` is increased. Frozen parameters are neither
    differentiated nor updated. The rng depends on seed, step and microbatch only. `begin` is the
    phase's first step: the decay of `ema` grows from there, (1 + t) / (10 + t), so that the initial
    weights have little influence.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        trained, rest = trees.split(state.params, trainable)
        norm = task.normalizer(batch)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), state.step)

        def loss_fn(trained: Params, carry: tuple, microbatch: Batch, key: jax.Array):
            overrides, extra = carry
            params = trees.merge(trained, trees.replace(rest, overrides))
            return task.loss(params, extra, microbatch, key, norm)

        def grad_fn(carry: tuple, microbatch: Batch, index: jax.Array):
            """One microbatch: ({loss, metrics, grads} to be summed, carry for the next one)."""
            (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                trained, carry, microbatch, jax.random.fold_in(key, index)
            )
            sums = {"loss": loss, "metrics": aux.metrics, "grads": grads}
            return sums, (aux.overrides, aux.extra)

        carry = ({}, state.extra)
        if microbatches == 1:
            total, (overrides, extra) = grad_fn(carry, batch, jnp.zeros((), jnp.int32))
        else:
            total, (overrides, extra) = _accumulate(grad_fn, carry, rest, batch, microbatches)

        if unexpected := [name for name in overrides if not trees.match(task.overridden, name)]:
            raise ValueError(
                f"the loss of task '{task.name}' sets {unexpected}, which its `overridden` "
                "does not name: checkpoints would miss the change"
            )
        grads, grad_norm = total["grads"], optax.tree.norm(total["grads"])
        ok = jnp.isfinite(total["loss"]) & jnp.isfinite(grad_norm)  # bool[]
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, trained)
            after = (optax.apply_updates(trained, updates), opt_state, overrides, extra)
        overridden = {name: trees.flatten(rest)[name] for name in overrides}
        before = (trained, state.opt_state, overridden, state.extra)
        new, opt_state, overrides, extra = jax.tree.map(lambda a, b: jnp.where(ok, a, b), after, before)
        t = state.step - begin
        ema_rate = 1 - jnp.minimum(ema, (1 + t) / (10 + t))  # f32[]
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + (1 - ok.astype(jnp.int32)),
            params=trees.merge(new, trees.replace(rest, overrides)),
            opt_state=opt_state,
            ema=jax.tree.map(lambda m, p: m + ema_rate * (p - m), state.ema, new) if ema else {},
            extra=extra,
        )
        return state, {**total["metrics"], "loss": total["loss"], "grad_norm": grad_norm}

    return step


def _accumulate(grad_fn: Callable, carry: tuple, rest: Params, batch: Batch, count: int) -> tuple[Any, tuple]:
    """Sum of `grad_fn` over `count` microbatches; overrides and extra are carried from each to the next."""

    def microbatches(x: jax.Array) -> jax.Array:
        # Strided, so that no sequence moves to another device: [B, ...] -> [B/A, A, ...] -> [A, B/A, ...].
        x = jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
        return sharding.constrain(x, None, "act_batch", *(None,) * (x.ndim - 2))

    split = jax.tree.map(microbatches, batch)
    first = jax.tree.map(lambda x: x[0], split)
    shapes, (names, _) = jax.eval_shape(grad_fn, carry, first, jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    _, extra = carry
    carry = {name: trees.flatten(rest)[name] for name in names}, extra

    def body(sums: tuple, xs: tuple) -> tuple[tuple, None]:
        total, carry = sums
        more, carry = grad_fn(carry, *xs)
        return (jax.tree.map(jnp.add, total, more), carry), None

    (total, carry), _ = jax.lax.scan(body, (zeros, carry), (split, jnp.arange(count)))
    return total, carry
