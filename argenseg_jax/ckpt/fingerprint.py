"""A fingerprint of the weights in a checkpoint, to detect answers that were computed with other weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from etils import epath

from argenseg_jax import files
from argenseg_jax.ckpt import orbax_io
from argenseg_jax.ckpt.checkpoint import Checkpoint
from argenseg_jax.interop import tensor_files

WHOLE = 64 << 20  # bytes; a checkpoint up to this size is read completely
BLOCK, BLOCKS = 4096, 64  # bytes per block and number of blocks that are read of a larger one


def fingerprint(checkpoint: Checkpoint) -> str:
    """16 hexadecimal digits that depend on the files of the weights and on their config.

    For a checkpoint of up to WHOLE bytes it depends on every byte and on nothing else. For a larger one,
    which takes seconds to minutes to read, on names, sizes, modification times and a sample of the bytes:
    it changes with another training or a rewritten file, and possibly with a copy.
    """
    root = checkpoint.path if checkpoint.is_hf else orbax_io.find_step(checkpoint.path)
    found = sorted(_hf_files(root) if checkpoint.is_hf else _step_files(root))
    remote = files.is_remote(root)
    stats = [path.stat() for _, path in found]
    whole = not remote and sum(stat.length for stat in stats) <= WHOLE
    digest = hashlib.blake2b(repr(sorted(checkpoint.config.get("model", {}).items())).encode(), digest_size=8)
    every = -(-len(found) // BLOCKS)
    for k, ((name, path), stat) in enumerate(zip(found, stats, strict=True)):
        digest.update(f"\0{name}\0{stat.length}\0".encode("utf-8", "surrogateescape"))
        if whole:
            digest.update(path.read_bytes())
            continue
        digest.update(str(stat.mtime if remote else os.stat(path).st_mtime_ns).encode())
        if not remote and k % every == 0:  # in a bucket every read is a request
            _sample(digest, path, stat.length, max(BLOCKS // len(found), 1))
    return digest.hexdigest()


def _sample(digest: hashlib.blake2b, path: epath.Path, length: int, blocks: int) -> None:
    """Adds the first, the last and further blocks of a file."""
    with path.open("rb") as file:
        for k in range(blocks + 1):
            file.seek(max(length - BLOCK, 0) * k // blocks)
            digest.update(file.read(BLOCK))


def _hf_files(folder: epath.Path) -> list[tuple[str, epath.Path]]:
    """(name, path) of weights, configs and vocabularies."""
    if not folder.is_dir():
        return [(folder.name, folder)]
    suffixes = (*tensor_files.SUFFIXES, ".json", ".model", ".txt")
    return [(path.name, path) for path in folder.iterdir() if path.name.endswith(suffixes) and path.is_file()]


def _step_files(step: epath.Path) -> list[tuple[str, epath.Path]]:
    """(name, path) of Orbax's files of the parameters; in a bucket, only of those that every save rewrites."""
    return [
        (f"{k}/{path.relative_to(folder)}", path)
        for k, folder in enumerate(orbax_io.param_folders(step, ema=True))
        for path in _below(folder)
    ]


def _below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif not files.is_remote(path):
            yield from _below(path)
