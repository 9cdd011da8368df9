"""Draws where the time of one decode goes: a bar for each phase, as an SVG."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

COLORS = {"prefill": "#4c78a8", "text": "#72b7b2", "scale": "#f58518", "VQ-VAE": "#54a24b"}
LEFT, WIDTH, ROW, TOP = 190, 560, 22, 34  # pixels


def draw(title: str, phases: Sequence[tuple[str, float, str]], path: str) -> None:
    """phases: (name, seconds, remark) in the order in which they run; the name's first word colours."""
    total, at, rows = sum(seconds for _, seconds, _ in phases), 0.0, []
    for i, (name, seconds, remark) in enumerate(phases):
        x, y = LEFT + WIDTH * at / total, TOP + ROW * i
        wide = max(WIDTH * seconds / total, 1.0)
        after = x + wide + 6
        side = f'x="{after:.1f}"' if after < LEFT + WIDTH - 60 else f'x="{x - 6:.1f}" text-anchor="end"'
        rows.append(
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{name}, {remark}</text>'
            f'<rect x="{x:.1f}" y="{y + 3}" width="{wide:.1f}" height="{ROW - 6}" rx="2" '
            f'fill="{COLORS[name.split()[0]]}"/>'
            f'<text {side} y="{y + 14}">{1000 * seconds:.1f} ms</text>'
        )
        at += seconds
    height = TOP + ROW * len(phases) + 10
    pathlib.Path(path).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 40} {height}" '
        'font-family="sans-serif" font-size="12" fill="#333">'
        f'<rect width="100%" height="100%" fill="white"/><text x="12" y="20" font-weight="bold">{title}'
        "</text>" + "".join(rows) + "</svg>\n"
    )
