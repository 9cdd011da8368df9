"""The shipped nano model: `shapes` full, from scratch; about an hour on two CPU cores.

  python -m argenseg_jax train --config configs/nano_pretrain.py --workdir runs/nano_pretrain

What was tried on the way, and what each change brought: docs/nano.md.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, nano


def get_config(arg: str | None = None) -> ConfigDict:
    """`devices=N` splits the CPU into N data-parallel devices (default 2)."""
    arg = common.parse_arg(arg, devices=2)
    cfg = nano.get_config(f"devices={arg.devices}")
    cfg.model.update(vqvae=dict(patch_nums=(1, 8, 8), ch=64, z_channels=32))
    cfg.data.update(sources=("shapes:full:train",), max_tokens=232, max_labels=139, recolour=1.0)
    cfg.vqvae.update(steps=9000, batch=8, lr=0.008)
    cfg.optim.update(schedule="cosine", warmup=0.05)
    cfg.train.update(steps=4800, global_batch=32, checkpoint_every=500, log_every=100)
    return cfg
