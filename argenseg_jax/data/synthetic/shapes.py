"""The synthetic `shapes` scenes: coloured shapes on a 64x64 canvas, with referring expressions.

Numpy only, and quick enough (well under a millisecond per sample) to be drawn while training.
A sample is a pure function of (level, split, seed, index).

Levels: `simple` has 2-3 objects of 4 colours and 3 shapes; `full` has 2-5 objects of 6 colours and
5 shapes, relations and expressions without a target. A few colour-shape pairs are held out: they
are drawn, and named, in the split `unseen` only.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base
from argenseg_jax.errors import UserError

CANVAS = 64
COLOURS = {
    "red": (220, 50, 50),
    "green": (50, 180, 70),
    "blue": (60, 90, 230),
    "yellow": (235, 215, 60),
    "purple": (155, 60, 190),
    "orange": (240, 140, 40),
}
SIZES = {"small": (6.5, 8.0), "large": (10.5, 13.0)}  # range of r, in pixels
SHAPES = ("circle", "square", "triangle", "star", "ring")
# In units of r, so that shapes of one r look equally large: half a side; centre to tip; a hole.
SQUARE_HALF, TRIANGLE_TIP, STAR_TIP, RING_HOLE = 0.885, 1.24, 1.15, 0.45
STAR_DENT = 0.5  # in units of the tip
MAX_ROTATION = 0.5  # radians
MIN_DISTANCE = 0.88  # between centres, in units of r1 + r2: shapes may touch
COLOUR_SD, NOISE_SD = 10.0, 8.0  # of an object's colour, and of every pixel

SPLITS = {"train": 2**31 - 1, "val": 200, "test": 500, "unseen": 500}  # default sizes


@dataclasses.dataclass(frozen=True)
class Level:
    """What may be drawn and asked. `kinds` are relative frequencies of the expression kinds."""

    name: str
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    max_objects: int
    held_out: frozenset[tuple[str, str]]
    kinds: Mapping[str, float]

    @functools.cached_property
    def seen(self) -> list[tuple[str, str]]:
        """The colour-shape pairs that are not held out."""
        return [pair for pair in itertools.product(self.colours, self.shapes) if pair not in self.held_out]


LEVELS = {
    level.name: level
    for level in (
        Level(
            "simple",
            tuple(COLOURS)[:4],
            SHAPES[:3],
            3,
            frozenset({("red", "triangle"), ("blue", "circle")}),
            dict(cs=15, ext=11, allc=11, alls=11, zcs=7, zs=4, exc=4),
        ),
        Level(
            "full",
            tuple(COLOURS),
            SHAPES,
            5,
            frozenset(
                {("red", "triangle"), ("green", "star"), ("blue", "circle"), ("yellow", "ring"), ("purple", "square")}
            ),
            dict(cs=10, ext=10, exc=10, zcs=9, alls=6, zs=4, rel=4, allc=4, none=4),
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape: names, centre (x, y; y grows downwards) and r in pixels, angle in radians."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    r: float
    angle: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image u8[H, W, 3] of N objects, with their visible parts bool[N, H, W]."""

    level: Level
    image: np.ndarray
    objects: tuple[Object, ...]
    masks: np.ndarray

    def union(self, indices: Sequence[int]) -> np.ndarray:
        """u8[H, W], 255 on the visible parts of the objects at `indices`."""
        return np.where(self.masks[list(indices)].any(0), np.uint8(255), np.uint8(0))


@dataclasses.dataclass(frozen=True)
class Expression:
    """A phrase about a scene, its kind, the objects it means, and their mask u8[H, W]."""

    kind: str
    text: str
    targets: tuple[int, ...]
    mask: np.ndarray


# ---------------------------------------------------------------------------------- drawing


def _inside(obj: Object, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """bool[h, w]: which pixel centres, x f32[1, w] and y f32[h, 1] from the centre, it covers."""
    if obj.shape in ("circle", "ring"):
        square = x * x + y * y
        inside = square <= obj.r**2
        return inside & (square >= (RING_HOLE * obj.r) ** 2) if obj.shape == "ring" else inside
    if obj.shape == "square":
        cos, sin, half = math.cos(obj.angle), math.sin(obj.angle), SQUARE_HALF * obj.r
        return (np.abs(cos * x + sin * y) <= half) & (np.abs(cos * y - sin * x) <= half)
    points = 3 if obj.shape == "triangle" else 5
    angles = obj.angle - np.pi / 2 + 2 * np.pi / points * np.arange(points)  # the tips; first is up
    if obj.shape == "triangle":  # each side is opposite a tip, at half its distance
        sides = [math.cos(a) * x + math.sin(a) * y for a in angles]
        return np.minimum(np.minimum(sides[0], sides[1]), sides[2]) >= -TRIANGLE_TIP * obj.r / 2
    # A star folds onto half a point: `along` the nearest tip's axis and `aside` of it.
    along = math.cos(angles[0]) * x + math.sin(angles[0]) * y
    for a in angles[1:]:
        along = np.maximum(along, math.cos(a) * x + math.sin(a) * y)
    aside = np.sqrt(np.maximum(x * x + y * y - along * along, 0))
    tip = STAR_TIP * obj.r
    dent = STAR_DENT * tip
    dent_along, dent_aside = dent * math.cos(np.pi / 5), dent * math.sin(np.pi / 5)
    return dent_aside * (tip - along) >= (tip - dent_along) * aside


def silhouette(shape: str, x: float, y: float, r: float) -> np.ndarray:
    """bool[H, W]: an upright shape around (x, y), cut off at the edge of the canvas."""
    across = np.arange(CANVAS, dtype=np.float32)
    return _inside(Object("", shape, "", x, y, r, 0.0), across[None] - np.float32(x), across[:, None] - np.float32(y))


def _reach(shape: str, r: float) -> float:
    """Radius of the circle around a shape."""
    return r * {"square": SQUARE_HALF * math.sqrt(2), "triangle": TRIANGLE_TIP, "star": STAR_TIP}.get(shape, 1.0)


def _background(rng: np.random.Generator) -> np.ndarray:
    """f32[3, H, W]: a dull colour, a grid of brightness steps, and a faint sine grating."""
    colour = 0.35 * rng.uniform(60, 200, 3) + 0.65 * rng.uniform(70, 170)
    blocks = rng.normal(0, rng.uniform(0, 8), (8, 8)).astype(np.float32)
    amplitude, phase, angle = rng.uniform(0, 14), rng.uniform(0, 2 * np.pi), rng.uniform(0, np.pi)
    wave = 2 * np.pi * rng.uniform(0.02, 0.08)  # radians per pixel
    t = np.arange(CANVAS, dtype=np.float32)
    across, down = wave * math.cos(angle) * t[None], wave * math.sin(angle) * t[:, None]
    bright = np.float32(amplitude) * np.sin(across + (down + phase))
    bright.reshape(8, 8, 8, 8)[:] += blocks[:, None, :, None]
    return bright + colour.astype(np.float32)[:, None, None]


@functools.cache
def _noise_table() -> np.ndarray:
    """f32[4096]: quantiles of the pixel noise; lookup is three times as fast as drawing normals."""
    normal = statistics.NormalDist(0, NOISE_SD)
    return np.array([normal.inv_cdf((i + 0.5) / 4096) for i in range(4096)], np.float32)


def _draw_objects(rng: np.random.Generator, level: Level, held_out: bool) -> list[Object]:
    """Draws 2 or more objects, inside and apart; the first is a held-out pair if asked."""
    count = int(rng.integers(2, level.max_objects + 1))
    objects: list[Object] = []
    while len(objects) < 2:  # the second object may not fit: start again
        objects = []
        for i in range(count):
            pairs = sorted(level.held_out) if held_out and i == 0 else level.seen
            pair, big, extra, turn = rng.random(4).tolist()  # one call: numpy's cost is per call
            colour, shape = pairs[int(pair * len(pairs))]
            size = "large" if big < 0.5 else "small"
            low, high = SIZES[size]
            r, angle = low + extra * (high - low), (2 * turn - 1) * MAX_ROTATION
            for x, y in rng.uniform(r, CANVAS - 1 - r, (20, 2)).tolist():
                if all(math.hypot(x - o.x, y - o.y) >= MIN_DISTANCE * (r + o.r) for o in objects):
                    objects.append(Object(colour, shape, size, x, y, r, angle))
                    break
    return objects


def scene(rng: np.random.Generator, level: str | Level, held_out: bool = False) -> Scene:
    """Draws one scene; with `held_out` one of its objects is a pair never drawn otherwise."""
    level = level_of(level) if isinstance(level, str) else level
    objects = _draw_objects(rng, level, held_out)
    if held_out:  # the order of drawing must not tell the held-out one
        objects = [objects[i] for i in rng.permutation(len(objects))]
    canvas = _background(rng)
    masks = np.zeros((len(objects), CANVAS, CANVAS), bool)
    for i, obj in enumerate(objects):
        reach = _reach(obj.shape, obj.r)
        left, right = max(0, math.floor(obj.x - reach)), math.ceil(obj.x + reach) + 1
        top, bottom = max(0, math.floor(obj.y - reach)), math.ceil(obj.y + reach) + 1
        x = np.arange(left, min(right, CANVAS), dtype=np.float32)[None] - np.float32(obj.x)
        y = np.arange(top, min(bottom, CANVAS), dtype=np.float32)[:, None] - np.float32(obj.y)
        inside = _inside(obj, x, y)
        masks[:i, top:bottom, left:right] &= ~inside  # later objects cover earlier ones
        masks[i, top:bottom, left:right] = inside
        colour = COLOURS[obj.colour] + COLOUR_SD * rng.standard_normal(3)
        canvas[:, top:bottom, left:right][:, inside] = colour[:, None]
    canvas += _noise_table().take(rng.integers(0, 4096, canvas.shape, np.uint16), mode="wrap")
    image = np.clip(canvas, 0, 255, out=canvas).astype(np.uint8).transpose(1, 2, 0)
    return Scene(level, np.ascontiguousarray(image), tuple(objects), masks)


# ---------------------------------------------------------------------------------- asking
# A kind is a function scene -> [(phrase, indices of its targets)]; the article "the" is only
# given to phrases that hold for exactly one object.

Candidates = list[tuple[str, tuple[int, ...]]]
MARGIN = 4.0  # pixels by which an extreme or a relation must hold, so that an eye can tell
DIRECTIONS = {"leftmost": ("x", -1), "rightmost": ("x", 1), "topmost": ("y", -1), "bottommost": ("y", 1)}
RELATIONS = {"above": ("y", -1), "below": ("y", 1), "left of": ("x", -1), "right of": ("x", 1)}


def unique(scene: Scene, *fields: str) -> Candidates:
    """ "the {fields}" for every object that is unique in these fields."""
    names = [" ".join(getattr(o, f) for f in fields) for o in scene.objects]
    return [(f"the {name}", (i,)) for i, name in enumerate(names) if names.count(name) == 1]


def groups(scene: Scene, field: str) -> dict[str, tuple[int, ...]]:
    """Indices of the objects that share a colour or a shape."""
    found: dict[str, tuple[int, ...]] = {}
    for i, obj in enumerate(scene.objects):
        name = getattr(obj, field)
        found[name] = (*found.get(name, ()), i)
    return found


def extremes(scene: Scene) -> Candidates:
    """ "the leftmost {shape}", or "... object" over all objects where the shape occurs once."""
    found = []
    everything = tuple(range(len(scene.objects)))
    for shape, group in groups(scene, "shape").items():
        noun, group = (shape, group) if len(group) > 1 else ("object", everything)
        for word, (axis, sign) in DIRECTIONS.items():
            order = sorted(group, key=lambda i: -sign * getattr(scene.objects[i], axis))
            gap = sign * (getattr(scene.objects[order[0]], axis) - getattr(scene.objects[order[1]], axis))
            if gap >= MARGIN:
                found.append((f"the {word} {noun}", (order[0],)))
    return found


def _relations(scene: Scene) -> Candidates:
    """ "the {colour} shape {relation} the {colour} one": the second colour occurs once, and exactly
    one object of the first has the relation, by a clear margin."""
    found = []
    by_colour = groups(scene, "colour")
    for other, (anchor, *more) in by_colour.items():
        if more:
            continue
        for colour, group in by_colour.items():
            if colour == other:
                continue
            for word, (axis, sign) in RELATIONS.items():
                origin = getattr(scene.objects[anchor], axis)
                gaps = [sign * (getattr(scene.objects[i], axis) - origin) for i in group]
                holds = [i for i, gap in zip(group, gaps) if gap > 0]
                if len(holds) == 1 and min(map(abs, gaps)) >= MARGIN:
                    found.append((f"the {colour} shape {word} the {other} one", tuple(holds)))
    return found


def _excepts(scene: Scene) -> Candidates:
    everything = set(range(len(scene.objects)))
    return [
        (f"everything except the {shape}s", tuple(sorted(everything - set(group))))
        for shape, group in groups(scene, "shape").items()
        if len(group) < len(everything)
    ]


def _absent(scene: Scene) -> Candidates:
    """Pairs that are not there; those that share a colour or shape with the scene have the largest weight."""
    present = {(o.colour, o.shape) for o in scene.objects}
    colours, shapes = {c for c, _ in present}, {s for _, s in present}
    found = []
    for colour in scene.level.colours:
        for shape in scene.level.shapes:
            if (colour, shape) not in present:
                near = colour in colours or shape in shapes
                found += [(f"the {colour} {shape}", ())] * (4 if near else 1)
    return found


KINDS: dict[str, Callable[[Scene], Candidates]] = {
    "cs": lambda s: unique(s, "colour", "shape"),
    "zcs": lambda s: unique(s, "size", "colour", "shape"),
    "zs": lambda s: unique(s, "size", "shape"),
    "ext": extremes,
    "rel": _relations,
    "allc": lambda s: [(f"all {c} shapes", g) for c, g in groups(s, "colour").items()],
    "alls": lambda s: [(f"all {n}s", g) for n, g in groups(s, "shape").items()],
    "exc": _excepts,
    "none": _absent,
}


def expressions(scene: Scene) -> list[Expression]:
    """Every expression of the level that holds in the scene, each phrase once."""
    found = {text: (kind, targets) for kind in scene.level.kinds for text, targets in KINDS[kind](scene)}
    return [Expression(kind, text, targets, scene.union(targets)) for text, (kind, targets) in found.items()]


def draw_expression(
    rng: np.random.Generator, scene: Scene, weights: Mapping[str, float], split: str
) -> Expression | None:
    """Draws a kind by its weight, then a phrase of it; None where the scene allows no kind.

    In `unseen` a held-out pair is among the targets. Elsewhere no phrase names one, except that
    `val` and `test` may ask for an absent one: in training that would teach that it never exists.
    """
    held_out = [" ".join(pair) for pair in scene.level.held_out]
    wanted = {i for i, o in enumerate(scene.objects) if (o.colour, o.shape) in scene.level.held_out}
    open_kinds = {kind: weight for kind, weight in weights.items() if weight > 0}
    while open_kinds:
        names = list(open_kinds)
        ends = np.cumsum(list(open_kinds.values()))
        kind = names[min(int(np.searchsorted(ends, rng.random() * ends[-1], "right")), len(names) - 1)]
        found = KINDS[kind](scene)
        if split == "unseen":
            found = [item for item in found if wanted.intersection(item[1])]
        elif split == "train" and kind == "none":
            found = [item for item in found if not item[0].endswith(tuple(held_out))]
        if found:
            text, targets = found[rng.integers(len(found))]
            return Expression(kind, text, targets, scene.union(targets))
        del open_kinds[kind]
    return None


# ---------------------------------------------------------------------------------- the source


def conversation(text: str, image_last: bool = False) -> list[dict[str, str]]:
    """The question about one phrase, and its answer."""
    ask = f"Segment {text}."
    return [
        {"from": "human", "value": f"{ask}\n<image>" if image_last else f"<image>\n{ask}"},
        {"from": "gpt", "value": "Sure, the segmentation result: <mask>."},
    ]


class ShapesSource:
    """Random access to drawn samples: source[i] depends on (level, split, seed, i) alone.

    Args:
      level: 'simple' or 'full'.
      split: 'train', 'val', 'test' or 'unseen' (the target is a pair never drawn elsewhere).
      size: number of samples; by default 2**31 - 1 for train, a few hundred otherwise.
      seed: another seed gives other samples.
      image_last: puts `<image>` after the question.
      kind_weights: relative frequency of each expression kind, replacing the level's own.
    """

    def __init__(
        self,
        level: str = "simple",
        split: str = "train",
        size: int | None = None,
        seed: int = 0,
        image_last: bool = False,
        kind_weights: Mapping[str, float] | None = None,
    ):
        self.level = level_of(level)
        if split not in SPLITS:
            raise UserError(f"shapes: no split {split!r}; choose one of {', '.join(SPLITS)}")
        weights = self.level.kinds if kind_weights is None else dict(kind_weights)
        unknown = set(weights) - set(self.level.kinds)
        if unknown or min(weights.values(), default=0) < 0 or sum(weights.values()) <= 0:
            raise UserError(
                f"shapes: kind_weights must give a weight >= 0 to some of "
                f"{', '.join(self.level.kinds)}; got {dict(weights)}"
            )
        self.split, self.seed, self.image_last, self.weights = split, seed, image_last, weights
        self._size = SPLITS[split] if size is None else size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        index = int(index)
        base.check_index(index, self._size)
        key = (self.seed, tuple(LEVELS).index(self.level.name), tuple(SPLITS).index(self.split))
        rng = np.random.default_rng((*key, index))
        expression = None
        while expression is None:  # rare: the weights may only allow kinds this scene lacks
            drawn = scene(rng, self.level, held_out=self.split == "unseen")
            expression = draw_expression(rng, drawn, self.weights, self.split)
        return Sample(
            conversations=conversation(expression.text, self.image_last),
            images=(drawn.image,),
            masks=(expression.mask,),
            meta={
                "id": index,
                "source": "shapes",
                "level": self.level.name,
                "split": self.split,
                "kind": expression.kind,
                "all_objects_mask": drawn.union(range(len(drawn.objects))),
            },
        )


def corpus() -> list[str]:
    """Sentences with every word of the grammar, to train a small tokenizer."""
    sentences = [turn["value"] for turn in conversation("the object")]
    for colour in COLOURS:
        sentences.append(f"all {colour} shapes")
        for shape in SHAPES:
            sentences += [f"the {colour} {shape}"] + [f"the {size} {colour} {shape}" for size in SIZES]
    for shape in SHAPES:
        sentences += [f"all {shape}s", f"everything except the {shape}s"]
        sentences += [f"the {size} {shape}" for size in SIZES]
    sentences += [f"the {word} {noun}" for word in DIRECTIONS for noun in (*SHAPES, "object")]
    sentences += [
        f"the {first} shape {word} the {second} one"
        for word in RELATIONS
        for first in COLOURS
        for second in COLOURS
        if first != second
    ]
    return sentences


def level_of(name: str) -> Level:
    if name not in LEVELS:
        raise UserError(f"shapes: no level {name!r}; choose one of {', '.join(LEVELS)}")
    return LEVELS[name]
