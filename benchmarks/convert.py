"""Converts a random checkpoint of a released size to Orbax and back: seconds, MB/s, peak memory.

  python benchmarks/convert.py --folder=/tmp/bench [--variant=8b] [--scale=1.0]

Writes a sharded folder of random bits under the official key names (--dtype, bfloat16), runs the
`convert` command in a process of its own each way, and compares every tensor bit by bit. It needs
three copies on disk (3 x 16 GB for 8b), which are removed at the end; --scale takes that share of
the layers. Prints one JSON line; exit code 1 when a bit differs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import zlib
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np

from argenseg_jax import trees
from argenseg_jax.interop import hf_config, hf_folder, tensor_files
from argenseg_jax.interop import state_dict as torch_convert
from argenseg_jax.interop.weight_map import HITS
from argenseg_jax.models import variants


def scaled(variant: str, scale: float) -> dict[str, Any]:
    """The variant's `model` section with that share of its layers."""
    cfg = variants.resolve({"variant": variant})
    for part in ("vision", "llm"):
        cfg[part]["depth"] = max(1, round(cfg[part]["depth"] * scale))
    return cfg


def write(folder: pathlib.Path, cfg: dict[str, Any], dtype: str) -> int:
    """A folder of random bits; returns its bytes."""
    model = variants.build(cfg)
    leaves = trees.map_named(lambda name, leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), hf_folder.param_shapes(model))
    tensors = torch_convert.export(trees.flatten(leaves), vocab_size=model.vocab.size)

    def draw(key: str, like: tensor_files.Lazy) -> np.ndarray:
        bits = np.random.default_rng(zlib.crc32(key.encode())).bytes(like.nbytes)
        return np.frombuffer(bits, like.dtype).reshape(like.shape)

    random = {
        key: tensor_files.Lazy(lazy.shape, lazy.dtype, functools.partial(draw, key, lazy))
        for key, lazy in tensors.items()
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config.model_cfg_to_hf(cfg, dtype)))
    return hf_folder.write_tensors(folder, random)


def convert(source: pathlib.Path, target: pathlib.Path) -> dict[str, float]:
    """Runs the command; {seconds, MB/s, peak RSS in MiB} of its process."""
    start = time.monotonic()
    command = [sys.executable, "-m", "argenseg_jax", "convert", f"--from={source}", f"--to={target}"]
    child = subprocess.Popen(command, cwd=pathlib.Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
    result = json.loads(child.stdout.read().splitlines()[-1])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"convert ended with {status}")
    seconds = time.monotonic() - start
    return {
        "seconds": round(seconds, 1),
        "MB_per_s": round(result["bytes"] / seconds / 1e6, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_MiB": round(usage.ru_maxrss / 1024),
    }


def differing(a: pathlib.Path, b: pathlib.Path) -> list[str]:
    """Keys whose bits, shape or dtype differ; the codebook's hit counts are not carried."""
    a, b = hf_folder.open_tensors(a), hf_folder.open_tensors(b)
    keys = sorted((a.keys() | b.keys()) - {HITS})
    return [
        key
        for key in keys
        if key not in a
        or key not in b
        or a[key].dtype != b[key].dtype
        or a[key].shape != b[key].shape
        or a[key].tobytes() != b[key].tobytes()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="must not exist")
    parser.add_argument("--variant", default="8b", choices=list(variants.VARIANTS))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"--folder {args.folder}: exists already; it is removed at the end")
    cfg = scaled(args.variant, args.scale)
    args.folder.mkdir(parents=True)
    there, orbax, back = (args.folder / name for name in ("torch", "orbax", "back"))
    try:
        size = write(there, cfg, args.dtype)
        result = {
            "variant": args.variant,
            "scale": args.scale,
            "dtype": args.dtype,
            "bytes": size,
            "shards": len(list(there.glob("*.safetensors"))),
            "to_orbax": convert(there, orbax),
            "to_torch": convert(orbax, back),
        }
        different = differing(there, back)
    finally:
        shutil.rmtree(args.folder)
    print(json.dumps({**result, "bit_exact": not different, "differing": different[:5]}))
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
