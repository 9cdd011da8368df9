"""The device mesh and the table of the shardings of parameters and activations.

Axes of the mesh: dcn_data (slices), data (replicas), fsdp (shards of every weight, data-parallel
too), tensor (heads, MLP width, vocabulary). The batch axis is split over the first three.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from argenseg_jax import trees
from argenseg_jax.errors import UserError

AXES = ("dcn_data", "data", "fsdp", "tensor")
BATCH_AXES = ("dcn_data", "data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Layout of the parameters whose path within `part` matches `pattern` as a whole.

    `spec` names a mesh axis for each dimension of one unstacked layer; () replicates, whatever the
    rank. An `optional` rule may match nothing in a model that has its part.
    """

    part: str
    pattern: str
    spec: tuple[str | None, ...] = ()
    optional: bool = False


def _adapters(part: str) -> tuple[Rule, Rule]:
    """Of models/lora.py: the side of the kernel's inputs, and that of its outputs."""
    return (
        Rule(part, r".*/lora_a", ("fsdp", None), optional=True),
        Rule(part, r".*/lora_b", (None, "fsdp"), optional=True),
    )


PARAM_RULES = (
    Rule("vision", r"patch_embed/kernel", (None, None, None, "fsdp")),
    Rule("vision", r"class_embed|pos_embed"),
    # The heads are replicated: InternViT-6B has 25 of them, which no usual tensor degree divides.
    Rule("vision", r"layers/attn/(q|k|v)/kernel", ("fsdp", None, None)),
    Rule("vision", r"layers/attn/o/kernel", (None, None, "fsdp")),
    Rule("vision", r"layers/mlp/fc1/kernel", ("fsdp", "tensor")),
    Rule("vision", r"layers/mlp/fc2/kernel", ("tensor", "fsdp")),
    Rule("vision", r"(.*/)?(scale|bias|ls1|ls2)"),
    *_adapters("vision"),
    Rule("connector", r"fc1/kernel", ("fsdp", "tensor")),
    Rule("connector", r"fc2/kernel", ("tensor", "fsdp")),
    Rule("connector", r".*/(scale|bias)"),
    *_adapters("connector"),
    Rule("llm", r"embed/embedding", ("tensor", "fsdp")),
    Rule("llm", r"layers/attn/(q|k|v)/kernel", ("fsdp", "tensor", None)),
    Rule("llm", r"layers/attn/o/kernel", ("tensor", None, "fsdp")),
    Rule("llm", r"layers/mlp/(gate|up)/kernel", ("fsdp", "tensor")),
    Rule("llm", r"layers/mlp/down/kernel", ("tensor", "fsdp")),
    Rule("llm", r"lm_head/kernel", ("fsdp", "tensor"), optional=True),  # absent where tied
    Rule("llm", r".*/(scale|bias)"),
    *_adapters("llm"),
    Rule("visual", r"word_embed/kernel", (None, "fsdp")),
    Rule("visual", r"word_embed/bias|lvl_embed|pos_embed"),
    Rule("vqvae", r".*"),  # small and frozen: replicated
)

# Logical axis of an activation -> mesh axes. The positions of the residual stream are split over the tensor axis
# (Korthikanti et al., 2022): norms and sums work on shards, and what would be an all-reduce after each
# layer is a reduce-scatter and an all-gather.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "act_batch": BATCH_AXES,
    "act_len": ("tensor",),
    "act_emb": (),
    "act_heads": ("tensor",),
    "act_ffw": ("tensor",),
    "act_vocab": ("tensor",),
}


def make_mesh(cfg: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of a config's `mesh` section {dcn_data, data, fsdp, tensor}; -1 = all that are left."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = [int(cfg[axis]) for axis in AXES]
    given = ", ".join(f"mesh.{a}={s}" for a, s in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"{given}: sizes are positive, and at most one of them is -1 (the rest)")
    fixed = math.prod(s for s in sizes if s > 0)
    if len(devices) % fixed or (-1 not in sizes and len(devices) != fixed):
        raise UserError(
            f"{given} makes {fixed} devices, but there are {len(devices)}; the sizes "
            "must multiply to that number (-1 takes the rest)"
        )
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    if sizes[0] > 1 and hasattr(devices[0], "slice_index"):
        grid = mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), (sizes[0], 1, 1, 1), devices)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def placed(shapes: Any, layout: Any) -> Any:
    """A tree of ShapeDtypeStruct whose leaves have the shardings of a tree of NamedSharding."""
    return jax.tree.map(lambda s, spec: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=spec), shapes, layout)


def platform() -> str:
    """Where what is traced now will run: 'cpu', 'gpu' or 'tpu'.

    Devices of the mesh in use decide; those of a topology description need not exist. Without a mesh
    it is where this process runs.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation's sharding: one logical name (or None = replicated) for each dimension.

    Does nothing outside a mesh (`jax.set_mesh`). A dimension that the mesh axes do not divide, such
    as 2 key/value heads over 4 tensor shards, is replicated.
    """
    axes = [() if name is None else ACTIVATIONS.get(name) for name in names]
    if None in axes:
        raise ValueError(f"no activation axis '{names[axes.index(None)]}' in {list(ACTIVATIONS)}")
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = [a if a and size % math.prod(mesh.shape[n] for n in a) == 0 else None for a, size in zip(axes, x.shape)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def data_parallel(run: Callable[..., Any], batch: Sequence[jax.Array], weights: jax.Array) -> Any:
    """`run(*batch, weights)` on every device for its part of the batch, with replicated weights.

    Weights [D, ...], split over fsdp along D, are gathered once, however often `run` uses them, and
    their gradient is summed once and scattered. Left to the partitioner, a loop within `run` would do
    both in each of its iterations. Results have the batch axis first. The tensor axis stays the partitioner's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape[a] for a in BATCH_AXES) == 1:
        return run(*batch, weights)

    def local(*args: jax.Array) -> Any:
        return run(*args[:-1], jax.lax.all_gather(args[-1], "fsdp", axis=0, tiled=True))

    return jax.shard_map(
        local,
        axis_names=set(BATCH_AXES),
        check_vma=False,
        in_specs=(*(PartitionSpec(BATCH_AXES),) * len(batch), PartitionSpec("fsdp")),
        out_specs=PartitionSpec(BATCH_AXES),
    )(*batch, weights)


def param_specs(shapes: Mapping[str, Any], rules: Sequence[Rule] = PARAM_RULES) -> dict[str, PartitionSpec]:
    """{'a/b/c': spec} for a parameter tree (of anything with .shape).

    Raises ValueError where a parameter is not covered by exactly one rule, where the ranks differ,
    or where a rule matches nothing although the tree has its part.
    """
    flat = trees.flatten(shapes)
    specs, used = {}, set()
    for path, leaf in flat.items():
        part, _, name = path.partition("/")
        name = re.sub(r"^layers_\d+/", "layers/", name)  # split for decoding
        hits = [r for r in rules if r.part == part and re.fullmatch(r.pattern, name)]
        if len(hits) != 1:
            raise ValueError(
                f"parameter '{path}' {tuple(leaf.shape)} is covered by {len(hits)} "
                f"sharding rules, not by one: {[r.pattern for r in hits]}"
            )
        used.add(hits[0])
        stack = (None,) if path.startswith(f"{part}/layers/") else ()
        spec = (*stack, *hits[0].spec) if hits[0].spec else ()
        if spec and len(spec) != len(leaf.shape):
            raise ValueError(f"sharding rule {hits[0]} does not fit '{path}' {tuple(leaf.shape)}")
        specs[path] = PartitionSpec(*spec)
    parts = {path.partition("/")[0] for path in flat}
    idle = [r for r in rules if r.part in parts and r not in used and not r.optional]
    if idle:
        raise ValueError(f"sharding rules that match no parameter: {idle}")
    return specs


def shardings(shapes: Mapping[str, Any], mesh: Mesh, rules: Sequence[Rule] = PARAM_RULES) -> dict[str, Any]:
    """Tree of NamedSharding for a parameter tree; UserError where an axis does not divide."""

    def sharding(path: str, spec: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
        for dim, axis in enumerate(spec):
            if axis is not None and shape[dim] % mesh.shape[axis]:
                fits = [d for d in range(1, len(mesh.devices.flat) + 1) if shape[dim] % d == 0]
                raise UserError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide dimension {dim} "
                    f"of {path} {tuple(shape)}; these sizes would: {fits}"
                )
        return NamedSharding(mesh, spec)

    specs = param_specs(shapes, rules)
    return trees.map_named(lambda path, leaf: sharding(path, specs[path], leaf.shape), shapes)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The batch axis (the first dimension) split over the data-parallel axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_rows(rows: int, mesh: Mesh, key: str) -> None:
    """UserError unless `rows`, the value of config key `key`, splits evenly over the mesh."""
    ways = math.prod(mesh.shape[a] for a in BATCH_AXES)
    if rows % ways:
        raise UserError(
            f"{key}={rows} is not a multiple of the {ways} data-parallel shards "
            f"({' x '.join('mesh.' + a for a in BATCH_AXES)})"
        )


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which sequences of a global batch this process supplies: those on its devices.

    Processes that share sequences (a tensor axis over hosts) supply the same ones.
    """
    slices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (part,) in slices for row in range(*part.indices(rows))})


def global_batch(mesh: Mesh, host_batch: Any) -> Any:
    """The sequences of `local_rows` (a tree of numpy arrays) -> the global batch on the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), host_batch)
