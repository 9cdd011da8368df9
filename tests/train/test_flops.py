"""Operations of a step: against XLA's own count of an unrolled model, and the textbook's 6 N T."""

import jax
import jax.numpy as jnp
import pytest

from argenseg_jax import hardware
from argenseg_jax.interop import hf_folder
from argenseg_jax.models import variants
from argenseg_jax.train import flops
from tests.cli import tiny_config


def test_peaks_take_the_longest_name():
    assert hardware.peak("TPU v5 lite") == 197e12 and hardware.peak("TPU v5") == hardware.peak("TPU v5p") == 459e12
    assert hardware.peak("NVIDIA H200") == 989e12 and hardware.peak("cpu") is None


def test_the_8b_costs_six_operations_a_parameter_and_token():
    model = variants.build({"variant": "8b"})
    shapes = hf_folder.param_shapes(model)
    frozen = lambda path: not path.startswith(("vision", "vqvae"))
    parts = flops.lm_step(model, shapes, frozen, batch=1, length=2048, tiles=1, masks=1)
    linear = 7.74e9 - model.llm.padded_vocab_size * 4096  # InternLM2.5-7B without the look-up
    attention = 3 * 2 * 32 * 2048**2 * 4096
    assert parts["llm"] == pytest.approx(6 * linear * 2048 + attention, rel=0.01)
    assert parts["vision"] == pytest.approx(2 * 302e6 * 1025 + 4 * 24 * 1025**2 * 1024, rel=0.02)
    trained = flops.lm_step(model, shapes, lambda path: True, batch=2, length=2048, tiles=1, masks=1)
    assert trained["vision"] == 3 * 2 * parts["vision"] and trained["llm"] == 2 * parts["llm"]


@pytest.mark.parametrize("part", ["vision", "vqvae", "llm"])
def test_forward_passes_against_xla(part):
    """XLA counts additions, norms and the masked half of the attention too."""
    cfg = tiny_config.get_config().model.to_dict() | {"unroll": True}
    cfg["vqvae"] = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, using_mid_sa=True, local=False)
    cfg["llm"] = dict(width=128, depth=2, heads=4, kv_heads=2, head_dim=32, mlp=256)
    cfg["vision"] = dict(width=128, depth=2, heads=4, mlp=256)
    model = variants.build(cfg)
    shapes = hf_folder.param_shapes(model)
    tiles = jnp.zeros((1, 1, model.image_size, model.image_size, 3))
    masks = jnp.zeros((1, 1, model.mask_size, model.mask_size, 3))
    line = jnp.zeros((1, 128), jnp.int32)

    def forward(params):
        run = lambda *args, method: model.apply({"params": params}, *args, method=method)
        if part == "vision":
            return run(tiles, method="encode_images")
        if part == "vqvae":
            return run(masks, method="tokenize")
        return run(run(line, line, line, method="hidden"), method="logits")

    count = jax.jit(forward).lower(shapes).cost_analysis()["flops"]
    parts = flops.lm_step(model, shapes, lambda path: False, batch=1, length=128, tiles=1, masks=1)
    mine = {"vision": parts["vision"] + parts["connector"] / 2, "vqvae": parts["vqvae"], "llm": parts["llm"] / 2}[part]
    assert 0.8 * count < mine < 1.1 * count


def test_the_vqvaes_decoder_against_xla():
    model = variants.build(
        {
            "variant": "nano",
            "vqvae": dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, using_mid_sa=True, local=False, patch_size=1),
        }
    )
    shapes = hf_folder.param_shapes(model)["vqvae"]
    decode = lambda p, f: model.vqvae.apply({"params": p}, f, method="decode")
    side = model.scales.side
    count = jax.jit(decode).lower(shapes, jnp.zeros((1, side, side, model.vqvae.z_channels))).cost_analysis()["flops"]
    assert 0.8 * count < flops.decoder(model, shapes) < 1.1 * count
