"""Finds the steps below W/checkpoints and checks whether they are complete; others are listed and skipped.

A step is complete when all items that it was saved with are there: Orbax lists them, `params`, `ema`,
`train`, `meta`, ..., in a file of the step. An interrupted copy is incomplete. A step with parameters only, as
`convert` writes it, is complete too, but no run resumes from it.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from argenseg_jax import files
from argenseg_jax.errors import UserError

DIRECTORY = "checkpoints"  # within a workdir
FROZEN = "frozen"  # within DIRECTORY
NOTES = "_CHECKPOINT_METADATA"  # Orbax's, of a step
READ_FIRST = ("meta", "metrics", NOTES)  # by every reader of a step; Orbax reads them when it lists the steps
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")
_ARRAYS, _META = "_METADATA", "meta/metadata"  # as Orbax names the files
_TRAINING = ("train", "meta")


def complete_steps(workdir: epath.PathLike, *, training: bool = False) -> list[int]:
    """Numbers of a workdir's complete steps, ascending; skipped folders are listed on stderr.

    `training`: only steps that a run can resume from.
    """
    folder = _folder(workdir)
    found = [number for number, step in _numbered(folder) if not missing(step)]
    _log_skipped(folder)
    return [number for number in found if not training or has_training(folder / str(number))]


def newest_step(workdir: epath.PathLike, *, training: bool = False) -> int | None:
    """The last of `complete_steps`, or None; nothing is created."""
    folder = _folder(workdir)
    _log_skipped(folder)
    return _newest(folder, lambda step: not missing(step) and (not training or has_training(step)))


def has_damaged(workdir: epath.PathLike) -> bool:
    """Whether there is a folder that is named like a step, was finished once, and is not complete."""
    return any(missing(step) for _, step in _numbered(_folder(workdir)))


def find_step(path: epath.PathLike) -> epath.Path:
    """Folder of a checkpoint: of a workdir or W/checkpoints the newest complete step, or the step itself.

    If none is complete, the newest one with all of its weights. UserError if there is none either.
    """
    root = files.to_path(path)
    if (root / "params").exists():
        if lacks := missing(root, weights=True):
            raise UserError(f"{root} is not complete: it lacks {', '.join(lacks)}; copy it again")
        return root
    for folder in (root / DIRECTORY, root):
        _log_skipped(folder)
        for accept in (lambda step: not missing(step), lambda step: not missing(step, weights=True)):
            if (number := _newest(folder, accept)) is not None:
                return folder / str(number)
    raise UserError(f"{path}: no checkpoint there (no complete step in {root / DIRECTORY})")


def missing(step: epath.Path, *, weights: bool = False) -> list[str]:
    """The items that a step was saved with and lacks; [] = it is complete.

    `weights`: checks the parameters only.
    """
    items = dict.fromkeys(["params", *_listed_items(step)])
    if not weights and any((step / name).exists() for name in _TRAINING):
        items |= dict.fromkeys(_TRAINING)
    absent = [name for name in items if name in ("params", "ema", "train") and not (step / name / _ARRAYS).exists()]
    if not weights:
        try:
            for name in READ_FIRST:
                files.check_all_regular(step / name)
        except UserError as fault:
            return [*absent, f"a readable {name} ({fault})"]
    if not weights and "train" in items:
        try:
            meta = read_meta(step)
        except UserError as fault:
            return [*absent, f"a readable {_META} ({fault})"]
        if not isinstance(meta.get("phase"), str) or not isinstance(meta.get("data"), Mapping):
            absent.append(f"{_META} of a training run")
    return [name for name in absent if not weights or name in ("params", "ema")]


def has_training(step: epath.Path) -> bool:
    """Whether a complete step has a train state, so that a run can resume from it."""
    return (step / "train").exists()


def read_meta(step: epath.Path) -> dict[str, Any]:
    """The metadata saved with a step; {} if it has parameters only. UserError if it is damaged."""
    file = step / _META
    meta = files.read_json(file) if file.exists() else {}
    if not isinstance(meta, dict) or not isinstance(meta.get(FROZEN), (int, type(None))):
        raise UserError(f"{file} is not the metadata of a step")
    return meta


def number_of(name: str) -> int | None:
    """The step number of a folder's name; None for another name."""
    return int(name) if _NUMBER.fullmatch(name) and int(name) < 2**31 else None


class CompleteSteps(ocp.path.step.NameFormat):
    """How Orbax names and finds steps; incomplete ones are neither counted nor removed."""

    def build_name(self, step: int) -> str:
        """The folder's name."""
        return str(step)

    def find_all(self, base_path: epath.PathLike) -> Iterator[Any]:
        """The complete steps that a run can resume from."""
        for number, step in _numbered(epath.Path(base_path)):
            if not missing(step) and has_training(step):
                yield ocp.path.step.Metadata(step=number, path=step)

    def find_step(self, base_path: epath.PathLike, step: int) -> Any:
        """One of them; ValueError if there is none."""
        found = next((m for m in self.find_all(base_path) if m.step == step), None)
        if found is None:
            raise ValueError(f"{base_path} has no complete step {step}")
        return found


def _folder(workdir: epath.PathLike) -> epath.Path:
    folder = files.to_path(workdir) / DIRECTORY
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but must be a folder of checkpoints; rename or remove it")
    return folder


def _numbered(folder: epath.Path) -> list[tuple[int, epath.Path]]:
    """(number, path) of the finished folders that are named like steps, ascending."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if (number := number_of(path.name)) is not None and path.is_dir() and is_finished(path):
            found.append((number, path))
    return sorted(found)


def is_finished(step: epath.Path) -> bool:
    """Whether Orbax finished writing it: in a bucket it writes a marker file last."""
    return ocp.utils.is_checkpoint_finalized(step)


def _newest(folder: epath.Path, accept: Any) -> int | None:
    return next((number for number, step in reversed(_numbered(folder)) if accept(step)), None)


def _listed_items(step: epath.Path) -> list[str]:
    """The items that Orbax listed when it saved a step; [] without a readable list."""
    try:
        notes = files.read_json(step / NOTES) if (step / NOTES).exists() else {}
        return list(notes["item_handlers"])
    except (UserError, LookupError, TypeError):
        return []


def _log_skipped(folder: epath.Path) -> None:
    skipped = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.name.isnumeric():
            continue
        if number_of(path.name) is None or not path.is_dir():
            skipped.append(f"'{path.name}' is not a step")
        elif is_finished(path) and (lacks := missing(path)):
            skipped.append(f"'{path.name}' lacks {', '.join(lacks)}")
    if skipped:
        _log_once(f"{folder}: skipped: {'; '.join(skipped)}")


@functools.lru_cache
def _log_once(text: str) -> None:
    """Prints on stderr, once per text: several parts of a command look for the same steps."""
    print(text, file=sys.stderr, flush=True)
