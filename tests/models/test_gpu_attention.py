"""cuDNN's attention without a GPU: which kernel is asked for what, and that the wrapping changes nothing.

`by_xla` computes what the kernel is asked for by jax's own definition, and leaves NaN where a kernel may
leave anything. On a GPU test_attention.py compares the kernel itself.
"""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from argenseg_jax import sharding
from argenseg_jax.decode.engine import Phases
from argenseg_jax.decode.inference_weights import for_inference
from argenseg_jax.decode.sampling import DecodeConfig
from argenseg_jax.models import attention, gpu_attention, variants
from argenseg_jax.models.attention import Mask
from argenseg_jax.models.kv_cache import BLOCK, KVCache
from argenseg_jax.train import losses
from tests import tiny


def heads(t, n=4, k=2, h=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (2, t, m, h), dtype) for key, m in zip(keys, (n, k, k)))


@pytest.fixture
def by_xla(monkeypatch):
    def call(q, k, v, queries=None, keys=None, *, causal=False, mask=None):
        assert q.shape[1] % 2 == 0
        y = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            is_causal=causal,
            query_seq_lengths=queries,
            key_value_seq_lengths=keys,
            implementation="xla",
        )
        if queries is None:
            return y
        return jnp.where((jnp.arange(q.shape[1]) < queries[:, None])[..., None, None], y, jnp.nan)

    monkeypatch.setattr(gpu_attention, "_call", call)


SEGMENTS = {
    "whole": ([[1] * 10, [1] * 10], False),
    "padded": ([[1] * 7 + [0] * 3, [1] * 10], False),
    "nothing but padding": ([[0] * 10, [1] * 10], False),
    "padded in front": ([[0] * 3 + [1] * 7, [1] * 10], True),
    "packed": ([[1] * 4 + [2] * 5 + [0], [1] * 2 + [2] * 3 + [3] * 5], True),
}


@pytest.mark.parametrize("t", [9, 10])
@pytest.mark.parametrize("kind", SEGMENTS)
def test_rows_and_their_gradients_are_those_of_the_definition(by_xla, kind, t):
    segments = jnp.asarray(SEGMENTS[kind][0])[:, :t]
    mask = Mask(segments, packed=SEGMENTS[kind][1])
    real = (segments > 0)[..., None, None]
    weigh = jax.random.normal(jax.random.key(5), (2, t, 4, 8)) * real

    def outcome(how):
        def loss(*x):
            y = attention.attention(*x, mask, how)
            return jnp.sum(jnp.where(real, y, 0) * weigh), y

        (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*heads(t))
        return jnp.where(real, y, 0), *(jnp.where(real, g, 0) for g in grads), y

    for got, want in zip(outcome("cudnn"), outcome("xla")[:4]):
        np.testing.assert_allclose(got, want, atol=2e-5)
    assert np.isfinite(outcome("cudnn")[4]).all()  # padding included


@pytest.mark.parametrize("t", [9, 10])
def test_without_a_mask(by_xla, t):
    want, got = (attention.attention(*heads(t), None, how) for how in ("xla", "cudnn"))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "block_mask, new, old",
    [("causal", 5, (BLOCK + 2, 3)), ("causal", 1, (BLOCK + 2, 3)), ("full", 4, (7, 0)), ("first", 9, (0, 0))],
)
def test_a_cache(by_xla, block_mask, new, old):
    q, k, v = heads(new)
    cache = KVCache.empty(1, 2, 2 * BLOCK, 2, 8, jnp.float32)
    cache = cache.append(0, *(x[:, : BLOCK + 3] for x in heads(2 * BLOCK)[1:])).replace(length=jnp.asarray(old))
    cache = cache.append(0, k, v)
    got, want = (attention.cached(q, k, v, cache, 0, block_mask, how) for how in ("cudnn", "xla"))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_each_device_computes_its_own_rows_and_heads(by_xla, kv_heads):
    """One key head cannot be split over two devices: each query head then has its own copy."""
    x = heads(10, k=kv_heads)
    mask = Mask(jnp.asarray(SEGMENTS["packed"][0]))
    want = attention.attention(*x, mask, "xla")
    mesh = sharding.make_mesh({"dcn_data": 1, "data": 2, "fsdp": 1, "tensor": 2}, jax.devices()[:4])
    with jax.set_mesh(mesh):
        got = jax.jit(lambda *x: attention.attention(*x, mask, "cudnn"))(*x)
    np.testing.assert_allclose(np.asarray(got)[0, :9], np.asarray(want)[0, :9], atol=1e-5)
    np.testing.assert_allclose(np.asarray(got)[1], np.asarray(want)[1], atol=1e-5)


# ---- programs for GPUs


@pytest.fixture
def cuda(monkeypatch):
    """Traces and lowers for a GPU that is not here: what jax asks of the machine is answered for it."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")

    def lower(run, *args):
        return jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()

    return lower


def squares(text, t):
    """Types of arrays over pairs of t positions (t + 1 where odd lengths are padded)."""
    return set(re.findall(rf"tensor<(?:\d+x)*(?:{t}x{t}|{t + t % 2}x{t + t % 2})x\w+>", text))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("t", [150, 151])
def test_the_kernel_masks_by_itself(cuda, packed, t):
    x = tuple(jax.ShapeDtypeStruct((2, t, n, 64), jnp.bfloat16) for n in (4, 2, 2))
    segments = jax.ShapeDtypeStruct((2, t), jnp.int32)

    def loss(q, k, v, segments):
        return jnp.sum(attention.attention(q, k, v, Mask(segments, packed=packed)).astype(jnp.float32))

    text = cuda(jax.grad(loss, (0, 1, 2)), *x, segments)
    assert set(re.findall(r"__cudnn\$\w+", text)) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert "PADDING_CAUSAL" in text and not squares(text, t)


def test_a_training_step(cuda):
    """The decoder's rows and the ViT's: flash kernels forward and backward, no array of pairs."""
    model = variants.build(tiny.config() | {"dtype": "bfloat16"})
    batch = tiny.batch(model, [tiny.sample(0)])
    params = jax.tree.map(jnp.asarray, tiny.made("qwen")[1])
    task = losses.lm_task(model, losses.LMOptions(packed=False))

    def loss(trained):
        return task.loss({**params, **trained}, None, batch, jax.random.key(0), task.normalizer(batch))[0]

    text = cuda(jax.grad(loss), {name: params[name] for name in ("llm", "vision")})
    calls = re.findall(r"__cudnn\$\w+", text)
    assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} == set(calls) and not squares(text, 96)
    assert "PADDING_CAUSAL" in text


def test_what_cudnn_refuses_has_one_line_in_the_log(monkeypatch, caplog):
    gpu_attention.log_once.cache_clear()
    wide = jax.ShapeDtypeStruct((2, 64, 4, 136), jnp.bfloat16)
    single = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.float32)
    with caplog.at_level(logging.WARNING):
        chosen = [attention.choose(q, platform="gpu") for q in (wide, single, wide, wide)]
    assert chosen == ["xla"] * 4
    assert [r.getMessage() for r in caplog.records] == [
        "attention is XLA's, not cuDNN's: heads of 136 numbers are no multiple of 8 up to 128",
        "attention is XLA's, not cuDNN's: it computes in 16 bits, not in float32",
    ]


def test_a_machine_is_asked_before_its_kernel_is_used(monkeypatch, caplog):
    """On a GPU the call is compiled once for its sizes; an error is a line in the log, not the end."""
    gpu_attention.log_once.cache_clear()
    gpu_attention._tried.cache_clear()
    asked = []

    def refuse(*args, **kwargs):
        asked.append(kwargs)
        raise NotImplementedError("Packed layout requires a GPU\nwith at least Hopper architecture.")

    monkeypatch.setattr(gpu_attention, "_call", refuse)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q = jax.ShapeDtypeStruct((2, 63, 4, 64), jnp.bfloat16)
    with caplog.at_level(logging.WARNING):
        assert [attention.choose(q, kv_heads=2, platform="gpu") for _ in range(3)] == ["xla"] * 3
    assert len(asked) == len(caplog.records) == 1
    assert "cuDNN's: Packed layout requires a GPU with at least Hopper" in caplog.records[0].getMessage()
    gpu_attention._tried.cache_clear()


def test_a_prompt_is_read_without_an_array_of_pairs(cuda):
    """The cache is empty, so the kernel's causal mask is the right one; words that follow use lengths."""
    model = variants.build(tiny.config() | {"dtype": "bfloat16"})
    phases = Phases(model)
    weights = jax.eval_shape(
        lambda p: {"params": for_inference(phases.model, p, int8=False, split=phases.split)}, tiny.made("qwen")[1]
    )
    prompt = (
        weights,
        jax.ShapeDtypeStruct((2, 90), jnp.int32),
        jax.ShapeDtypeStruct((2,), jnp.int32),
        None,
        DecodeConfig(),
    )
    text = phases.prefill.trace(*prompt, 256, 4).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and not squares(text, 90) and "x90x256x" not in text
    answer = phases.prefill.eval_shape(*prompt, 256, 4)
    text = phases.text.trace(weights, answer).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"__cudnn\$\w+", text)) == {"__cudnn$fmhaSoftmax"}
