"""The other tasks of a nano mixture, on the scenes of data/synthetic/shapes.py.

    object     any one object; `interactive:PROMPT:shapes-object:...` prompts for it
    semantic   "Please segment circle in this image.": a class; the empty mask of one that is absent
    instances  "Segment circle 2 from the left.": the objects of a class as a list, one mask per question,
               empty after the last; samples LIST * i ... LIST * i + LIST - 1 of a source ask for one list
    chat       counts, yes or no, colours, shapes, answered with one word
    draw       a described scene -> its image, black and white; no input image

A sample is a pure function of (task, level, split, seed, index). As in data/synthetic/shapes.py, held-out pairs are
drawn, and named, in the split `unseen` only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base, templates, text_to_image
from argenseg_jax.data.synthetic import shapes
from argenseg_jax.data.synthetic.shapes import Scene
from argenseg_jax.errors import UserError

LIST = 3  # questions about one list of instances, and so their maximum number
ABSENT = 0.2  # share of the semantic questions that name an absent class
CHAT = {"count": 6, "exist": 1.5, "colour": 1.25, "shape": 1.25}  # relative frequencies
COUNTED = {"colour": 3, "shape": 3, "pair": 2, "all": 1}  # of what counting asks for
MAX_DRAWN = 3  # objects of a described scene
RADII = {"small": 6.5, "large": 9.5}  # of its objects: less than half of the cells' spacing
GRID_ROWS, GRID_COLUMNS = ("top", "", "bottom"), ("left", "", "right")
CELLS = (11.0, 31.5, 52.0)  # centres of its rows and columns, in pixels


# ---------------------------------------------------------------------------------- masks of a scene


def _object(rng: np.random.Generator, scene: Scene, unseen: bool, position: int) -> Sample | None:
    choice = _held_out(scene) if unseen else range(len(scene.objects))
    target = int(rng.choice(choice))
    obj = scene.objects[target]
    return _masked(scene, f"<image>\nSegment the {obj.colour} {obj.shape}.", [target], kind="object")


def _semantic(rng: np.random.Generator, scene: Scene, unseen: bool, position: int) -> Sample | None:
    groups = shapes.groups(scene, "shape")
    absent = [shape for shape in scene.level.shapes if shape not in groups]
    present = sorted({scene.objects[i].shape for i in _held_out(scene)} if unseen else groups)
    name = str(rng.choice(absent if absent and not unseen and rng.random() < ABSENT else present))
    return _masked(
        scene, f"<image>\n Please segment {name} in this image.", groups.get(name, ()), kind=name, metric="semantic"
    )


def _instances(rng: np.random.Generator, scene: Scene, unseen: bool, position: int) -> Sample | None:
    """Number `position` of the largest class, from the left; None where the order is not clear."""
    groups = shapes.groups(scene, "shape")
    if unseen:
        groups = {scene.objects[i].shape: groups[scene.objects[i].shape] for i in _held_out(scene)}
    name = max(groups, key=lambda shape: (len(groups[shape]), rng.random()))
    order = sorted(groups[name], key=lambda i: scene.objects[i].x)
    across = [scene.objects[i].x for i in order]
    if len(order) > LIST or np.diff(across).min(initial=shapes.MARGIN) < shapes.MARGIN:
        return None
    return _masked(
        scene,
        f"<image>\nSegment {name} {position + 1} from the left.",
        order[position : position + 1],
        kind=name,
        metric="instances",
    )


def _masked(scene: Scene, question: str, targets, **meta) -> Sample:
    everything = scene.union(range(len(scene.objects)))
    return Sample(
        templates.turns(question), (scene.image,), (scene.union(targets),), {**meta, "all_objects_mask": everything}
    )


def _held_out(scene: Scene) -> list[int]:
    """The objects that are held-out pairs."""
    return [i for i, o in enumerate(scene.objects) if (o.colour, o.shape) in scene.level.held_out]


# ---------------------------------------------------------------------------------- chat


def _chat(rng: np.random.Generator, scene: Scene, unseen: bool, position: int) -> Sample | None:
    kind = _weighted(rng, CHAT)
    found = {"count": _counts, "exist": _exists, "colour": _colours, "shape": _shapes}[kind](rng, scene, unseen)
    if not found:
        return None
    question, answer = found[rng.integers(len(found))]
    return Sample(
        templates.turns(f"<image>\n{question}", answer),
        (scene.image,),
        (),
        {"kind": kind, "metric": "exact", "reference": answer},
    )


def _counts(rng: np.random.Generator, scene: Scene, unseen: bool) -> list[tuple[str, str]]:
    """Questions that have one answer, drawn among the counts that occur: 0 is not always right."""
    level, objects, what = scene.level, scene.objects, _weighted(rng, COUNTED)
    names = {
        "colour": {f"{c} shapes": (c, None) for c in level.colours},
        "shape": {f"{s}s": (None, s) for s in level.shapes},
        "pair": {f"{c} {s}s": (c, s) for c, s in _pairs(scene, unseen)},
        "all": {"shapes": (None, None)},
    }[what]
    counts = {
        name: sum(c in (None, o.colour) and s in (None, o.shape) for o in objects) for name, (c, s) in names.items()
    }
    answer = int(rng.choice(sorted(set(counts.values()))))
    return [(f"How many {name} are there?", str(n)) for name, n in counts.items() if n == answer]


def _exists(rng: np.random.Generator, scene: Scene, unseen: bool) -> list[tuple[str, str]]:
    present = {(o.colour, o.shape) for o in scene.objects}
    yes = rng.random() < 0.5
    near = [
        (c, s)
        for c, s in _pairs(scene, unseen)
        if ((c, s) in present) == yes and any(c == other or s == shape for other, shape in present)
    ]
    return [(f"Is there any {c} {s}?", "yes" if yes else "no") for c, s in near]


def _colours(rng: np.random.Generator, scene: Scene, unseen: bool) -> list[tuple[str, str]]:
    phrases = [*shapes.unique(scene, "shape"), *shapes.unique(scene, "size", "shape"), *shapes.extremes(scene)]
    return [(f"What colour is {text}?", scene.objects[i].colour) for text, (i,) in phrases]


def _shapes(rng: np.random.Generator, scene: Scene, unseen: bool) -> list[tuple[str, str]]:
    phrases = [(f"{text} object", targets) for text, targets in shapes.unique(scene, "colour")]
    phrases += [item for item in shapes.extremes(scene) if item[0].endswith("object")]
    return [(f"What shape is {text}?", scene.objects[i].shape) for text, (i,) in phrases]


def _pairs(scene: Scene, unseen: bool) -> list[tuple[str, str]]:
    level = scene.level
    return [(c, s) for c in level.colours for s in level.shapes if unseen or (c, s) not in level.held_out]


def _weighted(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    ends = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(ends, rng.random() * ends[-1], "right"))]


# ---------------------------------------------------------------------------------- images


def _draw_task(rng: np.random.Generator, level: shapes.Level) -> Sample:
    """A description of 1 to MAX_DRAWN objects in different cells of a 3x3 grid, and its image."""
    cells = rng.permutation(9)[: rng.integers(1, MAX_DRAWN + 1)]
    parts, canvas = [], np.zeros((shapes.CANVAS, shapes.CANVAS), bool)
    for cell in sorted(cells.tolist()):
        size, shape = str(rng.choice(list(RADII))), str(rng.choice(level.shapes))
        row, column = divmod(cell, 3)
        where = f"{GRID_ROWS[row]} {GRID_COLUMNS[column]}".strip()
        parts.append(f"a {size} {shape} " + (f"at the {where}" if where else "in the middle"))
        canvas |= shapes.silhouette(shape, CELLS[column], CELLS[row], RADII[size])
    question = text_to_image.QUESTION.format(", ".join(parts))
    return Sample(
        templates.turns(question, text_to_image.ANSWER),
        (),
        (canvas.astype(np.uint8) * np.uint8(255),),
        {"kind": f"{len(parts)} objects"},
    )


# ---------------------------------------------------------------------------------- the source

TASKS: dict[str, Callable[[np.random.Generator, Scene, bool, int], Sample | None] | None] = {
    "object": _object,
    "semantic": _semantic,
    "instances": _instances,
    "chat": _chat,
    "draw": None,
}


class TaskSource:
    """Random access to drawn samples of one task.

    Args:
      task: a key of TASKS.
      level, split, size, seed: as those of shapes.ShapesSource.
    """

    def __init__(self, task: str, level: str = "full", split: str = "train", size: int | None = None, seed: int = 0):
        if task not in TASKS:
            raise UserError(f"shapes-{task}: no such task; there are {', '.join(f'shapes-{name}' for name in TASKS)}")
        if split not in shapes.SPLITS:
            raise UserError(f"shapes-{task}: no split {split!r}; choose one of {', '.join(shapes.SPLITS)}")
        self.task, self.level, self.split, self.seed = task, shapes.level_of(level), split, seed
        self._size = shapes.SPLITS[split] if size is None else size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        index = int(index)
        base.check_index(index, self._size)
        group, position = divmod(index, LIST) if self.task == "instances" else (index, 0)
        rng = np.random.default_rng(
            (
                self.seed,
                list(TASKS).index(self.task),
                list(shapes.LEVELS).index(self.level.name),
                list(shapes.SPLITS).index(self.split),
                group,
            )
        )
        name = f"shapes-{self.task}"
        unseen, build = self.split == "unseen", TASKS[self.task]
        sample = None
        while sample is None:  # not every scene allows the question
            if build is None:
                sample = _draw_task(rng, self.level)
            else:
                sample = build(rng, shapes.scene(rng, self.level, held_out=unseen), unseen, position)
        return dataclasses.replace(
            sample, meta={"id": index, "source": name, "files": [f"{name}/{group}"], **sample.meta}
        )
