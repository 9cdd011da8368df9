"""Ahead of time: compiles the training step and the phases of decoding for TPUs that are not attached.

No weights, no data, no devices: only shapes with shardings on a mesh over a topology description; the
compiler is that of libtpu. Axes: B sequences, T prompt length.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from argenseg_jax import files, sharding, trees
from argenseg_jax.compile import advice, hlo
from argenseg_jax.compile.roofline import Work, bound
from argenseg_jax.data import pipeline
from argenseg_jax.decode import engine, inference_weights
from argenseg_jax.decode.sampling import DecodeConfig
from argenseg_jax.errors import UserError
from argenseg_jax.hardware import CHIPS, GIB, topology
from argenseg_jax.models import variants
from argenseg_jax.train import flops, program, run

LIBTPU = "libtpu==0.0.52"  # the compiler, as in pyproject.toml
_TOO_MUCH = re.compile(
    r"total memory required.*?\(([\d.]+)([KMGT])\).*?"
    r"exceeds available HBM \(([\d.]+)([KMGT])\)",
    re.IGNORECASE | re.DOTALL,
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A function ready for the compiler.

    Attributes:
      stage: the lowered function.
      flops: operations of one call over all devices; executed: including recomputation by remat.
      gathered: bytes of the weights, in the dtype of the products, that a device gathers or reads per call.
      arguments: bytes of weights and optimizer on one device.
    """

    stage: jax.stages.Lowered
    flops: float
    executed: float
    gathered: float
    arguments: float = 0.0


def devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Descriptions of a topology's devices ('v5e:16x16'): for compiling only."""
    from jax.experimental import topologies

    kind, shape = topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"the TPU compiler is missing: pip install {LIBTPU}")
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **more).devices)
    except Exception as error:  # jax and libtpu raise many types
        raise UserError(f"--topology {name}: {error}") from error


# ---------------------------------------------------------------------------------- what is compiled


def train_step(cfg: Mapping[str, Any], mesh: Mesh) -> tuple[Lowered, program.Program]:
    """The step of the config's last phase, built as in train/loop.py."""
    model = run.build_model(cfg)
    phase = run.phases(cfg, model, None)[-1]
    if phase.task.name != "lm":
        raise UserError("train.steps=0: there is no step of the language model to compile")
    shapes = jax.eval_shape(run.init_fn(model, run.adapters(cfg)), jax.random.key(0))
    with jax.set_mesh(mesh):
        made = program.build(cfg, phase, shapes, mesh)
        batch_sharding = sharding.batch_sharding(mesh)
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding)
            for name, (shape, dtype) in pipeline.batch_shapes(
                cfg["data"], run.geometry(model), phase.global_batch
            ).items()
        }
        stage = made.step.lower(made.abstract_state(), batch)
    with_remat = cfg["train"]["remat"] == "full"
    executed = sum(run.lm_flops(cfg, model, shapes, made.trainable, with_remat=with_remat).values())
    item = 2 if cfg["train"]["dtype"] == "bfloat16" else 4
    learned = sum(math.prod(x.shape) for path, x in trees.flatten(shapes).items() if made.trainable(path))
    passes = phase.global_batch // (phase.microbatch or phase.global_batch) * (4 if with_remat else 3)
    return Lowered(
        stage,
        made.flops,
        executed,
        item * learned * passes / mesh.shape["tensor"],
        _device_bytes(made.shapes, made.layout),
    ), made


def decode_phases(cfg: Mapping[str, Any], mesh: Mesh, *, batch: int, prompt: int, masks: int = 1) -> dict[str, Lowered]:
    """{phase: lowered} of decoding a batch, as in decode/engine.py: weights in bfloat16.

    Args:
      batch: B;  prompt: T, the length that prompts are padded to;  masks: at most, per answer.
    """
    model = variants.build({**cfg["model"], "dtype": "bfloat16"})
    shapes = jax.eval_shape(run.init_fn(model), jax.random.key(0))
    count = lambda part: sum(math.prod(x.shape) for x in jax.tree.leaves(shapes[part]))
    with jax.set_mesh(mesh):
        sharding.check_rows(batch, mesh, "--batch")
        phases = engine.Phases(model)
        prepare = functools.partial(inference_weights.for_inference, phases.model, split=phases.split)
        ready = jax.eval_shape(prepare, shapes)
        layout = sharding.shardings(ready, mesh)
        params = {"params": sharding.placed(ready, layout)}
        batch_sharding = sharding.batch_sharding(mesh)
        array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding)
        side, text = model.image_size, cfg["decode"]["max_text_tokens"]
        capacity = phases.capacity(prompt, text, masks)
        prefill = phases.prefill.lower(
            params,
            array((batch, prompt), jnp.int32),
            array((batch,), jnp.int32),
            array((batch, 1, side, side, 3), jnp.uint8),
            DecodeConfig(),
            capacity,
            text,
        )
        answer = sharding.placed(prefill.out_info, jax.tree.map(lambda x: _of_answer(x, mesh), prefill.out_info))
        stages = {
            "prefill": prefill,
            "text": phases.text.lower(params, answer),
            "mask": phases.mask.lower(params, answer, False),
        }
    codes, llm = model.scales.num_codes, model.llm
    attention = 4 * batch * llm.depth * llm.heads * llm.head_dim
    attend = lambda tokens, before: attention * tokens * (before + tokens / 2)
    matrices = 2 * batch * (count("llm") - llm.padded_vocab_size * llm.width)  # without the embedding look-up
    counted = {
        "prefill": matrices * prompt
        + attend(prompt, 0)
        + 2 * batch * count("vision") * ((side // model.vision.patch) ** 2 + 1),
        "text": text * (matrices + attend(1, prompt)),
        "mask": (codes + 1) * matrices + attend(codes, prompt) + batch * flops.decoder(model, shapes["vqvae"]),
    }
    read = 2 * count("llm") / (mesh.shape["tensor"] * mesh.shape["fsdp"])
    times = {"prefill": 1, "text": text, "mask": len(model.scales) + 1}
    weights = _device_bytes(ready, layout)
    return {
        name: Lowered(stage, counted[name], counted[name], read * times[name], weights)
        for name, stage in stages.items()
    }


def _device_bytes(shapes: Any, layout: Any) -> float:
    """Bytes on one device."""
    return sum(
        math.prod(spec.shard_shape(s.shape)) * np.dtype(s.dtype).itemsize
        for s, spec in zip(jax.tree.leaves(shapes), jax.tree.leaves(layout))
    )


def _of_answer(x: Any, mesh: Mesh) -> NamedSharding:
    """Sharding of a field of text_decode.Answer: B over the data axes, and the heads of the cache over `tensor`."""
    batch = sharding.BATCH_AXES
    if len(x.shape) < 4:
        return NamedSharding(mesh, PartitionSpec(batch) if x.shape else PartitionSpec())
    heads = "tensor" if x.shape[-2] % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(x.shape) - 4), batch, None, heads, None))


# ---------------------------------------------------------------------------------- reports


def compile_for(
    kind: str, lowered: Lowered, mesh: Mesh, options: Mapping[str, str] | None = None, keep: str | None = None
) -> dict[str, Any]:
    """Compiles for a kind of chip; reports whether it fits, its memory and work per device, and time estimates.

    `options` are passed to the compiler (xla_tpu_*); `keep` is a file for the HLO text.
    """
    chip = CHIPS[kind]
    limit = chip.hbm_gib / chip.devices
    try:
        compiled = lowered.stage.compile(compiler_options=dict(options) if options else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = _TOO_MUCH.search(str(error))
        if not found:
            raise UserError(f"the compiler failed: {str(error)[:300]}") from error
        need, limit = (float(found[i]) * _UNITS[found[i + 1].upper()] / GIB for i in (1, 3))
        if "HLO temporaries" in str(error):  # the message counts only these
            need += lowered.arguments / GIB
        return {"fits": False, "hbm_gib": round(need, 2), "hbm_limit_gib": round(limit, 2)}
    memory = compiled.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    need = arguments + temporary + output + memory.generated_code_size_in_bytes
    report = {
        "fits": True,
        "hbm_gib": need / GIB,
        "hbm_limit_gib": limit,
        "argument_gib": arguments / GIB,
        "temporary_gib": temporary / GIB,
        "output_gib": output / GIB,
    }
    num_devices = mesh.size
    counts = None
    if chip.hlo:
        text = compiled.as_text()
        if keep:
            files.write(keep, text)
        slices = mesh.shape["dcn_data"]
        counts = hlo.count(text, num_devices // slices if slices > 1 else 0)
        report |= {"hlo_flops": counts.flops * num_devices, "collective_bytes": dict(counts.collectives)}
    work = _work(lowered, mesh, counts, arguments + temporary)
    report |= {
        "flops": lowered.flops,
        "executed_flops": lowered.executed,
        "bytes": work.hbm_bytes,
        "network_bytes": work.ici_bytes + work.dcn_bytes,
        "counted": "hlo" if counts else "analytic",
        **bound(kind, work),
    }
    # Significant digits, not decimals: a small program takes less than 0.0001 s, and times are summed.
    return {
        key: float(f"{value:.4g}") if isinstance(value, float) and value < 1e6 else value
        for key, value in report.items()
    }


def _work(lowered: Lowered, mesh: Mesh, counts: hlo.Counts | None, used: float) -> Work:
    """The work of one device: counted in the HLO, or estimated if there is none.

    The estimate: weights are gathered for every pass, their gradients reduce-scattered at twice the cost of
    a gather; the `used` bytes are read and written once, weights once per pass.
    """
    flops_of_one = lowered.flops / mesh.size, lowered.executed / mesh.size
    if counts:
        total = sum(counts.collectives.values())
        return Work(*flops_of_one, counts.bytes, total - counts.across_slices, counts.across_slices)
    ways = mesh.shape["fsdp"]
    sent = lowered.gathered * (ways - 1) / ways
    return Work(*flops_of_one, 2 * used + 2 * lowered.gathered, sent)


def train_report(
    cfg: Mapping[str, Any],
    name: str,
    slices: int = 1,
    options: Mapping[str, str] | None = None,
    keep: str | None = None,
) -> dict[str, Any]:
    """Compiles the config's training step for a topology; see `compile_for`, and advice.advise."""
    kind, _ = topology(name)
    mesh = sharding.make_mesh(cfg["mesh"], devices(name, slices))
    lowered, made = train_step(cfg, mesh)
    report = compile_for(kind, lowered, mesh, options, keep)
    report["mesh"] = dict(mesh.shape)
    if not report["fits"]:
        state, moments = lowered.arguments, _device_bytes(made.shapes.opt_state, made.layout.opt_state)
        report |= {
            "flops": lowered.flops,
            "bound": None,
            "mfu": None,
            "argument_gib": round(state / GIB, 3),
            "advice": advice.advise(
                cfg,
                run.build_model(cfg),
                mesh,
                need=report["hbm_gib"] * GIB,
                limit=report["hbm_limit_gib"] * GIB,
                state=state,
                moments=moments,
            ),
        }
    return report


def decode_report(
    cfg: Mapping[str, Any], name: str, *, batch: int, prompt: int, keep: str | None = None
) -> dict[str, Any]:
    """Compiles the phases of decoding a batch; reports the largest memory and the sum of the times."""
    kind, _ = topology(name)
    mesh = sharding.make_mesh(cfg["mesh"], devices(name))
    phases = {
        phase: compile_for(kind, lowered, mesh, keep=keep and f"{keep}.{phase}")
        for phase, lowered in decode_phases(cfg, mesh, batch=batch, prompt=prompt).items()
    }
    worst = max(phases.values(), key=lambda report: report["hbm_gib"])
    summary = {
        "fits": all(p["fits"] for p in phases.values()),
        "hbm_gib": worst["hbm_gib"],
        "hbm_limit_gib": worst["hbm_limit_gib"],
        "mesh": dict(mesh.shape),
        "phases": phases,
        "flops": sum(p.get("flops", 0) for p in phases.values()),
        "bound": None,
        "mfu": None,
    }
    if summary["fits"]:
        slowest = max(phases.values(), key=lambda report: report["step_seconds"])
        seconds = sum(p["step_seconds"] for p in phases.values())
        peak = CHIPS[kind].flops / CHIPS[kind].devices * mesh.size
        summary |= {
            "bound": slowest["bound"],
            "step_seconds": float(f"{seconds:.4g}"),
            "mfu": round(summary["flops"] / peak / seconds, 4),
        }
    return summary
