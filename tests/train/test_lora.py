"""Adapters: merged == adapted, nothing else learns, and what a run with them leaves behind."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax import sharding, trees
from argenseg_jax.ckpt import checkpoint, orbax_io, transfer
from argenseg_jax.errors import UserError
from argenseg_jax.models.lora import Lora, is_adapter
from argenseg_jax.train import losses, run
from configs import common
from tests import tiny

EVERYWHERE = (r"(llm|vision)/layers/.*", r"connector/.*")


def noisy(params, lora):
    """The tree with adapters that add something."""
    added = lora.add(params, jax.random.key(0))
    draw = lambda name, x: (
        x if not name.endswith("lora_b") else 0.1 * jax.random.normal(jax.random.key(len(name)), x.shape)
    )
    return trees.map_named(draw, added)


def test_merged_weights_give_what_adapted_ones_do():
    """Every kind of kernel: attention in and out, MLP, connector; with biases and without."""
    model, params = tiny.made("qwen")
    lora = Lora(rank=3, alpha=1.5, targets=EVERYWHERE)
    params = jax.tree.map(jnp.asarray, params)
    batch = tiny.batch(model, [tiny.sample(0), tiny.sample(1)])
    opts = losses.LMOptions()
    norm = losses.lm_task(model, opts).normalizer(batch)

    @jax.jit
    def loss(params):
        return losses.lm_loss(model, params, batch, jax.random.key(0), norm, opts, deterministic=True)[0]

    fresh, trained = lora.add(params, jax.random.key(0)), noisy(params, lora)
    kernels = {path.replace("lora_a", "kernel") for path in trees.flatten(fresh) if path.endswith("lora_a")}
    assert len(kernels) == 7 + 6 + 2 and kernels <= set(trees.flatten(params))
    assert float(loss(lora.adapted(fresh))) == float(loss(params))
    merged = lora.merged(trained)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert abs(float(loss(merged)) - float(loss(params))) > 1e-2
    assert float(loss(lora.adapted(trained))) == pytest.approx(float(loss(merged)), rel=1e-5)
    o = "llm/layers/attn/o"
    flat, by_hand = (
        trees.flatten(trained),
        0.5 * np.einsum("LIr,LrO->LIO", *(trees.flatten(trained)[f"{o}/lora_{side}"] for side in "ab")),
    )
    np.testing.assert_allclose(
        trees.flatten(merged)[f"{o}/kernel"] - flat[f"{o}/kernel"],
        by_hand.reshape(flat[f"{o}/kernel"].shape),
        atol=1e-5,
    )


def test_mistakes():
    _, params = tiny.made()
    for key, wrong in (("targets", r"llm/lm_head/.*"), ("also", r"visuals/.*")):
        with pytest.raises(UserError, match=f"train.lora.{key}: '{wrong[:6]}.*' matches nothing; there are"):
            Lora(rank=2, **{key: (wrong,)}).add(params, jax.random.key(0))
    assert Lora().held() == () and Lora().add(params, jax.random.key(0)) == params
    assert Lora(rank=2, alpha=4).scale == 2 and Lora(rank=2).scale == 1


def test_adapters_have_their_sharding_rules():
    model, _ = tiny.made()
    shapes = jax.eval_shape(run.init_fn(model, Lora(rank=4, targets=EVERYWHERE)), jax.random.key(0))
    specs = sharding.param_specs(shapes)
    assert specs["llm/layers/attn/o/lora_a"] == jax.sharding.PartitionSpec(None, "fsdp", None)
    assert specs["llm/layers/attn/q/lora_b"] == jax.sharding.PartitionSpec(None, None, "fsdp")
    assert specs["connector/fc1/lora_a"] == jax.sharding.PartitionSpec("fsdp", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir of a run with adapters and a trained table, its config, the weights it began with)."""
    root = tmp_path_factory.mktemp("lora")
    start = tiny.workdir(root / "start")
    cfg = common.base().to_dict()
    cfg |= {"model": tiny.config(), "init_from": str(start)}
    cfg["data"] |= {"sources": ("shapes:simple:train",), "max_tokens": 96, "system": ""}
    cfg["optim"] |= {"lr": 0.01, "warmup": 0, "schedule": "constant", "weight_decay": 0.5}
    cfg["train"] |= {"steps": 2, "global_batch": 8, "dtype": "float32", "remat": "none", "checkpoint_every": 1}
    cfg["train"]["lora"] |= {"rank": 2, "alpha": 4.0, "also": ("visual/lvl_embed",)}
    run.train(cfg, str(root / "w"))
    return root / "w", cfg, tiny.made()[1]


def test_only_the_adapters_learn(trained):
    workdir, _, before = trained
    after = trees.flatten(orbax_io.restore_params(workdir))
    for name, leaf in trees.flatten(before).items():
        same = np.asarray(after[name]).tobytes() == np.asarray(leaf).tobytes()
        assert same == (name != "visual/lvl_embed"), name
    adapters = {name for name in after if is_adapter(name)}
    assert len(adapters) == 14 and all(np.any(after[name]) for name in adapters)
    moments = trees.flatten(jax.tree.map(lambda x: x, orbax_io.read_train(workdir)["opt_state"][1]["mu"]))
    assert set(moments) == adapters | {"visual/lvl_embed"}


def test_the_base_is_written_once(trained):
    workdir, _, _before = trained
    folder = workdir / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "frozen"]
    assert [p.name for p in (folder / "frozen").iterdir()] == ["1"]
    for step in "12":
        saved = set(trees.flatten(orbax_io._saved_shapes(folder / step / "params")))
        assert all(is_adapter(name) for name in saved - {"visual/lvl_embed"})


def test_a_run_with_adapters_resumes_bit_for_bit(trained, tmp_path):
    workdir, cfg, _ = trained
    shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "2")
    run.train(cfg, str(tmp_path / "w"))
    for read in (orbax_io.restore_params, orbax_io.read_train):
        again, want = read(tmp_path / "w"), read(workdir)
        jax.tree.map(np.testing.assert_array_equal, again, want)


def test_whoever_uses_the_run_gets_merged_weights(trained, tmp_path):
    workdir, cfg, before = trained
    raw = orbax_io.restore_params(workdir)
    want = trees.flatten(run.adapters(cfg).merged(raw))
    opened = checkpoint.open_checkpoint(str(workdir))
    got = trees.flatten(opened.load_params())
    kernel = "llm/layers/mlp/down/kernel"
    assert got.keys() == want.keys() == trees.flatten(before).keys()
    assert np.abs(got[kernel] - trees.flatten(before)[kernel]).max() > 1e-4
    transfer.to_hf(opened, tmp_path / "hf")
    exported = trees.flatten(checkpoint.open_checkpoint(str(tmp_path / "hf")).load_params())
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
        np.testing.assert_allclose(exported[name], want[name], atol=1e-6, err_msg=name)
