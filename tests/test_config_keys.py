"""The table of the config's keys: it names what configs/common.py does, and refuses what means nothing."""

import copy
import importlib
import json
import pathlib
import re

import numpy as np
import pytest

from argenseg_jax import config_keys
from argenseg_jax.data.sources import templates
from argenseg_jax.errors import UserError
from argenseg_jax.eval.metrics import registry
from argenseg_jax.models import layers, variants
from configs import common

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "common")


def flat(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


DEFAULTS = dict(flat(common.base().to_dict()))
NUMBERS = sorted(key for key, known in config_keys.KEYS.items() if "number" in known.rule and "tuple" not in known.rule)
# Every other number has a least value above 0.
ZERO = {
    "seed",
    "vqvae.steps",
    "data.max_labels",
    "data.workers",
    "data.threads",
    "data.pack",
    "data.sample_tiles",
    "data.max_masks",
    "data.max_pixels",
    "data.recolour",
    "data.prompt_drop",
    "data.max_broken",
    "train.steps",
    "train.microbatch",
    "train.keep",
    "train.sample_every",
    "train.max_skipped",
    "train.lora.rank",
    "train.lora.alpha",
    "train.loss.soft_targets",
    "train.loss.scale_power",
    "train.loss.foreground",
    "train.loss.text",
    "train.loss.corrupt",
    "train.loss.chunk",
    *(
        f"{part}.{name}"
        for part in ("optim", "vqvae")
        for name in ("lr", "adam_lr", "warmup", "decay", "final", "b1", "b2", "momentum", "weight_decay", "clip", "ema")
    ),
    "model.vision.ls_init",
    "model.vision.drop_path",
    "model.vqvae.num_res_blocks",
    "model.vqvae.beta",
    "model.vqvae.dead_zone",
    "model.vqvae.phi_ratio",
    "model.vocab.eos",
    "model.vocab.pad",
}
MINUS = {"mesh.dcn_data", "mesh.data", "mesh.fsdp", "mesh.tensor", "model.vision.ls_init", "model.vqvae.phi_ratio"}


def with_value(key, value):
    config = common.base().to_dict()
    config_keys.assign(config, key, value)
    return config


def test_the_table_and_the_defaults_name_the_same_keys():
    rest = {key for key in config_keys.KEYS if not re.match(r"model\.(?!variant)", key)}
    assert rest == set(DEFAULTS)
    fields = {
        f"{part}.{name}"
        for spec in variants.VARIANTS.values()
        for part, keys in spec.items()
        if isinstance(keys, dict)
        for name in keys
    }
    assert fields <= set(config_keys.MODEL)
    for part, module in (
        ("vision", variants.InternViT),
        ("llm", variants.DecoderLM),
        ("vqvae", variants.VQVAE),
        ("connector", variants.Connector),
        ("vocab", variants.Vocab),
    ):
        names = {key.partition(".")[2] for key in config_keys.MODEL if key.startswith(f"{part}.")}
        assert names <= set(module.__dataclass_fields__)


def test_names_that_other_files_define():
    assert config_keys.METRICS == tuple(registry.METRICS)
    assert config_keys.PROMPTS == tuple(templates.PROMPTS)
    assert set(config_keys.REMAT) == set(layers.REMAT_POLICIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_passes(name):
    config_keys.check(importlib.import_module(f"configs.{name}").get_config())


def test_every_variant_passes_resolved_and_as_json():
    for name in variants.VARIANTS:
        spec = variants.resolve({"variant": name})
        config_keys.check_model(spec)
        config_keys.check({"model": json.loads(json.dumps(spec))}, saved="config.json")


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_that_mean_nothing(key):
    """Each is one line with the key and the rule; what is right for this key passes."""
    for value in (float("nan"), float("inf"), float("-inf"), 2**40, 10**5000, "x", (5,), [], True, {}, object()):
        with pytest.raises(UserError, match=rf"^{re.escape(key)}[ =].*(write|keys is expected)") as error:
            config_keys.check(with_value(key, value))
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    for value, passes in ((0, key in ZERO), (-1, key in MINUS)):
        if passes:
            config_keys.check(with_value(key, value))
        else:
            with pytest.raises(UserError, match=re.escape(key)):
                config_keys.check(with_value(key, value))


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("data.sources", (5,), "texts"),
        ("data.sources", ("",), "texts"),
        ("data.sources", "a", "tuple"),
        ("data.root", "a\0b", "a text"),
        ("init_from", "\udcff", "a text"),
        ("init_from", None, "None is not allowed"),
        ("data.system", 3, "None (= the official message)"),
        ("optim.freeze", ("(",), "regular expressions"),
        ("optim.freeze", (5,), "regular expressions"),
        ("optim.matrices", ("(",), "regular expressions"),
        ("optim.groups", (("a",),), "pairs"),
        ("optim.groups", ((".*", -1.0),), "pairs"),
        ("optim.groups", (("(", 1.0),), "pairs"),
        ("optim.groups", (), "pairs"),
        ("train.lora.targets", ("(",), "regular"),
        ("train.lora.also", (1,), "regular"),
        ("train.keep_best", "loss", "min:NAME"),
        ("eval.prompt", "none", "{sent}"),
        ("eval.metric", "x", "unknown"),
        ("eval.masks", "x", "first, union"),
        ("eval.data", (5,), "texts"),
        ("optim.name", "sgd", "adamw"),
        ("optim.schedule", "sine", "wsd"),
        ("train.dtype", "float99", "bfloat16"),
        ("train.remat", None, "None"),
        ("data.augment", 1, "true or false"),
        ("model.vqvae.patch_nums", (), "whole numbers"),
        ("model.vqvae.patch_nums", (1, 2.5), "whole numbers"),
        ("model.llm", 5, "section"),
        ("train", None, "section"),
        ("train.nope", 1, "no such config key"),
        ("nope", 1, "no such config key: nope"),
        ("train.stepz", 1, "did you mean train.steps?"),
        ("model.llm.dtype", "bfloat16", "no such config key"),
        ("train.max_tokens", 1, "did you mean data.max_tokens?"),
    ],
)
def test_other_values_that_mean_nothing(key, value, says):
    with pytest.raises(UserError, match=re.escape(says)):
        config_keys.check(with_value(key, value))


def test_a_section_or_key_that_is_missing():
    for key in ("data", "train.loss", "seed", "optim.lr", "model"):
        config = common.base().to_dict()
        holder = config
        *sections, name = key.split(".")
        for section in sections:
            holder = holder[section]
        del holder[name]
        with pytest.raises(UserError, match=f"has no .*{key.split('.')[0]}.*start from common.base"):
            config_keys.check(config)


def test_a_saved_config_of_another_version_passes():
    """Keys may be missing or unknown; how the run was trained is not judged again; what is used is."""
    saved = json.loads(json.dumps(common.base().to_dict()))
    saved["train"] |= {"keep": -1, "log_every": 0, "later": 1}
    saved["eval"] |= {"prompt": "no place", "masks": "x", "data": [5]}  # `evaluate` says so
    saved["data"]["pack"] = -1
    saved["data"]["later"] = saved["later"] = {"x": 1}
    del saved["optim"], saved["data"]["max_broken"]
    config_keys.check(saved, saved="w/config.json")
    for key, value in (("data.max_tiles", -3), ("model.llm", 5), ("data", []), ("train.lora.rank", "x")):
        wrong = copy.deepcopy(saved)
        config_keys.assign(wrong, key, value)
        with pytest.raises(UserError, match=f"^w/config.json: {key}="):
            config_keys.check(wrong, saved="w/config.json")
    for strange in ([], None, 5):
        with pytest.raises(UserError, match="^w/config.json: .* is no config"):
            config_keys.check(strange, saved="w/config.json")


def test_a_model_section_names_its_file():
    with pytest.raises(UserError, match=r"^config.json: llm.width='x': write a whole number"):
        config_keys.check_model({"llm": {"width": "x"}}, "config.json")
    with pytest.raises(UserError, match=r"^model.llm.width='x'"):
        config_keys.check_model({"llm": {"width": "x"}})


@pytest.mark.parametrize("key", sorted(DEFAULTS))
def test_text_and_value_undo_each_other(key):
    value = DEFAULTS[key]
    assert config_keys.parse(key, config_keys.spell(value)) == value


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.system", None),
        ("data.system", "None"),
        ("data.system", "'None'"),
        ("data.system", "'quoted'"),
        ("data.system", ""),
        ("data.system", "\"a' b"),
        ("init_from", "None"),
        ("data.sources", ("a b*2", "c'd", '"')),
        ("data.sources", ("a,b",)),
        ("optim.lr", 1e-300),
        ("data.root", "日本 語"),
        ("eval.prompt", "'{sent}'"),
        ("optim.groups", ((r"a\d", 0.5), (".*", 1))),
        ("mesh.data", -1),
    ],
)
def test_odd_values_come_back_from_their_text(key, value):
    assert config_keys.parse(key, config_keys.spell(value)) == value


def test_numpy_values_are_spelled_as_numbers():
    assert config_keys.spell(np.float64(1e-4)) == "0.0001" and config_keys.spell(np.int64(3)) == "3"
    assert config_keys.spell(np.bool_(True)) == "True"
    assert config_keys.spell(np.array([1, 2])) == "(1, 2)" == config_keys.spell([np.int32(1), 2])
    assert type(config_keys.plain({"a": [np.float32(1)]})["a"][0]) is float


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("data.sources", "a.jsonl", ("a.jsonl",)),
        ("data.sources", "('a', 'b')", ("a", "b")),
        ("data.sources", "['a']", ("a",)),
        ("data.augment", "true", True),
        ("optim.lr", "1", 1.0),
        ("train.steps", "2_048", 2048),
        ("mesh.fsdp", "-1", -1),
        ("data.system", "None", None),
    ],
)
def test_texts_of_flags(key, text, value):
    assert config_keys.parse(key, text) == value


@pytest.mark.parametrize(
    "key, text",
    [
        ("train.steps", "1e3"),
        ("train.steps", "10.0"),
        ("train.steps", "None"),
        ("optim.lr", "1e-3x"),
        ("optim.lr", "nan"),
        ("optim.lr", "1e999"),
        ("data.sources", "('a'"),
        ("data.sources", "(" * 10**5),
        ("train.steps", "9" * 5000),
        ("seed", ""),
        ("init_from", "None"),
        ("data.augment", "maybe"),
    ],
)
def test_texts_that_are_refused(key, text):
    with pytest.raises(UserError, match=key) as error:
        config_keys.parse(key, text)
    assert len(str(error.value)) < 300
