"""Weights for inference in fewer bits: what they save, and how far their masks part from bfloat16's.

  python benchmarks/weights.py --checkpoint nano --data shapes:test --limit 64

For each of float32, bfloat16 and int8: seconds per image (after a warm-up), MiB of weights as decoded
with, and the mean IoU of the first masks with those of bfloat16. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np

import argenseg_jax
from argenseg_jax.data.mixture import open_source
from argenseg_jax.decode.predictor import WEIGHTS
from argenseg_jax.eval.evaluator import request
from argenseg_jax.eval.metrics.referring import iou


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--data", default="shapes:test", help="see evaluate --help")
    parser.add_argument("--limit", type=int, default=64, help="number of images")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    source = open_source(args.data)
    requests = [request(source[i]) for i in range(min(args.limit, len(source)))]
    masks, report = {}, {}
    for dtype in WEIGHTS:
        predictor = argenseg_jax.load(args.checkpoint, dtype)
        predictor.segment_batch(requests[: args.batch])  # compiles
        begin, results = time.perf_counter(), []
        for i in range(0, len(requests), args.batch):
            results += predictor.segment_batch(requests[i : i + args.batch])
        seconds = (time.perf_counter() - begin) / len(requests)
        masks[dtype] = [r.masks[0] if r.masks else np.zeros(q.image.shape[:2], bool) for q, r in zip(requests, results)]
        size = sum(x.nbytes for x in jax.tree.leaves(predictor.engine.params))
        report[dtype] = {"seconds_per_image": round(seconds, 4), "mib": round(size / 2**20, 3)}
    for dtype in WEIGHTS:
        same = [iou(a, b) for a, b in zip(masks[dtype], masks["bfloat16"])]
        report[dtype]["iou_with_bfloat16"] = round(float(np.mean(same)), 4)
    print(json.dumps({"n": len(requests), **report}), flush=True)


if __name__ == "__main__":
    main()
