"""The accelerators' limits in one table: TPU chips with their topologies, and peaks by jax device kind."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from argenseg_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip.

    Attributes:
      flops: dense bfloat16 operations per second.
      hbm_gib: memory that the compiler lets a program use.
      hbm_rate: bytes per second of the memory.
      ici_rate: bytes per second that a chip sends over all axes of the torus (one direction).
      dcn_rate: bytes per second and chip between slices.
      devices: jax devices of a chip.
      hlo: whether the compiled program can be read as text; the compiler ends the process elsewhere.
    """

    flops: float
    hbm_gib: float
    hbm_rate: float
    ici_rate: float
    dcn_rate: float
    devices: int = 1
    hlo: bool = False


# Peaks and memory rates from the makers' data sheets; network rates from "How to Scale Your Model"
# (jax-ml.github.io/scaling-book): rate of a link both ways x axes of the torus.
CHIPS = {
    "v4": Chip(275e12, 31.75, 1228e9, 3 * 9e10, 6.25e9),
    "v5e": Chip(197e12, 15.75, 819e9, 2 * 9e10, 3.125e9, hlo=True),
    "v5p": Chip(459e12, 95.74, 2765e9, 3 * 18e10, 6.25e9),
    "v6e": Chip(918e12, 31.25, 1640e9, 2 * 18e10, 12.5e9, hlo=True),
    "tpu7x": Chip(2307e12, 189.5, 7380e9, 3 * 18e10, 12.5e9, devices=2),
}


def topology(name: str) -> tuple[str, str]:
    """(kind, shape) of 'v5e:16x16', or of a cloud name such as 'v5p-128'; UserError otherwise.

    Cloud names count cores for v4 and v5p (v5p-128 has 64 chips), chips for the others.
    """
    known = f"there are {', '.join(CHIPS)}, as in v5e:16x16, v5p:4x4x4 or v5p-128"
    kind, _, shape = name.partition(":")
    if cloud := re.fullmatch(r"(v\d\w?|tpu7x)-(\d+)", name):
        kind, count = cloud[1], int(cloud[2])
        flat = kind in ("v5e", "v6e")
        shape = _near_cube(count if flat or kind == "tpu7x" else count // 2, 2 if flat else 3)
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"--topology {name} is unknown; {known}")
    return kind, shape


def _near_cube(chips: int, rank: int) -> str:
    """Sizes as equal as powers of two can be, the small ones first; '' for other numbers of chips."""
    if chips < 1 or chips & (chips - 1):
        return ""
    twos, more = divmod(chips.bit_length() - 1, rank)
    return "x".join(str(2 ** (twos + (i >= rank - more))) for i in range(rank))


def chips_of(shape: str) -> int:
    """Chips of a slice of shape '4x4x4'."""
    return int(np.prod([int(n) for n in shape.split("x")]))


# Dense bfloat16 operations per second of one device, by a beginning of its jax device_kind (longer
# ones first); from the makers' data sheets. Those of TPUs: CHIPS.
PEAKS = {
    "TPU v4": CHIPS["v4"],
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6": CHIPS["v6e"],
    "TPU7x": CHIPS["tpu7x"],
}
PEAKS = {
    **{kind: chip.flops / chip.devices for kind, chip in PEAKS.items()},
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak(device_kind: str) -> float | None:
    """Operations per second of a device, None where it is not known (CPUs)."""
    return next((value for kind, value in PEAKS.items() if device_kind.startswith(kind)), None)
