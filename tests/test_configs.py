"""Every experiment: parses, locks, builds at full size (shapes only), has known sections and layouts."""

import importlib
import pathlib

import jax
import pytest

from argenseg_jax import sharding, trees
from argenseg_jax.interop import hf_folder
from argenseg_jax.models import variants
from argenseg_jax.train import losses, optim, program, run
from configs import common

CONFIGS = sorted(p.stem for p in (pathlib.Path(common.__file__).parent).glob("*.py") if p.stem != "common")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_builds_abstractly(name):
    cfg = importlib.import_module(f"configs.{name}").get_config().lock()
    assert cfg.keys() == common.base().keys()
    cfg = cfg.to_dict()
    model = variants.build({**cfg["model"], "dtype": cfg["train"]["dtype"], "remat": cfg["train"]["remat"]})
    shapes = hf_folder.param_shapes(model)
    assert sharding.param_specs(shapes).keys() == trees.flatten(shapes).keys()
    select = optim.trainable(shapes, cfg["optim"]["freeze"], frozen=("vqvae/.*",))
    optim.build(cfg["optim"], cfg["train"]["steps"], trees.split(shapes, select)[0])
    losses.LMOptions(**cfg["train"]["loss"])
    chunk = cfg["train"]["loss"]["chunk"]
    assert not chunk or cfg["data"]["max_tokens"] % chunk == 0


def test_the_papers_recipe_with_adapters():
    """It trains the adapters, the vocabulary, the connector and the tables; little lies whole on a device."""
    cfg = importlib.import_module("configs.argenseg_8b").get_config("lora=16").lock().to_dict()
    lora = run.adapters(cfg)
    plain = hf_folder.param_shapes(variants.build(cfg["model"]))
    shapes = jax.eval_shape(lambda tree: lora.add(tree, jax.random.key(0)), plain)
    select = optim.trainable(shapes, cfg["optim"]["freeze"], frozen=("vqvae/.*", *lora.held()))
    trained, _ = trees.split(shapes, select)
    optim.build(cfg["optim"], 10, trained)
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    layer = 16 * (4 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336))  # q and o, k and v, the MLP
    assert size({k: v for k, v in trained["llm"].items() if k == "layers"}) == 32 * layer
    assert set(trained["llm"]) == {"layers", "embed", "lm_head"} and set(trained) == {"llm", "connector", "visual"}
    mesh = sharding.make_mesh(dict(dcn_data=1, data=1, fsdp=8, tensor=1), jax.devices()[:8])
    program.check_replicated(shapes, select, mesh, sharding.PARAM_RULES)


def test_the_papers_recipe_is_written_once():
    sizes = {n: importlib.import_module(f"configs.argenseg_{n}").get_config() for n in ("1b", "2b", "4b", "8b")}
    for name, cfg in sizes.items():
        assert cfg.model.variant == name
        cfg.model.variant = "8b"
        assert cfg == sizes["8b"]
    cfg = sizes["8b"]
    assert (cfg.optim.name, cfg.optim.lr, cfg.optim.warmup, cfg.optim.weight_decay) == ("adamw", 4e-5, 0.03, 0.05)
    assert (cfg.train.global_batch, cfg.data.max_tokens, cfg.train.dtype) == (128, 8192, "bfloat16")
    other = importlib.import_module("configs.argenseg_8b").get_config("variant=internvl3-8b,start=a/b")
    assert (other.model.variant, other.init_from) == ("internvl3-8b", "a/b")
