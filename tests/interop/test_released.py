"""The released sizes: config.json as published builds the variant, and every real key has its leaf.

Names and shapes are written down from the published models, not taken from the table under test. The
totals are those that the Hub counts in the released safetensors headers, to the digit (InternVL3-8B: in models
fine-tuned from it; InternVL3-14B: 15.1 B and 30.2 GB are printed, the digits follow from Qwen2.5-14B's).
"""

import math

import numpy as np
import pytest

from argenseg_jax import trees
from argenseg_jax.interop import hf_config, hf_folder
from argenseg_jax.interop import state_dict as convert
from argenseg_jax.interop.tensor_files import Lazy, Tensors
from argenseg_jax.models import variants

# Language model: width, layers, heads, key/value heads, MLP width.
QWEN = {
    "1b": (896, 24, 14, 2, 4864),
    "4b": (2048, 36, 16, 2, 11008),
    "38b": (5120, 64, 40, 8, 27648),
    "78b": (8192, 80, 64, 8, 29568),
    "internvl3-1b": (896, 24, 14, 2, 4864),
    "internvl3-2b": (1536, 28, 12, 2, 8960),
    "internvl3-8b": (3584, 28, 28, 4, 18944),
    "internvl3-14b": (5120, 48, 40, 8, 13824),
}
INTERNLM2 = {"2b": (2048, 24, 16, 8, 8192), "8b": (4096, 32, 32, 8, 14336), "26b": (6144, 48, 48, 8, 16384)}
BIG = ("26b", "38b", "78b")  # with InternViT-6B
# Of the safetensors files: parameters, keys, and keys of the `-hf` folder.
CHECKPOINTS = {
    "1b": (938_193_024, 637, 733),
    "2b": (2_205_754_368, 517, 661),
    "4b": (3_712_637_952, 781, 877),
    "8b": (8_075_365_376, 573, 733),
    "26b": (25_514_186_112, 934, 1120),
    "38b": (38_388_164_992, 1366, 1456),
    "78b": (78_408_318_336, 1558, 1648),
    "internvl3-1b": (938_193_024, 637, 733),
    "internvl3-2b": (2_088_957_440, 685, 781),
    "internvl3-8b": (7_944_373_760, 685, 781),
    "internvl3-14b": (15_117_256_704, 925, 1021),
}
LLM_CONFIG = {
    "internlm2": {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": False,
        "vocab_size": 92553,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151674,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "pad_token_id": None,
    },
}
# What single models have of their own. InternVL3 ends its text with <|endoftext|>, its answers not.
OWN = {"26b": {"rope_theta": 50000000, "rope_scaling": {"type": "dynamic", "factor": 2.5}}} | {
    name: {"rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "eos_token_id": 151643}
    for name in QWEN
    if name.startswith("internvl3")
}


def published(name):
    """(config.json, {key: shape}) of a released model; without what only starts a training run."""
    family = "qwen2" if name in QWEN else "internlm2"
    w, depth, n, k, f = {**QWEN, **INTERNLM2}[name]
    h = w // n
    llm = {
        **LLM_CONFIG[family],
        "hidden_size": w,
        "num_hidden_layers": depth,
        "intermediate_size": f,
        "num_attention_heads": n,
        "num_key_value_heads": k,
        **OWN.get(name, {}),
    }
    d, blocks, wide = (3200, 45, 12800) if name in BIG else (1024, 24, 4096)
    big = name in BIG
    vision = {
        "architectures": ["InternVisionModel"],
        "hidden_size": d,
        "num_hidden_layers": blocks,
        "intermediate_size": wide,
        "num_attention_heads": 25 if big else 16,
        "image_size": 448,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
        "qkv_bias": not big,
        "qk_normalization": big,
        "norm_type": "rms_norm" if big else "layer_norm",
    }
    config = {
        "model_type": "internvl_chat",
        "vision_config": vision,
        "llm_config": llm,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "force_image_size": 448,
        "select_layer": -1,
    }

    v = llm["vocab_size"]
    layer = {
        "attn.qkv.weight": (3 * d, d),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "ls1": (d,),
        "ls2": (d,),
        "norm1.weight": (d,),
        "norm2.weight": (d,),
        "mlp.fc1.weight": (wide, d),
        "mlp.fc1.bias": (wide,),
        "mlp.fc2.weight": (d, wide),
        "mlp.fc2.bias": (d,),
    }
    layer |= (
        {"attn.q_norm.weight": (d,), "attn.k_norm.weight": (d,)}
        if big
        else {"attn.qkv.bias": (3 * d,), "norm1.bias": (d,), "norm2.bias": (d,)}
    )
    if family == "internlm2":
        words, head = "tok_embeddings", "output"
        block = {
            "attention.wqkv.weight": ((n + 2 * k) * h, w),
            "attention.wo.weight": (w, n * h),
            "attention_norm.weight": (w,),
            "ffn_norm.weight": (w,),
            "feed_forward.w1.weight": (f, w),
            "feed_forward.w3.weight": (f, w),
            "feed_forward.w2.weight": (w, f),
        }
    else:
        words, head = "embed_tokens", "lm_head"
        block = {
            "self_attn.o_proj.weight": (w, n * h),
            "input_layernorm.weight": (w,),
            "post_attention_layernorm.weight": (w,),
            "mlp.gate_proj.weight": (f, w),
            "mlp.up_proj.weight": (f, w),
            "mlp.down_proj.weight": (w, f),
        }
        for x, heads in (("q", n), ("k", k), ("v", k)):
            block |= {f"self_attn.{x}_proj.weight": (heads * h, w), f"self_attn.{x}_proj.bias": (heads * h,)}
    emb = "vision_model.embeddings"
    shapes = {
        f"{emb}.class_embedding": (1, 1, d),
        f"{emb}.position_embedding": (1, 1025, d),
        f"{emb}.patch_embedding.weight": (d, 3, 14, 14),
        f"{emb}.patch_embedding.bias": (d,),
        "mlp1.0.weight": (4 * d,),
        "mlp1.0.bias": (4 * d,),
        "mlp1.1.weight": (w, 4 * d),
        "mlp1.1.bias": (w,),
        "mlp1.3.weight": (w, w),
        "mlp1.3.bias": (w,),
        f"language_model.model.{words}.weight": (v, w),
        f"language_model.{head}.weight": (v, w),
        "language_model.model.norm.weight": (w,),
    }
    shapes |= {f"vision_model.encoder.layers.{i}.{key}": s for i in range(blocks) for key, s in layer.items()}
    shapes |= {f"language_model.model.layers.{i}.{key}": s for i in range(depth) for key, s in block.items()}
    return config, shapes


@pytest.mark.parametrize("name", [*INTERNLM2, *QWEN])
def test_released_models_fit(name):
    config, keys = published(name)
    parameters, count, hf_count = CHECKPOINTS[name]
    assert (sum(map(math.prod, keys.values())), len(keys)) == (parameters, count)
    model = variants.build(hf_config.model_cfg_from_hf(config))
    assert model == variants.build({"variant": name})

    shapes = dict(hf_folder.param_shapes(model))
    vqvae = {"vqvae": shapes.pop("vqvae")}
    tensors = Tensors({key: Lazy(s, np.dtype("bfloat16"), None) for key, s in keys.items()})
    plan = convert.Import(tensors, shapes, vocab_size=model.vocab.size, optional=("visual/.*",))
    assert plan.total == 2 * parameters

    # And back: the same names, and only the vocabulary has grown.
    flat = {
        f"{part}/{path}": leaf
        for part, tree in {**shapes, **vqvae}.items()
        for path, leaf in trees.flatten(tree).items()
    }
    out, hf = (
        {
            key: lazy.shape
            for key, lazy in convert.export(flat, vocab_size=model.vocab.size, layout=layout).items()
            if not key.startswith(hf_folder.OWN_PARTS)
        }
        for layout in ("official", "hf")
    )
    assert out.keys() == keys.keys() and len(hf) == hf_count
    grown = {key for key in out if out[key] != keys[key]}
    assert len(grown) == 2 and {out[key] for key in grown} == {(model.vocab.size, model.llm.width)}


def test_variants_are_all_here():
    assert {*INTERNLM2, *QWEN, "nano"} == set(variants.VARIANTS)
