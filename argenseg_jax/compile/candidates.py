"""Candidates of `compile --search`: meshes x batch sizes x remat policies of a config, and their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from argenseg_jax.hardware import CHIPS, chips_of, topology
from argenseg_jax.models import variants

_REMAT = ("full", "dots", "none")  # from the least memory to the most


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting: shards per weight, tensor degree, sequences per step, remat policy."""

    fsdp: int
    tensor: int
    batch: int
    remat: str
    slices: int = 1

    def overrides(self) -> list[str]:
        """Flags that set it."""
        return [
            f"--config.mesh.dcn_data={self.slices}",
            "--config.mesh.data=1",
            f"--config.mesh.fsdp={self.fsdp}",
            f"--config.mesh.tensor={self.tensor}",
            f"--config.train.global_batch={self.batch}",
            "--config.train.microbatch=0",
            f"--config.train.remat={self.remat}",
        ]


def expand(cfg: Mapping[str, Any], name: str, slices: int = 1) -> list[Candidate]:
    """Tensor degrees up to 4 that divide the heads; 1, 2 and 4 times the config's batch.

    In order of memory: the smallest of each kind comes first.
    """
    kind, shape = topology(name)
    chips, kv_heads = chips_of(shape) * CHIPS[kind].devices, variants.build(cfg["model"]).llm.kv_heads
    found = []
    for tensor in (t for t in (1, 2, 4) if kv_heads % t == 0 and chips % t == 0):
        for batch in (cfg["train"]["global_batch"] * n for n in (1, 2, 4)):
            if batch % (chips // tensor * slices) == 0:
                found += [Candidate(chips // tensor, tensor, batch, remat, slices) for remat in _REMAT]
    return found


def hopeless(candidate: Candidate, tried: Sequence[tuple[Candidate, Mapping[str, Any]]]) -> bool:
    """Whether a candidate that needs no more memory has failed already."""
    order = _REMAT.index
    return any(
        not report["fits"]
        and other.tensor == candidate.tensor
        and other.batch <= candidate.batch
        and order(other.remat) <= order(candidate.remat)
        for other, report in tried
    )


def ranked(tried: Sequence[tuple[Candidate, Mapping[str, Any]]]) -> list[tuple[Candidate, Mapping[str, Any]]]:
    """Those that fit, by the MFU bound, then by memory."""
    fitting = [item for item in tried if item[1]["fits"]]
    return sorted(fitting, key=lambda item: (-item[1]["mfu"], item[1]["hbm_gib"]))


def line(candidate: Candidate, report: Mapping[str, Any]) -> str:
    """One line for the log."""
    setting = f"fsdp {candidate.fsdp}, tensor {candidate.tensor}, batch {candidate.batch}, remat {candidate.remat}"
    if "error" in report:
        return f"{setting}: {report['error']}"
    if not report["fits"]:
        return f"{setting}: does not fit, {report['hbm_gib']} GiB"
    return (
        f"{setting}: {report['hbm_gib']:.2f} GiB, MFU at most {report['mfu']:.0%} "
        f"({report['bound']}), {candidate.batch / report['step_seconds']:.0f} sequences per second at most"
    )
