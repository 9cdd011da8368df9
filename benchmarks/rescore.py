"""How long scoring saved predictions takes, and how much memory: rows of 640x480 masks, no model.

  python benchmarks/rescore.py            # 10,800 rows (RefCOCO val), then 300,000
  python benchmarks/rescore.py 1000 20000

Writes a predictions.jsonl of each size (the same rows every time) and runs `evaluate --rescore` on it.
The masks are ellipses with ragged edges, so that run lengths are as long as those of real objects.
Prints a table: rows, size of the file, milliseconds a row (wall, CPU), peak memory of the process.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np

SIZE = (480, 640)
SHAPES = 400  # different masks; rows pair them up
ROWS = (10_800, 300_000)


def masks(count: int = SHAPES, seed: int = 0) -> list[dict]:
    """COCO run lengths of ellipses whose edge wanders by some pixels; every 20th is empty."""
    from argenseg_jax.data.rle import encode_rle

    rng = np.random.default_rng(seed)
    y, x = np.indices(SIZE)
    found = []
    for k in range(count):
        middle, radii = rng.uniform(0.2, 0.8, 2) * SIZE, rng.uniform(15, 180, 2)
        edge = 1 + 0.1 * rng.standard_normal(SIZE[1])  # of each column
        inside = ((y - middle[0]) / radii[0]) ** 2 + ((x - middle[1]) / radii[1]) ** 2 < edge
        found.append(encode_rle(inside & (k % 20 > 0)))
    return found


def write(path: pathlib.Path, rows: int, seed: int = 0) -> None:
    """A predictions.jsonl of so many rows, as `evaluate` writes them."""
    rng = np.random.default_rng(seed)
    texts = [json.dumps(rle) for rle in masks()]
    pairs, pixels = rng.integers(0, len(texts), (rows, 2)), rng.integers(1, 10**5, (rows, 2))
    with path.open("w") as file:
        for k, ((a, b), (inner, more)) in enumerate(zip(pairs.tolist(), pixels.tolist())):
            b = a if k % 3 == 0 else b
            file.write(
                f'{{"index": {k}, "question": "Segment object {k} on the left.", "answer": "Sure.", '
                f'"masks": 1, "iou": 0.5, "prediction": {texts[a]}, "truth": {texts[b]}, '
                f'"kind": "kind {k % 7}", "id": {k}, "metric": "referring", '
                f'"baseline": [{inner}, {inner + more}]}}\n'
            )


# ru_maxrss of a child is at least its parent's memory when it was started; the kernel's VmHWM is its own.
_PROGRAM = """
import re, sys
from argenseg_jax.cli.__main__ import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def measure(path: pathlib.Path) -> tuple[float, float, int, dict]:
    """(seconds, CPU seconds, peak RSS in bytes, scores) of `evaluate --rescore`."""
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, "evaluate", "--rescore", str(path)], stdout=subprocess.PIPE
    )
    *_, scores, peak = child.stdout.read().splitlines()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"--rescore {path} failed")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, int(peak) * 1024, json.loads(scores)


def main(counts: list[int]) -> None:
    """Prints the table."""
    print("|    rows |     MB | ms a row |   of CPU | peak MiB |\n|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for rows in counts:
            path = pathlib.Path(folder) / "predictions.jsonl"
            write(path, rows)
            seconds, cpu, peak, _ = measure(path)
            print(
                f"| {rows:7,} | {path.stat().st_size / 1e6:6.1f} | {1000 * seconds / rows:8.3f} | "
                f"{1000 * cpu / rows:8.3f} | {peak / 2**20:8.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or list(ROWS))
