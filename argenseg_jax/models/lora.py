"""Low-rank adapters (Hu et al., 2021): kernels that stay as they are, each with a small trained part.

Beside a kernel [L?, *in, *out] of a dense layer a parameter tree then has `lora_a` [L?, I, r] and
`lora_b` [L?, r, O], where I and O are the products of its inputs and outputs, and the layer multiplies
with kernel + alpha / r * lora_a lora_b. The modules know nothing of it: they are given `adapted` trees.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax import trees
from argenseg_jax.errors import UserError
from argenseg_jax.models.layers import DENSE, Adapted, kernel_inputs

Params = Mapping[str, Any]
_DEFAULT = (r"llm/layers/.*",)
_LEAF = r".*/lora_[ab]"


@dataclasses.dataclass(frozen=True)
class Lora:
    """The config section `train.lora`.

    Attributes:
      rank: r of every adapter; 0 = no adapters.
      alpha: their product is multiplied with alpha / rank; 0 = with 1.
      targets: path regexes of the dense kernels that get one; () = all of the decoder's layers.
      also: path regexes of what is trained, whole, beside the adapters; nothing else is.
    """

    rank: int = 0
    alpha: float = 0.0
    targets: Sequence[str] = ()
    also: Sequence[str] = ()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.alpha else 1.0

    def held(self) -> tuple[str, ...]:
        """Regexes of the parameters that stay as they are."""
        if not self.rank:
            return ()
        return (rf"(?!(?:{'|'.join([_LEAF, *self.also])})$).*",)

    def add(self, params: Params, key: jax.Array) -> dict[str, Any]:
        """The tree with fresh adapters, which change nothing yet: lora_b is zero.

        Raises UserError for a regex that matches nothing.
        """
        if not self.rank:
            return dict(params)
        flat = trees.flatten(params)
        dense = [path for path in flat if re.fullmatch(DENSE, path)]
        targets = self.targets or _DEFAULT
        for name, patterns, paths in (("targets", targets, dense), ("also", self.also, list(flat))):
            if idle := [p for p in patterns if not any(re.fullmatch(p, path) for path in paths)]:
                raise UserError(
                    f"train.lora.{name}: '{idle[0]}' matches nothing; there are {', '.join(paths[:3])}, ..."
                )
        new = {}
        for number, path in enumerate(p for p in dense if trees.match(targets, p)):
            stack, inputs, outputs = _sides(path, flat[path].shape)
            draw = jax.random.normal(jax.random.fold_in(key, number), (*stack, inputs, self.rank))
            new[_beside(path, "a")] = draw * inputs**-0.5
            new[_beside(path, "b")] = jnp.zeros((*stack, self.rank, outputs))
        return trees.merge(params, trees.unflatten(new))

    def adapted(self, params: Params) -> Params:
        """The tree for the modules: targeted kernels are layers.Adapted; no adapters beside them."""
        return _exchanged(params, lambda kernel, a, b: Adapted(kernel, a, b * self.scale))

    def merged(self, params: Params) -> Params:
        """The tree of a plain model; of numpy, jax or stored arrays (see `Merged`)."""
        return _exchanged(params, lambda kernel, a, b: Merged(kernel, a, b, self.scale)[...])

    def merged_lazily(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """{path: leaf} of a plain model, each read and merged when asked for."""
        tree = _exchanged(trees.unflatten(leaves), lambda *arrays: Merged(*arrays, self.scale))
        return trees.flatten(tree)


@dataclasses.dataclass(frozen=True)
class Merged:
    """kernel + scale * a b, by numpy's indexing of the first axis."""

    kernel: Any
    a: Any
    b: Any
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def dtype(self) -> np.dtype:
        return self.kernel.dtype

    def __getitem__(self, index: int | type(...)) -> Any:
        kernel = self.kernel[index]
        more = self.scale * (self.a[index].astype(np.float32) @ self.b[index].astype(np.float32))
        return (kernel.astype(np.float32) + more.reshape(kernel.shape)).astype(kernel.dtype)


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return bool(re.fullmatch(_LEAF, path))


def _exchanged(params: Params, make: Any) -> Params:
    """The tree with make(kernel, a, b) in the place of these three."""
    flat = trees.flatten(params)
    if not any(map(is_adapter, flat)):
        return params
    return trees.unflatten(
        {
            path: make(leaf, flat[_beside(path, "a")], flat[_beside(path, "b")])
            if path.endswith("/kernel") and _beside(path, "a") in flat
            else leaf
            for path, leaf in flat.items()
            if not is_adapter(path)
        }
    )


def _beside(path: str, side: str) -> str:
    return f"{path.rpartition('/')[0]}/lora_{side}"


def _sides(path: str, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
    """(layers of a stack, product of the inputs, product of the outputs) of a kernel."""
    first = 1 if "/layers/" in path else 0
    split = first + kernel_inputs(path)
    return tuple(shape[:first]), math.prod(shape[first:split]), math.prod(shape[split:])
