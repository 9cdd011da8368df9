"""What commands have left in a workdir, as far as it is intact: metrics.jsonl, eval/*/scores.json, config.json.

A full disk, a power failure or an editor may have damaged a line or a key. It is left out and reported by
name; the rest counts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from argenseg_jax import files
from argenseg_jax.errors import UserError, brief

Say = Callable[[str], None]
GROUPS = ("random", "best", "worst", "scales")  # of the images of an evaluation


def say(text: str) -> None:
    """One line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def logged(path: epath.PathLike, note: Say = say) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, each with a whole number `step`; [] where there is no such file."""
    path = epath.Path(path)
    if not path.exists():
        return []
    try:
        lines = files.read_bytes(path).split(b"\n")
    except UserError as fault:
        note(f"left out: {fault}")
        return []
    found = []
    for k, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = files.parse_json(line, f"{path}:{k}")
            if not isinstance(row, dict) or not _is_count(row.get("step")):
                raise UserError(f"{path}:{k}: no object with a whole number `step`")
            found.append(row)
        except UserError as fault:
            note(f"left out: {fault}")
    return found


def evaluations(workdir: epath.PathLike, note: Say = say) -> dict[str, dict[str, Any]]:
    """{folder: scores} of all evaluations of a workdir, by name; see `intact`."""
    found = {}
    for path in sorted(epath.Path(workdir).glob("eval/*/scores.json")):
        try:
            scores = files.read_json(path)
            if not isinstance(scores, Mapping):
                raise UserError(f"{path}: no object with scores but {type(scores).__name__}")
            found[path.parent.name] = intact(scores, str(path), note)
        except UserError as fault:
            note(f"left out: {fault}")
    return found


def config(workdir: epath.PathLike, note: Say = say) -> dict[str, dict[str, Any]]:
    """The sections of a workdir's config.json; {} where there is none."""
    path = epath.Path(workdir) / "config.json"
    try:
        content = files.read_json(path) if path.exists() else {}
        if not isinstance(content, Mapping):
            raise UserError(f"{path}: no object with sections but {type(content).__name__}")
    except UserError as fault:
        note(f"left out: {fault}")
        return {}
    return {key: section for key, section in content.items() if isinstance(section, Mapping)}


def intact(scores: Mapping[str, Any], where: str, note: Say = say) -> dict[str, Any]:
    """The keys of a scores.json whose values are what their readers take: numbers, texts, and the parts."""
    found = {}
    for key, value in scores.items():
        if CHECKS.get(key, _is_score)(value):
            found[key] = value
        else:
            note(f"left out: {where}: key `{brief(key, 40)}`: {brief(repr(value), 60)}")
    if "pictures" in found:
        found["pictures"] = [
            image
            for k, image in enumerate(found["pictures"])
            if _is_image(image) or note(f"left out: {where}: key `pictures`[{k}]")
        ]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_score(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_groups(value: Any) -> bool:
    """{label: {n, and gIoU or accuracy}}, the score a number or None."""
    return isinstance(value, Mapping) and all(
        isinstance(group, Mapping)
        and _is_count(group.get("n"))
        and any(key in group and _is_score(group[key]) for key in ("gIoU", "accuracy"))
        for group in value.values()
    )


def _is_breakdown(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("histogram"), list)
        and bool(value["histogram"])
        and all(map(_is_count, value["histogram"]))
        and all(
            _are_groups(value.get(key)) and all("gIoU" in group for group in value[key].values())
            for key in ("by_size", "by_length")
        )
    )


def _is_image(value: Any) -> bool:
    """{group, file, question, answer, iou, scales?}; files are names, not paths that lead elsewhere."""
    return (
        isinstance(value, Mapping)
        and value.get("group") in GROUPS
        and all(isinstance(value.get(key), str) for key in ("file", "question", "answer"))
        and _is_number(value.get("iou"))
        and all(
            isinstance(name, str) and name not in ("", "..") and epath.Path(name).name == name
            for name in (value["file"], value.get("scales", "x"))
        )
    )


# All other keys are scores: numbers, or null where there is nothing to average.
CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("data", "source", "checkpoint", "weights", "coco_results"), _is_text),
    "metric": lambda v: isinstance(v, str),
    "n": _is_count,
    "by_kind": _are_groups,
    "breakdown": _is_breakdown,
    "pictures": lambda v: isinstance(v, list),
    "IoU_by_class": lambda v: isinstance(v, Mapping),
}
