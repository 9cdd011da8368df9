"""One nano model for every task on the drawn scenes, as the paper makes one: first chat, then all tasks.

  python -m argenseg_jax train --config configs/nano_mix.py:chat --workdir runs/chat
  python -m argenseg_jax train --config configs/nano_mix.py:start=runs/chat --workdir runs/mix

`chat` fine-tunes the shipped weights on questions with answers in words alone. The mixture has referring (with
plurals and no target), point, box and scribble, semantic, lists of instances, pictures of described scenes,
and chat. What came of it: docs/results.md.
"""
from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, nano_pretrain

# Source of drawn samples -> its share. Drawn sources are endless; the number of samples is the share.
SHARES = {
    "shapes:full:train": 0.14,
    "interactive:point-drawn:shapes-object:full:train": 0.12,
    "interactive:box-drawn:shapes-object:full:train": 0.12,
    "interactive:scribble:shapes-object:full:train": 0.08,
    "shapes-semantic:full:train": 0.04,
    "shapes-instances:full:train": 0.07,
    "shapes-draw:full:train": 0.05,
    "shapes-chat:full:train": 0.38,
}
SAMPLES = 10**7  # far more than are trained on
CHAT_STEPS, STEPS = 2200, 1200


def get_config(arg: str | None = None) -> ConfigDict:
    """`start` is the first checkpoint, `chat` trains on chat alone; `devices=N` splits the CPU (default 1)."""
    arg = common.parse_arg(arg, devices=1, chat=False, start="nano")
    cfg = nano_pretrain.get_config(f"devices={arg.devices}")
    cfg.init_from = arg.start
    cfg.vqvae.steps = 0
    cfg.data.update(sources=tuple(f"{name}:{round(share * SAMPLES)}" for name, share in SHARES.items()),
                    max_tokens=240, max_labels=140, recolour=0.5)
    cfg.train.update(steps=STEPS, global_batch=16, checkpoint_every=100, log_every=50)
    cfg.train.loss.text = 4.0
    cfg.optim.update(lr=0.007, adam_lr=2e-3, schedule="wsd", decay=0.4)
    cfg.eval.data = tuple(name.replace(":train", ":test") for name in SHARES)
    if arg.chat:
        name = "shapes-chat:full:train"
        cfg.data.update(sources=(f"{name}:{SAMPLES}",), max_tokens=100, max_labels=8, max_masks=0)
        cfg.train.update(steps=CHAT_STEPS, global_batch=32)
        cfg.optim.lr = 0.01
        cfg.eval.data = (name.replace(":train", ":test"),)
    return cfg
