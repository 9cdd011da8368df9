"""The multi-scale token grid: patch_nums -> positions, levels, centres and phi indices (numpy).

K scales, scale k has pn_k x pn_k codes in row-major order; N = sum of pn_k^2 codes in all.
256 px masks use 10 scales and 680 codes, 512 px masks 10 scales and 2240 codes (VAR, var.py).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@dataclasses.dataclass(frozen=True)
class Scales:
    """The sides of the scales, coarse to fine; the last one is the side of the latent grid."""

    patch_nums: tuple[int, ...]

    def __post_init__(self):
        if not self.patch_nums or list(self.patch_nums) != sorted(self.patch_nums):
            raise ValueError(f"patch_nums must not shrink from coarse to fine: {self.patch_nums}")

    def __len__(self) -> int:
        return len(self.patch_nums)

    @property
    def num_codes(self) -> int:
        """N, the number of codes of one mask."""
        return sum(pn * pn for pn in self.patch_nums)

    @property
    def side(self) -> int:
        """Side of the latent grid."""
        return self.patch_nums[-1]

    @functools.cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """(begin, end) of each scale within the N codes."""
        ends = np.cumsum([pn * pn for pn in self.patch_nums]).tolist()
        return tuple(zip([0, *ends[:-1]], ends))

    @functools.cached_property
    def levels(self) -> np.ndarray:
        """int32[N]: the scale that each code belongs to."""
        return np.repeat(np.arange(len(self), dtype=np.int32), [pn * pn for pn in self.patch_nums])

    @functools.cached_property
    def centers(self) -> np.ndarray:
        """float32[N, 2]: (y, x) centre of each code's cell, in units of the image side, 0..1."""
        return np.concatenate([grid_centers(pn) for pn in self.patch_nums])

    def phi_index(self, num_phi: int = 4) -> tuple[int, ...]:
        """Which phi convolution refines each scale (VAR quant.py, PhiPartiallyShared).

        The nearest of `num_phi` ticks to k/(K-1). For the official ten scales two entries are exact
        ties that float64 rounding decided, so that table is written out.
        """
        if num_phi == 4 and len(self) == 10:
            return (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
        if num_phi == 4:
            ticks = np.linspace(1 / 3 / 4, 1 - 1 / 3 / 4, 4)
        else:
            ticks = np.linspace(1 / 2 / num_phi, 1 - 1 / 2 / num_phi, num_phi)
        at = [k / max(len(self) - 1, 1) for k in range(len(self))]
        return tuple(int(np.argmin(np.abs(ticks - a))) for a in at)


def grid_centers(side: int) -> np.ndarray:
    """float32[side*side, 2]: (y, x) centres of a square grid's cells, 0..1, row-major."""
    c = (np.arange(side, dtype=np.float32) + 0.5) / side
    return np.stack(np.meshgrid(c, c, indexing="ij"), axis=-1).reshape(-1, 2)
