"""THE table of model sizes, and `build`: a config's `model` section -> an ARGenSeg module.

A variant is a nested dict whose inner dicts hold fields of the modules of the same name. The sizes
of the released models follow their published config.json files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from argenseg_jax import config_keys
from argenseg_jax.errors import UserError, brief
from argenseg_jax.models.argenseg import ARGenSeg, VisualEmbed
from argenseg_jax.models.connector import Connector
from argenseg_jax.models.decoder_lm import DecoderLM
from argenseg_jax.models.intern_vit import InternViT
from argenseg_jax.models.vqvae import VQVAE
from argenseg_jax.scales import PATCH_NUMS_256
from argenseg_jax.vocab import Vocab

_VIT_300M = dict(image_size=448, patch=14, width=1024, depth=24, heads=16, mlp=4096)
_VIT_6B = dict(
    image_size=448, patch=14, width=3200, depth=45, heads=25, mlp=12800, norm="rms_norm", qk_norm=True, qkv_bias=False
)
_VAR = dict(
    ch=160, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, z_channels=32, codebook_size=4096, patch_nums=PATCH_NUMS_256
)
_INTERNLM2_VOCAB = dict(base=92544, eos=92542, pad=2)
_QWEN_VOCAB = dict(base=151665, eos=151645, pad=151643)


def _internlm2(
    width: int, depth: int, heads: int, mlp: int, rope_theta: float = 1e6, ntk_factor: float = 2.0
) -> dict[str, Any]:
    return dict(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        mlp=mlp,
        eps=1e-5,
        rope_theta=rope_theta,
        ntk_factor=ntk_factor,
        max_positions=32768,
    )


def _qwen(width: int, depth: int, heads: int, kv_heads: int, mlp: int) -> dict[str, Any]:
    return dict(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        mlp=mlp,
        eps=1e-6,
        head_dim=64 if width == 896 else 128,
        rope_theta=1e6,
        qkv_bias=True,
    )


def _qwen_ntk(*sizes: int) -> dict[str, Any]:
    """Qwen2.5 as in InternVL3."""
    return dict(_qwen(*sizes), ntk_factor=2.0)


def _released(vision: dict, llm: dict, vocab: dict) -> dict[str, Any]:
    return dict(image_size=448, vision=vision, connector={}, llm=llm, vqvae=_VAR, vocab=vocab)


VARIANTS: dict[str, dict[str, Any]] = {
    "1b": _released(_VIT_300M, _qwen(896, 24, 14, 2, 4864), _QWEN_VOCAB),
    "2b": _released(_VIT_300M, _internlm2(2048, 24, 16, 8192), _INTERNLM2_VOCAB),
    "4b": _released(_VIT_300M, _qwen(2048, 36, 16, 2, 11008), _QWEN_VOCAB),
    "8b": _released(_VIT_300M, _internlm2(4096, 32, 32, 14336), _INTERNLM2_VOCAB),
    "26b": _released(_VIT_6B, _internlm2(6144, 48, 48, 16384, 5e7, 2.5), _INTERNLM2_VOCAB),
    "38b": _released(_VIT_6B, _qwen(5120, 64, 40, 8, 27648), _QWEN_VOCAB),
    "78b": _released(_VIT_6B, _qwen(8192, 80, 64, 8, 29568), _QWEN_VOCAB),
    "internvl3-1b": _released(_VIT_300M, _qwen_ntk(896, 24, 14, 2, 4864), _QWEN_VOCAB),
    "internvl3-2b": _released(_VIT_300M, _qwen_ntk(1536, 28, 12, 2, 8960), _QWEN_VOCAB),
    "internvl3-8b": _released(_VIT_300M, _qwen_ntk(3584, 28, 28, 4, 18944), _QWEN_VOCAB),
    "internvl3-14b": _released(_VIT_300M, _qwen_ntk(5120, 48, 40, 8, 13824), _QWEN_VOCAB),
    "nano": dict(
        image_size=64,
        vision=dict(image_size=64, patch=8, width=96, depth=2, heads=3, mlp=256, ls_init=1.0),
        connector=dict(ratio=1.0),
        llm=dict(
            width=96,
            depth=4,
            heads=3,
            kv_heads=3,
            head_dim=32,
            mlp=256,
            eps=1e-6,
            rope_theta=1e4,
            max_positions=2048,
            tied=True,
            qk_norm=True,
            rope_2d=True,
        ),
        vqvae=dict(
            ch=48,
            ch_mult=(1,),
            num_res_blocks=0,
            z_channels=16,
            codebook_size=512,
            patch_nums=(1, 8),
            using_sa=False,
            using_mid_sa=False,
            patch_size=8,
            local=True,
            dead_zone=0.03,
            phi_ratio=0.0,
        ),
        vocab=dict(base=498, eos=496, pad=496),
    ),
}
_PARTS = dict(vision=InternViT, connector=Connector, llm=DecoderLM, vqvae=VQVAE)
_FIELDS_OF = {**_PARTS, "vocab": Vocab}
_MAX_GRID = 512  # patches along a side of an image
_MAX_CODES = 2**20  # of a mask
_MAX_SIDE = 8192  # pixels of a mask


def resolve(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """{'variant': name, overrides} -> all fields spelled out.

    Raises:
      UserError: `model.` and the field that is unknown, missing, of another type, out of its range, or
        does not go with another one.
    """
    config_keys.check_model(model_cfg)
    cfg = {k: (dict(v) if isinstance(v, Mapping) else v) for k, v in model_cfg.items()}
    name = cfg.pop("variant", None)
    if name is not None and name not in VARIANTS:
        raise UserError(f"model.variant={name!r} is unknown; there are {', '.join(VARIANTS)}")
    spec = copy.deepcopy(VARIANTS[name]) if name else {}
    for key, value in cfg.items():
        spec[key] = {**spec.get(key, {}), **value} if key in _FIELDS_OF else value
    if missing := [key for key in (*_FIELDS_OF, "image_size") if key not in spec]:
        raise UserError(f"model.{missing[0]} is missing: name a variant, or give every part")
    if missing := [key for key in ("base", "eos") if key not in spec["vocab"]]:
        raise UserError(f"model.vocab.{missing[0]} is missing")
    _check_together(spec)
    return spec


def _check_together(spec: Mapping[str, Any]) -> None:
    """UserError that names the fields which exclude each other; each by itself is right."""

    def field(key: str) -> Any:
        part, _, name = key.rpartition(".")
        return spec[part].get(name, getattr(_FIELDS_OF[part], name, None)) if part else spec[name]

    def refuse(wrong: bool, text: str, *keys: str) -> None:
        if wrong:
            raise UserError(" and ".join(f"model.{key}={brief(repr(field(key)), 60)}" for key in keys) + f": {text}")

    for large, small in (("llm.heads", "llm.kv_heads"), ("vision.width", "vision.heads")):
        refuse(field(large) % field(small) != 0, "the first must be a multiple of the second", large, small)
    refuse(field("llm.head_dim") % 2 != 0, "rotary positions need an even number", "llm.head_dim")
    shuffle = round(1 / max(field("connector.ratio"), 1 / _MAX_GRID))
    refuse(
        abs(shuffle * field("connector.ratio") - 1) > 1e-6, "1 divided by a whole number is expected", "connector.ratio"
    )
    for key in ("image_size", "vision.image_size"):
        grid = field(key) // field("vision.patch")
        refuse(not 1 <= grid <= _MAX_GRID, f"1 to {_MAX_GRID} patches along a side are expected", key, "vision.patch")
    refuse(
        field("image_size") % (field("vision.patch") * shuffle) != 0,
        f"{shuffle} x {shuffle} patches become one position: they must fill the image",
        "image_size",
        "vision.patch",
        "connector.ratio",
    )
    sides, mults = field("vqvae.patch_nums"), field("vqvae.ch_mult")
    refuse(list(sides) != sorted(sides), "scales go from coarse to fine", "vqvae.patch_nums")
    refuse(sides[0] != 1, "the first scale has a single code, as <ge_start> is all its input", "vqvae.patch_nums")
    refuse(
        sum(side * side for side in sides) > _MAX_CODES, f"a mask has at most {_MAX_CODES} codes", "vqvae.patch_nums"
    )
    refuse(
        len(mults) > 8 or field("vqvae.patch_size") * 2 ** (len(mults) - 1) * sides[-1] > _MAX_SIDE,
        f"masks have at most {_MAX_SIDE} pixels along a side",
        "vqvae.patch_size",
        "vqvae.ch_mult",
        "vqvae.patch_nums",
    )
    size = Vocab(field("vocab.base"), field("vqvae.codebook_size"), 0).size
    for key in ("vocab.eos", "vocab.pad"):
        refuse(field(key) >= size, f"the vocabulary has {size} ids", key, "vocab.base")


def build(model_cfg: Mapping[str, Any]) -> ARGenSeg:
    """The module of a config's `model` section; errors as for `resolve`."""
    spec = resolve(model_cfg)
    dtype = jnp.dtype(spec.get("dtype", "float32"))
    stack = dict(dtype=dtype, remat=spec.get("remat", "none"), unroll=spec.get("unroll", False))
    parts = {key: {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in spec[key].items()} for key in _PARTS}
    quantizer = VQVAE(**parts["vqvae"])
    vocab = Vocab(num_codes=quantizer.codebook_size, **spec["vocab"])
    llm = DecoderLM(padded_vocab_size=vocab.padded_size, vocab_size=vocab.size, **parts["llm"], **stack)
    num_codes = sum(pn * pn for pn in quantizer.patch_nums)
    return ARGenSeg(
        vision=InternViT(**parts["vision"], **stack),
        connector=Connector(width=llm.width, dtype=dtype, **parts["connector"]),
        llm=llm,
        vqvae=quantizer,
        visual=VisualEmbed(llm.width, quantizer.z_channels, len(quantizer.patch_nums), num_codes, dtype),
        vocab=vocab,
        image_size=spec["image_size"],
        block_causal=spec.get("block_causal", False),
    )
