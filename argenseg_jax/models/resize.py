"""Torch-compatible 1-D resampling operators as small constant matrices (numpy).

Both resizes of the VQ-VAE's quantizer are separable: out = M_h x M_w^T. `jax.image.resize` is no
substitute: its cubic kernel has a = -0.5, torch's a = -0.75, enough of a difference to flip codes.
"""

from __future__ import annotations

import functools

import numpy as np

_A = -0.75  # sharpness of torch's cubic kernel


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel at |distance|, zero from 2 on."""
    d = np.abs(distance)
    near = ((_A + 2) * d - (_A + 3)) * d * d + 1
    far = ((_A * d - 5 * _A) * d + 8 * _A) * d - 4 * _A
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


@functools.cache
def bicubic_matrix(n_in: int, n_out: int) -> np.ndarray:
    """float32[n_out, n_in]: torch's `bicubic`: align_corners False, no antialias, border kept."""
    center = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    matrix = np.zeros((n_out, n_in))
    for offset in (-1, 0, 1, 2):
        tap = np.floor(center).astype(int) + offset
        np.add.at(matrix, (np.arange(n_out), np.clip(tap, 0, n_in - 1)), _cubic(center - tap))
    return _frozen(matrix)


@functools.cache
def area_matrix(n_in: int, n_out: int) -> np.ndarray:
    """float32[n_out, n_in]: torch's `area`, the mean over cells [floor(i n/m), ceil((i+1) n/m))."""
    row, col = np.arange(n_out)[:, None], np.arange(n_in)[None]
    inside = (col >= row * n_in // n_out) & (col < -(-(row + 1) * n_in // n_out))
    return _frozen(inside / inside.sum(axis=1, keepdims=True))


def _frozen(matrix: np.ndarray) -> np.ndarray:
    """Read-only float32 copy: the cache hands the same array to every caller."""
    matrix = matrix.astype(np.float32)
    matrix.flags.writeable = False
    return matrix
