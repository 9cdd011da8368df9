"""Which folder of OUT/eval belongs to which data set: one each, and the same one every time."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from argenseg_jax import files
from argenseg_jax.errors import UserError
from argenseg_jax.eval.metrics.registry import METRICS

LONGEST = 80  # characters of a folder's name
ABOVE = 3  # most folders above a file that its name may begin with
SOURCE = "source"  # key of scores.json and of partial answers: whose they are, see `identity`


def split(name: str) -> tuple[str, str]:
    """('metric', 'data') of METRIC@DATA; ('', name) without a metric in front."""
    metric, _, rest = name.partition("@")
    return (metric, rest) if rest and metric in METRICS else ("", name)


def identity(name: str) -> str:
    """One text per METRIC@DATA: a file or folder by its path from the root."""
    metric, data = split(name)
    return f"{metric}@" * bool(metric) + (os.fspath(files.absolute(data)) if _exists(data) else data)


def choose(out: epath.PathLike, names: Sequence[str]) -> list[epath.Path]:
    """OUT/eval/NAME of every data set: files and folders by their stem, named sources by their name.

    Where several of one call have the same NAME, or another data set has results there, the folders
    above the file are put in front. A data set that has results in a folder keeps it.
    """
    root = files.to_path(out) / "eval"
    options = {identity(name): _options(name) for name in names}
    owners = {folder: _owner(root / folder) for listed in options.values() for folder in listed}
    chosen: dict[str, str] = {}
    for name in names:
        mine = identity(name)
        kept = (f for f in options[mine] if (owner := owners[f]) and _is_owner(owner, mine, name))
        others = {f for source, listed in options.items() if source != mine for f in listed}
        free = (f for f in options[mine] if not owners[f] and f not in others)
        chosen[mine] = next(kept, None) or next(free, options[mine][-1])
    return [root / chosen[identity(name)] for name in names]


def _options(name: str) -> list[str]:
    """Names for the folder of a data set, best first; the last one is nobody else's."""
    metric, data = split(name)
    if _exists(data):
        path = files.absolute(data)
        above = [part for part in path.parent.parts if part.strip("/")][-ABOVE:]
        own = path.name if path.is_dir() else path.stem
        plain = ["-".join([*above[len(above) - k :], own]) for k in range(len(above) + 1)]
    else:
        plain = [data]
    tidy = [
        re.sub(r"[^\w.-]+", "-", f"{metric}-" * bool(metric) + text).lstrip(".-")[:LONGEST] or "data" for text in plain
    ]
    mark = hashlib.blake2b(identity(name).encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
    return [*tidy, f"{tidy[0]}-{mark}"]


def _owner(folder: epath.Path) -> Mapping[str, Any] | None:
    """What the results in a folder, complete or partial, record of their data; None where there are none."""
    partial = next(iter(sorted(folder.glob("partial/*.jsonl"))), None) if folder.exists() else None
    for path in (folder / "scores.json", partial):
        try:
            if path is not None and path.exists():
                saved = (
                    files.read_json(path)
                    if path is not partial
                    else files.parse_json(next(files.read_lines(path))[1], str(path))
                )
                if isinstance(saved, Mapping):
                    return saved
        except (UserError, StopIteration):  # damaged: what is written there now mends it
            continue
    return None


def _is_owner(saved: Mapping[str, Any], source: str, name: str) -> bool:
    """Results of earlier versions name their data as the command did."""
    return saved[SOURCE] == source if SOURCE in saved else saved.get("data") == name


def _exists(data: str) -> bool:
    try:
        return files.to_path(data).exists()
    except (UserError, OSError, ValueError):
        return False
