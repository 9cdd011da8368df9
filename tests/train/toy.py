"""A small task with every feature that the loop supports: dropout, an overridden codebook, frozen weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from argenseg_jax import sharding
from argenseg_jax.train.state import Aux, Phase, Task
from configs import common

WIDTH, OUT = 8, 4


def init(rng: jax.Array) -> dict[str, Any]:
    """Paths of the real model, so that the real sharding rules apply."""
    a, b, c, d = jax.random.split(rng, 4)
    normal = jax.random.normal
    return {
        "connector": {
            "norm": {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)},
            "fc1": {"kernel": normal(a, (WIDTH, 16)), "bias": jnp.zeros(16)},
            "fc2": {"kernel": normal(b, (16, OUT)), "bias": jnp.zeros(OUT)},
        },
        "visual": {
            "word_embed": {"kernel": normal(c, (WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)},
            "lvl_embed": normal(d, (2, WIDTH)),
            "pos_embed": jnp.zeros((3, WIDTH)),
        },
        "vqvae": {"quantizer": {"codebook": jnp.zeros((5, OUT))}},
    }


def loss(params, extra, batch, rng, norm):
    """Squared error over the examples with weight; `extra` counts them."""
    x = batch["x"] * params["connector"]["norm"]["scale"] + params["connector"]["norm"]["bias"]
    x = x + x @ params["visual"]["word_embed"]["kernel"] * 0.1 + params["visual"]["lvl_embed"][0]
    h = jnp.tanh(x @ params["connector"]["fc1"]["kernel"] + params["connector"]["fc1"]["bias"])
    keep = jax.random.bernoulli(rng, 0.9, h.shape[-1:])
    y = (h * keep) @ params["connector"]["fc2"]["kernel"] + params["connector"]["fc2"]["bias"]
    error = jnp.sum((y - batch["y"]) ** 2, -1) * batch["weight"]
    value = jnp.sum(error) / norm["examples"]
    codebook = params["vqvae"]["quantizer"]["codebook"]
    return value, Aux(
        {"gen_loss": value},
        {"vqvae/quantizer/codebook": codebook + jnp.sum(y)},
        None if extra is None else {"seen": extra["seen"] + jnp.sum(batch["weight"])},
    )


def task(name: str = "lm", frozen: tuple[str, ...] = ("vqvae/.*",), *, dropout: bool = True) -> Task:
    fn = loss if dropout else lambda p, e, b, r, n: loss(p, e, b, jax.random.key(0), n)
    return Task(
        name,
        frozen,
        lambda params: {"seen": jnp.zeros(())},
        lambda batch: {"examples": jnp.maximum(batch["weight"].sum(), 1.0)},
        fn,
        overridden=("vqvae/quantizer/codebook",),
    )


def batch(index: int, size: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(index)
    x = rng.normal(size=(size, WIDTH)).astype(np.float32)
    return {"x": x, "y": np.tanh(x[:, :OUT]) + 1, "weight": (np.arange(size) % 3 > 0).astype(np.float32)}


class Data(Iterator):
    """This process's examples of the batches 0, 1, 2, ...; the state is the index of the next batch."""

    def __init__(self, mesh: Mesh, size: int = 8):
        self.index, self.size, self.slots = 0, size, sharding.local_rows(mesh, size)

    def __next__(self) -> dict[str, np.ndarray]:
        self.index += 1
        return {k: x[self.slots] for k, x in batch(self.index - 1, self.size).items()}

    def get_state(self) -> dict[str, int]:
        return {"index": self.index}

    def set_state(self, state: dict[str, int]) -> None:
        self.index = state["index"]


def config(**train: Any) -> dict[str, Any]:
    """The shared defaults at toy size, on one device."""
    cfg = common.base().to_dict()
    cfg["mesh"]["data"] = 1
    cfg["optim"].update(lr=0.01, warmup=2, freeze=(r"visual/lvl_embed",), ema=0.9)
    cfg["vqvae"].update(lr=0.02, warmup=1)
    cfg["train"] |= dict(steps=6, global_batch=8, checkpoint_every=3, log_every=2) | train
    return cfg


def phases(cfg: dict[str, Any], first: int = 0, data: type = Data) -> list[Phase]:
    """An lm phase, after `first` steps of another one."""
    t = cfg["train"]
    lm = Phase(task(), t["steps"], t["global_batch"], t["microbatch"], cfg["optim"], data)
    if not first:
        return [lm]
    return [Phase(task("vqvae", (r"vqvae/.*", r"visual/.*")), first, 8, 0, cfg["vqvae"], data), lm]
