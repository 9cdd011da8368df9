"""One training step: ours beside PyTorch's (transformers' InternVL and AdamW), eager and compiled.

  python benchmarks/train_step.py                      # widths 512 and 1024, 8 layers, CPU, 2 threads
  python benchmarks/train_step.py --widths 512 --no-compile
  OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/train_step.py --threads 1 --clock cpu   # on a busy machine

Both sides hold the same float32 weights and do the same work on 4 rows of 1024 tokens: a frozen
InternViT of 4 layers on one 224 px tile a row, connector, Qwen2 decoder, untied head over the whole
vocabulary of 12,109 words, cross-entropy at every position after the image, gradients of all but the
ViT, clipping by their global norm, AdamW. Neither side computes anything again (no remat) or leaves
places out of the head. The first losses must agree. The peer has its fastest form: scaled dot-product
attention, the fused AdamW. Ours is the step that train/loop.py runs.

Each side runs in a process of its own, as its users run it: ours with the malloc settings that `train`
makes, the peer with glibc's. `kept` is the eager peer with our settings, which help it too. They take
turns, and medians count. Last line: JSON; ratios are the peer's seconds over ours.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import multiprocessing.connection
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np

from argenseg_jax import sharding
from argenseg_jax.cli import common
from argenseg_jax.models import variants
from argenseg_jax.models.argenseg import ARGenSeg, init_params
from argenseg_jax.train import losses, program
from argenseg_jax.train.state import Phase, TrainState
from argenseg_jax.vocab import IGNORE
from benchmarks.decode import in_turns, random_params, rounded, timed

ROWS, TOKENS, LAYERS = 4, 1024, 8
OPTIM = dict(
    name="adamw",
    lr=1e-4,
    schedule="constant",
    warmup=0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.05,
    clip=1.0,
    freeze=(r"vision/.*",),
    groups=((".*", 1.0),),
    ema=0.0,
    final=0.0,
)


def model_config(width: int) -> dict[str, Any]:
    """Shapes of InternVL on Qwen2.5 at a width that a CPU can carry."""
    return dict(
        image_size=224,
        unroll=True,  # without the copies of a scan, which cost CPUs a tenth of the step
        vision=dict(image_size=224, patch=14, width=256, depth=4, heads=4, mlp=1024),
        connector={},
        llm=dict(
            width=width,
            depth=LAYERS,
            heads=width // 64,
            kv_heads=width // 256,
            head_dim=64,
            mlp=width * 11 // 4,
            eps=1e-6,
            rope_theta=1e6,
            qkv_bias=True,
        ),
        vqvae=dict(ch=32),
        vocab=dict(base=8000, eos=7999),
    )


def draw_batch(model: ARGenSeg) -> dict[str, np.ndarray]:
    """One batch: each sequence is an image and tokens, all tokens after the image are targets."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(100, model.vocab.base, (ROWS, TOKENS), np.int32)
    tokens[:, : model.image_tokens] = model.vocab.img_context
    labels = np.where(np.arange(TOKENS) > model.image_tokens, tokens, IGNORE).astype(np.int32)
    side = model.image_size
    return {
        "tokens": tokens,
        "labels": labels,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(TOKENS, dtype=np.int32), tokens.shape),
        "tiles": rng.integers(0, 256, (ROWS, 1, side, side, 3), np.uint8),
        "masks": np.zeros((ROWS, 0, model.mask_size, model.mask_size, 3), np.uint8),
    }


def step_program(
    model: ARGenSeg, params: Mapping[str, Any], rows: int
) -> tuple[program.Program, TrainState, jax.sharding.Mesh]:
    """The program of the lm phase on one device, its first state, and the mesh."""
    task = losses.lm_task(model, losses.LMOptions())
    phase = Phase(task, 1000, rows, 0, OPTIM, data=lambda mesh: iter(()))
    mesh = sharding.make_mesh(dict(dcn_data=1, data=1, fsdp=1, tensor=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
        made = program.build({"seed": 0}, phase, shapes, mesh)
        return made, made.new_state(jax.tree.map(jax.numpy.array, params)), mesh


def ours(model: ARGenSeg, params: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> Iterator[float]:
    """Each `next` makes one step and gives its loss."""
    made, state, mesh = step_program(model, params, ROWS)
    rows = sharding.global_batch(mesh, batch)
    while True:
        with jax.set_mesh(mesh):
            state, metrics = made.step(state, rows)
        yield float(metrics["loss"])


def peer(
    model: ARGenSeg,
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    batch: Mapping[str, np.ndarray],
    *,
    compiled: bool,
) -> Iterator[float]:
    """The same in PyTorch, with the threads that torch has."""
    import torch
    import transformers

    from argenseg_jax.interop import hf_folder

    with tempfile.TemporaryDirectory() as folder:
        hf_folder.save_folder(f"{folder}/hf", params, config, (), layout="hf")
        net = transformers.InternVLForConditionalGeneration.from_pretrained(
            f"{folder}/hf", dtype=torch.float32, attn_implementation="sdpa"
        ).train()
    net.requires_grad_(True)
    for name, weight in net.named_parameters():
        if "vision_tower" in name:
            weight.requires_grad_(False)
    learned = [weight for weight in net.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in learned if w.ndim > 1], "weight_decay": OPTIM["weight_decay"]},
        {"params": [w for w in learned if w.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=OPTIM["lr"], betas=(OPTIM["b1"], OPTIM["b2"]), eps=OPTIM["eps"], fused=True)
    run = torch.compile(net) if compiled else net
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    tiles = torch.from_numpy(((batch["tiles"][:, 0] / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).copy())
    tokens, labels = (torch.from_numpy(batch[key]).long() for key in ("tokens", "labels"))
    while True:
        loss = run(input_ids=tokens, pixel_values=tiles, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, OPTIM["clip"])
        adam.step()
        adam.zero_grad()
        yield float(loss.detach())


def serve(pipe: multiprocessing.connection.Connection, side: str, width: int, threads: int) -> None:
    """A side's process: makes a step whenever it is asked to, and answers (loss, CPU seconds)."""
    if side in ("ours", "kept"):
        common.keep_memory()
    config = model_config(width)
    model = variants.build({**config, "dtype": "float32"})
    params, batch = random_params(model, model.llm.dtype), draw_batch(model)
    if side == "ours":
        steps = ours(model, params, batch)
    else:
        import torch

        torch.set_num_threads(threads)
        steps = peer(model, config, params, batch, compiled=side == "compile")
    while pipe.recv():
        start = time.process_time()
        loss = next(steps)
        pipe.send((loss, time.process_time() - start))


class Side:
    """A side in its process."""

    def __init__(self, name: str, width: int, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=serve, args=(child, name, width, threads), daemon=True)
        self.process.start()
        child.close()

    def step(self) -> tuple[float, float]:
        """Loss and CPU seconds of one more step."""
        self.pipe.send(True)
        return self.pipe.recv()

    def stop(self) -> None:
        self.pipe.send(False)
        self.process.join()


def measure(width: int, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each side at a width, and how far the losses of the first steps are apart."""
    sides = {name: Side(name, width, args.threads) for name in names}
    # The allocators need a few steps until they hold what a step needs.
    first = {name: [side.step()[0] for _ in range(4)] for name, side in sides.items()}
    apart = max(abs(a - b) / b for values in first.values() for a, b in zip(values, first["ours"]))
    if apart > 1e-3:
        raise SystemExit(f"the two sides do not do the same work: losses {first}")
    clock = timed if args.clock == "wall" else lambda step: step()[1]
    seconds = in_turns({name: side.step for name, side in sides.items()}, args.rounds, clock)
    for side in sides.values():
        side.stop()
    return {
        "width": width,
        "losses_apart": apart,
        "seconds": seconds,
        "tokens_per_second": ROWS * TOKENS / seconds["ours"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--widths",
        type=lambda text: [int(w) for w in text.split(",")],
        default=[512, 1024],
        help="of the decoder; multiples of 256",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the peer; jax takes every core")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="skip torch.compile")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="only ours")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts the seconds of all threads: on a machine that others use, pin one thread and take this",
    )
    args = parser.parse_args()
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "layers": LAYERS, "rows": ROWS, "tokens": TOKENS}
    for width in args.widths:
        names = ["ours"]
        if args.peer:
            names += ["eager", "kept"]
            if args.compile and width == min(args.widths):
                names.append("compile")
        part = measure(width, names, args)
        print(json.dumps(rounded(part)), file=sys.stderr, flush=True)
        suffix = "" if width == min(args.widths) else f"_w{width}"
        for name, seconds in part["seconds"].items():
            result[f"seconds_{name}{suffix}"] = seconds
            if name != "ours":
                result[f"ratio_peer_{name}{suffix}"] = seconds / part["seconds"]["ours"]
    print(json.dumps(rounded(result)), flush=True)


if __name__ == "__main__":
    main()
