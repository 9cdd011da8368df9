"""The table of sizes: every variant builds, has the published totals, and names what is unknown."""

import math

import jax
import pytest

from argenseg_jax import trees
from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_folder
from argenseg_jax.models import variants
from argenseg_jax.vocab import SPECIAL_TOKENS
from tests import tiny

OLD_SPECIALS = SPECIAL_TOKENS.index("<mask>")


def counted(variant):
    """({part: parameters}, model), without the rows of the vocabulary that ARGenSeg adds."""
    model = variants.build({"variant": variant})
    sizes = {}
    for name, leaf in trees.flatten(hf_folder.param_shapes(model)).items():
        part = name.split("/")[0]
        sizes[part] = sizes.get(part, 0) + math.prod(leaf.shape)
    added = model.llm.padded_vocab_size - (model.vocab.base + OLD_SPECIALS)
    sizes["llm"] -= added * model.llm.width * (1 if model.llm.tied else 2)
    return sizes, model


def vision_by_hand(m):
    d, n = m.width, (m.image_size // m.patch) ** 2
    norm = d if m.norm == "rms_norm" else 2 * d
    layer = 4 * d * d + d + (3 * d if m.qkv_bias else 2 * d) + 2 * norm + 2 * d + 2 * d * m.mlp + m.mlp + d
    return m.depth * layer + 3 * m.patch**2 * d + d + d + (1 + n) * d


def llm_by_hand(m, words):
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    layer = 2 * m.width * (q + kv) + 3 * m.width * m.mlp + 2 * m.width
    layer += (q + 2 * kv) * m.qkv_bias + 2 * m.head_dim * m.qk_norm
    return m.depth * layer + m.width + words * m.width * (1 if m.tied else 2)


@pytest.mark.parametrize("variant, total", [("1b", 938_193_024), ("26b", 25_514_186_112)])
def test_released_sizes(variant, total):
    """As published: vision, connector and language model (tests/interop/test_released.py: all of them)."""
    sizes, model = counted(variant)
    assert sum(sizes[p] for p in ("vision", "connector", "llm")) == total
    assert sizes["vision"] == vision_by_hand(model.vision)
    assert sizes["llm"] == llm_by_hand(model.llm, model.vocab.base + OLD_SPECIALS)
    wide, width = 4 * model.vision.width, model.llm.width
    assert sizes["connector"] == 2 * wide + (wide + 1) * width + (width + 1) * width
    assert sizes["visual"] == 33 * width + (10 + 680) * width
    assert 105e6 < sizes["vqvae"] < 112e6


@pytest.mark.parametrize(
    "variant, code", [("8b", 92557), ("2b", 92557), ("26b", 92557), ("1b", 151678), ("4b", 151678), ("38b", 151678)]
)
def test_released_ids(variant, code):
    model = variants.build({"variant": variant})
    vocab = model.vocab
    assert (vocab.first_code, vocab.size) == (code, code + 4096)
    assert [vocab.id(t) for t in ("<mask>", "<ge_start>", "<ge_end>", "<MASK_CONTEXT>")] == [
        code - 4,
        code - 3,
        code - 2,
        code - 1,
    ]
    assert model.llm.padded_vocab_size % 256 == 0 and 0 <= model.llm.padded_vocab_size - vocab.size < 256
    assert (model.image_tokens, model.mask_size, model.scales.num_codes) == (256, 256, 680)


def test_official_variants_use_no_nano_field():
    for name in set(variants.VARIANTS) - {"nano"}:
        model = variants.build({"variant": name})
        assert not (model.llm.qk_norm or model.llm.rope_2d or model.llm.tied or model.block_causal)
        vqvae = model.vqvae
        assert (vqvae.patch_size, vqvae.local, vqvae.dead_zone, vqvae.phi_ratio) == (1, False, 0, 0.5)


def test_nano_is_small():
    sizes, _ = counted("nano")
    assert sum(sizes.values()) < 5e6


def test_overrides_reach_their_field_and_the_table_stays():
    model = variants.build(
        {
            "variant": "1b",
            "llm": {"depth": 2},
            "block_causal": True,
            "dtype": "bfloat16",
            "remat": "full",
            "vqvae": {"patch_nums": [1, 4]},
        }
    )
    assert (model.llm.depth, model.llm.width, model.block_causal) == (2, 896, True)
    assert model.vision.dtype == model.llm.dtype == "bfloat16" and model.vision.remat == "full"
    assert model.vqvae.patch_nums == (1, 4) and model.visual.num_codes == 17
    assert variants.build({"variant": "1b"}).llm.depth == 24


@pytest.mark.parametrize(
    "cfg, text",
    [
        ({"variant": "9b"}, "model.variant='9b' is unknown; there are 1b, 2b"),
        ({"variant": "1b", "llm": {"widht": 3}}, "no such config key: model.llm.widht; did you mean model.llm.width?"),
        ({"variant": "1b", "vocab": {"size": 3}}, "no such config key: model.vocab.size"),
        ({"variant": "1b", "colour": 3}, "no such config key: model.colour"),
        ({"llm": {"width": 32}}, "model.vision is missing: name a variant"),
        ({"variant": "1b", "llm": 3}, "model.llm=3: a dict of fields is expected"),
    ],
)
def test_mistakes_are_named(cfg, text):
    with pytest.raises(UserError) as error:
        variants.build(cfg)
    assert text in str(error.value)


@pytest.mark.parametrize("form", ["internlm2", "nano"])
def test_init_draws_every_parameter(form):
    """`init` runs, its shapes are the abstract ones, and the padding of the vocabulary is zero."""
    model, params = tiny.made(form)
    batch = tiny.batch(model, [tiny.sample()])
    args = (batch["tokens"], batch["positions"], batch["segment_ids"], batch["tiles"], batch["masks"])
    drawn = jax.jit(lambda key: model.init(key, *args))(jax.random.key(0))["params"]
    trees.check_same(drawn, params, form)
    embed = drawn["llm"]["embed"]["embedding"]
    assert not embed[model.vocab.size :].any() and embed[: model.vocab.size].any(axis=1).all()
