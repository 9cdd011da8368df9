"""Fine-tunes an 8B model of the InternVL2.5 family by the paper's recipe.

  python -m argenseg_jax convert --from InternVL2_5-8B --vqvae vae_ch160v4096z32.pth --to runs/start
  python -m argenseg_jax train --config configs/internvl_8b.py --workdir runs/8b \
      --config.data.sources='("data/meta.json",)' --config.train.steps=12800

Every weight is sharded over all devices. `common.base` holds the recipe: AdamW, 4e-5, cosine, batch
128, bfloat16; one epoch is (samples / 128) steps. No run of this size has been made yet.
"""
from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`variant=4b` and so on for the other released sizes; `start=` is the converted checkpoint."""
    arg = common.parse_arg(arg, variant="8b", start="runs/start")
    cfg = common.base()
    cfg.model.variant = arg.variant
    cfg.init_from = arg.start
    cfg.mesh.update(data=1, fsdp=-1)
    return cfg
