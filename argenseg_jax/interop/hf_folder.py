"""HF-style folders: read their tensors lazily, load parameters, write a folder.

A folder holds config.json (interop/hf_config), safetensors in one or several files with an index
(or PyTorch's .bin files, interop/tensor_files), and the tokenizer's files.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from argenseg_jax import files, locks, trees
from argenseg_jax.errors import UserError, brief
from argenseg_jax.interop import hf_config, tensor_files
from argenseg_jax.interop import state_dict as torch_convert
from argenseg_jax.interop.tensor_files import Lazy, Tensors
from argenseg_jax.models import variants
from argenseg_jax.models.argenseg import init_params
from argenseg_jax.vocab import MASK

SHARD_BYTES = 4 << 30
MAX_CONFIG = 64 << 20  # bytes of a config.json or an index; an index has some 100 a tensor
# What the keys of ARGenSeg's own parts start with; a released InternVL has none of them.
OWN_PARTS = ("image_tokenizer.", "word_embed.", "lvl_embed.", "pos_1LC")
# They stand apart in a folder for transformers, which complains of tensors that it does not know.
OWN_FILE = "argenseg.safetensors"
INDEX = "model.safetensors.index.json"
INDICES = (INDEX, "pytorch_model.bin.index.json")
_PATTERNS = ("*.safetensors", "*.safetensors.xz", "pytorch_model*.bin", "*.pth")
# What a folder may hold besides weights: copied along when a folder is written from another.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def is_hf(path: epath.PathLike) -> bool:
    """Whether the path is a weight file or a folder with weight files in HF form."""
    path = epath.Path(path)
    if path.is_dir():
        return any((path / name).exists() for name in INDICES) or any(
            next(iter(path.glob(pattern)), None) for pattern in _PATTERNS
        )
    return path.is_file() and path.name.endswith(tensor_files.SUFFIXES)


def read_config(path: epath.PathLike) -> dict[str, Any]:
    """config.json of a folder."""
    file = epath.Path(path) / "config.json"
    if not file.exists():
        adapters = (file.parent / "adapter_config.json").exists()
        raise UserError(
            f"{file} does not exist; an HF-style folder needs it"
            + (
                f". {file.parent} holds LoRA adapters alone: merge them into the weights of their model first"
                if adapters
                else ""
            )
        )
    config = files.read_json(file, MAX_CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{file} is no object of fields")
    return config


def model_cfg(path: epath.PathLike, ids: Callable[[int], Mapping[str, int] | None] | None = None) -> dict[str, Any]:
    """The `model` section that a folder's config.json describes, and its weights.

    Args:
      path: the folder.
      ids: number of codes -> {base, eos, pad} as the folder's tokenizer knows them, or None.
    """
    config = read_config(path)

    def asked(num_codes: int, needed: bool) -> Mapping[str, int] | None:
        known = ids(num_codes) if ids else None
        if known is None and needed and not any(key.startswith(OWN_PARTS) for key in open_tensors(path)):
            raise UserError(
                "config.json: vocab_size is of no released model, and may be padded: the tokenizer's "
                "files have to be beside it to tell the ids"
            )
        return known

    try:
        cfg = hf_config.model_cfg_from_hf(config, asked)
    except UserError as error:
        raise UserError(str(error).replace("config.json", str(epath.Path(path) / "config.json"), 1)) from None
    if cfg["llm"].get("tied"):
        # "Tied" is what transformers wrote by default, whatever the model was; the file knows.
        tensors = open_tensors(path)
        head = torch_convert.find_key(tensors, torch_convert.HEAD)
        embedding = torch_convert.find_key(tensors, torch_convert.EMBEDDING)
        cfg["llm"]["tied"] = not (head and embedding) or torch_convert.same(tensors.lazy(head), tensors.lazy(embedding))
    return cfg


def open_tensors(path: epath.PathLike) -> Tensors:
    """All tensors of a folder or a single file.

    Raises:
      UserError: no such file, no weights in the folder, a broken or incomplete file, a key in two
        files, or a PyTorch file where torch is absent.
    """
    path = files.to_path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_dir():
        return tensor_files.open_file(path)
    parts = _weight_files(path)
    if not parts:
        raise UserError(f"{path} holds no weights (*.safetensors, pytorch_model*.bin or *.pth)")
    lazy: dict[str, Lazy] = {}
    for file in parts:
        if not file.exists():
            raise UserError(f"{file} does not exist, though the checkpoint's other files refer to it")
        tensors = tensor_files.open_file(file)
        for key in tensors:
            if key in lazy:
                raise UserError(f"{file}: '{key}' is also in another file of {path}")
            lazy[key] = tensors.lazy(key)
    return Tensors(lazy)


def _weight_files(folder: epath.Path) -> list[epath.Path]:
    """The files of a folder's checkpoint; safetensors are preferred to PyTorch's own.

    Files beside a whole checkpoint (of an optimizer, consolidated ones) are none of it.

    Raises:
      UserError: a damaged index, or LoRA adapters beside the weights, of which they are a part.
    """
    own = [OWN_FILE] if (folder / OWN_FILE).exists() else []
    for index in INDICES:
        if (folder / index).exists():
            return [folder / name for name in sorted({*_indexed(folder / index), *own})]
    for pattern in _PATTERNS:
        found = {file.name for file in folder.glob(pattern)}
        if adapters := sorted(name for name in found if name.startswith("adapter_")):
            raise UserError(
                f"{folder / adapters[0]}: LoRA adapters beside the weights; merge them into the weights "
                "first, or, if they are not to be used, move the file elsewhere"
            )
        for name in (f"model{end}" for end in tensor_files.SUFFIXES):
            if name in found:
                return [folder / name for name in [name, *own]]
        shards = [re.fullmatch(r"(.+)-(\d{1,6})-of-(\d{1,6})(\..+)", name) for name in sorted(found)]
        if named := next(filter(None, shards), None):
            stem, _, total, end = named.groups()
            width, count = len(total), int(total)
            if count <= len(found) * 1000:
                return [
                    folder / name
                    for name in [*(f"{stem}-{i + 1:0{width}d}-of-{total}{end}" for i in range(count)), *own]
                ]
        if found:
            return [folder / name for name in sorted(found)]
    return []


def _indexed(index: epath.Path) -> set[str]:
    """The files that an index names: weight files in its own folder."""
    content = files.read_json(index, MAX_CONFIG)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map {{key: file}}")
    for key, name in names.items():
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"[^/\\\0:]+", name)
            or not name.endswith(tensor_files.SUFFIXES)
        ):
            raise UserError(
                f"{index}: '{brief(key, 100)}' is in {brief(repr(name), 100)}, which is no weight file of this folder"
            )
    return set(names.values())


def param_shapes(model: Any) -> dict[str, Any]:
    """Abstract parameters (jax.ShapeDtypeStruct leaves) of an ARGenSeg; nothing is computed."""
    return trees.unflatten(_flat_shapes(model))


@functools.lru_cache(maxsize=8)
def _flat_shapes(model: Any) -> dict[str, Any]:
    """Tracing takes a second, and a conversion asks several times."""
    return trees.flatten(jax.eval_shape(functools.partial(init_params, model), jax.random.key(0)))


def load_params(
    path: epath.PathLike, model_or_shapes: Any, *, optional: Sequence[str] = (), dtype: Any = None
) -> dict[str, Any]:
    """Parameters (numpy arrays) from a folder or weight file; see interop/torch.to_jax.

    Args:
      path: folder or file.
      model_or_shapes: an ARGenSeg, or a tree of shapes (of the complete model or of some parts).
      optional: regexes of leaves that may be absent.
      dtype: of the result; None takes each leaf's own.
    """
    abstract = isinstance(model_or_shapes, Mapping)
    shapes = model_or_shapes if abstract else param_shapes(model_or_shapes)
    vocab = {} if abstract else _words(model_or_shapes)
    tensors = open_tensors(path)
    if not abstract and not optional:
        _check_whole(tensors, path)
    return torch_convert.to_jax(tensors, shapes, **vocab, optional=optional, dtype=dtype, source=str(path))


def load_part(path: epath.PathLike, model: Any, part: str) -> dict[str, Any]:
    """Parameters (numpy arrays) of one part of an ARGenSeg ('vqvae'); no other tensor is read."""
    tensors = open_tensors(path)
    if not any(key.startswith(OWN_PARTS) for key in tensors):
        _check_whole(tensors, path)
    tensors = tensors.only(lambda key: torch_convert.part(key) == part)
    return torch_convert.to_jax(tensors, {part: param_shapes(model)[part]}, source=str(path))[part]


def _check_whole(tensors: Tensors, path: epath.PathLike) -> None:
    """One hint instead of hundreds of names where a complete part is missing."""
    if not any(key.startswith(OWN_PARTS) for key in tensors):
        if advice := torch_convert.foreign(tensors):
            raise UserError(f"{path}: {advice}")
        raise UserError(
            f"{path} has no VQ-VAE, as InternVL was released: `argenseg convert` "
            "completes it with VAR's (--vqvae=vae_ch160v4096z32.pth)"
        )


def _words(model: Any) -> dict[str, Any]:
    """Arguments of state_dict.to_jax: size of the vocabulary, and before the visual tokens were added."""
    return {"vocab_size": model.vocab.size, "old_vocab_size": model.vocab.id(MASK)}


def plan_import(path: epath.PathLike, model: Any, vqvae: epath.PathLike | None = None) -> torch_convert.Import:
    """How a folder or weight file fills a model; nothing is read yet.

    Args:
      path: folder or file.
      model: the ARGenSeg.
      vqvae: file of the VQ-VAE, for an InternVL folder as released. The three tables that ARGenSeg
        adds are not filled then: they start as zeros, and the rows of new tokens as the mean of the
        old ones, as in the reference.
    """
    shapes, vocab = dict(param_shapes(model)), _words(model)
    tensors = open_tensors(path)
    if vqvae is None:
        _check_whole(tensors, path)
        return torch_convert.Import(tensors, shapes, **vocab, source=str(path))
    if any(torch_convert.part(key) == "vqvae" for key in tensors):
        raise UserError(f"{path} has a VQ-VAE: leave --vqvae={vqvae} out, which completes an InternVL as released")
    own = {"vqvae": shapes.pop("vqvae")}
    return torch_convert.Import(
        tensors, shapes, **vocab, optional=("visual/.*",), source=str(path)
    ) + torch_convert.Import(open_tensors(vqvae), own, source=str(vqvae))


def save_folder(
    path: epath.PathLike,
    params: Mapping[str, Any],
    model_cfg: Mapping[str, Any],
    tokenizer_files: Sequence[epath.PathLike] = (),
    dtype: Any = None,
    texts: Mapping[str, str] | None = None,
    *,
    layout: str = "official",
    done: Callable[[int], None] = lambda n: None,
) -> int:
    """Writes an HF-style folder with the official key names; returns the bytes of the tensors.

    The folder appears under its name when it is complete. An existing one is an error.

    Args:
      path: the folder to make.
      params: the complete parameter tree; arrays, or anything that state_dict.export takes.
      model_cfg: the `model` section that built it.
      tokenizer_files: copied into the folder.
      dtype: of the weights in the file ('bfloat16', ...); None keeps each leaf's own.
      texts: {file name: content} of further files.
      layout: 'official', or 'hf' for transformers' own InternVL.
      done: called with the bytes of each tensor that was written.
    """
    flat, size = trees.flatten(params), variants.build(model_cfg).vocab.size
    tensors = torch_convert.export(flat, layout=layout, vocab_size=size, dtype=dtype)
    name = str(np.dtype(dtype or flat["llm/embed/embedding"].dtype))
    config = hf_config.model_cfg_to_hf(model_cfg, name, layout)
    with locks.new_folder(path) as folder:
        total = 0
        if layout == "hf":
            own = {key: tensors.pop(key) for key in list(tensors) if key.startswith(OWN_PARTS)}
            tensor_files.write_safetensors(folder / OWN_FILE, own, done)
            total = sum(lazy.nbytes for lazy in own.values())
        total += write_tensors(folder, tensors, done)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file, text in (texts or {}).items():
            (folder / file).write_text(text)
        for file in tokenizer_files:
            file = epath.Path(file)
            (folder / file.name).write_bytes(files.read_bytes(file))
    return total


def tokenizer_files(folder: epath.PathLike) -> list[epath.Path]:
    """The tokenizer's files that a folder holds; code of its own, which its config names, too."""
    folder = epath.Path(folder)
    return [f for f in (folder / name for name in TOKENIZER_FILES) if f.exists()] + sorted(
        folder.glob("tokenization_*.py")
    )


def write_tensors(
    folder: epath.PathLike, tensors: Mapping[str, Lazy], done: Callable[[int], None] = lambda n: None
) -> int:
    """Writes shards of at most SHARD_BYTES and, for several, an index; returns the bytes."""
    folder = epath.Path(folder)
    shards: list[dict[str, Lazy]] = [{}]
    held = 0
    for key, lazy in tensors.items():
        if shards[-1] and held + lazy.nbytes > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][key] = lazy
        held += lazy.nbytes
    total, n, where = sum(lazy.nbytes for lazy in tensors.values()), len(shards), {}
    for i, shard in enumerate(shards):
        name = "model.safetensors" if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        tensor_files.write_safetensors(folder / name, shard, done)
        where.update(dict.fromkeys(shard, name))
    if n > 1:
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"
        )
    return total
