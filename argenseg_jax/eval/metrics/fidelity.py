"""PSNR and SSIM of reconstructed or generated images."""

from __future__ import annotations

import array
import math

import numpy as np

IDENTICAL = 100.0  # dB of equal images, whose PSNR is infinite
WINDOW, SIGMA = 11, 1.5  # of the Gaussian that SSIM averages over


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two u8 images of one shape; at most IDENTICAL."""
    _check(a, b)
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return IDENTICAL if error == 0 else min(IDENTICAL, 10 * math.log10(255**2 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of u8[H, W] or u8[H, W, C], mean over pixels.

    The Gaussian window has 11x11 pixels and sigma 1.5 and stays inside the image; the variances
    are those of the window as a population.
    """
    _check(a, b)
    if min(a.shape[:2]) < WINDOW:
        raise ValueError(f"SSIM needs {WINDOW}x{WINDOW} pixels or more, not {a.shape[:2]}")
    x, y = a.astype(np.float64), b.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = _blur(x), _blur(y)
    vx, vy, both = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    each = ((2 * mx * my + c1) * (2 * both + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(each.mean())


class Fidelity:
    """Means of PSNR and SSIM."""

    def __init__(self):
        self._values = {"PSNR": array.array("d"), "SSIM": array.array("d")}

    def add(self, psnr_db: float, similarity: float) -> None:
        """One image."""
        self._values["PSNR"].append(psnr_db)
        self._values["SSIM"].append(similarity)

    def scores(self) -> dict[str, float | int | None]:
        """{n, PSNR, SSIM}; None without an image."""
        return {
            "n": len(self._values["PSNR"]),
            **{name: float(np.mean(values)) if values else None for name, values in self._values.items()},
        }


def _blur(image: np.ndarray) -> np.ndarray:
    """The Gaussian mean at every place where the window fits."""
    at = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(at**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(image, WINDOW, axis=axis)
        image = windows @ weights
    return image


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"two u8 images of one shape expected, not {a.dtype}{a.shape}, {b.dtype}{b.shape}")
