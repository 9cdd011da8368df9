"""Optimizers: schedules by hand, Muon per layer matrix, groups, decay and freezing by path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from argenseg_jax import trees
from argenseg_jax.errors import UserError
from argenseg_jax.train import optim
from configs import common

PARAMS = trees.unflatten(
    {
        "llm/layers/attn/q/kernel": jnp.ones((2, 6, 2, 4)),
        "llm/layers/attn/o/kernel": jnp.ones((2, 2, 4, 6)),
        "llm/layers/mlp/gate/kernel": jnp.ones((2, 6, 5)),
        "llm/layers/norm/scale": jnp.ones((2, 6)),
        "llm/embed/embedding": jnp.ones((7, 6)),
    }
)


def section(**changes):
    return common.optimizer(lr=0.1, warmup=0, schedule="constant", weight_decay=0.0, clip=0.0) | changes


def grads(seed=0):
    flat = trees.flatten(PARAMS)
    keys = jax.random.split(jax.random.key(seed), len(flat))
    return trees.unflatten({n: jax.random.normal(k, x.shape) for k, (n, x) in zip(keys, flat.items())})


def updates(cfg, g=None, steps=10):
    tx = optim.build(cfg, steps, PARAMS)
    return trees.flatten(tx.update(g or grads(), tx.init(PARAMS), PARAMS)[0])


def test_schedules():
    rate = lambda **c: np.array([float(optim.schedule(section(lr=1.0, **c), 10)(t)) for t in range(10)])
    np.testing.assert_allclose(rate(warmup=4)[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(rate(warmup=0.4), rate(warmup=4))
    cosine = rate(schedule="cosine", warmup=0, final=0.2)
    np.testing.assert_allclose(cosine, 0.2 + 0.4 * (1 + np.cos(np.pi * np.arange(10) / 10)), rtol=1e-5)
    wsd = rate(schedule="wsd", warmup=2, decay=0.5)
    np.testing.assert_allclose(wsd[2:], [1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], rtol=1e-5)
    with pytest.raises(UserError, match="optim.schedule='linear'"):
        rate(schedule="linear")


def test_adamw_first_update_is_the_sign():
    for path, u in updates(section()).items():
        np.testing.assert_allclose(np.abs(u), 0.1, rtol=1e-4, err_msg=path)


def test_adafactor_stores_rows_and_columns():
    """A large matrix has two vectors of state; the update of a rank-one square is the gradient's sign."""
    params = {"llm": {"layers": {"mlp": {"gate": {"kernel": jnp.ones((2, 128, 256))}}}}}
    tx = optim.build(section(name="adafactor"), 10, params)
    state = tx.init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) < 2 * (128 + 256) + 8
    sign = jnp.where(jnp.arange(128)[:, None] % 3 == 0, 1.0, -1.0)
    grads = jax.tree.map(lambda x: x * sign * jnp.arange(1, 257), params)
    got, _ = tx.update(grads, state, params)
    want = jnp.broadcast_to(-0.1 * sign, (2, 128, 256))
    np.testing.assert_allclose(got["llm"]["layers"]["mlp"]["gate"]["kernel"], want, rtol=1e-3)


def test_muon_orthogonalises_each_layer_as_one_matrix():
    got = updates(section(name="muon", adam_lr=0.01))
    q = np.asarray(got["llm/layers/attn/q/kernel"]).reshape(2, 6, 8)
    o = np.asarray(got["llm/layers/attn/o/kernel"]).reshape(2, 8, 6)
    gate = np.asarray(got["llm/layers/mlp/gate/kernel"])
    for name, layers in (("q", q), ("o", o), ("gate", gate)):
        fan = np.sqrt(max(1.0, layers.shape[2] / layers.shape[1]))
        for layer in layers:
            values = np.linalg.svd(layer, compute_uv=False) / (0.1 * fan)
            assert values.min() > 0.3 and values.max() < 1.3, (name, values)
    for name in ("llm/layers/norm/scale", "llm/embed/embedding"):  # AdamW with its own learning rate
        np.testing.assert_allclose(np.abs(got[name]), 0.01, rtol=1e-4)


def test_muon_layers_do_not_mix():
    g, other = grads(), grads(1)
    path = "llm/layers/mlp/gate/kernel"
    mixed = trees.flatten(g)[path].at[1].set(trees.flatten(other)[path][1])
    a, b = (updates(section(name="muon"), x)[path] for x in (g, trees.replace(g, {path: mixed})))
    np.testing.assert_allclose(a[0], b[0], atol=1e-6)
    assert np.abs(a[1] - b[1]).max() > 0.01


def test_weight_decay_on_matrices_only():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    for path, u in updates(section(weight_decay=0.5), zero).items():
        np.testing.assert_allclose(u, 0.0 if path.endswith("scale") else -0.05, atol=1e-7, err_msg=path)


def test_groups_scale_the_rate_and_the_first_match_wins():
    got = updates(section(groups=((".*/attn/.*", 0.5), ("llm/layers/.*", 0.0), (".*", 1.0))))
    rates = {path: float(jnp.abs(u).max()) for path, u in got.items()}
    assert rates["llm/layers/attn/q/kernel"] == pytest.approx(0.05, rel=1e-3)
    assert rates["llm/layers/mlp/gate/kernel"] == 0
    assert rates["llm/embed/embedding"] == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(UserError, match="optim.groups does not cover llm/embed/embedding"):
        optim.build(section(groups=(("llm/layers/.*", 1.0),)), 10, PARAMS)


def test_clipping_uses_the_global_norm():
    tx = optim.build(section(clip=1.0, name="adamw", b1=0.0, b2=0.0, eps=1.0), 10, PARAMS)
    g = jax.tree.map(lambda x: x * 100, grads())
    u, _ = tx.update(g, tx.init(PARAMS), PARAMS)
    scaled = jax.tree.map(lambda x: x / optax.tree.norm(g), g)
    want = jax.tree.map(lambda x: -0.1 * x / (jnp.abs(x) + 1.0), scaled)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), u, want)


def test_freezing():
    select = optim.trainable(PARAMS, (r"llm/embed/.*",), frozen=(r".*/scale",))
    assert [p for p in trees.flatten(PARAMS) if not select(p)] == ["llm/layers/norm/scale", "llm/embed/embedding"]
    with pytest.raises(UserError, match="'lm/.*' matches no parameter"):
        optim.trainable(PARAMS, ("lm/.*",))
    with pytest.raises(UserError, match="no parameter to train"):
        optim.trainable(PARAMS, (".*",))
    with pytest.raises(UserError, match="optim.name='sgd'"):
        optim.build(section(name="sgd"), 10, PARAMS)
