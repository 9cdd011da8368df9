"""Sweeps: the points of a config file, the commands that run them, and their results.

A config file's `sweep(add)` calls `add(**{"optim.lr": 1e-3, "seed": 1})` once for each point. Each
point is a run in ROOT/NAME, where NAME is made of its settings.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import html
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from argenseg_jax import config_files, config_keys, files
from argenseg_jax.ckpt import orbax_io
from argenseg_jax.ckpt.orbax_io import newest_step
from argenseg_jax.errors import UserError
from argenseg_jax.models import variants
from argenseg_jax.train import loop
from argenseg_jax.train.metrics_log import METRICS, read_lines

SCORES = "scores.json"  # in a point's folder: the scores of `evaluate`, and of which step
_NAME_LENGTH = 100
_SMALLER_IS_BETTER = re.compile(r".*(loss|seconds|error|bce|mse)$")  # names of such metrics


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination of settings.

    Attributes:
      settings: {'optim.lr': value}, the differences from the config.
      steps: of all phases together.
      config: the complete config, as nested dicts.
    """

    settings: Mapping[str, Any]
    steps: int
    config: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """A folder name made of the settings; a digest is added if characters had to be replaced."""
        text = ",".join(f"{key}={config_keys.spell(value)}" for key, value in self.settings.items())
        plain = re.sub(r"[^\w.,=+-]+", "_", text)[:_NAME_LENGTH]
        return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def expand(module: ModuleType, config: ConfigDict) -> list[Point]:
    """The points of the config file's `sweep`; UserError for a wrong key or value, no point or one twice."""
    if not hasattr(module, "sweep"):
        raise UserError(f"{module.__file__} has no sweep(add); it calls add(**{{'optim.lr': 1e-3}}) for each point")
    points: list[Point] = []

    def add(**settings: Any) -> None:
        point = copy.deepcopy(config)
        try:
            plain = config_keys.flattened(settings)
            config_files.override(point, plain)
            config_keys.check(point)
        except UserError as error:
            raise UserError(f"{module.__file__}: sweep adds {config_keys.shown(settings)}: {error}") from None
        points.append(Point(plain, point.vqvae.steps + point.train.steps, point.to_dict()))

    config_files.call(module, "sweep", add)
    names = [point.name for point in points]
    if not names:
        raise UserError(f"{module.__file__}: sweep adds no point")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{module.__file__}: sweep adds '{twice}' twice")
    return points


def listed_metrics(module: ModuleType) -> tuple[str, ...]:
    """What the config file's metrics() names; loss where there is none."""
    listed = config_files.call(module, "metrics") if hasattr(module, "metrics") else ("loss",)
    if not isinstance(listed, (tuple, list)) or not listed or not all(isinstance(name, str) for name in listed):
        raise UserError(
            f"{module.__file__}: metrics() returns {config_keys.shown(listed)}; a tuple of names is expected"
        )
    return tuple(listed)


def train_args(point: Point, config: str, overrides: Mapping[str, Any], root: str) -> list[str]:
    """Arguments of the command that trains a point: ['train', '--config=...', ...]."""
    keys = {**overrides, **point.settings}
    return [
        "train",
        f"--config={config}",
        *(f"--config.{k}={config_keys.spell(v)}" for k, v in keys.items()),
        f"--workdir={root.rstrip('/')}/{point.name}",
    ]


# ------------------------------------------------------------------------------ to run elsewhere


def command_lines(commands: Sequence[Sequence[str]]) -> str:
    """One line of shell for each point."""
    return "".join(f"python -m argenseg_jax {shlex.join(args)}\n" for args in commands)


def slurm_array(commands: Sequence[Sequence[str]]) -> str:
    """launch/slurm.sh as an array job whose tasks are the points."""
    header, strict, body = _launcher("slurm.sh").partition("set -euo pipefail\n")
    if not strict:
        raise UserError("launch/slurm.sh has no line 'set -euo pipefail'")
    cases = "".join(f"  {i}) set -- {shlex.join(args)} ;;\n" for i, args in enumerate(commands))
    return f'{header}#SBATCH --array=0-{len(commands) - 1}\n{strict}case "$SLURM_ARRAY_TASK_ID" in\n{cases}esac\n{body}'


def job_sets(commands: Sequence[Sequence[str]]) -> str:
    """launch/jobset.yaml once for each point."""
    template = _launcher("jobset.yaml")
    place = re.compile(r"^( *)- --config=CONFIG\n *- --workdir=.*\n", re.M)
    if not place.search(template):
        raise UserError("launch/jobset.yaml has no lines '- --config=CONFIG' and '- --workdir=...'")

    def one(number: int, args: Sequence[str]) -> str:
        flags = lambda found: "".join(f"{found[1]}- {json.dumps(flag)}\n" for flag in args[1:])
        text = re.sub(r"^  name: argenseg$", f"  name: argenseg-{number}", template, flags=re.M)
        return place.sub(flags, text)

    return "---\n".join(one(i, args) for i, args in enumerate(commands))


def _launcher(name: str) -> str:
    """Text of a file of launch/, which is beside the package in a clone of the repository."""
    path = epath.Path(__file__).parent.parent.parent / "launch" / name
    if not path.exists():
        raise UserError(f"{path} is not there; run from a clone of the repository")
    return path.read_text()


# -------------------------------------------------------------------------------- results


def is_trained(folder: epath.PathLike, point: Point) -> bool:
    """Whether the last step of a run of exactly this point's config is saved.

    If the run is of another config, `train` reports what differs.
    """
    if (newest_step(folder) or 0) < point.steps:
        return False
    resolved = {**point.config, "model": variants.resolve(point.config["model"])}
    try:
        loop.check_config(epath.Path(folder) / orbax_io.CONFIG, resolved, resumed=True)
    except UserError:
        return False
    return True


def scores(folder: epath.PathLike, point: Point, data: str) -> dict[str, Any] | None:
    """The scores of `evaluate` on `data` for the trained point, or None."""
    path = epath.Path(folder) / SCORES
    saved = files.read_json(path) if path.exists() else {}
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds no scores; remove it")
    return saved if (saved.get("data"), saved.get("step")) == (data, point.steps) else None


def numbers(folder: epath.PathLike, point: Point, data: str | None) -> dict[str, Any]:
    """The last line of a trained point's metrics, and its scores; {} if it is not trained."""
    path = epath.Path(folder) / METRICS
    logged = read_lines(path) if is_trained(folder, point) else []
    return {**logged[-1], **((data and scores(folder, point, data)) or {})} if logged else {}


def best(results: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """Index of the best point: smallest for losses and seconds, else largest; None without values."""
    known = [i for i, result in enumerate(results) if isinstance(result.get(metric), (int, float))]
    choose_best = min if _SMALLER_IS_BETTER.match(metric) else max
    return choose_best(known, key=lambda i: results[i][metric], default=None)


def table(points: Sequence[Point], results: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """Markdown: settings and metrics of every point, the best by the first metric in bold."""
    keys = list(dict.fromkeys(key for point in points for key in point.settings))
    first = best(results, metrics[0])

    def line(i: int) -> list[str]:
        values = [f"{v:.4g}" if isinstance(v, (int, float)) else "-" for v in map(results[i].get, metrics)]
        return [config_keys.spell(points[i].settings.get(key, "-")) for key in keys] + [
            f"**{v}**" if i == first else v for v in values
        ]

    head = [*keys, *metrics]
    body = [head, ["---"] * len(head), *map(line, range(len(points)))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in body)


def plot(points: Sequence[Point], results: Sequence[Mapping[str, Any]], metric: str) -> str:
    """SVG: the metric over the values of each swept key, one panel per key; the line joins the means."""
    width, height, left, right, top, bottom = 320, 240, 56, 16, 28, 40
    shown = [(p.settings, r[metric]) for p, r in zip(points, results) if isinstance(r.get(metric), (int, float))]
    low, high = min((y for _, y in shown), default=0), max((y for _, y in shown), default=1)
    y_of = lambda y: top + (high - y) / ((high - low) or 1) * (height - top - bottom)
    panels = []
    for key in dict.fromkeys(key for point in points for key in point.settings):
        groups: dict[Any, list[float]] = {}
        for settings, y in shown:
            if key in settings:
                groups.setdefault(settings[key], []).append(y)
        values, positions = _axis(list(groups))
        x_of = {v: left + at * (width - left - right) for v, at in zip(values, positions)}
        means = [(x_of[v], y_of(sum(groups[v]) / len(groups[v]))) for v in values]
        marks = "".join(f"<circle cx='{x_of[v]:.1f}' cy='{y_of(y):.1f}' r='4'/>" for v in values for y in groups[v])
        ticks = "".join(
            f"<text x='{x_of[v]:.1f}' y='{height - 22}' text-anchor='middle'>{html.escape(config_keys.spell(v))}</text>"
            for v in values
        )
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in means)
        panels.append(
            f"<g transform='translate({len(panels) * width})'>"
            f"<text x='{left}' y='16' font-weight='bold'>{html.escape(metric)}</text>"
            f"<path d='M{left - 8},{top - 4}V{height - bottom + 6}H{width - 4}' class='axis'/>"
            f"<text x='{left - 12}' y='{top + 6}' text-anchor='end'>{high:.4g}</text>"
            f"<text x='{left - 12}' y='{height - bottom + 4}' text-anchor='end'>{low:.4g}</text>"
            f"<polyline points='{line}'/>{marks}{ticks}"
            f"<text x='{(left + width) // 2}' y='{height - 6}' text-anchor='middle'>"
            f"{html.escape(key)}</text></g>"
        )
    size = max(len(panels), 1) * width
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {size} {height}' width='{size}' "
        f"height='{height}' font-family='sans-serif' font-size='11'><style>polyline,.axis"
        "{fill:none;stroke:#999}polyline{stroke:#d60;stroke-width:1.5}circle{fill:#d60;"
        f"fill-opacity:.7}}</style><rect width='100%' height='100%' fill='#fff'/>{''.join(panels)}</svg>\n"
    )


def _axis(values: list[Any]) -> tuple[list[Any], list[float]]:
    """Sorted values and their positions in [0, 1]: linear, logarithmic if over a decade, or evenly spaced."""
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        values = sorted(values, key=str)
        size = [float(i) for i in range(len(values))]
    else:
        values = sorted(values)
        wide = values and values[0] > 0 and values[-1] >= 10 * values[0]
        size = [math.log(v) if wide else float(v) for v in values]
    span = (size[-1] - size[0]) if size else 0
    return values, [(s - size[0]) / span if span else 0.5 for s in size]
