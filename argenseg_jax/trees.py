"""Nested dicts seen as flat 'a/b/c' names: flatten, select by path regex, merge without surprises."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from argenseg_jax.errors import UserError


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {'a/b/c': leaf}, in the tree's order."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, name + "/"))
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'a/b/c': leaf} -> nested dict."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def map_named(fn: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Applies fn(name, leaf) to every leaf."""
    return unflatten({name: fn(name, leaf) for name, leaf in flatten(tree).items()})


def match(patterns: Iterable[str], name: str) -> bool:
    """Whether any regex matches the whole name."""
    return any(re.fullmatch(p, name) for p in patterns)


def split(tree: Mapping[str, Any], select: Callable[[str], bool]) -> tuple[dict, dict]:
    """(leaves whose name is selected, the others), both as nested dicts."""
    flat = flatten(tree)
    return (
        unflatten({n: v for n, v in flat.items() if select(n)}),
        unflatten({n: v for n, v in flat.items() if not select(n)}),
    )


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Union of trees with disjoint leaves; a leaf that occurs twice is an error."""
    flat: dict[str, Any] = {}
    for part in parts:
        for name, value in flatten(part).items():
            if name in flat:
                raise ValueError(f"'{name}' occurs in two of the trees to be merged")
            flat[name] = value
    return unflatten(flat)


def replace(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with some leaves (by 'a/b/c' name) exchanged; an unknown name is an error."""
    flat = flatten(tree)
    unknown = sorted(set(leaves) - set(flat))
    if unknown:
        raise ValueError(f"no such leaves: {unknown}")
    return unflatten({**flat, **leaves})


def check_same(have: Mapping[str, Any], want: Mapping[str, Any], what: str) -> None:
    """Raises one UserError that lists every missing, unknown or misshapen leaf of `have`."""
    a, b = flatten(have), flatten(want)
    faults = [f"missing {n}" for n in b if n not in a] + [f"unknown {n}" for n in a if n not in b]
    faults += [
        f"{n} has shape {tuple(a[n].shape)}, not {tuple(b[n].shape)}"
        for n in a
        if n in b and tuple(a[n].shape) != tuple(b[n].shape)
    ]
    if faults:
        raise UserError(
            f"{what} does not fit the model: {'; '.join(faults[:12])}"
            + (f"; and {len(faults) - 12} more" if len(faults) > 12 else "")
        )
