"""config.json of an InternVL-family folder <-> the `model` section of our configuration.

Two layouts: the field names of the official InternVLChatModel, and those of transformers' own
InternVLForConditionalGeneration (the `-hf` folders; `model_type` is `internvl`). What they have no
name for (the VQ-VAE's sizes, the first special id, the nano fields) stands under the key
`argenseg`, and only where it differs from what their fields and the released sizes imply.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from argenseg_jax.errors import UserError
from argenseg_jax.models import variants
from argenseg_jax.vocab import IMG_CONTEXT, SPECIAL_TOKENS

OWN = "argenseg"
HF = "internvl"  # model_type of transformers' own layout
# Official name -> our name, per part.
_VISION = {"image_size": "image_size", "patch_size": "patch", "hidden_size": "width",
           "num_hidden_layers": "depth", "num_attention_heads": "heads",
           "intermediate_size": "mlp", "norm_type": "norm", "layer_norm_eps": "eps",
           "qk_normalization": "qk_norm", "qkv_bias": "qkv_bias", "initializer_factor": "ls_init",
           "drop_path_rate": "drop_path"}
# transformers' name -> official name, where they differ.
_HF_VISION = {"attention_bias": "qkv_bias", "use_qk_norm": "qk_normalization",
              "layer_scale_init_value": "initializer_factor"}
_LLM = {"hidden_size": "width", "num_hidden_layers": "depth", "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads", "head_dim": "head_dim", "intermediate_size": "mlp",
        "rms_norm_eps": "eps", "rope_theta": "rope_theta",
        "max_position_embeddings": "max_positions", "tie_word_embeddings": "tied"}
_NOT_SIZES = ("parent", "name", "dtype", "remat", "unroll", "vocab_rows", "vocab_size")
# Released vocabularies by the id of <img>: (id of <|im_end|>, padding id). Their checkpoints from
# before the visual tokens hold the first nine special tokens only.
_KNOWN_VOCABS = {92544: (92542, 2), 151665: (151645, 151643)}
_SPECIALS_BEFORE = SPECIAL_TOKENS.index("<mask>")


def model_cfg_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> the `model` section, every size spelled out (models/variants.build takes it).

    Raises:
      UserError: a field that is missing, or a value that no module here implements.
    """
    try:
        return _from_hf(config)
    except KeyError as error:
        raise UserError(f"config.json has no field {error}; expected an InternVL-style config with "
                        "vision_config and llm_config (or text_config)") from None


def _from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    own = config.get(OWN, {})
    if config.get("model_type") == HF:
        config = _official_names(config)
    vision, llm = config["vision_config"], config["llm_config"]
    if config.get("select_layer", -1) != -1:
        raise UserError(f"config.json: select_layer={config['select_layer']} is not supported")
    cfg = {
        "image_size": config.get("force_image_size") or vision["image_size"],
        "vision": vision_cfg(vision),
        "connector": {"ratio": config.get("downsample_ratio", 0.5),
                      "version": config.get("ps_version", "v1")},
        "llm": llm_cfg(llm),
        "vqvae": {**variants.VARIANTS["8b"]["vqvae"], **own.get("vqvae", {})},
    }
    cfg["vocab"] = _vocab(llm, cfg["vqvae"]["codebook_size"], config.get("image_token_id"))
    for key, value in own.items():
        cfg[key] = {**cfg.get(key, {}), **value} if isinstance(value, Mapping) else value
    return cfg


def _official_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of transformers' InternVL under the names of the official one."""
    vision, text = dict(config["vision_config"]), dict(config["text_config"])
    fixed = ((config, "vision_feature_select_strategy", "default"),
             (config, "projector_hidden_act", "gelu"), (vision, "hidden_act", "gelu"),
             (vision, "use_mean_pooling", True))
    for part, name, value in fixed:
        if part.get(name, value) != value:
            raise UserError(f"config.json: {name}={part[name]!r} is not supported; only {value!r}")
    for name in ("image_size", "patch_size"):
        if not isinstance(vision[name], int):
            height, vision[name] = vision[name]
            if height != vision[name]:
                raise UserError(f"config.json: vision_config.{name} must be a square")
    vision.update({official: vision.get(name, default) for (name, official), default
                   in zip(_HF_VISION.items(), (False, False, 0.1))})
    # transformers 4 ties by text_config, 5 by the outer field, which 4 does not write.
    text["tie_word_embeddings"] = config.get("tie_word_embeddings",
                                             text.get("tie_word_embeddings", False))
    return {"vision_config": vision, "llm_config": text, "ps_version": "v2",
            "downsample_ratio": config.get("downsample_ratio", 0.5),
            "select_layer": config.get("vision_feature_layer", -1),
            "image_token_id": config["image_token_id"]}


def vision_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """vision_config -> fields of InternViT."""
    return {ours: config[theirs] for theirs, ours in _VISION.items() if theirs in config}


def llm_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """llm_config (InternLM2, Llama, Qwen2 or Qwen3) -> fields of DecoderLM."""
    cfg = {ours: config[theirs] for theirs, ours in _LLM.items()
           if config.get(theirs) is not None}
    rope = config.get("rope_parameters") or {}  # transformers 5
    cfg.setdefault("rope_theta", rope.get("rope_theta", 1e4))
    cfg.setdefault("kv_heads", cfg["heads"])
    cfg.setdefault("head_dim", cfg["width"] // cfg["heads"])
    scaling = config.get("rope_scaling") or rope or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "dynamic":
        cfg["ntk_factor"] = scaling["factor"]
    elif kind != "default":
        raise UserError(f"config.json: rope scaling '{kind}' is not supported; default or dynamic")
    family = llm_family(config)
    for field in ("bias", "attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(field):
            raise UserError(f"config.json: a language model with {field} is not supported")
    cfg["qkv_bias"] = family == "qwen2"
    cfg["qk_norm"] = family == "qwen3"
    return cfg


def llm_family(config: Mapping[str, Any]) -> str:
    """'internlm2', 'llama' (its form in transformers), 'qwen2' or 'qwen3'.

    By the architecture's name; InternLM2 where none is given.
    """
    name = (config.get("architectures") or [config.get("model_type") or "internlm2"])[0].lower()
    for family in ("internlm2", "llama", "qwen2", "qwen3"):
        if name.startswith(family) and "moe" not in name:
            return family
    raise UserError(f"config.json: the language model '{name}' is not supported; "
                    "InternLM2, Llama, Qwen2 or Qwen3")


def _vocab(llm: Mapping[str, Any], num_codes: int, image_token: int | None) -> dict[str, int]:
    """Ids from the size of the vocabulary, which ends with the special tokens and the codes."""
    size = llm["vocab_size"]
    base = size - len(SPECIAL_TOKENS) - num_codes
    if image_token is not None:
        base = image_token - SPECIAL_TOKENS.index(IMG_CONTEXT)
    elif size - _SPECIALS_BEFORE in _KNOWN_VOCABS:
        base = size - _SPECIALS_BEFORE
    eos, pad = _KNOWN_VOCABS.get(base, (llm.get("eos_token_id"), llm.get("pad_token_id")))
    return {"base": base, "eos": 0 if eos is None else eos, "pad": 0 if pad is None else pad}


def model_cfg_to_hf(model_cfg: Mapping[str, Any], dtype: str = "float32",
                    layout: str = "official") -> dict[str, Any]:
    """The `model` section -> config.json, such that model_cfg_from_hf builds the same model.

    Raises:
      UserError: layout 'hf' for a model that transformers cannot run.
    """
    model = variants.build(model_cfg)
    config = (_hf if layout == "hf" else _official)(model, dtype)
    own = _difference(_all_fields(model), _all_fields(variants.build(_from_hf(config))))
    return {**config, OWN: own} if own else config


def _official(model: Any, dtype: str) -> dict[str, Any]:
    """config.json of the official InternVLChatModel."""
    vision = _fields(model.vision)
    llm = model.llm
    family = "qwen3" if llm.qk_norm else "qwen2" if llm.qkv_bias else "internlm2"
    return {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat",
        "downsample_ratio": model.connector.ratio, "ps_version": model.connector.version,
        "force_image_size": model.image_size, "select_layer": -1, "template": "internvl2_5",
        "dynamic_image_size": True, "use_thumbnail": True, "min_dynamic_patch": 1,
        "max_dynamic_patch": 12, "pad2square": False,
        "tie_word_embeddings": llm.tied, "torch_dtype": dtype,
        "vision_config": {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b",
                          "hidden_act": "gelu", "torch_dtype": dtype,
                          **{theirs: vision[ours] for theirs, ours in _VISION.items()}},
        "llm_config": _llm_config(model, family, dtype),
    }


def _hf(model: Any, dtype: str) -> dict[str, Any]:
    """config.json of transformers' own InternVLForConditionalGeneration."""
    if model.llm.rope_2d or model.block_causal or model.connector.version != "v2":
        raise UserError("transformers has no rope_2d, block_causal or pixel shuffle v1: such a "
                        "model has the official layout only")
    config = _official(model, dtype)
    vision = dict(config["vision_config"], architectures=["InternVLVisionModel"],
                  model_type="internvl_vision")
    vision.update({theirs: vision.pop(official) for theirs, official in _HF_VISION.items()})
    family = "qwen3" if model.llm.qk_norm else "qwen2" if model.llm.qkv_bias else "llama"
    return {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": HF,
        "downsample_ratio": model.connector.ratio, "image_token_id": model.vocab.img_context,
        "image_seq_length": model.image_tokens, "projector_hidden_act": "gelu",
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        "tie_word_embeddings": model.llm.tied, "torch_dtype": dtype, "vision_config": vision,
        "text_config": _llm_config(model, family, dtype),
    }


def _llm_config(model: Any, family: str, dtype: str) -> dict[str, Any]:
    """llm_config or text_config."""
    llm = _fields(model.llm)
    name = {"internlm2": "InternLM2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = {"architectures": [f"{name}ForCausalLM"], "model_type": family,
              "vocab_size": model.vocab.size, "hidden_act": "silu",
              "eos_token_id": model.vocab.eos, "pad_token_id": model.vocab.pad,
              **{theirs: llm[ours] for theirs, ours in _LLM.items()}, "torch_dtype": dtype}
    if llm["ntk_factor"] > 1:
        config["rope_scaling"] = {"type": "dynamic", "factor": llm["ntk_factor"]}
    if family == "internlm2":
        config.update(bias=False, bos_token_id=1)
    elif "rope_scaling" in config:
        config["rope_scaling"]["rope_type"] = "dynamic"  # InternLM2 refuses a third entry
    return config


def _fields(module: Any) -> dict[str, Any]:
    """Name -> value of a module's sizes."""
    return {f.name: getattr(module, f.name) for f in dataclasses.fields(module)
            if f.name not in _NOT_SIZES}


def _all_fields(model: Any) -> dict[str, Any]:
    """The model as a nested `model` section."""
    connector = {k: v for k, v in _fields(model.connector).items() if k != "width"}
    vocab = {k: v for k, v in _fields(model.vocab).items() if k != "num_codes"}
    return {"image_size": model.image_size, "block_causal": model.block_causal, "vocab": vocab,
            "vision": _fields(model.vision), "connector": connector, "llm": _fields(model.llm),
            "vqvae": _fields(model.vqvae)}


def _difference(want: Mapping[str, Any], have: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `want` that `have` does not hold already; tuples become lists, as in JSON."""
    out = {}
    for key, value in want.items():
        if isinstance(value, Mapping):
            value = _difference(value, have[key])
            if value:
                out[key] = value
        elif value != have[key]:
            out[key] = list(value) if isinstance(value, tuple) else value
    return out
