"""HF-style folders and weight files: read tensors lazily, load parameters, write a folder.

A folder holds config.json (interop/hf_config), safetensors in one or several files with an index,
and the tokenizer's files. Single files may be .safetensors, .safetensors.xz, or PyTorch's own
.pth/.bin/.pt, which needs torch and is read with weights_only=True: nothing is unpickled freely.
"""
from __future__ import annotations

import functools
import json
import lzma
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from argenseg_jax import files, trees
from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_config
from argenseg_jax.interop import torch as torch_convert
from argenseg_jax.models import variants
from argenseg_jax.models.argenseg import init_params

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"
# What a folder may hold besides weights: copied along when a folder is written from another.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
                   "merges.txt", "special_tokens_map.json", "added_tokens.json",
                   "generation_config.json")


def is_hf(path: epath.PathLike) -> bool:
    """Whether the path is a weight file or a folder with weight files in HF form."""
    path = epath.Path(path)
    if path.is_dir():
        return bool(_weight_files(path))
    suffixes = (".safetensors", ".safetensors.xz", *TORCH_SUFFIXES)
    return path.is_file() and path.name.endswith(suffixes)


def read_config(path: epath.PathLike) -> dict[str, Any]:
    """config.json of a folder."""
    file = epath.Path(path) / "config.json"
    if not file.exists():
        raise UserError(f"{file} does not exist; an HF-style folder needs it")
    return files.read_json(file)


def model_cfg(path: epath.PathLike) -> dict[str, Any]:
    """The `model` section that a folder's config.json describes."""
    return hf_config.model_cfg_from_hf(read_config(path))


class Tensors(Mapping[str, np.ndarray]):
    """{torch key: array} over one or several files; an array is read when it is asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]):
        self._readers = dict(readers)

    def __getitem__(self, key: str) -> np.ndarray:
        return self._readers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def open_tensors(path: epath.PathLike) -> Tensors:
    """All tensors of a folder or a single file.

    Raises:
      UserError: no such file, no weights in the folder, a broken or incomplete file, a key in two
        files, or a PyTorch file where torch is absent.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    parts = _weight_files(path) if path.is_dir() else [path]
    if not parts:
        raise UserError(f"{path} holds no weights (*.safetensors, pytorch_model*.bin or *.pth)")
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for file in parts:
        for key, reader in _open_file(file).items():
            if key in readers:
                raise UserError(f"{file}: '{key}' also stands in another file of {path}")
            readers[key] = reader
    return Tensors(readers)


def _weight_files(folder: epath.Path) -> list[epath.Path]:
    """The files of a folder's checkpoint; safetensors are preferred to PyTorch's own."""
    for index in (INDEX, "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            content = files.read_json(folder / index)
            try:
                return [folder / name for name in sorted(set(content["weight_map"].values()))]
            except (KeyError, TypeError, AttributeError):
                raise UserError(f"{folder / index} has no weight_map {{key: file}}") from None
    for pattern in ("*.safetensors", "*.safetensors.xz", "pytorch_model*.bin", "*.pth"):
        if found := sorted(folder.glob(pattern)):
            return found
    return []


def _open_file(file: epath.Path) -> dict[str, Callable[[], np.ndarray]]:
    if not file.exists():
        raise UserError(f"{file} does not exist, though the index of its folder names it")
    try:
        if file.name.endswith(TORCH_SUFFIXES):
            return _readers(_load_torch(file))
        if file.name.endswith(".xz"):
            return _readers(safetensors.numpy.load(lzma.decompress(file.read_bytes())))
        if not file.name.endswith(".safetensors"):
            raise UserError(f"{file} is no weight file: expected .safetensors, .pth or .bin")
        if not os.path.exists(os.fspath(file)):  # a remote file
            return _readers(safetensors.numpy.load(file.read_bytes()))
        opened = safetensors.safe_open(os.fspath(file), framework="numpy")
        return {key: (lambda k=key: opened.get_tensor(k)) for key in opened.keys()}
    except (safetensors.SafetensorError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{file} is broken or incomplete: {error}") from None


def _readers(arrays: Mapping[str, np.ndarray]) -> dict[str, Callable[[], np.ndarray]]:
    return {key: (lambda a=array: a) for key, array in arrays.items()}


def _load_torch(file: epath.Path) -> dict[str, np.ndarray]:
    """A PyTorch state dict as numpy arrays, bit for bit (bfloat16 included)."""
    try:
        import torch  # pylint: disable=g-import-not-at-top
    except ImportError:
        raise UserError(f"{file} needs PyTorch to be read: `pip install torch`, or convert it to "
                        ".safetensors elsewhere") from None
    try:
        with file.open("rb") as stream:
            state = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; all mean that the file is not usable
        raise UserError(f"{file} cannot be read as PyTorch weights (weights_only): "
                        f"{str(error).splitlines()[0]}") from None
    while isinstance(state, Mapping) and not any(torch.is_tensor(v) for v in state.values()):
        inner = next((state[k] for k in ("state_dict", "model", "module") if k in state), None)
        if inner is None:
            raise UserError(f"{file} holds no tensors under their names")
        state = inner

    def to_numpy(t) -> np.ndarray:
        if t.dtype == torch.bfloat16:
            return t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return t.numpy()

    return {key: to_numpy(t.detach()) for key, t in state.items() if torch.is_tensor(t)}


def param_shapes(model: Any) -> dict[str, Any]:
    """Abstract parameters (jax.ShapeDtypeStruct leaves) of an ARGenSeg; nothing is computed."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def load_params(path: epath.PathLike, model_or_shapes: Any, *, optional: Sequence[str] = (),
                dtype: Any = None) -> dict[str, Any]:
    """Parameters (numpy arrays) from a folder or weight file; see interop/torch.to_jax.

    Args:
      path: folder or file.
      model_or_shapes: an ARGenSeg, or a tree of shapes (of the whole or of some parts).
      optional: regexes of leaves that may be absent.
      dtype: of the result; None takes each leaf's own.
    """
    abstract = isinstance(model_or_shapes, Mapping)
    shapes = model_or_shapes if abstract else param_shapes(model_or_shapes)
    vocab_size = None if abstract else model_or_shapes.vocab.size
    return torch_convert.to_jax(open_tensors(path), shapes, vocab_size=vocab_size,
                                optional=optional, dtype=dtype, source=str(path))


def load_base(path: epath.PathLike, vqvae: epath.PathLike, model: Any, dtype: Any = None
              ) -> dict[str, Any]:
    """Parameters to start from: an InternVL folder as released, and VAR's VQ-VAE in its own file.

    The three tables that ARGenSeg adds start as zeros, the rows of the new tokens as the mean of
    the old rows, as in the reference.
    """
    shapes = dict(param_shapes(model))
    own = {"vqvae": shapes.pop("vqvae")}
    params = torch_convert.to_jax(open_tensors(path), shapes, vocab_size=model.vocab.size,
                                  optional=("visual/.*",), dtype=dtype, source=str(path))
    added = {name: np.zeros(leaf.shape, dtype or leaf.dtype)
             for name, leaf in trees.flatten({"visual": shapes["visual"]}).items()}
    found = trees.flatten(params)
    params = trees.unflatten({**added, **found})
    return {**params, **load_params(vqvae, own, dtype=dtype)}


def save_folder(path: epath.PathLike, params: Mapping[str, Any], model_cfg: Mapping[str, Any],
                tokenizer_files: Sequence[epath.PathLike] = (), dtype: Any = None,
                texts: Mapping[str, str] | None = None) -> int:
    """Writes an HF-style folder with the official key names; returns the bytes of the tensors.

    The folder appears under its name when it is complete. An existing one is an error.

    Args:
      path: the folder to make.
      params: the whole parameter tree.
      model_cfg: the `model` section that built it.
      tokenizer_files: copied into the folder.
      dtype: of the weights in the file ('bfloat16', ...); None keeps each leaf's own.
      texts: {file name: content} of further files.
    """
    path = epath.Path(path)
    if path.exists():
        raise UserError(f"{path} exists already; choose another name or remove it")
    dtype = None if dtype is None else jnp.dtype(dtype)
    model = variants.build(model_cfg)
    name = str(dtype or jax.tree.leaves(params)[0].dtype)
    config = hf_config.model_cfg_to_hf(model_cfg, name)
    temporary = path.parent / f"{path.name}.partial-{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    try:
        total = _write_tensors(temporary, torch_convert.to_torch(
            params, vocab_size=model.vocab.size, dtype=dtype))
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file, text in (texts or {}).items():
            (temporary / file).write_text(text)
        for file in tokenizer_files:
            file = epath.Path(file)
            (temporary / file.name).write_bytes(file.read_bytes())
        temporary.rename(path)
    except BaseException:
        temporary.rmtree(missing_ok=True)
        raise
    return total


def tokenizer_files(folder: epath.PathLike) -> list[epath.Path]:
    """The tokenizer's files that a folder holds."""
    return [f for f in (epath.Path(folder) / name for name in TOKENIZER_FILES) if f.exists()]


def _write_tensors(folder: epath.Path, pairs: Iterator[tuple[str, np.ndarray]]) -> int:
    """Writes (key, array) pairs in shards of at most SHARD_BYTES, and an index if there are several."""
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = held = 0

    def flush() -> None:
        (folder / f"{len(shards)}.tmp").write_bytes(
            safetensors.numpy.save(shard, metadata={"format": "pt"}))
        shards.append(list(shard))
        shard.clear()

    for key, array in pairs:
        if shard and held + array.nbytes > SHARD_BYTES:
            flush()
            held = 0
        shard[key] = array
        held += array.nbytes
        total += array.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.tmp").rename(folder / "model.safetensors")
        return total
    where = {}
    for i, keys in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.tmp").rename(folder / name)
        where.update(dict.fromkeys(keys, name))
    (folder / INDEX).write_text(json.dumps(
        {"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
    return total
