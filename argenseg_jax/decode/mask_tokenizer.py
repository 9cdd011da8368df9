"""Masks -> the codes that training would compute itself: the mask tokenizer alone, for `prepare --codes`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from argenseg_jax import trees
from argenseg_jax.ckpt.checkpoint import open_checkpoint
from argenseg_jax.data import transforms
from argenseg_jax.errors import UserError

BATCH = 16  # masks of one call, so that there is one compilation
DTYPE = "bfloat16"  # of the computation, where the checkpoint's config does not say


@dataclasses.dataclass(frozen=True)
class MaskTokenizer:
    """The VQ-VAE of a checkpoint; a value that can be sent to other processes, which load it again.

    Attributes:
      checkpoint: as of `open_checkpoint`.
      dtype: of the computation: the codes are those of a training with train.dtype of the same name.
      pad: as data.pad_to_square of that training.
      vqvae: fingerprint of the weights.
      mask_size, num_codes: R and N of the model.
    """

    checkpoint: str
    dtype: str
    pad: bool
    vqvae: str
    mask_size: int
    num_codes: int

    @classmethod
    def from_checkpoint(cls, checkpoint: str, dtype: str = "", *, checksums: bool = True) -> MaskTokenizer:
        """dtype: '' = train.dtype of the run that wrote the checkpoint, or bfloat16."""
        opened = open_checkpoint(checkpoint, checksums=checksums)
        model, config = opened.model(), opened.config
        dtype = dtype or config.get("train", {}).get("dtype", DTYPE)
        pad = bool(config.get("data", {}).get("pad_to_square", False))
        return cls(
            checkpoint, dtype, pad, fingerprint(opened.load_part("vqvae")), model.mask_size, model.scales.num_codes
        )

    def identity(self) -> dict[str, Any]:
        """What the codes depend on; training compares it with its own."""
        return identity(self.vqvae, self.dtype, self.pad, self.mask_size, self.num_codes)

    def __call__(self, masks: Sequence[np.ndarray]) -> np.ndarray:
        """u8[H, W] (0..255) or u8[H, W, 3] each, see transforms.targets -> i32[K, N]."""
        tokenize = _tokenizer(self.checkpoint, self.dtype, self.vqvae)
        squares = [transforms.resize_target(m, self.mask_size, pad=self.pad) for m in masks]
        codes = np.zeros((len(squares), self.num_codes), np.int32)
        for begin in range(0, len(squares), BATCH):
            some = squares[begin : begin + BATCH]
            filled = np.stack(some + some[:1] * (BATCH - len(some)))
            codes[begin : begin + len(some)] = np.asarray(tokenize(filled[:, None]))[: len(some), 0]
        return codes


def identity(vqvae: str, dtype: str, pad: bool, mask_size: int, num_codes: int) -> dict[str, Any]:
    """All that the codes of a mask depend on, for JSON."""
    return {"vqvae": vqvae, "dtype": dtype, "pad_to_square": bool(pad), "mask_size": mask_size, "num_codes": num_codes}


def fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 over the names and float32 values of the leaves."""
    digest = hashlib.sha256()
    for name, leaf in sorted(trees.flatten(params).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(np.asarray(leaf, np.float32)).tobytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def _tokenizer(checkpoint: str, dtype: str, vqvae: str) -> Callable[[np.ndarray], jax.Array]:
    """u8[B, 1, R, R, 3] -> i32[B, 1, N], loaded once a process."""
    opened = open_checkpoint(checkpoint, checksums=False)  # the fingerprint is compared instead
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), opened.load_part("vqvae"))
    if fingerprint(params) != vqvae:
        raise UserError(f"{checkpoint} has changed while its codes were being written")
    run = jax.jit(nn.apply(lambda model, masks: model.tokenize(masks), opened.model(dtype=dtype)))
    return functools.partial(run, {"params": {"vqvae": params}})
