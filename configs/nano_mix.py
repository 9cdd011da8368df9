"""One nano model for every task on the drawn scenes, from the shipped weights.

  python -m argenseg_jax train --config configs/nano_mix.py --workdir runs/mix
  python -m argenseg_jax evaluate --workdir runs/mix
  python -m argenseg_jax train --config configs/nano_mix.py:chat --workdir runs/chat

Referring (with plurals and no target), point, box and scribble, semantic, lists of instances, pictures of
described scenes, and chat. `chat` is for comparison: as many steps with as many chat samples, and nothing
else. What came of it: docs/results.md.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, nano_pretrain

CHAT = "shapes-chat:full:train"
# Source of drawn samples -> its share. Drawn sources are endless; the number of samples is the share.
SHARES = {
    "shapes:full:train": 0.14,
    "interactive:point-drawn:shapes-object:full:train": 0.12,
    "interactive:box-drawn:shapes-object:full:train": 0.12,
    "interactive:scribble:shapes-object:full:train": 0.08,
    "shapes-semantic:full:train": 0.04,
    "shapes-instances:full:train": 0.07,
    "shapes-draw:full:train": 0.05,
    CHAT: 0.38,
}
SAMPLES = 10**7  # far more than are trained on


def get_config(arg: str | None = None) -> ConfigDict:
    """`chat` trains on chat alone; `devices=N` splits the CPU into N data-parallel devices (default 1)."""
    arg = common.parse_arg(arg, devices=1, chat=False)
    cfg = nano_pretrain.get_config(f"devices={arg.devices}")
    cfg.init_from = "nano"
    cfg.vqvae.steps = 0
    cfg.data.update(
        sources=tuple(f"{name}:{round(share * SAMPLES)}" for name, share in SHARES.items()),
        max_tokens=240,
        max_labels=140,
        recolour=0.5,
    )
    cfg.train.update(steps=6000, global_batch=16, checkpoint_every=250, log_every=50)
    cfg.train.loss.text = 4.0
    cfg.optim.update(lr=0.003, adam_lr=1e-3, schedule="wsd", decay=0.4)
    cfg.eval.data = tuple(name.replace(":train", ":test") for name in SHARES)
    if arg.chat:
        cfg.data.update(sources=(f"{CHAT}:{SAMPLES}",), max_tokens=100, max_labels=8, max_masks=0)
        cfg.train.global_batch = round(SHARES[CHAT] * cfg.train.global_batch)
        cfg.eval.data = (CHAT.replace(":train", ":test"),)
    return cfg
