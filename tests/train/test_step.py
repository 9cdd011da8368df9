"""The step: accumulation, frozen and overridden parameters, steps that are not finite, devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax import sharding, trees
from argenseg_jax.train import optim
from argenseg_jax.train import step as step_lib
from tests.train import toy

STEADY = 1e-4  # AdamW's eps: a gradient of rounding errors only must not become a full update


def build(*, task=None, microbatches=1, ema=0.0, freeze=("visual/lvl_embed",), **section):
    """(initial state, step function) of the toy task."""
    task = task or toy.task()
    cfg = toy.config()["optim"] | section
    params = toy.init(jax.random.key(0))
    select = optim.trainable(params, freeze, task.frozen)
    tx = optim.build(cfg, 20, trees.split(params, select)[0])
    state = step_lib.init_state(params, tx, select, ema=ema, extra=task.init_extra(params))
    return state, step_lib.make_train_step(task, tx, select, seed=0, microbatches=microbatches, ema=ema)


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("count", [2, 4])
def test_accumulation_equals_the_full_batch(count):
    task = toy.task(dropout=False)
    state, full = build(task=task)
    _, parts = build(task=task, microbatches=count)
    batch = {k: jnp.asarray(v) for k, v in toy.batch(0).items()}
    a, m = jax.jit(full)(state, batch)
    b, n = jax.jit(parts)(state, batch)
    close(m, n, rtol=1e-5)
    # Examples of weight 0 are distributed unevenly: a mean of the microbatches' own means would be wrong.
    assert len({float(batch["weight"][i::count].sum()) for i in range(count)}) > 1
    trained = lambda s: trees.split(s.params, lambda p: not p.startswith("vqvae"))[0]
    close(trained(a), trained(b), rtol=1e-4, atol=1e-6)
    assert float(a.extra["seen"]) == float(b.extra["seen"]) == batch["weight"].sum()


def test_frozen_parameters_are_unchanged_and_have_no_state():
    state, step = build(name="muon", matrices=("connector/.*/kernel",), weight_decay=0.1, ema=0.5)
    moments = {
        "/".join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))
        for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    assert not any("lvl_embed" in m or "codebook" in m for m in moments)
    assert any("word_embed" in m for m in moments)
    assert "lvl_embed" not in str(jax.tree.structure(state.ema))
    after = state
    for i in range(3):
        after, _ = jax.jit(step)(after, toy.batch(i))
    before, now = trees.flatten(state.params), trees.flatten(after.params)
    changed = {path for path in before if np.any(before[path] != now[path])}
    unused = {"visual/pos_embed", "visual/word_embed/bias"}  # by the loss
    assert changed == set(before) - {"visual/lvl_embed"} - unused
    assert before["visual/lvl_embed"].tobytes() == now["visual/lvl_embed"].tobytes()


def test_overrides_are_set_directly():
    state, step = build()
    batch = toy.batch(0)
    after, _ = step(state, batch)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 0), 0)
    _, aux = toy.loss(state.params, state.extra, batch, key, {"examples": batch["weight"].sum()})
    close(after.params["vqvae"]["quantizer"]["codebook"], aux.overrides["vqvae/quantizer/codebook"], rtol=1e-4)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    state, step = build(ema=0.9)
    bad = toy.batch(0) | {"y": np.full((8, toy.OUT), np.nan, np.float32)}
    after, metrics = step(state, bad)
    assert not np.isfinite(metrics["loss"])
    assert (int(after.step), int(after.skipped)) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, state.replace(step=0, skipped=0), after.replace(step=0, skipped=0))
    after, _ = step(after, toy.batch(1))
    assert (int(after.step), int(after.skipped)) == (2, 1)
    assert np.any(after.params["connector"]["fc1"]["kernel"] != state.params["connector"]["fc1"]["kernel"])


def test_ema_forgets_the_initial_weights_and_then_averages():
    state, step = build(ema=0.75)
    path = ("connector", "fc1", "kernel")
    get = lambda tree: np.asarray(tree[path[0]][path[1]][path[2]], np.float64)
    want = get(state.params)
    for t in range(4):
        state, _ = step(state, toy.batch(t))
        decay = min(0.75, (1 + t) / (10 + t))
        want = decay * want + (1 - decay) * get(state.params)
    np.testing.assert_allclose(get(state.ema), want, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def one_device():
    """(state, metrics) after four steps."""
    state, step = build(microbatches=2, ema=0.9, eps=STEADY)
    step = jax.jit(step)
    for i in range(4):
        state, metrics = step(state, toy.batch(i))
    return state, metrics


@pytest.mark.parametrize(
    "sizes", [dict(data=4), dict(fsdp=2, data=2), dict(tensor=4, fsdp=2), dict(dcn_data=2, fsdp=2)], ids=str
)
def test_devices_do_not_change_the_result(sizes, one_device):
    state, step = build(microbatches=2, ema=0.9, eps=STEADY)
    cfg = dict(dcn_data=1, data=1, fsdp=1, tensor=1) | sizes
    mesh = sharding.make_mesh(cfg, jax.devices()[: int(np.prod(list(cfg.values())))])
    layout = step_lib.state_shardings(jax.eval_shape(lambda: state), mesh)
    fc1 = layout.params["connector"]["fc1"]["kernel"].spec
    assert fc1 == layout.ema["connector"]["fc1"]["kernel"].spec  # averages are sharded like their weights
    assert fc1 in {s.spec for s in jax.tree.leaves(layout.opt_state)}
    state = jax.device_put(state, layout)
    with jax.set_mesh(mesh):
        sharded = jax.jit(step, out_shardings=(layout, None), donate_argnums=0)
        for i in range(4):
            state, metrics = sharded(state, sharding.global_batch(mesh, toy.batch(i)))
    close(metrics, one_device[1], rtol=1e-5)
    close(state, one_device[0], rtol=1e-4, atol=1e-5)
    shard = state.params["connector"]["fc1"]["kernel"].addressable_shards[0].data.shape
    assert shard == (toy.WIDTH // cfg["fsdp"], 16 // cfg["tensor"])


def test_overrides_must_be_frozen():
    task = dataclasses.replace(toy.task(), frozen=())
    state, step = build(task=task, freeze=())
    with pytest.raises(KeyError, match="codebook"):
        step(state, toy.batch(0))
