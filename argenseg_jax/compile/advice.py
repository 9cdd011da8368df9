"""Suggests changes to a config whose training step does not fit, with estimates of the memory that each saves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from argenseg_jax import sharding
from argenseg_jax.hardware import GIB
from argenseg_jax.models.argenseg import ARGenSeg


def activations(cfg: Mapping[str, Any], model: ARGenSeg, mesh: Mesh, batch: int, remat: str) -> float:
    """Estimated bytes of activations on one device in the backward pass, for a global batch of `batch`."""
    llm, length = model.llm, cfg["data"]["max_tokens"]
    local = batch / math.prod(mesh.shape[a] for a in sharding.BATCH_AXES)
    item = 2 if cfg["train"]["dtype"] == "bfloat16" else 4
    split = mesh.shape["tensor"]
    residual_stream = length * llm.width * item / split
    inside = length * item * (6 * llm.width + 3 * llm.mlp + 4 * llm.heads * llm.head_dim) / split
    saved = {"full": residual_stream, "dots": residual_stream + inside * 0.6, "none": residual_stream + inside}[remat]
    return local * (llm.depth * saved + 2 * inside + logits(cfg, model, mesh))


def logits(cfg: Mapping[str, Any], model: ARGenSeg, mesh: Mesh, chunk: int | None = None) -> float:
    """Bytes of the logits of one sequence and their gradient, for the positions in memory at a time."""
    chunk = cfg["train"]["loss"]["chunk"] if chunk is None else chunk
    positions = chunk or cfg["data"]["max_labels"] or cfg["data"]["max_tokens"]
    return 2 * 4 * positions * model.llm.padded_vocab_size / mesh.shape["tensor"]


def advise(
    cfg: Mapping[str, Any], model: ARGenSeg, mesh: Mesh, *, need: float, limit: float, moments: float, state: float
) -> list[dict[str, Any]]:
    """Changes by the memory they save, the sufficient ones first: {change, saves_gib, enough}.

    Args:
      need, limit: bytes of one device, as reported by the compiler.
      state: bytes of parameters and optimizer on one device;  moments: of these, AdamW's two moments.
    """
    train, batch = cfg["train"], cfg["train"]["microbatch"] or cfg["train"]["global_batch"]
    ways = math.prod(mesh.shape[a] for a in sharding.BATCH_AXES)
    # The estimate is scaled to the memory that the compiler needs beyond the state.
    used = activations(cfg, model, mesh, batch, train["remat"])
    scale = min(max(need - state, 0) / max(used, 1), 1.0)
    now = used * scale
    found: list[tuple[str, float]] = []

    def propose(change: str, saves: float) -> None:
        if saves > 0.01 * GIB:
            found.append((change, saves))

    smaller = [m for m in range(ways, batch, ways) if train["global_batch"] % m == 0]
    fitting = [m for m in smaller if need - now * (1 - m / batch) <= limit]
    if smaller:
        micro = fitting[-1] if fitting else smaller[0]
        propose(f"--config.train.microbatch={micro}", now * (1 - micro / batch))
    if train["remat"] != "full":
        full = activations(cfg, model, mesh, batch, "full") * scale
        propose("--config.train.remat=full", now - full)
    if mesh.shape["data"] > 1:
        propose(
            f"--config.mesh.data=1 --config.mesh.fsdp={mesh.shape['data'] * mesh.shape['fsdp']}",
            state * (1 - 1 / mesh.shape["data"]),
        )
    if not train["loss"]["chunk"]:
        saved = logits(cfg, model, mesh) - logits(cfg, model, mesh, 256)
        propose("--config.train.loss.chunk=256", saved * batch / ways * scale)
    if cfg["optim"]["name"] == "adamw":
        propose("--config.optim.name=adafactor", moments)
    tensor = 2 * mesh.shape["tensor"]
    if model.llm.kv_heads % tensor == 0 and mesh.shape["fsdp"] % 2 == 0:
        # Twice the batch per data shard, each tensor in two parts: what is not sharded within a layer is halved.
        propose(f"--config.mesh.fsdp={mesh.shape['fsdp'] // 2} --config.mesh.tensor={tensor}", now * 0.1)
    shorter = cfg["data"]["max_tokens"] // 2
    propose(f"--config.data.max_tokens={shorter}", now / 2)
    found.sort(key=lambda item: (need - item[1] > limit, -item[1]))
    return [
        {"change": change, "saves_gib": round(saves / GIB, 2), "enough": need - saves <= limit}
        for change, saves in found
    ]
