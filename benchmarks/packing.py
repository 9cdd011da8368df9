"""What packing brings: the share of padding, and tokens a second of a training step, packed and not.

  python benchmarks/packing.py                      # CPU; rows of 2048 tokens
  python benchmarks/packing.py --steps 0            # only the shares

The mix is the paper's, 402 segmentation to 1250 chat samples, with lengths of the 8b (256 tokens a tile,
680 codes a mask): a segmentation sample has one tile, one mask and 40 to 90 words; half of the chat has
an image of 1 to 4 tiles; its text is log-normal with a median of 250 tokens. These lengths are assumed,
not measured on data. Rows are filled by argenseg_jax/data/packing.py, as in training. The step is that
of train/loop.py on a model of width 256 with 4 layers whose ViT, codes and rows have the lengths of the
8b. Measurements take turns, medians count. Last line: JSON; gain = tokens/s packed over unpacked.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np

from argenseg_jax import sharding
from argenseg_jax.data import packing
from argenseg_jax.models import variants
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.vocab import IGNORE
from benchmarks.decode import random_params, rounded, timed
from benchmarks.train_step import step_program

SEGMENTATION, CHAT = 402, 1250
MAX_TILES = 4  # of a sample


def model_config() -> dict[str, Any]:
    """Small but for its lengths: 256 tokens a tile, 680 codes a mask."""
    return dict(
        image_size=448,
        vision=dict(image_size=448, patch=14, width=64, depth=1, heads=1, mlp=64),
        connector={},
        llm=dict(width=256, depth=4, heads=4, kv_heads=2, head_dim=64, mlp=704, eps=1e-6, qkv_bias=True),
        vqvae=dict(ch=32),
        vocab=dict(base=2000, eos=1999),
        dtype="float32",
    )


def samples(model: ARGenSeg, max_tokens: int, seed: int = 0) -> Iterator[packing.Example]:
    """Endless examples of the mix; those longer than a sequence are skipped, as in training."""
    rng, vocab, n = np.random.default_rng(seed), model.vocab, model.scales.num_codes
    while True:
        masks = int(rng.random() < SEGMENTATION / (SEGMENTATION + CHAT))
        tiles = 1 if masks else int(rng.integers(1, MAX_TILES + 1)) * int(rng.random() < 0.5)
        words = int(rng.integers(40, 91)) if masks else int(rng.lognormal(np.log(250), 0.8)) + 10
        question = np.full(tiles * model.image_tokens + words // 2, vocab.img_context)
        question[tiles * model.image_tokens :] = rng.integers(100, 1900, words // 2)
        answer = rng.integers(100, 1900, words - words // 2)
        codes = [vocab.ge_start, *[vocab.mask_context] * (n - 1), vocab.ge_end] if masks else []
        target = np.asarray([vocab.ge_start, *[vocab.mask_context] * n] if masks else [], np.int64)
        tokens = np.concatenate([question, answer, codes]).astype(np.int32)
        labels = np.concatenate([np.full(len(question), IGNORE), answer, target]).astype(np.int32)
        if len(tokens) <= max_tokens:
            yield {
                "tokens": tokens,
                "labels": labels,
                "tiles": np.zeros((tiles, model.image_size, model.image_size, 3), np.uint8),
                "masks": np.zeros((masks, model.mask_size, model.mask_size, 3), np.uint8),
            }


def rows(model: ARGenSeg, ahead: int, room: packing.Size, count: int) -> list[list[packing.Example]]:
    """The examples of `count` sequences."""
    source, pending = enumerate(samples(model, room["tokens"])), []
    rule = packing.Packing(room, packing.size, lambda examples: {}, ahead)

    def refill(length: int) -> None:
        while len(pending) < length:
            pending.append(next(source))

    return [packing.fill(rule, pending, refill) for _ in range(count)]


def padding(rows: list[list[packing.Example]], room: packing.Size) -> dict[str, float]:
    """Shares of the tokens, tiles and masks of the sequences that are padding."""
    used = [{key: sum(packing.size(example)[key] for example in row) for key in room} for row in rows]
    return {key: 1 - sum(u[key] for u in used) / (len(rows) * room[key]) for key in ("tokens", "tiles", "masks")}


def room(max_tokens: int, tiles: int, masks: int) -> packing.Size:
    return {"tokens": max_tokens, "labels": max_tokens, "tiles": tiles, "masks": masks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--ahead", type=int, default=16, help="data.pack")
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--steps", type=int, default=5, help="measured on each side")
    args = parser.parse_args()
    model = variants.build(model_config())
    share = args.max_tokens / 2048
    rooms = {
        "unpacked": (0, room(args.max_tokens, MAX_TILES, 1)),
        "packed": (args.ahead, room(args.max_tokens, round(5 * share), max(round(2 * share), 1))),
    }
    result: dict[str, Any] = {"max_tokens": args.max_tokens, "ahead": args.ahead}
    for name, (ahead, space) in rooms.items():
        many = rows(model, ahead, space, 500)
        result[f"padding_{name}"] = padding(many, space)
        result[f"samples_a_row_{name}"] = sum(map(len, many)) / len(many)
    for ahead in (1, 4, 64):
        result[f"padding_packed_{ahead}_ahead"] = padding(
            rows(model, ahead, rooms["packed"][1], 500), rooms["packed"][1]
        )["tokens"]
    if args.steps:
        result |= speeds(model, rooms, args)
    print(json.dumps(rounded(result)), flush=True)


def speeds(model: ARGenSeg, rooms: dict[str, tuple[int, packing.Size]], args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second that are no padding, on both sides."""
    params, steps = random_params(model, model.llm.dtype), {}
    for name, (ahead, space) in rooms.items():
        made, state, mesh = step_program(model, params, args.rows)
        chosen = rows(model, ahead, space, args.rows * (args.steps + 1))
        joined = [packing.join(row, space, model.vocab.pad) for row in chosen]
        batches = [
            {key: np.stack([row[key] for row in joined[i : i + args.rows]]) for key in joined[0]}
            for i in range(0, len(joined), args.rows)
        ]
        steps[name] = [made, state, mesh, batches]
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(args.steps + 1):
        for name, side in steps.items():
            made, state, mesh, batches = side

            def step() -> None:
                with jax.set_mesh(mesh):
                    side[1], metrics = made.step(state, sharding.global_batch(mesh, batches[i]))
                    jax.block_until_ready(metrics)

            seconds = timed(step)
            if i:  # the first step compiles
                taken[name].append(np.count_nonzero(batches[i]["segment_ids"]) / seconds)
    speed = {f"tokens_per_second_{name}": statistics.median(values) for name, values in taken.items()}
    return {**speed, "gain": speed["tokens_per_second_packed"] / speed["tokens_per_second_unpacked"]}


if __name__ == "__main__":
    main()
