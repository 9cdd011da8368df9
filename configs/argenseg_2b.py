"""Fine-tunes InternVL2.5-2B (InternLM2.5-1.8B) by the paper's recipe.

  python -m argenseg_jax convert --from InternVL2_5-2B --vqvae vae_ch160v4096z32.pth --to runs/start
  python -m argenseg_jax train --config configs/argenseg_2b.py --workdir runs/2b \
      --config.data.sources='("data/meta.json",)'

The recipe is common.paper. No run of this size has been made yet.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`start=PATH` is the converted checkpoint; `variant=NAME` another released size."""
    return common.paper("2b", arg)
