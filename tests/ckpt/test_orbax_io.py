"""Orbax: what is saved comes back bit for bit, into shardings, and other models are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from argenseg_jax.ckpt import orbax_io, params_writer
from argenseg_jax.errors import UserError


def params(seed=0):
    return {
        "llm": {
            "norm": {"scale": jax.random.normal(jax.random.key(seed), (4,))},
            "embed": {"embedding": jnp.arange(12.0).reshape(6, 2)},
        }
    }


def save(workdir, step=3, ema=None, data=None, seed=0, keep=None, best="", numbers=None):
    data = {"index": 5} if data is None else data
    with orbax_io.Checkpointer(str(workdir), keep, best) as checkpoints:
        checkpoints.save(step, params(seed), ema or {}, {"step": jnp.int32(step)}, {"phase": "lm"}, data, numbers)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_state_comes_back(tmp_path):
    data = {"taken": {"0": 5, "1": 6}, "broken": {}}
    ema = {"llm": {"norm": {"scale": jnp.ones(4)}}}
    save(tmp_path, ema=ema, data=data)
    with orbax_io.Checkpointer(str(tmp_path)) as checkpoints:
        assert checkpoints.latest() == 3 and checkpoints.meta(3)["phase"] == "lm"
        got = checkpoints.restore(3, abstract(params()), abstract(ema), abstract({"step": jnp.int32(0)}))
    same(got[:3], (params(), ema, {"step": jnp.int32(3)}))
    assert got[3] == data


def test_params_for_use(tmp_path):
    ema = {"llm": {"norm": {"scale": jnp.full(4, 7.0)}}}
    save(tmp_path, ema=ema)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "3"):
        got = orbax_io.restore_params(str(path))
        assert isinstance(got["llm"]["norm"]["scale"], np.ndarray)
        same(got["llm"]["norm"]["scale"], np.full(4, 7.0, np.float32))
        same(got["llm"]["embed"], params()["llm"]["embed"])
    same(orbax_io.restore_params(str(tmp_path), ema=False), params())


def test_restores_into_shardings(tmp_path):
    save(tmp_path)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec("x")))
    got = orbax_io.restore_params(str(tmp_path), jax.tree.map(place, params()))
    same(got, params())
    assert got["llm"]["embed"]["embedding"].addressable_shards[1].data.shape == (3, 2)


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, seed=step, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]  # nothing is frozen
    same(orbax_io.restore_params(str(tmp_path)), params(3))


@pytest.mark.parametrize("keep", [0, None])
def test_all_are_kept_without_a_limit(tmp_path, keep):
    for step in (1, 2, 3):
        save(tmp_path, step, seed=step, keep=keep)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "3"]
    same(orbax_io.restore_params(str(tmp_path)), params(3))


@pytest.mark.parametrize("best, best_step", [("min:loss", 2), ("max:loss", 4), ("", 6)])
def test_the_best_step_is_not_removed(tmp_path, best, best_step):
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0, None, 3.0), 1):
        numbers = {} if loss is None else {"loss": loss, "lr": 1.0}
        save(tmp_path, step, seed=step, keep=1, best=best, numbers=numbers)
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert steps == sorted({best_step, 6})
    with orbax_io.Checkpointer(str(tmp_path), best=best, read_only=True) as checkpoints:
        assert checkpoints.best_step() == (best_step if best else None)
    with pytest.raises(UserError, match="keep_best='loss': write min:NAME or max:NAME"):
        orbax_io.Checkpointer(str(tmp_path), best="loss")


def frozen(value):
    return {"llm": {"base": {"kernel": jnp.full((2, 3), value)}}}


def test_what_is_frozen_is_written_once_a_phase(tmp_path):
    """Three phases: the steps of the first two refer to their own; later ones vanish with their steps."""

    def saved(checkpoints, step, value, index):
        checkpoints.save(
            step,
            params(step),
            {},
            {"step": jnp.int32(step)},
            {"phase": "lm"},
            {"index": index},
            frozen=value and frozen(value),
        )

    folder = tmp_path / "checkpoints" / "frozen"
    with orbax_io.Checkpointer(str(tmp_path), keep=2) as checkpoints:
        saved(checkpoints, 1, 1.0, 0)
        saved(checkpoints, 2, 1.0, 0)
        assert [p.name for p in folder.iterdir()] == ["1"]
        checkpoints.begin_phase()
        saved(checkpoints, 3, 7.0, 0)
    (folder / "9" / "params.orbax-checkpoint-tmp").mkdir(parents=True)  # a kill has left this
    for step, value in ((2, 1.0), (3, 7.0)):
        path = tmp_path / "checkpoints" / str(step)
        whole = {"llm": {**params(step)["llm"], **frozen(value)["llm"]}}
        same(orbax_io.restore_params(path), whole)
        orbax_io.check_shapes(path, whole)
        leaves = orbax_io.open_params(path)
        same(leaves["llm/base/kernel"][...], frozen(value)["llm"]["base"]["kernel"])
    with orbax_io.Checkpointer(str(tmp_path), keep=2) as checkpoints:
        got = checkpoints.restore(3, abstract(whole), {}, abstract({"step": jnp.int32(0)}))
        same(got[0], whole)
        saved(checkpoints, 4, 7.0, 1)  # the same phase continues
        saved(checkpoints, 5, 7.0, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "5", "frozen"]
    assert [p.name for p in folder.iterdir()] == ["3"]
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="5 lacks what was frozen in training, .*frozen/3/params: copy"):
        orbax_io.restore_params(tmp_path)


def test_states_of_several_processes_are_one():
    states = [{"taken": {"0": 3, "1": 4}, "step": 7}, {"taken": {"1": 4, "2": 5}, "step": 7}]
    assert orbax_io._merged(states) == {"taken": {"0": 3, "1": 4, "2": 5}, "step": 7}


def test_a_half_written_step_does_not_count(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp-1" / "params").mkdir(parents=True)
    with orbax_io.Checkpointer(str(tmp_path)) as checkpoints:
        assert checkpoints.latest() == 3
    assert orbax_io.find_step(str(tmp_path)).name == "3"


def test_another_model_is_refused(tmp_path):
    save(tmp_path)
    other = abstract(params())
    other["llm"]["norm"]["scale"] = jax.ShapeDtypeStruct((5,), jnp.float32)
    other["llm"]["new"] = {"bias": jax.ShapeDtypeStruct((1,), jnp.float32)}
    with pytest.raises(UserError, match=r"missing llm/new/bias; .*scale has shape \(4,\), not \(5,\)"):
        orbax_io.restore_params(str(tmp_path), other)
    with orbax_io.Checkpointer(str(tmp_path)) as checkpoints:
        with pytest.raises(UserError, match="llm/new/bias"):
            checkpoints.restore(3, other, {}, {"step": jnp.int32(0)})
        with pytest.raises(UserError, match="another optimizer or task"):
            checkpoints.restore(3, abstract(params()), {}, abstract({"step": jnp.int32(0), "mu": jnp.ones(3)}))


@pytest.mark.parametrize("ema", [False, True])
def test_layers_are_read_one_by_one(tmp_path, ema):
    """As training saves them, as save_params does, and in one chunk as older checkpoints have them."""
    tree = {"llm": {"layers": {"w": jnp.arange(60.0).reshape(5, 4, 3)}, "scale": jnp.ones(3)}}
    averaged = {"llm": {"layers": {"w": -tree["llm"]["layers"]["w"]}}} if ema else {}
    with orbax_io.Checkpointer(str(tmp_path / "a")) as checkpoints:
        checkpoints.save(1, tree, averaged, {"step": jnp.int32(1)}, {}, {})
    orbax_io.save_params(str(tmp_path / "b"), tree)
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "c" / "params", tree)
    for name in "abc":
        leaves = orbax_io.open_params(tmp_path / name)
        want = orbax_io.restore_params(tmp_path / name)["llm"]
        assert set(leaves) == {"llm/layers/w", "llm/scale"}
        stack = leaves["llm/layers/w"]
        assert stack.shape == (5, 4, 3) and stack._layers == ((5,) if name == "c" else (1,))
        for i in (3, 0, 4):
            same(stack[i], want["layers"]["w"][i])
        same(leaves["llm/scale"][...], want["scale"])


def test_slices_are_written_one_by_one(tmp_path):
    tree = {"layers": {"w": np.arange(24.0, dtype=np.float32).reshape(3, 4, 2)}, "zero": np.zeros((2, 2), np.int32)}
    shapes = {
        "layers/w": jax.ShapeDtypeStruct((3, 4, 2), jnp.bfloat16),
        "zero": jax.ShapeDtypeStruct((2, 2), jnp.int32),
    }
    with params_writer.ParamsWriter(tmp_path / "0", shapes) as writer:
        for i in (2, 0, 1):
            writer.write("layers/w", (i,), tree["layers"]["w"][i])
        writer.write("zero", (slice(2), slice(1)), tree["zero"][:, :1])  # the corner that is filled
    got = orbax_io.restore_params(tmp_path)
    assert got["layers"]["w"].dtype == jnp.bfloat16 and got["zero"].dtype == np.int32
    same({**got, "layers": {"w": got["layers"]["w"].astype(np.float32)}}, tree)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    want = {
        "layers": {
            "w": jax.ShapeDtypeStruct((3, 4, 2), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "x")))
        },
        "zero": jax.ShapeDtypeStruct((2, 2), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec())),
    }
    same(orbax_io.restore_params(tmp_path, want), tree)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        orbax_io.restore_params(str(tmp_path))
    save(tmp_path)
    with pytest.raises(UserError, match="no config.json"):
        orbax_io.find_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3}))
    for path in (tmp_path, tmp_path / "checkpoints" / "3"):
        assert orbax_io.find_config(str(path)) == {"seed": 3}
