"""Roofline: lower bounds of a step's time, and upper bounds of its MFU, from a chip's data sheet.

The bound is the time that the busiest of compute, HBM and network needs at its data-sheet rate if the
others overlap with it perfectly: real steps are slower.
"""

from __future__ import annotations

import dataclasses

from argenseg_jax.hardware import CHIPS


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one device in a step.

    Attributes:
      model_flops: operations without recomputation; executed_flops: with that of remat.
      hbm_bytes: read and written;  ici_bytes, dcn_bytes: sent inside a slice, and between slices.
    """

    model_flops: float
    executed_flops: float
    hbm_bytes: float
    ici_bytes: float
    dcn_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


def bound(kind: str, work: Work) -> dict[str, float | str]:
    """Seconds of each limit, the largest of them (`bound`), and the step time and MFU that it allows."""
    chip = CHIPS[kind]
    seconds = {
        "compute": work.executed_flops * chip.devices / chip.flops,
        "hbm": work.hbm_bytes * chip.devices / chip.hbm_rate,
        "interconnect": work.ici_bytes * chip.devices / chip.ici_rate + work.dcn_bytes * chip.devices / chip.dcn_rate,
    }
    limit = max(seconds, key=lambda name: seconds[name])
    return {
        "bound": limit,
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "step_seconds": seconds[limit],
        "mfu": work.model_flops * chip.devices / chip.flops / max(seconds[limit], 1e-12),
    }
