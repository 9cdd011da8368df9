"""What checksums cost: writing them, checking them, and loading a step with and without them.

  python benchmarks/checksums.py --gb 16 --folder /tmp

Makes a step of random bfloat16 (it does not compress; 16 GB are the size of the 8B) in a temporary folder, and
reads it layer by layer, as `convert` does: memory stays small, and what does not fit into the page cache comes
from the disk. Prints one JSON line: seconds, medians of --repeats.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
from etils import epath

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from argenseg_jax.ckpt import checksums, orbax_io, params_writer


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return round(statistics.median(times), 2)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=None)
    args = parser.parse_args()
    layers, rng = 32, np.random.default_rng(0)
    shape = layers, int(args.gb * 1e9 / 2 / layers) // 1024, 1024
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        step = epath.Path(folder) / "checkpoints" / "1"
        leaves = {"layers/w": jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16)}
        with params_writer.ParamsWriter(step, leaves, checksums=False) as writer:
            for layer in range(layers):
                writer.write(
                    "layers/w", (layer,), rng.integers(0, 2**16, shape[1:], np.uint16).view(ml_dtypes.bfloat16)
                )

        def load(check: bool) -> None:
            leaf = orbax_io.open_params(step, checksums=check)["layers/w"]
            for layer in range(layers):
                leaf[layer]

        result = {
            "gb": args.gb,
            "write": seconds(lambda: checksums.write(step), args.repeats),
            "check": seconds(lambda: checksums.check(step, ("params",)), args.repeats),
            "load": seconds(lambda: load(False), args.repeats),
            "load_checked": seconds(lambda: load(True), args.repeats),
        }
    print(json.dumps({**result, "check_gb_per_s": round(args.gb / result["check"], 2)}))


if __name__ == "__main__":
    main()
