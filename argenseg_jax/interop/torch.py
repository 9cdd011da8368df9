"""PyTorch state dict <-> parameter tree, driven by the weight map; both directions are bit-exact.

Works on numpy arrays and never needs PyTorch. Import demands that every key is used exactly once
(or listed as ignored), that every leaf is filled and that all shapes agree; otherwise it raises one
UserError that names everything that does not fit.
"""
from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from argenseg_jax import trees
from argenseg_jax.errors import UserError
from argenseg_jax.interop.weight_map import HITS, IGNORED, TABLE, Row, full_name, template_regex

Params = Mapping[str, Any]


def to_jax(tensors: Mapping[str, np.ndarray], shapes: Params, *, vocab_size: int | None = None,
           optional: Sequence[str] = (), dtype: Any = None,
           source: str = "the checkpoint") -> dict[str, Any]:
    """State dict -> parameter tree.

    Args:
      tensors: {torch key: array}; may load lazily, each is read once. Keys of a single part (the
        VQ-VAE, the language model) may lack the prefix of the whole model.
      shapes: tree of anything with .shape and .dtype (jax.eval_shape of the model's init).
      vocab_size: the model's true vocabulary. A smaller one in the file (a checkpoint from before
        the visual tokens were added) grows by rows that are the mean of its rows. None: the file's.
      optional: regexes of leaves that may be absent from the file; they are left out of the result.
      dtype: of the result; None takes each leaf's own.
      source: the file, for messages.

    Returns:
      Nested dict of numpy arrays. Rows of the padded vocabulary beyond the true one are zero.

    Raises:
      UserError: one message with every unmatched key, its nearest candidate, and every empty leaf.
    """
    want = trees.flatten(shapes)
    jobs, faults = _assign(tensors, want, optional)
    flat: dict[str, np.ndarray] = {}
    for job in () if faults else jobs:
        try:
            flat.update(_import(tensors, job, want, vocab_size, dtype))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise UserError(f"{source} does not fit the model: " + "; ".join(faults))
    return trees.unflatten({path: flat[path] for path in want if path in flat})


def to_torch(params: Params, *, family: str | None = None, vocab_size: int | None = None,
             dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Parameter tree -> (torch key, contiguous array) pairs, one at a time, in the table's order.

    Args:
      params: the whole tree or some of its parts (vision, connector, llm, visual, vqvae).
      family: key names of the language model, 'internlm2' or 'qwen2'; None: the latter where it has
        biases or qk-norm, as InternLM2 has neither.
      vocab_size: the true vocabulary, to which the padded rows are cut; None keeps them.
      dtype: of floating-point tensors in the file; None keeps each leaf's.

    Raises:
      UserError: a leaf that no row of the table covers.
    """
    flat = trees.flatten(params)
    if family is None:
        marks = ("llm/layers/attn/q/bias", "llm/layers/attn/q_norm/scale")
        family = "qwen2" if any(mark in flat for mark in marks) else "internlm2"
    todo = set(flat)
    for row in TABLE:
        if row.family not in ("", family):
            continue
        for paths, names in _instances(row, flat):
            missing = [p for p in paths if p not in flat]
            if missing:
                raise UserError(f"cannot export '{paths[0]}' without {missing}")
            todo -= set(paths)
            leaves = [np.asarray(flat[p]) for p in paths]
            for i in range(leaves[0].shape[0]) if row.stacked else (None,):
                tensor = row.op.to_torch(tuple(x if i is None else x[i] for x in leaves))
                if row.op.vocab_axis is not None:
                    tensor = tensor[:vocab_size]
                yield row.key.format(i=i, **names), _as(tensor, dtype)
    if todo:
        raise UserError(f"the weight map has no row ({family}) for {sorted(todo)}")
    if "vqvae/quantizer/codebook" in flat and "visual/lvl_embed" in flat:
        size = flat["visual/lvl_embed"].shape[0], flat["vqvae/quantizer/codebook"].shape[0]
        yield HITS, np.zeros(size, np.float32)  # PyTorch's strict loading asks for the buffer


@functools.cache
def torch_keys(path: str) -> tuple[str, ...]:
    """The torch keys, as templates in {i}, that fill a leaf; one for each family that has it."""
    keys = []
    for row in TABLE:
        for template in row.paths:
            m = template_regex(template).fullmatch(path)
            if m:
                keys.append(row.key.format(i="{i}", **m.groupdict()))
    return tuple(keys)


@dataclasses.dataclass
class _Job:
    """The torch keys, by layer (None when not stacked), that fill the leaves of one row."""

    row: Row
    paths: tuple[str, ...]
    keys: dict[int | None, str]


def _assign(tensors: Mapping[str, Any], want: Mapping[str, Any], optional: Sequence[str]
            ) -> tuple[list[_Job], list[str]]:
    """Gives every key its leaf. Returns the jobs and a message for each key or leaf left over."""
    jobs: dict[str, _Job] = {}  # by leaf
    unused: dict[str, str] = {}  # key: its full name
    faults = []
    for key in tensors:
        name = full_name(key)
        if trees.match(IGNORED, name):
            continue
        found = _find(name)
        if not found or any(path not in want for path in found.paths):
            unused[key] = name
            continue
        job = jobs.setdefault(found.paths[0], found)
        if job is not found and (job.row is not found.row or set(job.keys) & set(found.keys)):
            faults.append(f"'{key}' fills '{found.paths[0]}' a second time")
        layer = next(iter(found.keys))
        job.keys[layer] = key
    filled = {path for job in jobs.values() for path in job.paths}
    known = [key for path in want for key in torch_keys(path)]
    faults += [f"'{key}' has no place" + _nearest(name, known) for key, name in unused.items()]
    for job in jobs.values():
        if job.row.stacked:
            layers = set(range(want[job.paths[0]].shape[0]))
            if layers != set(job.keys):
                faults.append(f"{job.row.key} needs layers 0..{len(layers) - 1}; differs in "
                              f"{sorted(layers ^ set(job.keys))}")
    faults += [f"nothing fills '{path}' (expected {' or '.join(torch_keys(path)) or 'no key'})"
               for path in want if path not in filled and not trees.match(optional, path)]
    return list(jobs.values()), faults


def _find(name: str) -> _Job | None:
    """The row, leaves and layer of a full torch key."""
    for row in TABLE:
        m = template_regex(row.key).fullmatch(name)
        if m:
            index = m.groupdict()
            layer = index.pop("i", None)
            return _Job(row, tuple(p.format(**index) for p in row.paths),
                        {None if layer is None else int(layer): name})
    return None


def _nearest(name: str, known: Sequence[str]) -> str:
    layer = next(iter(re.findall(r"layers\.(\d+)\.", name)), "0")
    near = difflib.get_close_matches(name, [k.replace("{i}", layer) for k in known], 1, 0.5)
    return f" (nearest: '{near[0]}')" if near else ""


def _instances(row: Row, flat: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], dict]]:
    """(paths, indices) for each place in the tree that the row describes."""
    for path in flat:
        m = template_regex(row.paths[0]).fullmatch(path)
        if m:
            yield tuple(p.format(**m.groupdict()) for p in row.paths), m.groupdict()


def _import(tensors: Mapping[str, np.ndarray], job: _Job, want: Mapping[str, Any],
            vocab_size: int | None, dtype: Any) -> dict[str, np.ndarray]:
    """Reads the tensors of one job; layers go straight into their stacked leaves."""
    row, first = job.row, want[job.paths[0]]
    out = {p: np.zeros(want[p].shape, dtype or want[p].dtype) for p in job.paths}
    for layer, key in job.keys.items():
        tensor = tensors[key]
        shapes = [tuple(want[p].shape[layer is not None:]) for p in job.paths]
        if row.op.vocab_axis is not None:
            tensor = _grow(tensor, vocab_size)
            size = list(shapes[0])
            size[row.op.vocab_axis] = min(tensor.shape[0], size[row.op.vocab_axis])
            shapes = [tuple(size)]
        try:
            leaves = row.op.to_jax(tensor, tuple(shapes))
            fits = [leaf.shape for leaf in leaves] == shapes
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"'{key}' {tuple(tensor.shape)} does not fit '{job.paths[0]}' "
                             f"{tuple(first.shape)} ({row.op.name})")
        for path, leaf in zip(job.paths, leaves):
            where = layer if row.stacked else tuple(slice(n) for n in leaf.shape)
            out[path][where] = leaf
    return out


def _grow(tensor: np.ndarray, size: int | None) -> np.ndarray:
    """[V, ...] with fewer rows than `size` gets rows that are the mean of its own."""
    new = 0 if size is None else size - tensor.shape[0]
    if new == 0:
        return tensor
    if new < 0:
        raise ValueError(f"a vocabulary of {tensor.shape[0]} rows in the file, {size} in the model")
    mean = tensor.astype(np.float32).mean(0, keepdims=True).astype(tensor.dtype)
    return np.concatenate([tensor, np.repeat(mean, new, 0)])


def _as(tensor: np.ndarray, dtype: Any) -> np.ndarray:
    """Contiguous, in the file's dtype."""
    return np.ascontiguousarray(tensor, dtype or tensor.dtype).reshape(tensor.shape)
