"""The mapping table between PyTorch keys and Flax paths: one rule per kind of tensor, used in both directions.

A rule is (torch key, flax path(s), op, family). In the names `{i}` is a layer whose tensors are
stacked along a leading axis L in JAX; `{j}` and `{k}` are indices that stay in the flax name.
Rules of a family are alternatives for the same leaves: 'internlm2' or 'qwen2' for the language
model, 'official' or 'hf' (transformers' own InternVL, whose language model has the names of Qwen2)
for the vision tower and the connector. An op turns one torch tensor into the leaf (or the several
leaves) of one layer, and back, without arithmetic: both directions are bit-exact.

Axis letters: D width, N query heads, K key/value heads, G = N/K, H head width, F MLP width, V
vocabulary, C channels. Torch keeps Linear as [out, in] and convolutions as OIHW.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Op:
    """An invertible change of layout.

    Attributes:
      name: for messages.
      to_jax: (torch tensor, shapes of the leaves) -> leaves. Raises ValueError when it cannot fit.
      to_torch: leaves -> torch tensor.
      vocab_axis: the leaf's axis that is the vocabulary (always the torch tensor's first), padded
        on import and cut to the true size on export; None for most.
    """

    name: str
    to_jax: Callable[[np.ndarray, tuple[Shape, ...]], tuple[np.ndarray, ...]]
    to_torch: Callable[[tuple[np.ndarray, ...]], np.ndarray]
    vocab_axis: int | None = None


@dataclasses.dataclass(frozen=True)
class WeightRule:
    """One entry of the mapping table; see the module's docstring."""

    key: str
    paths: tuple[str, ...]
    op: Op
    family: str = ""

    @property
    def stacked(self) -> bool:
        """Whether the layers `{i}` share one leaf."""
        return "{i}" in self.key


@functools.cache
def template_regex(template: str) -> re.Pattern[str]:
    """Matches the names of a template; its groups are the indices."""
    return re.compile(re.sub(r"\\\{([ijk])\\\}", r"(?P<\1>\\d{1,6})", re.escape(template)))


def _one(name: str, to_jax, to_torch) -> Op:
    """An op between one tensor and one leaf."""
    return Op(name, lambda t, shapes: (to_jax(t, shapes[0]),), lambda leaves: to_torch(leaves[0]))


def _squeeze(n: int) -> Op:
    """Drops n leading axes of size 1."""
    return _one(f"squeeze{n}", lambda t, shape: np.squeeze(t, tuple(range(n))), lambda x: x.reshape((1,) * n + x.shape))


def _split_heads(t: np.ndarray, shape: Shape) -> np.ndarray:
    """[N*H, D] -> [D, N, H]; [N*H] -> [N, H]."""
    return t.T.reshape(shape)


def _join_heads(x: np.ndarray) -> np.ndarray:
    """[D, N, H] -> [N*H, D]; [N, H] -> [N*H]."""
    return x.reshape(*x.shape[:-2], -1).T


def _split_grouped(t: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
    """[K*(G+2)*H, D] -> q [D, N, H], k and v [D, K, H]: per K, G query heads, then k, then v."""
    (width, heads, dim), (_, kv_heads, _) = shapes[:2]
    parts = t.reshape(kv_heads, heads // kv_heads + 2, dim, width)
    flat = (parts[:, :-2].reshape(heads, dim, width), parts[:, -2], parts[:, -1])
    return tuple(p.transpose(2, 0, 1) for p in flat)


def _join_grouped(leaves: tuple[np.ndarray, ...]) -> np.ndarray:
    q, k, v = (x.transpose(1, 2, 0) for x in leaves)
    q = q.reshape(k.shape[0], -1, *k.shape[1:])
    return np.concatenate([q, k[:, None], v[:, None]], 1).reshape(-1, k.shape[-1])


IDENTITY = _one("identity", lambda t, shape: t, lambda x: x)
LINEAR = _one("linear", lambda t, shape: t.T, lambda x: x.T)
CONV = _one("conv", lambda t, shape: t.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
HEADS_IN = _one("heads_in", _split_heads, _join_heads)
HEADS_OUT = _one("heads_out", lambda t, shape: t.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T)
FUSED_QKV = Op(
    "fused_qkv",
    lambda t, shapes: tuple(_split_heads(p, s) for p, s in zip(np.split(t, 3), shapes)),
    lambda leaves: np.concatenate([_join_heads(x) for x in leaves]),
)
GROUPED_WQKV = Op("grouped_wqkv", _split_grouped, _join_grouped)
VOCAB_EMBEDDING = dataclasses.replace(IDENTITY, name="vocab_embedding", vocab_axis=0)
VOCAB_LINEAR = dataclasses.replace(LINEAR, name="vocab_linear", vocab_axis=1)


def _rules(key: str, path: str, ops: dict[str, tuple[str, Op]], family: str = "") -> list[WeightRule]:
    """Rules key.SUFFIX -> path/LEAF for {suffix: (leaf, op)}."""
    return [WeightRule(f"{key}.{s}", (f"{path}/{leaf}",), op, family) for s, (leaf, op) in ops.items()]


_NORM = {"weight": ("scale", IDENTITY), "bias": ("bias", IDENTITY)}
_DENSE = {"weight": ("kernel", LINEAR), "bias": ("bias", IDENTITY)}
_CONV = {"weight": ("kernel", CONV), "bias": ("bias", IDENTITY)}
_SCALE = {"weight": ("scale", IDENTITY)}
_HEADS = {"weight": ("kernel", HEADS_IN), "bias": ("bias", HEADS_IN)}
_HEADS_OUT = {"weight": ("kernel", HEADS_OUT), "bias": ("bias", IDENTITY)}
_HF_LAYER = "vision_tower.encoder.layer.{i}"


def _each(path: str, leaf: str) -> tuple[str, ...]:
    return tuple(f"{path}/{x}/{leaf}" for x in "qkv")


def _vision() -> list[WeightRule]:
    """InternViT, LayerNorm (300M) and RMSNorm with qk-norm (6B) alike, and the connector."""
    key, path = "vision_model.encoder.layers.{i}", "vision/layers"
    emb = "vision_model.embeddings"
    rules = [
        *_rules(f"{emb}.patch_embedding", "vision/patch_embed", _CONV),
        WeightRule(f"{emb}.class_embedding", ("vision/class_embed",), _squeeze(2)),
        WeightRule(f"{emb}.position_embedding", ("vision/pos_embed",), _squeeze(1)),
        *_rules(f"{key}.norm1", f"{path}/norm1", _NORM),
        WeightRule(f"{key}.attn.qkv.weight", _each(f"{path}/attn", "kernel"), FUSED_QKV),
        WeightRule(f"{key}.attn.qkv.bias", _each(f"{path}/attn", "bias"), FUSED_QKV),
        *_rules(f"{key}.attn.q_norm", f"{path}/attn/q_norm", _SCALE),
        *_rules(f"{key}.attn.k_norm", f"{path}/attn/k_norm", _SCALE),
        *_rules(f"{key}.attn.proj", f"{path}/attn/o", _HEADS_OUT),
        WeightRule(f"{key}.ls1", (f"{path}/ls1",), IDENTITY),
        *_rules(f"{key}.norm2", f"{path}/norm2", _NORM),
        *_rules(f"{key}.mlp.fc1", f"{path}/mlp/fc1", _DENSE),
        *_rules(f"{key}.mlp.fc2", f"{path}/mlp/fc2", _DENSE),
        WeightRule(f"{key}.ls2", (f"{path}/ls2",), IDENTITY),
        *_rules("mlp1.0", "connector/norm", _NORM),
        *_rules("mlp1.1", "connector/fc1", _DENSE),
        *_rules("mlp1.3", "connector/fc2", _DENSE),
    ]
    hf = {
        f"{emb}.patch_embedding": "vision_tower.embeddings.patch_embeddings.projection",
        f"{emb}.class_embedding": "vision_tower.embeddings.cls_token",
        f"{emb}.position_embedding": "vision_tower.embeddings.position_embeddings",
        f"{key}.norm1": f"{_HF_LAYER}.layernorm_before",
        f"{key}.ls1": f"{_HF_LAYER}.lambda_1",
        f"{key}.norm2": f"{_HF_LAYER}.layernorm_after",
        f"{key}.ls2": f"{_HF_LAYER}.lambda_2",
        f"{key}.attn.proj": f"{_HF_LAYER}.attention.projection_layer",
        f"{key}.attn": f"{_HF_LAYER}.attention",
        f"{key}.mlp": f"{_HF_LAYER}.mlp",
        "mlp1.0": "multi_modal_projector.layer_norm",
        "mlp1.1": "multi_modal_projector.linear_1",
        "mlp1.3": "multi_modal_projector.linear_2",
    }
    renamed = [rule for rule in rules if rule.op is not FUSED_QKV]
    for x in "qkv":
        renamed += _rules(f"{key}.attn.{x}_proj", f"{path}/attn/{x}", _HEADS)
    theirs = [
        dataclasses.replace(
            rule, key=next(new + rule.key.removeprefix(old) for old, new in hf.items() if rule.key.startswith(old))
        )
        for rule in renamed
    ]
    return [
        dataclasses.replace(rule, family=family)
        for family, part in (("official", rules), ("hf", theirs))
        for rule in part
    ]


def _decoder() -> list[WeightRule]:
    """The language model: rules of both families, then of InternLM2 and of Qwen2.5."""
    root, layer, path = "language_model", "language_model.model.layers.{i}", "llm/layers"

    def own(family: str, names: dict[str, tuple[str, dict[str, tuple[str, Op]]]]) -> list[WeightRule]:
        return [
            rule for key, (to, ops) in names.items() for rule in _rules(f"{layer}.{key}", f"{path}/{to}", ops, family)
        ]

    kernel, out = {"weight": ("kernel", LINEAR)}, {"weight": ("kernel", HEADS_OUT)}
    return [
        *_rules(f"{root}.model.norm", "llm/norm", _SCALE),
        WeightRule(f"{root}.model.tok_embeddings.weight", ("llm/embed/embedding",), VOCAB_EMBEDDING, "internlm2"),
        WeightRule(f"{root}.output.weight", ("llm/lm_head/kernel",), VOCAB_LINEAR, "internlm2"),
        WeightRule(f"{layer}.attention.wqkv.weight", _each(f"{path}/attn", "kernel"), GROUPED_WQKV, "internlm2"),
        *own(
            "internlm2",
            {
                "attention.wo": ("attn/o", out),
                "attention_norm": ("attn_norm", _SCALE),
                "ffn_norm": ("mlp_norm", _SCALE),
                "feed_forward.w1": ("mlp/gate", kernel),
                "feed_forward.w3": ("mlp/up", kernel),
                "feed_forward.w2": ("mlp/down", kernel),
            },
        ),
        WeightRule(f"{root}.model.embed_tokens.weight", ("llm/embed/embedding",), VOCAB_EMBEDDING, "qwen2"),
        WeightRule(f"{root}.lm_head.weight", ("llm/lm_head/kernel",), VOCAB_LINEAR, "qwen2"),
        *own(
            "qwen2",
            {
                "self_attn.q_proj": ("attn/q", _HEADS),
                "self_attn.k_proj": ("attn/k", _HEADS),
                "self_attn.v_proj": ("attn/v", _HEADS),
                "self_attn.q_norm": ("attn/q_norm", _SCALE),
                "self_attn.k_norm": ("attn/k_norm", _SCALE),
                "self_attn.o_proj": ("attn/o", out),
                "input_layernorm": ("attn_norm", _SCALE),
                "post_attention_layernorm": ("mlp_norm", _SCALE),
                "mlp.gate_proj": ("mlp/gate", kernel),
                "mlp.up_proj": ("mlp/up", kernel),
                "mlp.down_proj": ("mlp/down", kernel),
            },
        ),
    ]


def _vqvae() -> list[WeightRule]:
    """The VAR tokenizer and the three tables that ARGenSeg adds to the language model."""
    root, path = "image_tokenizer", "vqvae"
    block = {"norm1": _NORM, "conv1": _CONV, "norm2": _NORM, "conv2": _CONV}
    wider = {**block, "nin_shortcut": _CONV}
    attn = {"norm": _NORM, "qkv": _CONV, "proj_out": _CONV}
    plain = {"conv_in": _CONV, "norm_out": _NORM, "conv_out": _CONV}
    rules = []
    for coder, level in (("encoder", "down"), ("decoder", "up")):
        key, to = f"{root}.{coder}", f"{path}/{coder}"
        parts = [(name, name, {"": ops}) for name, ops in plain.items()]
        parts += [
            (f"{level}.{{j}}.block.{{k}}", f"{level}_{{j}}/block_{{k}}", wider),
            (f"{level}.{{j}}.attn.{{k}}", f"{level}_{{j}}/attn_{{k}}", attn),
            (f"{level}.{{j}}.{level}sample.conv", f"{level}_{{j}}/{level}sample", {"": _CONV}),
            ("mid.block_{j}", "mid/block_{j}", block),
            ("mid.attn_{j}", "mid/attn_{j}", attn),
        ]
        for theirs, ours, members in parts:
            for name, ops in members.items():
                rules += _rules(f"{key}.{theirs}.{name}".rstrip("."), f"{to}/{ours}/{name}".rstrip("/"), ops)
    return [
        *rules,
        *_rules(f"{root}.quant_conv", f"{path}/quant_conv", _CONV),
        *_rules(f"{root}.post_quant_conv", f"{path}/post_quant_conv", _CONV),
        WeightRule(f"{root}.quantize.embedding.weight", (f"{path}/quantizer/codebook",), IDENTITY),
        *_rules(f"{root}.quantize.quant_resi.qresi_ls.{{j}}", f"{path}/quantizer/phi_{{j}}", _CONV),
        *_rules("word_embed", "visual/word_embed", _DENSE),
        WeightRule("lvl_embed.weight", ("visual/lvl_embed",), IDENTITY),
        WeightRule("pos_1LC", ("visual/pos_embed",), _squeeze(1)),
    ]


TABLE: tuple[WeightRule, ...] = (*_vision(), *_decoder(), *_vqvae())

# The hit counts of the codebook: statistics of the tokenizer's own training, which nothing reads.
HITS = "image_tokenizer.quantize.ema_vocab_hit_SV"
# Torch keys that have no leaf.
IGNORED: tuple[str, ...] = (re.escape(HITS), r".*\.rotary_emb\.inv_freq")

# In memory transformers' InternVL has other prefixes than in its files (versions 4.52 to 5 alike).
_MODEL_PREFIXES: tuple[tuple[str, str], ...] = (
    (r"model\.language_model\.(.*)", r"language_model.model.\1"),
    (r"model\.((?:vision_tower|multi_modal_projector)\..*)", r"\1"),
)

# Files of a single part lack the prefix of the complete model: (what their keys start with, the prefix).
PART_PREFIXES: tuple[tuple[str, str], ...] = (
    (
        r"(encoder|decoder)\.(conv_in|conv_out|norm_out|mid|down|up)\..*|(post_)?quant_conv\..*"
        r"|quantize\..*",
        "image_tokenizer.",
    ),
    (r"model\.(tok_embeddings|embed_tokens|layers|norm)\..*|output\.weight|lm_head\.weight", "language_model."),
    (
        r"embeddings\.(class_embedding|position_embedding|patch_embedding\..*)"
        r"|encoder\.layers\..*",
        "vision_model.",
    ),
)


def full_name(key: str) -> str:
    """The table's key of a tensor from a file of one part, or from transformers' memory."""
    for pattern, name in _MODEL_PREFIXES:
        if found := re.fullmatch(pattern, key):
            return found.expand(name)
    for pattern, prefix in PART_PREFIXES:
        if re.fullmatch(pattern, key):
            return prefix + key
    return key
