"""Weights for inference: what is cast, what stays, and that eight bits draw the same masks."""

import jax
import jax.numpy as jnp
import numpy as np

import argenseg_jax
from argenseg_jax import trees
from argenseg_jax.data.mixture import open_source
from argenseg_jax.decode.inference_weights import for_inference
from argenseg_jax.eval.evaluator import request
from argenseg_jax.eval.metrics.referring import iou
from argenseg_jax.models import variants
from argenseg_jax.models.layers import Int8
from tests import tiny


def test_only_matrices_of_the_decoder_shrink():
    model = variants.build({**tiny.config(), "dtype": "bfloat16"})
    weights = tiny.made()[1]
    flat = trees.flatten(for_inference(model, weights, int8=True))
    small = {name for name, x in flat.items() if isinstance(x, Int8)}
    assert small == {
        f"llm/layers_{i}/{m}/kernel"
        for i in range(2)
        for m in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    }
    assert flat["llm/layers_1/attn/o/kernel"].scale.shape == (32,)
    assert flat["llm/layers_1/attn/q/kernel"].scale.shape == (4, 8)
    for name, x in flat.items():
        exact = name.endswith("scale") or name.startswith("vqvae") or "lvl" in name or "pos" in name
        if name not in small and not name.endswith("class_embed") and "ls" not in name:
            assert x.dtype == (jnp.float32 if exact else jnp.bfloat16), name
    plain = for_inference(tiny.made()[0], weights, split=False)
    jax.tree.map(np.testing.assert_array_equal, plain, weights)


def test_eight_bits_draw_the_masks_of_bfloat16():
    """The shipped model on 16 scenes; benchmarks/weights.py measures more of them."""
    source = open_source("shapes:test")
    requests = [request(source[i]) for i in range(16)]
    full, small = (argenseg_jax.load("nano", dtype).segment_batch(requests) for dtype in ("bfloat16", "int8"))
    pairs = [(a.masks[0], b.masks[0]) for a, b in zip(full, small, strict=True) if a.masks]
    assert len(pairs) > 12 and np.mean([iou(a, b) for a, b in pairs]) >= 0.98
