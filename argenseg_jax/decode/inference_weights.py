"""Weights for inference: in the dtype of the computation, or in eight bits; layer by layer.

Casting once saves doing it at every step, and half the memory; Int8 kernels (the decoder layers', one
scale for each output channel) halve it again. The VQ-VAE and all norms stay in f32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from argenseg_jax import trees
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.decoder_lm import split_layers
from argenseg_jax.models.layers import Int8

Params = Mapping[str, Any]
_CAST = re.compile(r"(llm|vision|connector|visual/word_embed)/(.*/)?(kernel|bias|embedding)")
_EIGHT_BITS = re.compile(r"llm/layers/(attn|mlp)/(\w+)/kernel")


def for_inference(model: ARGenSeg, params: Params, *, int8: bool = False, split: bool = True) -> Params:
    """The tree that a model with `llm.split` = split decodes with.

    Args:
      params: as trained or loaded: numpy arrays, or jax arrays with any sharding, which they keep.
    """

    def prepare(name: str, x: Any) -> Any:
        found = _EIGHT_BITS.fullmatch(name)
        if int8 and found:
            return _eight_bits(jnp.asarray(x), 2 if found[2] in "qkv" else 1)
        return x.astype(model.llm.dtype, copy=False) if _CAST.fullmatch(name) else x

    ready = trees.map_named(prepare, params)
    if split and "llm" in ready:
        ready["llm"] = split_layers(ready["llm"])
    return jax.tree.map(jnp.asarray, ready)


def _eight_bits(kernel: jax.Array, outputs: int) -> Int8:
    return jax.jit(Int8.from_kernel, static_argnums=(1, 2))(kernel, outputs, True)
