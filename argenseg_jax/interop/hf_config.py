"""config.json of an InternVL-family folder <-> the `model` section of our configuration.

Two layouts: the field names of the official InternVLChatModel, and those of transformers' own
InternVLForConditionalGeneration (the `-hf` folders; `model_type` is `internvl`). What they have no
name for (the VQ-VAE's sizes, the first special id, the nano fields) is under the key
`argenseg`, and only where it differs from what their fields and the released sizes imply.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from argenseg_jax import config_keys
from argenseg_jax.errors import DATA_FAULTS, UserError, brief
from argenseg_jax.models import variants
from argenseg_jax.vocab import IMG_CONTEXT, SPECIAL_TOKENS

OWN = "argenseg"
HF = "internvl"  # model_type of transformers' own layout
# Official name -> our name, per part.
_VISION = {
    "image_size": "image_size",
    "patch_size": "patch",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp",
    "norm_type": "norm",
    "layer_norm_eps": "eps",
    "qk_normalization": "qk_norm",
    "qkv_bias": "qkv_bias",
    "initializer_factor": "ls_init",
    "drop_path_rate": "drop_path",
}
# transformers' name -> official name, where they differ.
_HF_VISION = {
    "attention_bias": "qkv_bias",
    "use_qk_norm": "qk_normalization",
    "layer_scale_init_value": "initializer_factor",
}
_LLM = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp",
    "rms_norm_eps": "eps",
    "rope_theta": "rope_theta",
    "max_position_embeddings": "max_positions",
    "tie_word_embeddings": "tied",
}
_LLM_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")  # have no default
_OUR_NAME = re.compile(r"\bmodel\.([a-z0-9_]+(?:\.[a-z0-9_]+)?)")  # in messages about a `model` section
_MAX_ID = 2**24  # of a vocabulary
Ids = Callable[[int, bool], Mapping[str, int] | None]
_NOT_SIZES = ("parent", "name", "dtype", "remat", "unroll", "padded_vocab_size", "vocab_size")
# Released vocabularies by the id of <img>: (id of <|im_end|>, padding id). Their checkpoints from
# before the visual tokens hold the first nine special tokens only.
_KNOWN_VOCABS = {92544: (92542, 2), 151665: (151645, 151643)}
_SPECIALS_BEFORE = SPECIAL_TOKENS.index("<mask>")


def model_cfg_from_hf(config: Mapping[str, Any], ids: Ids | None = None) -> dict[str, Any]:
    """config.json -> the `model` section, every size spelled out (models/variants.build takes it).

    Args:
      config: the parsed file.
      ids: (number of codes, whether config.json leaves them open) -> {base, eos, pad} as the tokenizer
        beside the file knows them, or None; asked where the vocabulary is of no released model.

    Raises:
      UserError: 'config.json: ' and the field that is missing, of another type, out of its range, or
        has a value that no module here implements.
    """
    try:
        cfg = _from_hf(config, ids)
        variants.resolve(cfg)
        return cfg
    except KeyError as error:
        raise UserError(
            f"config.json has no field {error}; expected an InternVL-style config with "
            "vision_config and llm_config (or text_config)"
        ) from None
    except UserError as error:
        text = _OUR_NAME.sub(lambda found: _their_name(found.group(1), config), str(error))
        raise UserError(text if text.startswith("config.json") else f"config.json: {text}") from None
    except DATA_FAULTS as error:  # a value of a type that nothing above has looked at
        raise UserError(f"config.json is no InternVL-style config ({type(error).__name__}: {brief(error)})") from None


def _their_name(key: str, config: Mapping[str, Any]) -> str:
    """The field of config.json that has set our field 'llm.width'."""
    part, _, name = key.rpartition(".")
    own = config.get(OWN)
    below = own.get(part) if part and isinstance(own, Mapping) else own
    if isinstance(below, Mapping) and name in below:
        return f"{OWN}.{key}"
    is_hf = config.get("model_type") == HF
    table, section = {
        "vision": (_VISION, "vision_config"),
        "llm": (_LLM, "text_config" if is_hf else "llm_config"),
        "connector": ({"downsample_ratio": "ratio", "ps_version": "version"}, ""),
        "": ({"force_image_size": "image_size"} if config.get("force_image_size") else {}, ""),
    }.get(part, ({}, ""))
    theirs = next((theirs for theirs, ours in table.items() if ours == name), None)
    if theirs is None:
        return f"{OWN}.{key}" if key != "image_size" else "vision_config.image_size"
    if is_hf:
        theirs = next((hf for hf, official in _HF_VISION.items() if official == theirs), theirs)
    return f"{section}.{theirs}".lstrip(".")


def _section(config: Any, name: str, where: str = "") -> Mapping[str, Any]:
    """A part of config.json that has to be an object; KeyError where it is not there."""
    if not isinstance(config[name], Mapping):
        raise UserError(f"config.json: {where}{name}={brief(repr(config[name]), 60)}: an object of fields is expected")
    return config[name]


def _from_hf(config: Mapping[str, Any], ids: Ids | None = None) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise UserError("config.json is no object of fields")
    own = _section(config, OWN) if OWN in config else {}
    for part in own:
        if part in ("vision", "connector", "llm", "vqvae", "vocab"):
            _section(own, part, f"{OWN}.")
    if config.get("model_type") == HF:
        config = _official_names(config)
    vision, llm = _section(config, "vision_config"), _section(config, "llm_config")
    if config.get("select_layer", -1) != -1:
        raise UserError(f"config.json: select_layer={brief(repr(config['select_layer']), 60)} is not supported")
    cfg = {
        "image_size": config.get("force_image_size") or vision["image_size"],
        "vision": vision_cfg(vision),
        "connector": {"ratio": config.get("downsample_ratio", 0.5), "version": config.get("ps_version", "v1")},
        "llm": llm_cfg({"tie_word_embeddings": config.get("tie_word_embeddings"), **llm}),
        "vqvae": {**variants.VARIANTS["8b"]["vqvae"], **own.get("vqvae", {})},
    }
    codes = _checked("vqvae.codebook_size", cfg["vqvae"]["codebook_size"])
    cfg["vocab"] = _vocab(llm, codes, config.get("image_token_id"), ids, own.get("vocab", {}).get("base"))
    for key, value in own.items():
        cfg[key] = {**cfg.get(key, {}), **value} if isinstance(value, Mapping) else value
    return cfg


def _checked(key: str, value: Any) -> Any:
    """The value of one of our fields; UserError where the table of keys refuses it."""
    if problem := config_keys.fault(f"model.{key}", value):
        raise UserError(problem)
    return value


def _number(config: Mapping[str, Any], name: str, high: int = _MAX_ID) -> int:
    """A whole number >= 0 of config.json that is no field of ours; KeyError where it is not there."""
    value = config[name]
    if type(value) is not int or not 0 <= value <= high:
        raise UserError(f"config.json: {name}={brief(repr(value), 60)}: write a whole number from 0 to {high}")
    return value


def _official_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of transformers' InternVL under the names of the official one."""
    vision, text = dict(_section(config, "vision_config")), dict(_section(config, "text_config"))
    fixed = (
        (config, "vision_feature_select_strategy", "default"),
        (config, "projector_hidden_act", "gelu"),
        (vision, "hidden_act", "gelu"),
        (vision, "use_mean_pooling", True),
    )
    for part, name, value in fixed:
        if part.get(name, value) != value:
            raise UserError(f"config.json: {name}={part[name]!r} is not supported; only {value!r}")
    for name in ("image_size", "patch_size"):
        if isinstance(vision[name], list):
            if len(vision[name]) != 2 or vision[name][0] != vision[name][1]:
                raise UserError(f"config.json: vision_config.{name} must be a square")
            vision[name] = vision[name][0]
    vision.update(
        {
            official: vision.get(name, default)
            for (name, official), default in zip(_HF_VISION.items(), (False, False, 0.1))
        }
    )
    # transformers 4 ties by text_config, 5 by the outer field, which 4 does not write.
    text["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return {
        "vision_config": vision,
        "llm_config": text,
        "ps_version": "v2",
        "downsample_ratio": config.get("downsample_ratio", 0.5),
        "select_layer": config.get("vision_feature_layer", -1),
        "image_token_id": config["image_token_id"],
    }


def vision_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """vision_config -> fields of InternViT."""
    return {
        ours: _checked(f"vision.{ours}", config[theirs])
        for theirs, ours in _VISION.items()
        if config.get(theirs) is not None
    }


def llm_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """llm_config (InternLM2, Llama, Qwen2 or Qwen3) -> fields of DecoderLM."""
    cfg = {
        ours: _checked(f"llm.{ours}", config[theirs]) for theirs, ours in _LLM.items() if config.get(theirs) is not None
    }
    for theirs in _LLM_SIZES:
        if _LLM[theirs] not in cfg:
            raise KeyError(theirs)
    rope = _section(config, "rope_parameters") if config.get("rope_parameters") else {}  # transformers 5
    scaling = _section(config, "rope_scaling") if config.get("rope_scaling") else rope
    cfg.setdefault("rope_theta", rope.get("rope_theta", 1e4))
    cfg.setdefault("kv_heads", cfg["heads"])
    cfg.setdefault("head_dim", cfg["width"] // cfg["heads"])
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "dynamic":
        cfg["ntk_factor"] = scaling["factor"]
    elif kind != "default":
        raise UserError(f"config.json: rope scaling {brief(repr(kind), 60)} is not supported; default or dynamic")
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
    listed = config.get("architectures") or [config.get("model_type") or "internlm2"]
    name = listed[0].lower() if isinstance(listed, list) and isinstance(listed[0], str) else ""
    for family in ("internlm2", "llama", "qwen2", "qwen3"):
        if name.startswith(family) and "moe" not in name:
            return family
    raise UserError(
        f"config.json: the language model {brief(repr(name or listed), 60)} is not supported; "
        "InternLM2, Llama, Qwen2 or Qwen3"
    )


def _vocab(
    llm: Mapping[str, Any], num_codes: int, image_token: int | None, ids: Ids | None, own_base: int | None
) -> Mapping[str, int]:
    """Ids: those of a released model by the size of its vocabulary; else as the tokenizer knows them.

    Without a tokenizer the vocabulary is taken to end with the special tokens and the codes.
    """
    size = _number(llm, "vocab_size")
    base = size - len(SPECIAL_TOKENS) - num_codes
    if own_base is not None:
        base = own_base
    elif image_token is not None:
        base = _number({"image_token_id": image_token}, "image_token_id") - SPECIAL_TOKENS.index(IMG_CONTEXT)
    elif size - _SPECIALS_BEFORE in _KNOWN_VOCABS:
        base = size - _SPECIALS_BEFORE
    if base in _KNOWN_VOCABS:
        eos, pad = _KNOWN_VOCABS[base]
        return {"base": base, "eos": eos, "pad": pad}
    if own_base is None and ids and (known := ids(num_codes, image_token is None)):
        if image_token is not None and known["base"] != base:
            raise UserError(
                f"config.json: image_token_id={image_token}, but the tokenizer beside it has "
                f"{IMG_CONTEXT} at {known['base'] + SPECIAL_TOKENS.index(IMG_CONTEXT)}"
            )
        return known
    if own_base is None and base < 1:
        raise UserError(
            f"config.json: vocab_size={size} is of no released model and too small for {num_codes} codes; "
            "the tokenizer's files have to be beside it to tell the ids"
        )
    return {"base": base, "eos": _end_id(llm, "eos_token_id"), "pad": _end_id(llm, "pad_token_id")}


def _end_id(llm: Mapping[str, Any], name: str) -> int:
    """An id of config.json, the first where it lists several; 0 where it has none."""
    value = llm.get(name)
    if isinstance(value, list) and value:
        value = value[0]
    return 0 if value is None else _number({name: value}, name)


def model_cfg_to_hf(model_cfg: Mapping[str, Any], dtype: str = "float32", layout: str = "official") -> dict[str, Any]:
    """The `model` section -> config.json, such that model_cfg_from_hf builds the same model.

    Raises:
      UserError: layout 'hf' for a model that transformers cannot run.
    """
    model = variants.build(model_cfg)
    config = (_hf if layout == "hf" else _official)(model, dtype)
    base = model.vocab.base
    ids = {} if base in _KNOWN_VOCABS else {"base": base}  # no other file needs to be asked then
    have = _all_fields(variants.build(_from_hf({**config, OWN: {"vocab": ids}})))
    own = _difference(_all_fields(model), have)
    if ids := {**ids, **own.get("vocab", {})}:
        own = {"vocab": ids, **{key: value for key, value in own.items() if key != "vocab"}}
    return {**config, OWN: own} if own else config


def _official(model: Any, dtype: str) -> dict[str, Any]:
    """config.json of the official InternVLChatModel."""
    vision = _fields(model.vision)
    llm = model.llm
    family = "qwen3" if llm.qk_norm else "qwen2" if llm.qkv_bias else "internlm2"
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": model.connector.ratio,
        "ps_version": model.connector.version,
        "force_image_size": model.image_size,
        "select_layer": -1,
        "template": "internvl2_5",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "pad2square": False,
        "tie_word_embeddings": llm.tied,
        "torch_dtype": dtype,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_act": "gelu",
            "torch_dtype": dtype,
            **{theirs: vision[ours] for theirs, ours in _VISION.items()},
        },
        "llm_config": _llm_config(model, family, dtype),
    }


def _hf(model: Any, dtype: str) -> dict[str, Any]:
    """config.json of transformers' own InternVLForConditionalGeneration."""
    if model.llm.rope_2d or model.block_causal or model.connector.version != "v2":
        raise UserError(
            "transformers has no rope_2d, block_causal or pixel shuffle v1: such a model has the official layout only"
        )
    config = _official(model, dtype)
    vision = dict(config["vision_config"], architectures=["InternVLVisionModel"], model_type="internvl_vision")
    vision.update({theirs: vision.pop(official) for theirs, official in _HF_VISION.items()})
    family = "qwen3" if model.llm.qk_norm else "qwen2" if model.llm.qkv_bias else "llama"
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": HF,
        "downsample_ratio": model.connector.ratio,
        "image_token_id": model.vocab.img_context,
        "image_seq_length": model.image_tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": model.llm.tied,
        "torch_dtype": dtype,
        "vision_config": vision,
        "text_config": _llm_config(model, family, dtype),
    }


def _llm_config(model: Any, family: str, dtype: str) -> dict[str, Any]:
    """llm_config or text_config."""
    llm = _fields(model.llm)
    name = {"internlm2": "InternLM2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": family,
        "vocab_size": model.vocab.size,
        "hidden_act": "silu",
        "eos_token_id": model.vocab.eos,
        "pad_token_id": model.vocab.pad,
        **{theirs: llm[ours] for theirs, ours in _LLM.items()},
        "torch_dtype": dtype,
    }
    if llm["ntk_factor"] > 1:
        config["rope_scaling"] = {"type": "dynamic", "factor": llm["ntk_factor"]}
    if family == "internlm2":
        config.update(bias=False, bos_token_id=1)
    elif "rope_scaling" in config:
        config["rope_scaling"]["rope_type"] = "dynamic"  # InternLM2 refuses a third entry
    return config


def _fields(module: Any) -> dict[str, Any]:
    """Name -> value of a module's sizes."""
    return {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name not in _NOT_SIZES}


def _all_fields(model: Any) -> dict[str, Any]:
    """The model as a nested `model` section."""
    connector = {k: v for k, v in _fields(model.connector).items() if k != "width"}
    vocab = {k: v for k, v in _fields(model.vocab).items() if k != "num_codes"}
    return {
        "image_size": model.image_size,
        "block_causal": model.block_causal,
        "vocab": vocab,
        "vision": _fields(model.vision),
        "connector": connector,
        "llm": _fields(model.llm),
        "vqvae": _fields(model.vqvae),
    }


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
