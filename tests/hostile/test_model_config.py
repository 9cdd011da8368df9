"""config.json of strangers, of an HF folder and of a workdir: a model that can be built, or one line with the key."""

import json
import re

import pytest
from hypothesis import given

from argenseg_jax.ckpt import checkpoint
from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_config, hf_folder
from argenseg_jax.models import variants
from tests import tiny
from tests.hostile import changed, mutated, places
from tests.interop.test_released import published

OFFICIAL = hf_config.model_cfg_to_hf(tiny.config())
HF = hf_config.model_cfg_to_hf(tiny.config(), layout="hf")
RUN = {
    "model": tiny.config(),
    "data": {"system": "", "max_tokens": 256, "pad_to_square": False},
    "decode": {"max_text_tokens": 4},
    "train": {"dtype": "float32", "lora": {"rank": 0, "targets": []}},
}


def opened(folder, config):
    """The model, or None where config.json is refused by one line that names the file."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
    try:
        return checkpoint.open_checkpoint(str(folder)).model()
    except UserError as error:
        text = str(error)
        assert "\n" not in text and "0x7f" not in text and len(text) < 500 and str(folder) in text
        return None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(an HF folder, a copied step), without weights to speak of: none are read to open them."""
    root = tmp_path_factory.mktemp("folders")
    (root / "hf").mkdir()
    (root / "hf" / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    step = tiny.workdir(root / "run") / "checkpoints" / "1"
    return root / "hf", step


@given(mutated(OFFICIAL))
def test_official_configs(folders, config):
    opened(folders[0], config)


@given(mutated(HF))
def test_transformers_configs(folders, config):
    opened(folders[0], config)


@given(mutated(RUN))
def test_configs_of_runs(folders, config):
    opened(folders[1], config)


@pytest.mark.parametrize("document, which", [(OFFICIAL, 0), (HF, 0), (RUN, 1)], ids=["official", "hf", "run"])
def test_every_key_takes_every_odd_value(folders, document, which):
    """Nothing is computed and nothing allocated before a value has been looked at: this takes seconds, not hours."""
    assert opened(folders[which], document) is not None
    for path in places(document):
        for value in (None, "x", [], 0, -1, 10**9, True, {"x": None}):
            opened(folders[which], changed(document, path, value))


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("vision_config.hidden_size", "x", "vision_config.hidden_size='x': write a whole number from 1 to 65536"),
        ("llm_config.num_hidden_layers", 10**9, "llm_config.num_hidden_layers=1000000000: write a whole number from 1"),
        ("llm_config.num_hidden_layers", None, "has no field 'num_hidden_layers'"),
        ("llm_config.num_key_value_heads", 0, "llm_config.num_key_value_heads=0: write a whole number from 1"),
        (
            "llm_config.num_key_value_heads",
            3,
            "llm_config.num_attention_heads=4 and llm_config.num_key_value_heads=3: the first must be a multiple",
        ),
        ("llm_config.hidden_size", -1, "llm_config.hidden_size=-1"),
        ("llm_config.vocab_size", [], r"vocab_size=\[\]"),
        ("llm_config.tie_word_embeddings", "yes", "llm_config.tie_word_embeddings='yes': write true or false"),
        ("llm_config.rope_scaling", {"type": "dynamic", "factor": "2"}, "ntk_factor='2': write a number"),
        ("llm_config.rope_scaling", {"type": ["x"]}, r"rope scaling \['x'\] is not supported"),
        ("llm_config.rope_scaling", 3, "rope_scaling=3: an object"),
        ("llm_config.rope_theta", -1.0, "llm_config.rope_theta"),
        ("llm_config.architectures", 5, "language model 5 is not supported"),
        ("llm_config", None, "llm_config=None: an object of fields"),
        ("vision_config", [], r"vision_config=\[\]: an object"),
        ("vision_config.norm_type", "batch", "vision_config.norm_type 'batch' is unknown; there are layer_norm"),
        ("vision_config.image_size", 10**9, "vision_config.image_size=1000000000"),
        ("vision_config.layer_norm_eps", True, "vision_config.layer_norm_eps=True: write a number"),
        (
            "vision_config.num_attention_heads",
            5,
            "vision_config.hidden_size=32 and vision_config.num_attention_heads=5",
        ),
        ("force_image_size", 10**9, "force_image_size=1000000000"),
        ("force_image_size", 33, "they must fill the image"),
        ("downsample_ratio", 0.3, "downsample_ratio=0.3: 1 divided by a whole number"),
        ("ps_version", 1, "ps_version 1 is"),
        ("select_layer", {}, "select_layer={} is not supported"),
        ("argenseg", None, "argenseg=None: an object of fields"),
        ("argenseg.vqvae", None, "argenseg.vqvae=None: an object"),
        ("argenseg.vqvae.ch", 0, "argenseg.vqvae.ch=0"),
        ("argenseg.vqvae.patch_nums", [4, 2], r"argenseg.vqvae.patch_nums=\[4, 2\]: scales go from coarse to fine"),
        ("argenseg.vqvae.patch_nums", [1] + [512] * 63, "a mask has at most"),
        ("argenseg.nope", 1, "no such config key"),
        ("argenseg.vocab.base", -13, "argenseg.vocab.base=-13"),
        ("llm_config.head_dim", 7, "an even number"),
        ("argenseg.vqvae.ch_mult", [1] * 40, "pixels along a side"),
    ],
)
def test_values_are_named_by_the_key_of_their_file(tmp_path, key, value, says):
    config = changed(OFFICIAL, key.split(".")[:-1], {**_at(OFFICIAL, key.split(".")[:-1]), key.split(".")[-1]: value})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}/config.json.*{says}"):
        hf_folder.model_cfg(tmp_path)


def _at(document, path):
    for key in path:
        document = document[key]
    return document


@pytest.mark.parametrize("content", [b"null", b"[]", b"3", b"[" * 100000, b'{"a": NaN}', b"\xff\xfe\0", b""])
def test_files_that_are_no_config(folders, content):
    for folder in folders:
        (folder / "config.json").write_bytes(content)
        with pytest.raises(UserError, match="config.json"):
            checkpoint.open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["1b", "8b", "internvl3-8b"])
def test_released_configs_pass(name):
    assert variants.build(hf_config.model_cfg_from_hf(published(name)[0])) == variants.build({"variant": name})
