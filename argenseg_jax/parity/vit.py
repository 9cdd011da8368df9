"""Recordings of kind D: InternViT, pixel shuffle, connector; at the native and other sizes."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax.interop import hf_config
from argenseg_jax.interop import state_dict as torch_convert
from argenseg_jax.models import connector, intern_vit
from argenseg_jax.parity.recording import Recording
from argenseg_jax.parity.vq import nhwc


def compare_vit(record: Recording) -> None:
    """Every variant of the recording, each with its own weights."""
    for variant, cfg in record.config["variants"].items():
        _compare_variant(record, variant, cfg)


def _compare_variant(record: Recording, variant: str, cfg) -> None:
    vit = intern_vit.InternViT(**hf_config.vision_cfg(cfg["vision_config"]))
    ratio = cfg["downsample_ratio"]
    projector = connector.Connector(width=cfg["llm_hidden_size"], ratio=ratio)
    image = jax.ShapeDtypeStruct((1, vit.image_size, vit.image_size, 3), jnp.float32)
    places = 1 + (vit.image_size // vit.patch) ** 2
    hidden = jax.ShapeDtypeStruct((1, places, vit.width), jnp.float32)
    shapes = {
        "vision": jax.eval_shape(vit.init, jax.random.key(0), image)["params"],
        "connector": jax.eval_shape(projector.init, jax.random.key(0), hidden)["params"],
    }
    params = torch_convert.to_jax(record.weights(variant), shapes, source=str(record.folder))
    vision, native = params["vision"], vit.image_size

    def features(x, version="v2"):
        return projector.clone(version=version).apply({"params": params["connector"]}, x)

    def shuffled(x, version):
        y = connector.pixel_shuffle(x[:, 1:], ratio, version)
        side = round(y.shape[1] ** 0.5)
        return y.reshape(y.shape[0], side, side, -1)

    def resized(size):
        """The tower whose position embedding was resampled to another size for good."""
        pos = intern_vit.resample_pos_embed(jnp.asarray(vision["pos_embed"]), size // vit.patch)
        return dataclasses.replace(vit, image_size=size), {**vision, "pos_embed": pos}

    own = re.escape(variant)
    for found in record.names(rf"{own}/pixel_values_(\d+)"):
        size = int(found[1])
        pixels = jnp.asarray(nhwc(record.floats(found[0], (None, 3, size, size))))
        last, states = _run(vit, vision, pixels)
        name, tail = f"{variant}/", "" if size == native else "_interp"
        record.check(f"{name}embeddings_{size}", states[0])
        record.check(f"{name}last_hidden_{size}{tail and '_interp_on_the_fly'}", last)
        record.check(f"{name}hidden_states_{size}", states)
        record.check(f"{name}pooler_{size}", last[:, 0])
        for m in record.names(rf"{own}/features_{size}{tail}_ps_(v\d)"):
            record.check(m[0], features(last, m[1]))
        for m in record.names(rf"{own}/pixel_shuffle_{size}_ps_(v\d)"):
            record.check(m[0], shuffled(last, m[1]))
        for m in record.names(rf"{own}/features_{size}_select_m([1-9]\d*)"):
            if int(m[1]) <= len(states):
                record.check(m[0], features(states[-int(m[1])]))
        record.check(f"{name}last_hidden_{size}_after_resize", _run(*resized(size), pixels)[0])
        for m in record.names(rf"{own}/last_hidden_{size}_after_resize_to_(\d+)"):
            record.check(m[0], _run(*resized(int(m[1])), pixels)[0])

    full = jnp.asarray(vision["pos_embed"])
    for m in record.names(
        rf"{own}/(pos_embed_on_the_fly|position_embedding_resized)"
        r"_(\d+)_to_(\d+)"
    ):
        pos = intern_vit.resample_pos_embed(full, int(m[3]) // vit.patch)
        record.check(m[0], pos[None] if re.search("resized", m[1]) else pos[None, 1:])


def _run(vit: intern_vit.InternViT, params, pixels) -> tuple[np.ndarray, np.ndarray]:
    """Last hidden state [P, 1 + n, D] and all of them [L + 1, P, 1 + n, D]."""
    return jax.jit(lambda p, x: vit.apply({"params": p}, x, capture=True))(params, pixels)
