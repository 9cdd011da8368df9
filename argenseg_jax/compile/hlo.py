"""Counts operations, memory traffic and collectives in compiled HLO text, with the trip counts of loops.

XLA's own `cost_analysis` counts the body of a loop once. All numbers are per device, since the text is the
program of one device.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "after-all",
    "partition-id",
    "replica-id",
}
_NAME = r"%?([\w.\-]+)"
_LINE = re.compile(rf"^\s*(?:ROOT )?{_NAME} = (.+)$")
_HEAD = re.compile(rf"^(?:ENTRY )?{_NAME} \(.*\{{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=" + _NAME)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: name, result type as text, opcode, operand names, and the attributes after them."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclasses.dataclass
class Counts:
    """Totals of a program on one device.

    Attributes:
      flops: of matrix products and convolutions, without products with padding.
      bytes: read and written in HBM by instructions (fused ones count once); not those in a TPU's fast
        memory, S(1) in the text.
      collectives: {kind: bytes that a device sends}.
      across_slices: of these bytes, those of groups with members in several slices.
      kernels: number of calls of Pallas kernels, whose operations are not counted.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    across_slices: float = 0.0
    kernels: int = 0


def count(text: str, chips_per_slice: int = 0) -> Counts:
    """Counts a module. chips_per_slice: devices per slice, 0 = one slice."""
    module, entry = parse(text)
    total = Counts()
    _walk(module, entry, 1, None, total, chips_per_slice)
    return total


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """{computation: {instruction name: instruction}}, and the name of the entry computation."""
    module: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = module.setdefault(head[1], {})
            entry = head[1] if line.startswith("ENTRY") else entry
        elif current is not None and (found := _LINE.match(line)):
            current[found[1]] = _instruction(found[1], found[2])
    if not entry:
        raise ValueError("no ENTRY computation in the HLO text")
    return module, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 1
    operands = re.findall(r"%([\w.\-]+)", rest[:end]) or re.findall(r"([\w.\-]+)(?:,|$)", rest[:end])
    if opcode in ("parameter", "constant"):
        operands, rest = [rest[:end]], ""
        end = -1
    return Instruction(name, shape, opcode, tuple(operands), rest[end + 1 :])


def _closing(text: str, begin: int) -> int:
    depth = 0
    for i in range(begin, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """(dtype, dimensions, whether in HBM) of every array in a result type; S(1) is a TPU's fast memory."""
    return [
        (dtype, tuple(map(int, filter(None, dims.split(",")))), "S(" not in layout)
        for dtype, dims, layout in _ARRAY.findall(shape)
        if dtype in _BYTES
    ]


def size(shape: str) -> float:
    """Bytes of a result type."""
    return sum(_sizes(shape))


def in_hbm(shape: str) -> float:
    """Bytes of a result type's arrays in HBM."""
    return sum(_sizes(shape, hbm=True))


def _sizes(shape: str, hbm: bool = False) -> list[float]:
    return [_BYTES[dtype] * math.prod(dims) * (inside or not hbm) for dtype, dims, inside in arrays(shape)]


def _walk(module: dict, name: str, times: int, around: set | None, total: Counts, chips: int) -> None:
    """Adds a computation that runs `times` times.

    `around`: channels of the collectives already counted in the computation that this fusion is part
    of, None if it is not a fusion. On TPUs one collective appears in several fusions, which start it,
    continue it in parallel with other work, and end it.
    """
    body, channels = module[name], set() if around is None else around
    for op in body.values():
        kind = op.opcode.removesuffix("-start")
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # how TPUs write one: a fusion followed by the slice
        if kind in COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", op.attributes)
            if not channel or channel[1] not in channels:
                moved, crosses = _moved(op, kind, body, chips)
                total.collectives[kind] += times * moved
                total.across_slices += times * moved * crosses
            channels |= {channel[1]} if channel else set()
        elif op.opcode in ("dot", "convolution"):
            total.flops += times * _flops(op, body)
        elif op.opcode == "custom-call" and "tpu_custom_call" in op.attributes:
            total.kernels += times
        if around is None and op.opcode not in _FREE and not op.opcode.endswith("-done"):
            total.bytes += times * _traffic(op, body, module)
        if (
            op.opcode.endswith(("-done", "-update"))
            or kind in COLLECTIVES
            or op.opcode in ("reduce", "sort", "scatter", "map", "reduce-window", "select-and-scatter")
        ):
            continue  # the called computation is scalar, or was counted at -start
        runs = trips(op, module) if op.opcode == "while" else 1
        for called in _called(op):
            part = around is not None or op.opcode in ("fusion", "async-start")
            _walk(module, called, times * runs, channels if part else None, total, chips)


def _called(op: Instruction) -> Iterator[str]:
    yield from _CALLED.findall(op.attributes)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", op.attributes):
        yield from re.findall(_NAME, branches[1])


def trips(op: Instruction, module: dict) -> int:
    """Trip count of a while loop: XLA's annotation, else the constant that its condition compares with."""
    if known := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', op.attributes):
        return int(known[1])
    condition = module[re.search(r"condition=" + _NAME, op.attributes)[1]]
    limits = [
        int(i.operands[0]) for i in condition.values() if i.opcode == "constant" and i.operands[0].lstrip("-").isdigit()
    ]
    return max([n for n in limits if n > 0], default=1)


# ---------------------------------------------------------------------------------- operations


def _flops(op: Instruction, body: dict) -> float:
    _, out, _ = arrays(op.shape)[0]
    left, right = (arrays(body[name].shape)[0][1] for name in op.operands[:2])
    if op.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)[1]
        return 2 * math.prod(out) * math.prod(left[int(i)] for i in axes.split(",") if i)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    spatial = sorted(c for c in labels[2] if c.isdigit())  # as the window counts them
    window = re.search(r"window=\{([^}]*)\}", op.attributes)
    fields = dict(item.split("=") for item in window[1].split()) if window else {}

    def field(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    hits = 1
    windows = zip(
        spatial,
        field("size", "1"),
        field("stride", "1"),
        field("pad", "0_0"),
        field("lhs_dilate", "1"),
        field("rhs_dilate", "1"),
    )
    for axis, taps, stride, pad, dilation, spread in windows:
        hits *= _hits(
            out[labels[3].index(axis)],
            left[labels[1].index(axis)],
            int(taps),
            int(stride),
            int(pad.split("_")[0]),
            int(dilation),
            int(spread),
        )
    return 2 * hits * right[labels[2].index("i")] * out[labels[3].index("b")] * out[labels[3].index("f")]


@functools.cache
def _hits(out: int, wide: int, taps: int, stride: int, pad: int, dilation: int, spread: int) -> int:
    """Pairs of an output position and a kernel tap that read an input, not padding, along one axis."""
    at = np.arange(out)[:, None] * stride - pad + np.arange(taps)[None] * spread
    return int(np.count_nonzero((at >= 0) & (at <= (wide - 1) * dilation) & (at % dilation == 0)))


# ---------------------------------------------------------------------------------- bytes


def _traffic(op: Instruction, body: dict, module: dict) -> float:
    """Bytes that one instruction reads and writes in HBM; for an array that is only sliced, of the slices."""
    operands = [name for name in op.operands if name in body]
    if op.opcode in ("dynamic-slice", "gather", "slice"):
        return size(op.shape) * ((in_hbm(body[operands[0]].shape) > 0) + (in_hbm(op.shape) > 0))
    if op.opcode == "dynamic-update-slice":
        return 2 * in_hbm(body[op.operands[1]].shape)
    if op.opcode in ("copy-start", "slice-start"):  # the result also has the source, and a scalar
        source = in_hbm(body[operands[0]].shape)
        return sorted(_sizes(op.shape))[1] * ((source > 0) + (in_hbm(op.shape) > source))
    if op.opcode.endswith("-start"):
        return in_hbm(op.shape)  # operands and results
    if op.opcode != "fusion":
        return in_hbm(op.shape) + sum(in_hbm(body[name].shape) for name in operands)
    inside = module[next(_called(op))]
    # Buffers of a collective in flight are passed through, not read and written.
    passed = {int(to or 0): int(of) for to, of in re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", op.attributes)}
    updates = {i.operands[0]: i for i in inside.values() if i.opcode == "dynamic-update-slice"}
    results = sum(x for index, x in enumerate(_sizes(op.shape, hbm=True)) if index not in passed)
    written = sum(in_hbm(inside[i.operands[1]].shape) for i in updates.values()) or results
    read = 0.0
    for index, name in enumerate(operands):
        if index in passed.values() or not in_hbm(body[name].shape):
            continue
        at = next((i.name for i in inside.values() if i.opcode == "parameter" and i.operands == (str(index),)), None)
        users = [i for i in inside.values() if i.opcode != "parameter" and at in i.operands]
        if users and all(
            i.opcode in ("dynamic-slice", "gather", "dynamic-update-slice") and i.operands[0] == at for i in users
        ):
            read += sum(
                in_hbm(inside[i.operands[1]].shape) if i.opcode == "dynamic-update-slice" else size(i.shape)
                for i in users
            )
        else:
            read += in_hbm(body[name].shape)
    return read + written


# ---------------------------------------------------------------------------------- collectives


def _moved(op: Instruction, kind: str, body: dict, chips: int) -> tuple[float, bool]:
    """(bytes that a device sends in a ring, whether they leave its slice) of one collective."""
    sent = sum(size(body[name].shape) for name in op.operands if name in body)
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", op.attributes)
        return sent, any(chips and int(a) // chips != int(b) // chips for a, b in pairs)
    groups = replica_groups(op.attributes)
    n = len(groups[0]) if groups else 1
    factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)
    crosses = bool(chips) and any(len({i // chips for i in group}) > 1 for group in groups)
    return sent * factor, crosses


def replica_groups(attributes: str) -> list[list[int]]:
    """Members of each group: of `{{0,1},{2,3}}`, of the short form `[2,4]<=[4,2]T(1,0)`, or of axes of
    a mesh, `mesh['a'=2,'b'=4] {'b'}`."""
    if short := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims, axes = ([int(i) for i in x.split(",")] if x else None for x in short.groups())
        return np.arange(math.prod(dims)).reshape(dims).transpose(axes).reshape(shape).tolist()
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        return _mesh_groups(mesh[1], mesh[2])
    if listed := re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", attributes):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,\s]+)\}", listed[1])]
    return []


def _mesh_groups(mesh: str, grouped: str) -> list[list[int]]:
    """Groups along axes such as 'a', or a part of one: 'a':(2)4 has size 4, after a part of size 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    wanted = {
        name: (int(before or 1), int(long or sizes[name]))
        for name, before, long in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped)
    }
    shape, inside = [], []
    for name, size in sizes.items():
        before, long = wanted.get(name, (size, 1))
        inside += [len(shape) + 1] if name in wanted else []
        shape += [before, long, size // (before * long)]
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    members = math.prod(shape[axis] for axis in inside)
    return np.arange(math.prod(shape)).reshape(shape).transpose(outside + inside).reshape(-1, members).tolist()
