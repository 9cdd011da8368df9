"""The released sizes: config.json as published builds the variant, and every real key has its leaf.

Names and shapes are written down from the published models, not taken from the table under test.
"""
import math

import numpy as np
import pytest

from argenseg_jax import trees
from argenseg_jax.interop import hf_config, hf_folder
from argenseg_jax.interop import torch as convert
from argenseg_jax.interop.tensor_files import Lazy, Tensors
from argenseg_jax.models import variants

# Language model: width, layers, heads, key/value heads, MLP width; parameters of the whole.
QWEN = {"1b": (896, 24, 14, 2, 4864, 938.2e6), "4b": (2048, 36, 16, 2, 11008, 3.713e9),
        "38b": (5120, 64, 40, 8, 27648, 38.39e9), "78b": (8192, 80, 64, 8, 29568, 78.41e9),
        "internvl3-1b": (896, 24, 14, 2, 4864, 938.2e6),
        "internvl3-2b": (1536, 28, 12, 2, 8960, 2.089e9),
        "internvl3-8b": (3584, 28, 28, 4, 18944, 7.944e9),
        "internvl3-14b": (5120, 48, 40, 8, 13824, 15.12e9)}
INTERNLM2 = {"2b": (2048, 24, 16, 8, 8192, 2.206e9), "8b": (4096, 32, 32, 8, 14336, 8.075e9),
             "26b": (6144, 48, 48, 8, 16384, 25.51e9)}
BIG = ("26b", "38b", "78b")  # with InternViT-6B
LLM_CONFIG = {
    "internlm2": {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False,
                  "vocab_size": 92553, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
                  "rope_scaling": {"type": "dynamic", "factor": 2.0},
                  "max_position_embeddings": 32768, "tie_word_embeddings": False},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151674,
              "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
              "max_position_embeddings": 32768, "tie_word_embeddings": False,
              "use_sliding_window": False},
}


def published(name):
    """(config.json, {key: shape}, parameters) of a released model."""
    family = "qwen2" if name in QWEN else "internlm2"
    w, depth, n, k, f, total = {**QWEN, **INTERNLM2}[name]
    h = w // n
    llm = {**LLM_CONFIG[family], "hidden_size": w, "num_hidden_layers": depth, "intermediate_size": f,
           "num_attention_heads": n, "num_key_value_heads": k}
    if name.startswith("internvl3"):
        llm["rope_scaling"] = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    d, blocks, wide = (3200, 45, 12800) if name in BIG else (1024, 24, 4096)
    big = name in BIG
    vision = {"architectures": ["InternVisionModel"], "hidden_size": d, "num_hidden_layers": blocks,
              "intermediate_size": wide, "num_attention_heads": 25 if big else 16, "image_size": 448,
              "patch_size": 14, "layer_norm_eps": 1e-6, "initializer_factor": 0.1, "qkv_bias": not big,
              "qk_normalization": big, "norm_type": "rms_norm" if big else "layer_norm"}
    config = {"model_type": "internvl_chat", "vision_config": vision, "llm_config": llm,
              "downsample_ratio": 0.5, "ps_version": "v2", "force_image_size": 448, "select_layer": -1}

    v = llm["vocab_size"]
    layer = {"attn.qkv.weight": (3 * d, d), "attn.proj.weight": (d, d), "attn.proj.bias": (d,),
             "ls1": (d,), "ls2": (d,), "norm1.weight": (d,), "norm2.weight": (d,),
             "mlp.fc1.weight": (wide, d), "mlp.fc1.bias": (wide,), "mlp.fc2.weight": (d, wide),
             "mlp.fc2.bias": (d,)}
    layer |= ({"attn.q_norm.weight": (d,), "attn.k_norm.weight": (d,)} if big else
              {"attn.qkv.bias": (3 * d,), "norm1.bias": (d,), "norm2.bias": (d,)})
    if family == "internlm2":
        words, head = "tok_embeddings", "output"
        block = {"attention.wqkv.weight": ((n + 2 * k) * h, w), "attention.wo.weight": (w, n * h),
                 "attention_norm.weight": (w,), "ffn_norm.weight": (w,),
                 "feed_forward.w1.weight": (f, w), "feed_forward.w3.weight": (f, w),
                 "feed_forward.w2.weight": (w, f)}
    else:
        words, head = "embed_tokens", "lm_head"
        block = {"self_attn.o_proj.weight": (w, n * h), "input_layernorm.weight": (w,),
                 "post_attention_layernorm.weight": (w,), "mlp.gate_proj.weight": (f, w),
                 "mlp.up_proj.weight": (f, w), "mlp.down_proj.weight": (w, f)}
        for x, heads in (("q", n), ("k", k), ("v", k)):
            block |= {f"self_attn.{x}_proj.weight": (heads * h, w), f"self_attn.{x}_proj.bias": (heads * h,)}
    emb = "vision_model.embeddings"
    shapes = {f"{emb}.class_embedding": (1, 1, d), f"{emb}.position_embedding": (1, 1025, d),
              f"{emb}.patch_embedding.weight": (d, 3, 14, 14), f"{emb}.patch_embedding.bias": (d,),
              "mlp1.0.weight": (4 * d,), "mlp1.0.bias": (4 * d,), "mlp1.1.weight": (w, 4 * d),
              "mlp1.1.bias": (w,), "mlp1.3.weight": (w, w), "mlp1.3.bias": (w,),
              f"language_model.model.{words}.weight": (v, w), f"language_model.{head}.weight": (v, w),
              "language_model.model.norm.weight": (w,)}
    shapes |= {f"vision_model.encoder.layers.{i}.{key}": s for i in range(blocks) for key, s in layer.items()}
    shapes |= {f"language_model.model.layers.{i}.{key}": s for i in range(depth) for key, s in block.items()}
    return config, shapes, total


@pytest.mark.parametrize("name", [*INTERNLM2, *QWEN])
def test_released_models_fit(name):
    config, keys, total = published(name)
    assert sum(map(math.prod, keys.values())) == pytest.approx(total, rel=1e-3)
    model = variants.build(hf_config.model_cfg_from_hf(config))
    assert model == variants.build({"variant": name})

    shapes = dict(hf_folder.param_shapes(model))
    vqvae = {"vqvae": shapes.pop("vqvae")}
    tensors = Tensors({key: Lazy(s, np.dtype("bfloat16"), None) for key, s in keys.items()})
    plan = convert.Import(tensors, shapes, vocab_size=model.vocab.size, optional=("visual/.*",))
    assert plan.total == 2 * sum(map(math.prod, keys.values()))

    # And back: the same names, and only the vocabulary has grown.
    flat = {f"{part}/{path}": leaf for part, tree in {**shapes, **vqvae}.items()
            for path, leaf in trees.flatten(tree).items()}
    out = {key: lazy.shape for key, lazy in
           convert.export(flat, vocab_size=model.vocab.size).items()
           if not key.startswith(hf_folder.OWN_PARTS)}
    assert out.keys() == keys.keys()
    grown = {key for key in out if out[key] != keys[key]}
    assert len(grown) == 2 and {out[key] for key in grown} == {(model.vocab.size, model.llm.width)}


def test_variants_are_all_here():
    assert {*INTERNLM2, *QWEN, "nano"} == set(variants.VARIANTS)
