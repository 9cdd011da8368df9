"""The data pipeline beside its bare transforms and beside a torch DataLoader, at the same work.

  python benchmarks/data.py [--data F.jsonl --image_root R] [--samples 256] [--rounds 5]

The work of a sample is what training does at the paper's sizes: read an image and a mask, cut a tile
of 448, resize the mask to 256, write 1024 tokens. Without --data it is done on photographs that are
drawn for it (480 x 360). The programs take turns, so that a busy machine disturbs all of
them alike; each figure is a median over the rounds. `overhead` is CPU time of the whole process beyond
that of the same calls in a plain loop; the speeds are samples per second of wall time, with 1 and 2
worker processes, after their start. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np
import torch

from argenseg_jax.data import mixture, transforms
from argenseg_jax.data.nano_tokenizer import nano_tokenizer
from argenseg_jax.data.pipeline import DataConfig, Geometry, SampleEncoder, train_iterator
from argenseg_jax.data.synthetic.shapes import corpus
from argenseg_jax.eval.visualize import encode_png

BATCH = 16
DRAINED = 4  # batches that may lie ready; after so many one has to be made for each that is taken
GEOMETRY = Geometry(image_size=448, image_tokens=256, mask_size=256, code_tokens=680)


def photographs(folder: pathlib.Path, count: int = 48) -> pathlib.Path:
    """A JSONL of smooth random images with one mask each, in the folder."""
    rng, lines = np.random.default_rng(0), []
    for k in range(count):
        blurred = transforms.resize(rng.integers(0, 256, (12, 16, 3), np.uint8), (480, 360))
        noise = rng.integers(-12, 13, blurred.shape)
        image = np.clip(blurred.astype(np.int32) + noise, 0, 255).astype(np.uint8)
        (folder / f"{k}.png").write_bytes(encode_png(image))
        (folder / f"{k}_mask.png").write_bytes(encode_png(((blurred[..., 0] > 128) * 255).astype(np.uint8)))
        lines.append(
            json.dumps(
                {
                    "image": f"{k}.png",
                    "mask": f"{k}_mask.png",
                    "conversations": [
                        {"from": "human", "value": "<image>\nSegment the bright parts of the picture."},
                        {"from": "gpt", "value": "Sure, the segmentation result: <mask>."},
                    ],
                }
            )
        )
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


class Samples(torch.utils.data.Dataset):
    """The same rows for torch: a map-style data set whose items are dicts of arrays."""

    def __init__(self, source: Any, encoder: SampleEncoder):
        self.source, self.encoder = source, encoder

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.encoder.training_example(self.source[index], np.random.default_rng(index))


def torch_batches(data: Samples, workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless shuffled batches of a DataLoader with worker processes that stay."""
    loader = torch.utils.data.DataLoader(
        data, batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    while True:
        yield from loader


def taken(batches: Iterator[Any], count: int) -> tuple[float, float]:
    """(wall, CPU) seconds of `count` batches; the CPU time is that of this process alone."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - wall, time.process_time() - cpu


def bare_loop(data: Samples) -> Iterator[None]:
    """One sample after another, as many as a batch has: the transforms and nothing else."""
    order = np.random.default_rng(0)
    while True:
        for index in order.integers(len(data), size=BATCH):
            data[int(index)]
        yield


def overhead(data: Samples, config: dict[str, Any], batches: int, rounds: int) -> dict[str, float]:
    """The pipeline in one process against the plain loop, in turn."""
    ours = train_iterator({**config, "threads": 0}, data.encoder.tokenizer, GEOMETRY, seed=0, batch_size=BATCH)
    plain = bare_loop(data)
    spent: dict[str, list[float]] = {"plain": [], "pipeline": []}
    for _ in range(rounds):
        taken(ours, DRAINED)
        spent["pipeline"].append(taken(ours, batches)[1])
        time.sleep(1)  # until its buffer is full and its thread at rest
        spent["plain"].append(taken(plain, batches)[1])
    ours.close()
    plain_cpu, pipeline_cpu = (statistics.median(spent[k]) for k in ("plain", "pipeline"))
    return {
        "plain_ms": 1e3 * plain_cpu / batches / BATCH,
        "pipeline_ms": 1e3 * pipeline_cpu / batches / BATCH,
        "overhead": pipeline_cpu / plain_cpu - 1,
    }


def speeds(data: Samples, config: dict[str, Any], workers: int, batches: int, rounds: int) -> dict[str, float]:
    """Samples per second of both, in turn; what lay in a program's buffers is taken before its time."""
    ours = train_iterator({**config, "workers": workers}, data.encoder.tokenizer, GEOMETRY, seed=0, batch_size=BATCH)
    programs: dict[str, Iterator[Any]] = {"argenseg": ours, "torch": torch_batches(data, workers)}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(1 + rounds):
        for name, program in programs.items():
            taken(program, DRAINED + 2 * workers)
            if turn:  # in the first the processes start
                times[name].append(taken(program, batches)[0])
    ours.close()
    rate = {name: batches * BATCH / statistics.median(t) for name, t in times.items()}
    ratios = [t / o for t, o in zip(times["torch"], times["argenseg"])]
    return {**rate, "ratio": statistics.median(ratios)}


def main() -> None:
    """Runs all and prints the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", help="official JSONL")
    parser.add_argument("--image_root", default="")
    parser.add_argument("--samples", type=int, default=256, help="per round and program")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.data or str(photographs(pathlib.Path(folder)))
        config = {"sources": (path,), "max_tokens": 1024, "system": ""}
        encoder = SampleEncoder(DataConfig(**config), GEOMETRY, nano_tokenizer(16, corpus()))
        source = mixture.open_source(path, image_root=args.image_root)
        data, batches = Samples(source, encoder), max(1, args.samples // BATCH)
        result = {"data": args.data or "drawn", **_rounded(overhead(data, config, batches, args.rounds))}
        for workers in (1, 2):
            result[f"workers_{workers}"] = _rounded(speeds(data, config, workers, batches, args.rounds))
    print(json.dumps(result))


def _rounded(numbers: dict[str, float]) -> dict[str, Any]:
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


if __name__ == "__main__":
    main()
