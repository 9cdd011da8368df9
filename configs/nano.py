"""The demo's model: `shapes` simple, from scratch on two CPU cores in about 8 minutes.

  python -m argenseg_jax train --config configs/nano.py --workdir runs/nano

First the mask VQ-VAE, then the language model, in one run. The words stand before the image tokens
(data.image_last), which a small causal model needs: docs/nano.md.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`devices=N` splits the CPU into N data-parallel devices (default 1, on all cores)."""
    arg = common.parse_arg(arg, devices=1)
    cfg = common.base()
    cfg.model.update(variant="nano", unroll=True)
    cfg.data.update(
        sources=("shapes:simple:train",),
        max_tokens=158,
        max_labels=75,
        image_last=True,
        system="",
        recolour=0.5,
        threads=0,
    )
    cfg.vqvae.update(steps=1100, batch=16, lr=0.01, b2=0.98, weight_decay=0.01)
    cfg.optim.update(
        name="muon", lr=0.01, adam_lr=3e-3, freeze=(), weight_decay=0.01, warmup=0.02, schedule="wsd", decay=0.3
    )
    cfg.train.update(steps=2050, global_batch=16, remat="none", dtype="float32", log_every=50, checkpoint_every=1000)
    cfg.mesh.data = arg.devices
    return cfg
