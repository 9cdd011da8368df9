"""Converts checkpoints between Orbax and HF folders, one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath

from argenseg_jax import files, locks, trees
from argenseg_jax.ckpt import checkpoint, orbax_io, params_writer
from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_folder, state_dict

VOCAB_LEAVES = ("llm/embed/embedding", "llm/lm_head/kernel")  # padded in memory


def to_orbax(
    source: checkpoint.Checkpoint,
    weights: epath.PathLike,
    target: epath.PathLike,
    *,
    vqvae: epath.PathLike | None = None,
    dtype: Any = None,
) -> dict[str, int]:
    """HF folder -> workdir with one checkpoint, the config, and the tokenizer with the added tokens.

    Args:
      source: the folder.
      weights: the folder again, or one weight file in it.
      target: the workdir to create; it appears when it is complete.
      vqvae: file of the VQ-VAE, for an InternVL as released (interop/hf_folder.plan_import).
      dtype: of the parameters; None = that of the file.

    Returns:
      {params, bytes} without the padding of the vocabulary.

    Raises:
      UserError: a mismatch, before anything is written; an existing target; a full disk.
    """
    model, config = source.model(), dict(source.config)
    if source.has_tokenizer():
        config["model"] = {**config["model"], "vocab": _vocab(source, model)}
    else:
        print(f"{source.path} has no tokenizer: none is written", file=sys.stderr)
    plan = hf_folder.plan_import(weights, model, vqvae)
    shapes = trees.flatten(hf_folder.param_shapes(model))
    missing = np.dtype(dtype or plan.dtypes["llm/embed/embedding"])  # of tables that start as zeros
    leaves = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype or plan.dtypes.get(name, missing)) for name, leaf in shapes.items()
    }
    with locks.new_folder(target) as folder, _bar(target, _nbytes(leaves)) as bar:
        with params_writer.ParamsWriter(
            folder / orbax_io.DIRECTORY / "0", leaves, checksums=source.checksums
        ) as writer:
            for name, layer, array in plan.slices():
                writer.write(name, state_dict.corner(layer, array), array)
                bar.update(array.size * leaves[name].dtype.itemsize)
            for name in leaves.keys() - plan.dtypes.keys():
                writer.write(name, (...,), np.zeros(leaves[name].shape, np.bool_))
        (folder / orbax_io.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if source.has_tokenizer():
            _copy_tokenizer(source, folder / checkpoint.TOKENIZER)
    return _sizes(model, leaves)


def _vocab(source: checkpoint.Checkpoint, model: Any) -> dict[str, int]:
    """The ids, as the tokenizer of the folder has them; UserError if it is of another model."""
    vocab = source.tokenizer().vocab
    if vocab.base != model.vocab.base:
        raise UserError(
            f"{source.path}: its tokenizer has <img> at {vocab.base}, its config.json at {model.vocab.base}"
        )
    return {"base": vocab.base, "eos": vocab.eos, "pad": vocab.pad}


def _copy_tokenizer(source: checkpoint.Checkpoint, folder: epath.Path) -> None:
    """Saves the tokenizer with ARGenSeg's added tokens, and copies its other files unchanged."""
    source.tokenizer().save(folder)
    for file in source.tokenizer_files():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(files.read_bytes(file))


def to_hf(
    source: checkpoint.Checkpoint, target: epath.PathLike, *, layout: str = "official", dtype: Any = None
) -> dict[str, int]:
    """Orbax checkpoint -> HF folder; the run's config is a file of its own, since config.json has no key for it.

    Args:
      source: the checkpoint; its averaged weights if it has them, with adapters merged.
      target: the folder to create; it appears when it is complete.
      layout: names of the keys and form of config.json: 'official', or 'hf' (transformers' own).
      dtype: of the weights; None = that of the checkpoint.

    Returns:
      {params, bytes} as of to_orbax.
    """
    model = source.model()
    source.check_shapes()
    leaves = source.adapters().merged_lazily(orbax_io.open_params(source.path, checksums=source.checksums))
    config = {key: value for key, value in source.config.items() if key != "model"}
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype) for name, leaf in leaves.items()}
    with _bar(target, _nbytes(shapes)) as bar:
        hf_folder.save_folder(
            target,
            trees.unflatten(leaves),
            source.config["model"],
            source.tokenizer_files(),
            dtype,
            {checkpoint.RUN_CONFIG: json.dumps(config, indent=2) + "\n"},
            layout=layout,
            done=bar.update,
        )
    return _sizes(model, shapes)


def _nbytes(leaves: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())


def _sizes(model: Any, leaves: Any) -> dict[str, int]:
    """Number and bytes of the parameters, without the padding of the vocabulary."""
    share = model.vocab.size / model.vocab.padded_size
    real = {name: math.prod(leaf.shape) * (share if name in VOCAB_LEAVES else 1) for name, leaf in leaves.items()}
    return {
        "params": round(sum(real.values())),
        "bytes": round(sum(n * leaves[name].dtype.itemsize for name, n in real.items())),
    }


@contextlib.contextmanager
def _bar(target: epath.PathLike, total: int) -> Iterator[tqdm.tqdm]:
    """A progress bar of `total` bytes; UserError if the disk has no space for them."""
    parent = os.path.dirname(os.path.abspath(target))
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not files.is_remote(target) and (free := shutil.disk_usage(parent).free) < total:
        raise UserError(f"{target} needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")
    with tqdm.tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        delay=1,
        desc=os.path.basename(os.fspath(target)),
        dynamic_ncols=True,
    ) as bar:
        yield bar
