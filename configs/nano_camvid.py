"""Real street photographs (CamVid, 11 classes) from the shipped nano weights, on CPU cores.

  python -m argenseg_jax train --config configs/nano_camvid.py --workdir runs/camvid \
      --config.data.root=PATH/TO/camvid
  python -m argenseg_jax evaluate --workdir runs/camvid --data PATH/TO/camvid/val.jsonl

The folder holds meta_train.json and the official JSONL. First the VQ-VAE learns the masks of
photographs, then the language model is fine-tuned with flips, crops and colour jitter.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, nano_pretrain


def get_config(arg: str | None = None) -> ConfigDict:
    """`devices=N` splits the CPU into N data-parallel devices (default 2)."""
    arg = common.parse_arg(arg, devices=2)
    cfg = nano_pretrain.get_config(f"devices={arg.devices}")
    cfg.init_from = "nano"
    cfg.data.update(sources=("meta_train.json",), root="camvid", augment=True, recolour=0.0)
    cfg.vqvae.update(steps=3000)
    cfg.train.update(steps=3050, checkpoint_every=500, log_every=50)
    cfg.optim.update(lr=0.005, adam_lr=1e-3, schedule="wsd", decay=0.4)
    cfg.eval.prompt = "Segment the {sent} in the image."
    return cfg
