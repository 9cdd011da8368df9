"""A model that compiles in seconds, on two CPU devices: `train --config tests/cli/tiny_config.py`."""

from configs import nano


def get_config(arg=None):
    """configs/nano.py at a fraction of its width, for two steps of the lm phase."""
    cfg = nano.get_config("devices=2")
    cfg.model.vision = dict(width=32, depth=1, heads=2, mlp=32)
    cfg.model.llm = dict(width=32, depth=1, heads=2, kv_heads=2, head_dim=16, mlp=32)
    cfg.model.vqvae = dict(ch=32, num_res_blocks=1)
    cfg.vqvae.steps = 0
    # AdamW compiles faster than Muon; a rate that ignores train.steps lets runs share programs.
    cfg.optim.update(name="adamw", schedule="constant", warmup=1)
    cfg.data.max_tokens = 192
    cfg.train.update(steps=2, global_batch=2, log_every=1, checkpoint_every=10, allow_fresh=("vqvae/.*",))
    return cfg
