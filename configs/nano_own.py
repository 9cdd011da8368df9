"""One's own classes from the shipped nano weights: examples/own_data/README.md walks through it.

  python -m argenseg_jax train --config configs/nano_own.py --workdir runs/mine \
      --config.data.sources='("mine/prepared",)'

First the VQ-VAE sees the masks, then the language model is fine-tuned, with flips, crops and colour
jitter.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, nano_camvid


def get_config(arg: str | None = None) -> ConfigDict:
    """`devices=N` splits the CPU into N data-parallel devices (default 2)."""
    arg = common.parse_arg(arg, devices=2)
    cfg = nano_camvid.get_config(f"devices={arg.devices}")
    cfg.data.update(sources=(), root="")
    cfg.vqvae.update(steps=600)
    cfg.train.update(steps=800, checkpoint_every=200, sample_every=400, log_every=50)
    cfg.eval.prompt = "semantic"
    return cfg
