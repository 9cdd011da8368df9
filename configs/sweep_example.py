"""Three learning rates and two seeds of a short nano training, from the shipped weights.

  python -m argenseg_jax sweep --config configs/sweep_example.py --workdir runs/sweep

A point is a set of config keys; whatever it does not name is as in get_config. `metrics` names what
the table and the plot show: numbers of metrics.jsonl, or of `evaluate` with --data.
"""

from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import common, nano_pretrain


def get_config(arg: str | None = None) -> ConfigDict:
    """`devices=N` splits the CPU into N data-parallel devices (default 2)."""
    arg = common.parse_arg(arg, devices=2)
    cfg = nano_pretrain.get_config(f"devices={arg.devices}")
    cfg.init_from = "nano"
    cfg.vqvae.steps = 0
    cfg.train.update(steps=200, log_every=20, checkpoint_every=100)
    cfg.optim.warmup = 20
    return cfg


def sweep(add: Callable[..., None]) -> None:
    """Every learning rate with every seed."""
    for lr in (1e-3, 3e-3, 1e-2):
        for seed in (0, 1):
            add(**{"optim.lr": lr, "seed": seed})


def metrics() -> tuple[str, ...]:
    """The first one is plotted."""
    return ("gen_loss", "text_loss", "code_accuracy")
