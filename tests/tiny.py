"""A model that compiles in seconds, in each of the forms that matter, with weights and samples."""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from argenseg_jax import trees
from argenseg_jax.ckpt import checkpoint, orbax_io
from argenseg_jax.data import pipeline
from argenseg_jax.data.nano_tokenizer import nano_tokenizer
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.synthetic import shapes
from argenseg_jax.data.tokenizer import Tokenizer
from argenseg_jax.interop import hf_folder
from argenseg_jax.models import variants
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.scales import PATCH_NUMS_512
from argenseg_jax.train.run import geometry

NUM_CODES = 24
LLM = {
    "internlm2": dict(eps=1e-5),
    "qwen": dict(qkv_bias=True),
    "qwen, tied": dict(qkv_bias=True, tied=True),
    "nano": dict(tied=True, qk_norm=True, rope_2d=True),
}
FORMS = tuple(LLM)


def config(form: str = "qwen", *, block_causal: bool = False, **llm: Any) -> dict[str, Any]:
    """A `model` section: width 32, one ViT layer, two decoder layers, masks of 21 codes."""
    return dict(
        image_size=32,
        block_causal=block_causal,
        vision=dict(image_size=32, patch=8, width=32, depth=1, heads=2, mlp=32, drop_path=0.1),
        connector=dict(ratio=0.5),
        llm={
            **dict(width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp=48, rope_theta=1e4, max_positions=2048),
            **LLM[form],
            **llm,
        },
        vqvae=dict(
            ch=32,
            ch_mult=(1,),
            num_res_blocks=0,
            z_channels=8,
            codebook_size=NUM_CODES,
            patch_nums=(1, 2, 4),
            using_sa=False,
            using_mid_sa=False,
            patch_size=4,
        ),
        vocab=variants.VARIANTS["nano"]["vocab"],
    )


def params(model: ARGenSeg, seed: int = 0) -> dict[str, Any]:
    """Random weights, none of them zero but the padding of the vocabulary."""
    rng = np.random.default_rng(seed)

    def draw(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        x = rng.standard_normal(leaf.shape, np.float32)
        return 1 + 0.1 * x if name.endswith("scale") else 0.2 * x

    drawn = trees.map_named(draw, hf_folder.param_shapes(model))
    drawn["llm"]["embed"]["embedding"][model.vocab.size :] = 0
    if not model.llm.tied:
        drawn["llm"]["lm_head"]["kernel"][:, model.vocab.size :] = 0
    return drawn


@functools.cache
def made(form: str = "qwen") -> tuple[ARGenSeg, dict[str, Any]]:
    """(model, weights) of a form."""
    model = variants.build(config(form))
    return model, params(model)


@functools.cache
def tokenizer() -> Tokenizer:
    return nano_tokenizer(NUM_CODES, shapes.corpus())


def picture(seed: int, height: int = 40, width: int = 30) -> np.ndarray:
    """u8[H, W, 3] of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def sample(seed: int = 0, masks: int = 1, image: bool = True, answer: str = "It is <mask>.") -> Sample:
    """A question, and an answer with so many masks (each the left part of the picture)."""
    truth = np.zeros((40, 30), np.uint8)
    truth[:, : 5 + seed % 20] = 255
    turns = [
        {"from": "human", "value": "Segment the red circle." + " Now!" * (seed % 3)},
        {"from": "gpt", "value": " and ".join([answer] * masks) if masks else "There is none."},
    ]
    return Sample(turns, (picture(seed),) if image else (), (truth,) * masks)


def encoder(model: ARGenSeg, **data: Any) -> pipeline.SampleEncoder:
    """Of samples of a model, by the keys of a section `data`."""
    return pipeline.SampleEncoder(pipeline.DataConfig(system="", **data), geometry(model), tokenizer())


def batch(model: ARGenSeg, samples: list[Sample], max_tokens: int = 96, max_masks: int = 1) -> dict[str, np.ndarray]:
    """The samples as a batch of the LM task."""
    encode = encoder(model, max_tokens=max_tokens, max_masks=max_masks).training_example
    rows = [encode(s, np.random.default_rng(0)) for s in samples]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@functools.cache
def made_512() -> tuple[ARGenSeg, dict[str, Any]]:
    """(model, weights) with masks of 512 px in the released scales: 2240 codes."""
    sizes = config(max_positions=8192)
    sizes["vqvae"] |= dict(patch_nums=PATCH_NUMS_512, patch_size=16)
    model = variants.build(sizes)
    return model, params(model)


def scripted(
    chain: Mapping[int, int], pair: tuple[ARGenSeg, dict[str, Any]] | None = None
) -> tuple[ARGenSeg, dict[str, Any]]:
    """(model, weights) that write chain[token] behind a token; codes follow the whole context."""
    model, weights = pair or made()
    embed, head = (weights["llm"][a][b].copy() for a, b in (("embed", "embedding"), ("lm_head", "kernel")))
    for axis, token in enumerate(chain):  # one direction of the residual stream a token
        embed[token] = 30 * np.eye(model.llm.width)[axis]
    for axis, follower in enumerate(chain.values()):
        head[axis, follower] += 10
    return model, trees.replace(weights, {"llm/embed/embedding": embed, "llm/lm_head/kernel": head})


def answers(first: Sequence[int], behind: Sequence[int]) -> tuple[ARGenSeg, dict[str, Any]]:
    """(model, weights) that answer every question with `first`, and go on with `behind` each mask."""
    words = tokenizer()
    start = words.encode([words.im_start, "assistant\n"])[-1]
    texts = ([start, *first], [words.vocab.ge_end, *behind])
    return scripted({a: b for text in texts for a, b in itertools.pairwise(text)})


def workdir(
    folder: pathlib.Path, weights: Mapping[str, Any] | None = None, form: str = "qwen", **sections: Any
) -> pathlib.Path:
    """Saves weights as `train` would, with config.json and tokenizer; returns the folder."""
    run = {
        "model": config(form),
        "data": {"system": "", "max_tokens": 256},
        "decode": {"max_text_tokens": 4},
        **sections,
    }
    folder.mkdir(parents=True, exist_ok=True)
    orbax_io.save_params(str(folder / orbax_io.DIRECTORY / "1"), weights or made(form)[1])
    (folder / orbax_io.CONFIG).write_text(json.dumps(run))
    tokenizer().save(folder / checkpoint.TOKENIZER)
    return folder


def hf(folder: pathlib.Path, source: pathlib.Path) -> pathlib.Path:
    """The workdir `source` as an HF folder, as `convert` makes it."""
    opened = checkpoint.open_checkpoint(str(source))
    run = {k: v for k, v in opened.config.items() if k != "model"}
    hf_folder.save_folder(
        folder,
        opened.load_params(),
        opened.config["model"],
        hf_folder.tokenizer_files(source / checkpoint.TOKENIZER),
        texts={checkpoint.RUN_CONFIG: json.dumps(run)},
    )
    return folder
