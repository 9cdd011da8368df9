"""The LM loss: its parts by hand, batches that lack a part, chunks, microbatches, each option."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from argenseg_jax import trees
from argenseg_jax.models import layers, variants
from argenseg_jax.train import losses, optim
from argenseg_jax.train import step as step_lib
from argenseg_jax.vocab import IGNORE
from configs import common
from tests import tiny

PLAIN = losses.LMOptions()


@functools.cache
def compiled(opts, deterministic=True, form="qwen"):
    """(params, batch, rng, norm) -> (loss, metrics) of a form."""
    model, _ = tiny.made(form)

    def run(params, batch, rng, norm):
        value, aux = losses.lm_loss(model, params, batch, rng, norm, opts, deterministic=deterministic)
        return value, aux.metrics

    return jax.jit(run)


def loss(batch, opts=PLAIN, *, norm=None, seed=0, deterministic=True):
    """{metric: float} of a batch, normalised by its own counts."""
    model, params = tiny.made("qwen")
    norm = norm or losses.lm_task(model, opts).normalizer(batch)
    value, metrics = compiled(opts, deterministic)(params, batch, jax.random.key(seed), norm)
    assert float(value) == float(metrics["loss"])
    return {k: float(v) for k, v in metrics.items()}


@pytest.fixture(scope="module")
def batch():
    """Rows of two masks, one mask and text alone."""
    model, _ = tiny.made("qwen")
    return tiny.batch(
        model, [tiny.sample(0, masks=2), tiny.sample(1), tiny.sample(2, masks=0)], max_masks=2, max_tokens=128
    )


@pytest.fixture(scope="module")
def by_hand(batch):
    """(text nll, code nll, codes, index of the scale) of every target, in numpy."""
    model, params = tiny.made("qwen")

    @jax.jit
    def run(params):
        def call(method, *args):
            return model.apply({"params": params}, *args, method=method)

        codes = call("tokenize", batch["masks"])
        hidden = call(
            "hidden",
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            call("encode_images", batch["tiles"]),
            codes,
        )
        return codes, jax.nn.log_softmax(call("logits", hidden))

    codes, logp = map(np.asarray, run(params))
    text, code = [], []
    for row in range(3):
        seen = 0
        for t, label in enumerate(batch["labels"][row, 1:]):
            if label == model.vocab.mask_context:
                c = codes[row].reshape(-1)[seen]
                code.append(
                    (
                        -logp[row, t, model.vocab.first_code + c],
                        c,
                        model.scales.levels[seen % 21],
                        logp[row, t].argmax() == model.vocab.first_code + c,
                    )
                )
                seen += 1
            elif label != IGNORE:
                text.append(-logp[row, t, label])
        assert seen == [42, 21, 0][row]
    return np.array(text), np.array(code)


def test_both_parts_are_means_over_their_own_targets(batch, by_hand):
    text, code = by_hand
    got = loss(batch)
    assert got["text_loss"] == pytest.approx(text.mean(), rel=1e-5)
    assert got["gen_loss"] == pytest.approx(code[:, 0].mean(), rel=1e-5)
    assert got["loss"] == pytest.approx(text.mean() + code[:, 0].mean(), rel=1e-5)
    assert got["code_accuracy"] == pytest.approx(code[:, 3].mean())


def test_a_batch_may_lack_any_part(batch):
    """Text alone (with and without room for masks), codes alone, nothing at all: never NaN."""
    text_only = {k: v[2:] for k, v in batch.items()}
    got = loss(text_only)
    assert got["gen_loss"] == 0 and got["loss"] == got["text_loss"] > 0
    no_room = {**text_only, "masks": text_only["masks"][:, :0]}
    assert loss(no_room)["loss"] == pytest.approx(got["loss"], rel=1e-6)

    mask_context = tiny.made("qwen")[0].vocab.mask_context
    codes_only = {**batch, "labels": np.where(batch["labels"] == mask_context, batch["labels"], IGNORE)}
    got = loss(codes_only)
    assert got["text_loss"] == 0 and got["loss"] == got["gen_loss"] > 0
    nothing = {**batch, "labels": np.full_like(batch["labels"], IGNORE)}
    assert loss(nothing) == dict.fromkeys(got, 0.0)
    no_picture = tiny.batch(tiny.made("qwen")[0], [tiny.sample(0, masks=0, image=False)] * 3)
    for room in (1, 0):
        some = {**no_picture, "tiles": no_picture["tiles"][:, :room]}
        assert np.isfinite(loss(some)["loss"]) and loss(some)["loss"] > 0


def test_gradients_of_a_batch_without_masks_are_finite(batch):
    model, params = tiny.made("qwen")
    text_only = {k: v[2:] for k, v in batch.items()}
    norm = losses.lm_task(model, PLAIN).normalizer(text_only)
    grads = jax.jit(jax.grad(lambda p: losses.lm_loss(model, p, text_only, jax.random.key(0), norm, PLAIN)[0]))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_head_may_leave_out_the_places_without_targets(batch):
    most = int((batch["labels"][:, 1:] != IGNORE).sum(1).max())
    assert most < batch["labels"].shape[1] - 8
    plain = losses.LMOptions(scale_accuracy=True, scale_power=0.5)
    assert loss(batch, dataclasses.replace(plain, max_labels=most)) == pytest.approx(loss(batch, plain), rel=1e-5)


def test_chunks_change_nothing(batch):
    """Values and gradients, for a chunk that divides the row; another one is named."""
    plain, chunked = loss(batch), loss(batch, losses.LMOptions(chunk=32))
    assert chunked == pytest.approx(plain, rel=1e-5)
    model, params = tiny.made("qwen")
    hidden, ids, weight = _places(model)
    want = jax.jit(jax.grad(lambda p, x: jnp.sum(weight * _nll(model, p, x, ids)), argnums=(0, 1)))(params, hidden)
    for chunk in (0, 16):
        opts = losses.LMOptions(chunk=chunk)
        total = lambda p, x: losses.token_nll(model, p, x, ids, ids < 0, weight, opts)[0]
        got = jax.jit(jax.grad(total, argnums=(0, 1)))(params, hidden)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)
    with pytest.raises(ValueError, match="train.loss.chunk=24 does not divide the 64"):
        losses.token_nll(model, params, hidden, ids, ids < 0, weight, losses.LMOptions(chunk=24))


def _places(model):
    """Hidden states of two rows, their targets, and a weight for each."""
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (2, 64, 32)),
        jax.random.randint(keys[1], (2, 64), 0, model.vocab.size),
        jax.random.uniform(keys[2], (2, 64)),
    )


def _nll(model, params, hidden, ids):
    """By the textbook."""
    logits = hidden @ model.apply({"params": params}, method="head_matrix")
    return -jnp.take_along_axis(jax.nn.log_softmax(logits[..., : model.vocab.size]), ids[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("learns, products", [(True, 3), (False, 2)])
def test_the_head_is_used_three_times_and_twice_where_it_is_frozen(learns, products):
    """Forward, into x, into the head: products in the compiled loop over chunks."""
    model, params = tiny.made("qwen")
    hidden, ids, weight = _places(model)

    def total(trained, x):
        given = {**params, "llm": {**params["llm"], **trained}}
        return losses.token_nll(model, given, x, ids, ids < 0, weight, losses.LMOptions(chunk=16))[0]

    head = {"lm_head": params["llm"]["lm_head"]}
    grad = jax.grad(total, argnums=(0, 1)) if learns else jax.grad(lambda x: total(head, x))
    args = (head, hidden) if learns else (hidden,)
    text = jax.jit(grad).lower(*args).compile().as_text()
    assert text.count(" dot(") == products


def head_gradients(dtype, head_dtype, chunks):
    """(in chunks, in numpy) gradients of a sum of random losses into the head, computed in `dtype`."""
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (2, 512, 64), dtype)
    head = jax.random.normal(keys[1], (64, 256)).astype(dtype)
    by_word = jax.random.normal(keys[2], (2, 512, 256))

    def part(x, head, constants):
        return jnp.sum(layers.head_product(x, head, 256) * constants), ()

    got = jax.jit(jax.grad(lambda h: losses.in_chunks(part, 512 // chunks)(x, h, by_word)[0]))(head.astype(head_dtype))
    assert got.dtype == head_dtype
    want = np.einsum("btd,btv->dv", np.asarray(x, np.float64), np.asarray(by_word, np.float64))
    return np.asarray(got, np.float64), want


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_the_head_s_gradient_adds_up_in_f32():
    """Over 16 chunks in bfloat16: to f32 where it is asked for, to a single rounding where it is not."""
    assert relative(*head_gradients(jnp.bfloat16, jnp.float32, 16)) < 3e-7
    once = head_gradients(jnp.bfloat16, jnp.bfloat16, 16)
    rounded = np.asarray(jnp.asarray(once[1], jnp.bfloat16), np.float64)
    assert relative(*once) == pytest.approx(relative(rounded, once[1]), rel=0.01)
    assert relative(*once) < 2e-3


def test_microbatches_add_up_to_the_batch(batch):
    """With denominators of the whole batch, though the rows hold 2, 1 and 0 masks."""
    model, _ = tiny.made("qwen")
    norm = losses.lm_task(model, PLAIN).normalizer(batch)
    parts = [loss({k: v[i : i + 1] for k, v in batch.items()}, norm=norm) for i in range(3)]
    for key, value in loss(batch).items():
        assert sum(p[key] for p in parts) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("form, block_causal", [("qwen", False), ("nano", True)])
def test_packed_rows_have_the_losses_of_unpacked_ones(form, block_causal):
    """Chat, a picture without a mask, one and two masks, text alone; two rows, in another order."""
    model = variants.build(tiny.config(form, block_causal=block_causal))
    params = tiny.params(model)
    samples = [
        tiny.sample(0, masks=2),
        tiny.sample(1, image=False),
        tiny.sample(2, masks=0),
        tiny.sample(3),
        tiny.sample(4, masks=0, image=False),
    ]
    room = dict(max_tokens=224, max_tiles=2, max_masks=3)
    encoder = tiny.encoder(model, **room, sample_tiles=1)
    pieces = [encoder.example(s, np.random.default_rng(0)) for s in samples]
    stack = lambda rows: {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    plain = stack([encoder.packing.join([p]) for p in pieces])
    packed = stack([encoder.packing.join([pieces[k] for k in row]) for row in ((4, 0, 3), (2, 1))])
    assert packed["segment_ids"].max(1).tolist() == [3, 2]
    assert (packed["masks"].max((2, 3, 4)) > 0).sum(1).tolist() == [3, 1]
    opts = losses.LMOptions(scale_accuracy=True, scale_power=0.5, max_labels=200)
    task = losses.lm_task(model, opts)

    @jax.jit
    def run(params, batch):
        def value(params):
            return losses.lm_loss(
                model, params, batch, jax.random.key(0), task.normalizer(batch), opts, deterministic=True
            )

        if block_causal:
            return value(params)[1].metrics, None
        (_, aux), grads = jax.value_and_grad(value, has_aux=True)(params)
        return aux.metrics, grads

    (one, grads), (many, packed_grads) = run(params, plain), run(params, packed)
    for name in one:
        assert float(many[name]) == pytest.approx(float(one[name]), rel=1e-5), name
    if grads is None:
        return
    norm = lambda tree: float(optax.tree.norm(tree))
    assert norm(jax.tree.map(jnp.subtract, grads, packed_grads)) < 1e-4 * norm(grads) > 0


def test_scale_power_and_foreground_weigh_the_codes(batch, by_hand):
    _, code = by_hand
    nll, codes, levels = code[:, 0], code[:, 1], code[:, 2].astype(int)
    per_scale = np.array([1, 4, 16]) ** -0.5
    weight = per_scale[levels] / np.repeat(per_scale, [1, 4, 16]).mean()
    got = loss(batch, losses.LMOptions(scale_power=0.5))["gen_loss"]
    assert got == pytest.approx(np.mean(weight * nll), rel=1e-5)
    got = loss(batch, losses.LMOptions(foreground=3.0))["gen_loss"]
    assert got == pytest.approx(np.mean(np.where(codes == 0, 1, 3) * nll), rel=1e-5)


def test_soft_targets_share_with_near_codes():
    codebook = jnp.array([[9.0, 9], [1, 0], [1.1, 0], [-3, 0]])
    share = np.asarray(losses.code_neighbours(codebook, 1.0, zero_first=True))
    np.testing.assert_allclose(share.sum(1), 1, rtol=1e-6)
    assert share[1, 2] > share[1, 0] > share[1, 3]  # code 0 counts as the zero vector
    np.testing.assert_allclose(losses.code_neighbours(codebook, 1e-4, True), np.eye(4), atol=1e-6)
    away = np.asarray(losses.code_neighbours(codebook, 1.0, zero_first=False))
    assert away[1, 3] > away[1, 0]


def test_soft_targets_approach_the_plain_loss(batch):
    plain = loss(batch)
    assert loss(batch, losses.LMOptions(soft_targets=1e-4)) == pytest.approx(plain, rel=1e-4)
    soft = loss(batch, losses.LMOptions(soft_targets=0.5))
    assert soft["text_loss"] == pytest.approx(plain["text_loss"], rel=1e-6)
    assert abs(soft["gen_loss"] - plain["gen_loss"]) > 1e-3


def test_corrupted_inputs_keep_their_targets(batch):
    """Noise enters the inputs of later scales: the first code's loss is as before; text moves not."""
    opts = losses.LMOptions(corrupt=1.0)
    assert loss(batch, opts) == pytest.approx(loss(batch), rel=1e-6)  # never when deterministic
    one_target = {**batch, "labels": np.full_like(batch["labels"], IGNORE)}
    model, _ = tiny.made("qwen")
    start = np.argmax(batch["tokens"][1] == model.vocab.ge_start)
    one_target["labels"][1, start + 1] = model.vocab.mask_context
    dry = {k: v[1:2] for k, v in one_target.items()}
    runs = [compiled_value(opts, dry, seed) for seed in (0, 1)]
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    whole = {k: v[1:2] for k, v in batch.items()}
    assert abs(compiled_value(opts, whole, 0) - compiled_value(opts, whole, 1)) > 1e-3


def compiled_value(opts, batch, seed):
    """gen_loss in training mode, with a ViT that drops nothing."""
    model, params = tiny.made("qwen")
    still = dataclasses.replace(model, vision=dataclasses.replace(model.vision, drop_path=0.0))
    norm = losses.lm_task(model, opts).normalizer(batch)
    run = jax.jit(lambda key: losses.lm_loss(still, params, batch, key, norm, opts)[1].metrics["gen_loss"])
    return float(run(jax.random.key(seed)))


@pytest.mark.parametrize("form", ["internlm2", "nano"])
def test_a_step_moves_all_but_the_frozen(form, batch):
    """Invariant 6 on the real model: the VQ-VAE and a frozen ViT keep every bit, the rest learns."""
    model, params = tiny.made(form)
    task = losses.lm_task(model, PLAIN)
    select = optim.trainable(params, ("vision/.*",), task.frozen)
    cfg = {**common.base().optim.to_dict(), "lr": 0.01, "warmup": 0}
    tx = optim.build(cfg, 4, trees.split(params, select)[0])
    state = step_lib.init_state(jax.tree.map(jnp.asarray, params), tx, select)
    step = jax.jit(step_lib.make_train_step(task, tx, select, seed=0, microbatches=3))
    losses_seen = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses_seen.append(float(metrics["loss"]))
    assert losses_seen[-1] < losses_seen[0] and int(state.skipped) == 0
    before, after = trees.flatten(params), trees.flatten(state.params)
    for name in before:
        same = before[name].tobytes() == np.asarray(after[name]).tobytes()
        assert same == name.startswith(("vision/", "vqvae/")), name
    padding = after["llm/embed/embedding"][model.vocab.size :]
    assert not np.any(padding)
