"""Optimizers by path regex: AdamW, Adafactor or Muon, schedules, clipping, weight decay, groups, freezing.

Every choice is made by the parameter's path ('llm/layers/attn/q/kernel'); the keys of a config section
are those of configs/common.py `optimizer`. Frozen parameters never reach these transformations: the
step splits them off first, so they have no state and no gradient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from argenseg_jax import trees
from argenseg_jax.errors import UserError

Schedule = Callable[[Any], Any]
_DECAYED = (r".*/kernel", r".*/embedding")
_MAX_REPORTED = 3


def steps_of(amount: float, steps: int) -> int:
    """A duration of a config: below 1 a fraction of `steps`, otherwise a number of steps."""
    return round(amount * steps) if amount < 1 else int(amount)


def schedule(cfg: Mapping[str, Any], steps: int) -> Schedule:
    """Learning rate at each of the `steps` updates (counted from 0), after a linear warm-up."""
    warmup = steps_of(cfg["warmup"], steps)
    rest, last = max(steps - warmup, 1), cfg["lr"] * cfg["final"]
    if cfg["schedule"] == "cosine":
        body = optax.cosine_decay_schedule(cfg["lr"], rest, cfg["final"])
    elif cfg["schedule"] == "constant":
        body = optax.constant_schedule(cfg["lr"])
    elif cfg["schedule"] == "wsd":
        decay = max(min(steps_of(cfg["decay"], steps), rest), 1)
        body = optax.linear_schedule(cfg["lr"], last, decay, rest - decay)
    else:
        raise UserError(f"optim.schedule='{cfg['schedule']}'; there are cosine, constant, wsd")
    rising = lambda t: cfg["lr"] * (t + 1) / (warmup + 1)  # not 0 in the first update
    return optax.join_schedules([rising, body], [warmup])


def trainable(shapes: Mapping[str, Any], freeze: Sequence[str], frozen: Sequence[str] = ()) -> Callable[[str], bool]:
    """Predicate on paths: neither frozen by the config nor `frozen` by the task.

    Raises UserError for a `freeze` pattern that matches no parameter, or if nothing is left.
    """
    paths = list(trees.flatten(shapes))
    unmatched = [p for p in freeze if not any(re.fullmatch(p, path) for path in paths)]
    if unmatched:
        raise UserError(f"optim.freeze: '{unmatched[0]}' matches no parameter (paths look like '{paths[0]}')")
    patterns = (*freeze, *frozen)
    if all(trees.match(patterns, path) for path in paths):
        raise UserError("optim.freeze leaves no parameter to train")
    return lambda path: not trees.match(patterns, path)


def multipliers(params: Mapping[str, Any], groups: Sequence[tuple[str, float]]) -> dict[str, float]:
    """{path: learning-rate multiplier} by the first matching group; UserError if a path has no group."""
    paths = list(trees.flatten(params))
    found = {path: next(m for p, m in groups if re.fullmatch(p, path)) for path in paths if _grouped(groups, path)}
    ungrouped = [path for path in paths if path not in found]
    if ungrouped:
        raise UserError(
            f"optim.groups does not cover {', '.join(ungrouped[:_MAX_REPORTED])}"
            f"{' ...' if len(ungrouped) > _MAX_REPORTED else ''}; end with ('.*', 1.0)"
        )
    return found


def _grouped(groups: Sequence[tuple[str, float]], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern, _ in groups)


def build(cfg: Mapping[str, Any], steps: int, params: Mapping[str, Any]) -> optax.GradientTransformation:
    """The optimizer of one phase.

    Args:
      cfg: a section with the keys of configs/common.py `optimizer`.
      steps: length of the phase, for the schedule.
      params: the trainable parameters (or their shapes), nested dict.

    Returns:
      A transformation of trees shaped like `params`: clip, precondition, decay, learning rate.
    """
    factors = multipliers(params, cfg["groups"])
    adam = optax.scale_by_adam(cfg["b1"], cfg["b2"], cfg["eps"])
    if cfg["name"] == "muon":
        is_matrix = lambda path: trees.match(cfg["matrices"], path)
        precondition = optax.partition(
            {"muon": scale_by_muon(cfg["momentum"]), "adam": adam},
            trees.map_named(lambda path, _: "muon" if is_matrix(path) else "adam", params),
        )
        ratio = cfg["adam_lr"] / cfg["lr"] if cfg["adam_lr"] else 1.0
        factors = {path: m if is_matrix(path) else m * ratio for path, m in factors.items()}
    elif cfg["name"] == "adamw":
        precondition = adam
    elif cfg["name"] == "adafactor":
        # Shazeer and Stern, 2018, without momentum: one number per row and per column of a matrix.
        precondition = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    else:
        raise UserError(f"optim.name='{cfg['name']}'; there are adamw, adafactor, muon")
    decayed = trees.map_named(lambda path, _: trees.match(_DECAYED, path), params)
    return optax.chain(
        optax.clip_by_global_norm(cfg["clip"]) if cfg["clip"] else optax.identity(),
        precondition,
        optax.add_decayed_weights(cfg["weight_decay"], decayed),
        optax.stateless(lambda updates, _: trees.map_named(lambda path, u: u * factors[path], updates)),
        optax.scale_by_learning_rate(schedule(cfg, steps)),
    )


def matrix_axes(path: str, rank: int) -> MuonDimensionNumbers:
    """Which axes of a kernel are its inputs and outputs; the layer axis is neither.

    q, k, v are [L, D, H, N]: one D x HN matrix per layer; o is [L, H, N, D]: one HN x D matrix.
    """
    first = 1 if "/layers/" in path else 0
    if re.search(r"/attn/[qkv]/kernel$", path):
        return MuonDimensionNumbers(first, (first + 1, first + 2))
    if path.endswith("/attn/o/kernel"):
        return MuonDimensionNumbers((first, first + 1), first + 2)
    if rank != first + 2:
        raise UserError(f"optim.matrices: '{path}' has rank {rank}; Muon takes matrices only")
    return MuonDimensionNumbers(first, first + 1)


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Muon per layer matrix, times sqrt(max(1, outputs / inputs)) (Jordan et al., 2024)."""

    def axes(tree: Any) -> Any:
        # optax.partition has replaced the leaves of the other group by empty nodes; they stay.
        return jax.tree_util.tree_map_with_path(
            lambda path, x: matrix_axes("/".join(str(k.key) for k in path), x.ndim), tree
        )

    def by_shape(update: jax.Array, dims: MuonDimensionNumbers) -> jax.Array:
        inputs, outputs = (math.prod(update.shape[a] for a in np.atleast_1d(d)) for d in dims)
        return update * math.sqrt(max(1.0, outputs / inputs))

    return optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=axes),
        optax.stateless(lambda updates, _: jax.tree.map(by_shape, updates, axes(updates))),
    )
