"""PyTorch state dict <-> parameter tree, driven by the weight map; both directions are bit-exact.

Works on numpy arrays and never needs PyTorch. Import demands that every key is used exactly once
(or listed as ignored), that every leaf is filled and that all shapes agree; otherwise it raises one
UserError that names everything that does not fit.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from argenseg_jax import trees
from argenseg_jax.errors import UserError, brief
from argenseg_jax.interop import diagnosis
from argenseg_jax.interop.tensor_files import Lazy, Tensors, contiguous
from argenseg_jax.interop.weight_map import HITS, IGNORED, TABLE, WeightRule, full_name, template_regex

Params = Mapping[str, Any]
HEAD, EMBEDDING = "llm/lm_head/kernel", "llm/embed/embedding"
_FLOATS = {np.dtype(dtype) for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
_SHOWN = 5  # faults that one message names
_LONG = 200  # characters of a key
_FIRST_ROWS = 64


class Import:
    """How the tensors of one or several sources fill the leaves of a model.

    Attributes:
      dtypes: {leaf: dtype in the source}, of the leaves that are filled; the widest where the
        layers of one leaf differ.
      total: bytes of the tensors that will be read.
    """

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray],
        shapes: Params,
        *,
        vocab_size: int | None = None,
        old_vocab_size: int | None = None,
        optional: Sequence[str] = (),
        source: str = "the checkpoint",
    ):
        """Assigns every tensor to its leaves; arguments and errors as for to_jax. No leaf is read."""
        want = trees.flatten(shapes)
        jobs, faults = _assign(tensors, want, optional)
        vocab = _VocabSizes(
            vocab_size, old_vocab_size, complete=any(job.paths[0].startswith("visual/") for job in jobs)
        )
        self.dtypes: dict[str, np.dtype] = {}
        self.total = 0
        steps = []
        for job in () if faults else jobs:
            for layer, key in job.keys.items():
                stored = _lazy(tensors, key)
                self.total += stored.nbytes
                try:
                    steps.append(_Step(job, layer, key, stored, want, vocab))
                except ValueError as error:
                    faults.append(str(error))
                    continue
                for path in job.paths:
                    self.dtypes[path] = _wider(self.dtypes.get(path, stored.dtype), stored.dtype)
        if faults:
            if advice := foreign(tensors):
                raise UserError(f"{source}: {advice}")
            more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            raise UserError(f"{source} does not fit the model: " + "; ".join(map(str, faults[:_SHOWN])) + more)
        self._steps = steps

    def __add__(self, other: Import) -> Import:
        """Both, one after the other; their leaves are disjoint."""
        both = copy.copy(self)
        both.dtypes = {**self.dtypes, **other.dtypes}
        both.total = self.total + other.total
        both._steps = self._steps + other._steps
        return both

    def slices(self) -> Iterator[tuple[str, int | None, np.ndarray]]:
        """(leaf, layer or None, array), one tensor in memory at a time.

        With a layer the array is that layer of the leaf, otherwise its leading corner: entries
        of the padded vocabulary are missing, and are zero.
        """
        for step in self._steps:
            for path, array in zip(step.job.paths, step.read()):
                yield path, step.layer, array


def foreign(tensors: Mapping[str, Any]) -> str | None:
    """What kind of file this is, where its keys are those of adapters, a wrapper or quantised weights."""
    return diagnosis.advice(list(tensors), lambda key: _find(full_name(key)) is not None)


def part(key: str) -> str | None:
    """The part of the model that a torch key belongs to: 'vqvae', 'llm', ...; None for an unexpected key."""
    found = _find(full_name(key))
    return found.paths[0].split("/")[0] if found else None


def find_key(tensors: Mapping[str, Any], path: str) -> str | None:
    """The torch key that fills a leaf."""
    for key in tensors:
        found = _find(full_name(key))
        if found and path in found.paths:
            return key
    return None


def same(a: Lazy, b: Lazy) -> bool:
    """Whether two tensors hold the same numbers; mostly the first rows tell."""
    return a.shape == b.shape and all(
        np.array_equal(read(a), read(b)) for read in (lambda x: x.head(_FIRST_ROWS), lambda x: x.read())
    )


def to_jax(
    tensors: Mapping[str, np.ndarray],
    shapes: Params,
    *,
    vocab_size: int | None = None,
    old_vocab_size: int | None = None,
    optional: Sequence[str] = (),
    dtype: Any = None,
    source: str = "the checkpoint",
) -> dict[str, Any]:
    """State dict -> parameter tree.

    Args:
      tensors: {torch key: array}; may load lazily, each is read once. Keys of a single part (the
        VQ-VAE, the language model) may lack the prefix of the complete model.
      shapes: tree of anything with .shape and .dtype (jax.eval_shape of the model's init).
      vocab_size: the model's true vocabulary. A smaller one in the file (a checkpoint from before
        the visual tokens were added) grows by entries that are the mean of its own. None: the file's.
      old_vocab_size: size of the vocabulary before the visual tokens. What a file has beyond them, or, if
        it has visual tokens, beyond vocab_size, is padding, which is left out. None: no file is padded.
      optional: regexes of leaves that may be absent from the file; they are left out of the result.
      dtype: of the result; None takes each leaf's own.
      source: the file, for messages.

    Returns:
      Nested dict of numpy arrays. Entries of the padded vocabulary beyond the true one are zero.

    Raises:
      UserError: one message with every unmatched key, its nearest candidate, every empty leaf, and
        every tensor of a wrong shape.
    """
    want = trees.flatten(shapes)
    plan = Import(
        tensors, shapes, vocab_size=vocab_size, old_vocab_size=old_vocab_size, optional=optional, source=source
    )
    flat: dict[str, np.ndarray] = {}
    for path, layer, array in plan.slices():
        if path not in flat:
            flat[path] = np.zeros(want[path].shape, dtype or want[path].dtype)
        flat[path][corner(layer, array)] = array
    return trees.unflatten({path: flat[path] for path in want if path in flat})


def corner(layer: int | None, array: np.ndarray) -> tuple[int | slice, ...]:
    """Index of a slice of Import.slices in its leaf."""
    return (*(() if layer is None else (layer,)), *map(slice, array.shape))


def to_torch(
    params: Params,
    *,
    family: str | None = None,
    layout: str = "official",
    vocab_size: int | None = None,
    dtype: Any = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Parameter tree -> (torch key, contiguous array) pairs, one at a time, in the table's order.

    Arguments and errors: see `export`.
    """
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    for key, lazy in export(flat, family=family, layout=layout, vocab_size=vocab_size, dtype=dtype).items():
        yield key, lazy.read()


def export(
    flat: Mapping[str, Any],
    *,
    family: str | None = None,
    layout: str = "official",
    vocab_size: int | None = None,
    dtype: Any = None,
) -> dict[str, Lazy]:
    """{torch key: tensor} of the leaves {path: leaf}, in the table's order; nothing is read yet.

    Args:
      flat: leaves of the complete tree or of some of its parts (vision, connector, llm, visual,
        vqvae); anything with .shape, .dtype and numpy's way of indexing the first axis.
      family: key names of the language model, 'internlm2' or 'qwen2'; None: the latter where it has
        biases or qk-norm, as InternLM2 has neither.
      layout: 'official', or 'hf' for the names of transformers' own InternVL, which knows no fused
        attention: there every language model has the names of Qwen2.
      vocab_size: the true vocabulary, to which the padding is cut; None keeps it.
      dtype: of floating-point tensors in the file; None keeps each leaf's.

    Raises:
      UserError: a leaf that no rule of the mapping table covers.
    """
    if family is None:
        marks = ("llm/layers/attn/q/bias", "llm/layers/attn/q_norm/scale")
        family = "qwen2" if any(mark in flat for mark in marks) else "internlm2"
    families = ("", layout, "qwen2" if layout == "hf" else family)
    todo, out = set(flat), {}
    for rule in TABLE:
        if rule.family not in families:
            continue
        for paths, names in _instances(rule, flat):
            missing = [p for p in paths if p not in flat]
            if missing:
                raise UserError(f"cannot export '{paths[0]}' without {missing}")
            todo -= set(paths)
            leaves = [flat[p] for p in paths]
            stored = np.dtype(dtype or leaves[0].dtype)
            shape = _torch_shape(rule, leaves, vocab_size)
            for i in range(leaves[0].shape[0]) if rule.stacked else (None,):
                read = functools.partial(_export, rule, leaves, i, vocab_size, stored)
                out[rule.key.format(i=i, **names)] = Lazy(shape, stored, read)
    if todo:
        raise UserError(f"the weight map has no rule ({family}) for {sorted(todo)}")
    if "vqvae/quantizer/codebook" in flat and "visual/lvl_embed" in flat:
        codebook = flat["vqvae/quantizer/codebook"]
        # PyTorch's strict loading asks for the buffer.
        out[HITS] = Lazy.of(np.zeros((flat["visual/lvl_embed"].shape[0], codebook.shape[0]), dtype or codebook.dtype))
    return out


def _export(
    rule: WeightRule, leaves: Sequence[Any], layer: int | None, vocab_size: int | None, dtype: np.dtype
) -> np.ndarray:
    """The torch tensor of one layer."""
    where = ... if layer is None else layer
    tensor = rule.op.to_torch(tuple(np.asarray(leaf[where]) for leaf in leaves))
    if rule.op.vocab_axis is not None:
        tensor = tensor[:vocab_size]
    return contiguous(tensor, dtype)


def _torch_shape(rule: WeightRule, leaves: Sequence[Any], vocab_size: int | None) -> tuple[int, ...]:
    """Shape of the torch tensor (of one layer), found without reading the leaves."""
    blanks = tuple(_blank(leaf.shape[rule.stacked :]) for leaf in leaves)
    shape = rule.op.to_torch(blanks).shape
    if rule.op.vocab_axis is None or vocab_size is None:
        return shape
    return (min(vocab_size, shape[0]), *shape[1:])


def _blank(shape: Sequence[int]) -> np.ndarray:
    """An array of any size that takes a single byte, to try an op's shapes on."""
    return np.broadcast_to(np.zeros((), np.uint8), tuple(shape))


@functools.cache
def torch_keys(path: str) -> tuple[str, ...]:
    """The torch keys, as templates in {i}, that fill a leaf; one for each family that has it."""
    keys = []
    for rule in TABLE:
        for template in rule.paths:
            m = template_regex(template).fullmatch(path)
            if m:
                keys.append(rule.key.format(i="{i}", **m.groupdict()))
    return tuple(keys)


@dataclasses.dataclass
class _Job:
    """The torch keys, by layer (None when not stacked), that fill the leaves of one rule."""

    rule: WeightRule
    paths: tuple[str, ...]
    keys: dict[int | None, str]


def _assign(
    tensors: Mapping[str, Any], want: Mapping[str, Any], optional: Sequence[str]
) -> tuple[list[_Job], list[str]]:
    """Gives every key its leaf. Returns the jobs and a message for each key or leaf left over."""
    jobs: dict[str, _Job] = {}  # by leaf
    faults: list[Any] = []
    known = [key for path in want for key in torch_keys(path)]
    unused: list[_Unused] = []
    for key in tensors:
        name = full_name(key)
        if trees.match(IGNORED, name):
            continue
        found = _find(name)
        if not found or any(path not in want for path in found.paths):
            if not (found and found.paths == (HEAD,) and _is_copy(tensors, key, want)):
                unused.append(_Unused(key, name, known))
            continue
        job = jobs.setdefault(found.paths[0], found)
        if job is not found and (job.rule is not found.rule or set(job.keys) & set(found.keys)):
            faults.append(f"'{key}' fills '{found.paths[0]}' a second time")
        layer = next(iter(found.keys))
        job.keys[layer] = key
    filled: dict[str, str] = {}
    for job in jobs.values():
        for path in job.paths:
            if path in filled:
                faults.append(f"{job.rule.key} fills '{path}' a second time, after {filled[path]}")
            filled[path] = job.rule.key
    faults += unused
    for job in jobs.values():
        if job.rule.stacked:
            layers = set(range(want[job.paths[0]].shape[0]))
            if differs := sorted(layers ^ set(job.keys)):
                faults.append(
                    f"{job.rule.key} needs layers 0..{len(layers) - 1}; differs in "
                    f"{differs if len(differs) <= _SHOWN else f'{len(differs)} of them'}"
                )
    faults += [
        f"nothing fills '{path}' (expected {' or '.join(torch_keys(path)) or 'no key'}"
        + (
            "; if the embedding is the head as well, set tie_word_embeddings to true in config.json)"
            if path == HEAD
            else ")"
        )
        for path in want
        if path not in filled and not trees.match(optional, path)
    ]
    return list(jobs.values()), faults


def _is_copy(tensors: Mapping[str, Any], head: str, want: Mapping[str, Any]) -> bool:
    """Whether the head of a model whose embedding is its head is the embedding again."""
    embedding = find_key(tensors, EMBEDDING) if EMBEDDING in want else None
    return embedding is not None and same(_lazy(tensors, head), _lazy(tensors, embedding))


@dataclasses.dataclass
class _Unused:
    """An unexpected key; its text names the nearest known key, which takes a while to find."""

    key: str
    name: str
    known: Sequence[str]

    def __str__(self) -> str:
        near = _nearest(self.name, self.known) if len(self.name) < _LONG else ""
        return f"unexpected key '{brief(self.key, _LONG)}'{near}"


def _find(name: str) -> _Job | None:
    """The rule, leaves and layer of a full torch key."""
    for rule in TABLE:
        m = template_regex(rule.key).fullmatch(name)
        if m:
            index = m.groupdict()
            layer = index.pop("i", None)
            return _Job(
                rule, tuple(p.format(**index) for p in rule.paths), {None if layer is None else int(layer): name}
            )
    return None


def _nearest(name: str, known: Sequence[str]) -> str:
    layer = next(iter(re.findall(r"layers?\.(\d+)\.", name)), "0")
    near = difflib.get_close_matches(name, [k.replace("{i}", layer) for k in known], 1, 0.5)
    return f" (nearest: '{near[0]}')" if near else ""


def _instances(rule: WeightRule, flat: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], dict]]:
    """(paths, indices) for each group of leaves in the tree that the rule describes."""
    for path in flat:
        m = template_regex(rule.paths[0]).fullmatch(path)
        if m:
            yield tuple(p.format(**m.groupdict()) for p in rule.paths), m.groupdict()


class _Step:
    """One tensor on its way into its leaves (or into one layer of them)."""

    def __init__(
        self, job: _Job, layer: int | None, key: str, stored: Lazy, want: Mapping[str, Any], vocab: _VocabSizes
    ):
        """Raises ValueError where the shapes do not fit, or the tensor holds no floats."""
        self.job, self.layer, self._stored = job, layer, stored
        if stored.dtype not in _FLOATS:
            raise ValueError(f"'{key}' is {stored.dtype.name}; weights are float64, float32, float16 or bfloat16")
        shape = stored.shape
        self._shapes = [tuple(want[p].shape[layer is not None :]) for p in job.paths]
        self._vocab_sizes: tuple[int, int] | None = None
        axis = job.rule.op.vocab_axis
        if axis is not None and shape:
            self._vocab_sizes = vocab.resolve(shape[0])
            shape = (self._vocab_sizes[1], *shape[1:])
            size = list(self._shapes[0])
            size[axis] = min(self._vocab_sizes[1], size[axis])
            self._shapes = [tuple(size)]
        try:
            leaves = job.rule.op.to_jax(_blank(shape), tuple(self._shapes))
            fits = [leaf.shape for leaf in leaves] == self._shapes
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"'{key}' {tuple(stored.shape)} does not fit '{job.paths[0]}' "
                f"{tuple(want[job.paths[0]].shape)} ({job.rule.op.name})"
            )

    def read(self) -> tuple[np.ndarray, ...]:
        """The leaves (of the layer)."""
        tensor = self._stored.read()
        return self.job.rule.op.to_jax(
            tensor if self._vocab_sizes is None else _grow(tensor, *self._vocab_sizes), tuple(self._shapes)
        )


@dataclasses.dataclass(frozen=True)
class _VocabSizes:
    """How many entries of the file's vocabulary are read, and how many the leaf gets; see to_jax.

    Attributes:
      complete: whether the file is of a model with visual tokens.
    """

    vocab_size: int | None
    old_vocab_size: int | None
    complete: bool

    def resolve(self, stored: int) -> tuple[int, int]:
        """(true entries among the stored ones, entries of the model); ValueError where they do not fit."""
        size = stored if self.vocab_size is None else self.vocab_size
        true = stored
        if self.old_vocab_size is not None:
            true = min(stored, size if self.complete else self.old_vocab_size)
        if not 1 <= true <= size:
            raise ValueError(f"a vocabulary of {stored} tokens in the file, {size} in the model")
        return true, size


def _wider(a: np.dtype, b: np.dtype) -> np.dtype:
    """The dtype that holds both; float32 for float16 and bfloat16."""
    try:
        return np.promote_types(a, b)
    except TypeError:
        return np.dtype(np.float32)


def _lazy(tensors: Mapping[str, np.ndarray], key: str) -> Lazy:
    return tensors.lazy(key) if isinstance(tensors, Tensors) else Lazy.of(tensors[key])


def _grow(tensor: np.ndarray, true: int, size: int) -> np.ndarray:
    """[V, ...] -> [size, ...]: its first `true` entries, then their mean."""
    if true == size == tensor.shape[0]:
        return tensor
    grown = np.empty((size, *tensor.shape[1:]), tensor.dtype)
    grown[:true] = tensor[:true]
    blocks = (grown[i : min(i + 4096, true)] for i in range(0, true, 4096))  # f64 of all is too much
    grown[true:] = sum(b.astype(np.float64).sum(0) for b in blocks) / true
    return grown
