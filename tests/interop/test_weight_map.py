"""The weight map: bit-exact both ways, real key names, every key and leaf accounted for."""

import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest

from argenseg_jax import trees
from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_folder, weight_map
from argenseg_jax.interop import state_dict as convert
from argenseg_jax.models import variants

HERE = pathlib.Path(__file__).parent
VISION = dict(image_size=56, patch=14, width=64, depth=2, heads=4, mlp=144)
VAE = dict(ch=32, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, z_channels=32, codebook_size=256)
LLM = dict(width=64, depth=3, heads=8, kv_heads=2, head_dim=8, mlp=160)
MODELS = {
    "internlm2": dict(image_size=56, vision=VISION, connector={}, llm=LLM, vqvae=VAE, vocab=dict(base=200, eos=4)),
    "qwen2": dict(
        image_size=56,
        vision=VISION,
        connector={},
        llm={**LLM, "qkv_bias": True},
        vqvae=VAE,
        vocab=dict(base=200, eos=4),
    ),
    "rms, tied": dict(
        image_size=56,
        connector={},
        vqvae=VAE,
        vocab=dict(base=200, eos=4),
        vision={**VISION, "norm": "rms_norm", "qk_norm": True, "qkv_bias": False},
        llm={**LLM, "qkv_bias": True, "tied": True},
    ),
    "nano": dict(variant="nano"),
}


@pytest.fixture(scope="module")
def made():
    """{name: (model, random parameters)}; rows of the padded vocabulary are zero."""
    rng = np.random.default_rng(0)
    out = {}
    for name, cfg in MODELS.items():
        model = variants.build(cfg)
        params = jax.tree.map(
            lambda s: rng.standard_normal(s.shape).astype(np.float32), dict(hf_folder.param_shapes(model))
        )
        params["llm"]["embed"]["embedding"][model.vocab.size :] = 0
        if "lm_head" in params["llm"]:
            params["llm"]["lm_head"]["kernel"][:, model.vocab.size :] = 0
        out[name] = model, params
    return out


def to_torch(model, params, **kw):
    return dict(convert.to_torch(params, vocab_size=model.vocab.size, **kw))


def assert_same(a, b):
    a, b = trees.flatten(a), trees.flatten(b)
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "dtype,layout", [(np.float32, "official"), (ml_dtypes.bfloat16, "official"), (np.float32, "hf")]
)
def test_round_trip_is_bit_exact(made, name, dtype, layout):
    model, params = made[name]
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    tensors = to_torch(model, params, layout=layout)
    assert (
        tensors[next(k for k in tensors if k.endswith(("embed_tokens.weight", "tok_embeddings.weight")))].shape[0]
        == model.vocab.size
    )
    back = convert.to_jax(tensors, params, vocab_size=model.vocab.size)
    assert_same(back, params)
    again = to_torch(model, back, layout=layout)
    assert_same(again, tensors)


@pytest.mark.parametrize("name", ["internlm2", "qwen2"])
def test_official_key_names(made, name):
    model, params = made[name]
    assert sorted(to_torch(model, params)) == (HERE / f"keys_{name}.txt").read_text().split()


def test_rms_form_has_no_biases_but_qk_norm(made):
    keys = to_torch(*made["rms, tied"])
    assert "vision_model.encoder.layers.1.attn.k_norm.weight" in keys
    assert "language_model.lm_head.weight" not in keys
    assert not [k for k in keys if k.startswith("vision_model.encoder") and k.endswith(("qkv.bias", "norm1.bias"))]


@pytest.mark.parametrize("name", ["internlm2", "qwen2"])
def test_every_mismatch_is_in_one_message(made, name):
    model, params = made[name]
    tensors = to_torch(model, params)
    tensors["vision_model.encoder.layers.0.atn.proj.bias"] = tensors.pop("vision_model.encoder.layers.0.attn.proj.bias")
    tensors["something.else"] = np.zeros(3)
    del tensors["lvl_embed.weight"]
    with pytest.raises(UserError) as caught:
        convert.to_jax(tensors, params, source="the file")
    text = str(caught.value)
    for part in (
        "the file",
        "unexpected key 'vision_model.encoder.layers.0.atn.proj.bias'",
        "nearest: 'vision_model.encoder.layers.0.attn.proj.bias'",
        "something.else",
        "nothing fills 'visual/lvl_embed' (expected lvl_embed.weight)",
        "vision_model.encoder.layers.{i}.attn.proj.bias needs layers 0..1",
    ):
        assert part in text, part
    assert "\n" not in text


def test_shapes_and_layers_must_fit(made):
    model, params = made["internlm2"]
    tensors = to_torch(model, params)
    tensors["mlp1.1.weight"] = tensors["mlp1.1.weight"][:, :-1]
    tensors["pos_1LC"] = tensors["pos_1LC"][:, 1:]
    with pytest.raises(UserError, match=r"'mlp1.1.weight' \(64, 255\) does not fit.*pos_1LC"):
        convert.to_jax(tensors, params)
    tensors = to_torch(model, params)
    tensors["language_model.model.layers.3.ffn_norm.weight"] = np.zeros(64, np.float32)
    with pytest.raises(UserError, match=r"layers 0..2; differs in \[3\]"):
        convert.to_jax(tensors, params)
    tensors = to_torch(model, params)
    tensors["language_model.model.embed_tokens.weight"] = tensors["language_model.model.tok_embeddings.weight"]
    with pytest.raises(UserError, match="a second time"):
        convert.to_jax(tensors, params)
    tensors = to_torch(model, params)  # one leaf of three that the fused tensor fills already
    for i in range(2):
        tensors[f"vision_tower.encoder.layer.{i}.attention.v_proj.bias"] = np.zeros(64, np.float32)
    with pytest.raises(UserError, match="v_proj.bias fills 'vision/layers/attn/v/bias' a second time"):
        convert.to_jax(tensors, params)


def test_parts_without_their_prefix(made):
    _model, params = made["internlm2"]
    tensors = {k.removeprefix("image_tokenizer."): v for k, v in convert.to_torch({"vqvae": params["vqvae"]})}
    assert "quantize.embedding.weight" in tensors
    assert_same(convert.to_jax(tensors, {"vqvae": params["vqvae"]})["vqvae"], params["vqvae"])


def test_a_smaller_vocabulary_grows_by_its_mean(made):
    model, params = made["internlm2"]
    tensors = to_torch(model, params)
    old = model.vocab.base + 9
    for key in ("language_model.model.tok_embeddings.weight", "language_model.output.weight"):
        tensors[key] = tensors[key][:old]
    back = convert.to_jax(tensors, params, vocab_size=model.vocab.size)
    head, embed = back["llm"]["lm_head"]["kernel"], back["llm"]["embed"]["embedding"]
    np.testing.assert_array_equal(head[:, :old], params["llm"]["lm_head"]["kernel"][:, :old])
    np.testing.assert_allclose(
        head[:, old : model.vocab.size],
        np.repeat(head[:, :old].mean(1, keepdims=True), model.vocab.size - old, 1),
        atol=1e-6,
    )
    assert not head[:, model.vocab.size :].any() and not embed[model.vocab.size :].any()
    with pytest.raises(UserError, match="a vocabulary of 469 tokens in the file, 400 in the model"):
        convert.to_jax(to_torch(model, params), params, vocab_size=400)


def test_unknown_leaves_are_not_exported(made):
    model, params = made["nano"]
    with pytest.raises(UserError, match="no rule.*connector/extra"):
        to_torch(model, {**params, "connector": {**params["connector"], "extra": np.zeros(2)}})


def test_every_row_of_the_table_is_used(made):
    """A row that no model needs is a mistake in the table."""
    used = set()
    for name in MODELS:
        for layout in ("official", "hf"):
            for key in to_torch(*made[name], layout=layout):
                used |= {row.key for row in weight_map.TABLE if weight_map.template_regex(row.key).fullmatch(key)}
    assert {row.key for row in weight_map.TABLE} == used
