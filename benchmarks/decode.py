"""From a prompt to a mask: ours beside PyTorch, and beside ourselves decoding code by code.

  python benchmarks/decode.py                     # width 512, 8 layers, CPU, 2 threads
  python benchmarks/decode.py --width 1024
  python benchmarks/decode.py --variant 8b        # on a GPU: bf16, 448 px image, 10 tokens of text
  OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/decode.py --threads 1 --clock cpu   # on a busy machine

Both sides hold the same random weights and do the same work: prefill, the ten scales of one 256 px mask
on a cache, the codes' confidence, <ge_end> and the token after it, the VQ-VAE's decoder, the picture on
the host. On CPUs the prompt has 300 tokens, the decoder 8 layers and the VQ-VAE a fifth of the released
width (as the decoder has). Measurements take turns, ours then theirs, and medians count, because a
machine is seldom idle. The floor is what the device's own speed of multiplying and of reading memory,
measured here, allows for the FLOPs and the bytes of weights and cache.
Last line: JSON. PyTorch and transformers are needed for the peer only.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer lives on the same device
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax import trees
from argenseg_jax.decode import scale_decode
from argenseg_jax.decode.engine import Engine, compiler_options
from argenseg_jax.decode.sampling import DecodeConfig
from argenseg_jax.models import variants
from argenseg_jax.models.argenseg import ARGenSeg, init_params
from benchmarks import timeline

PROMPT = 300
CLOCKS = [time.perf_counter]  # the one in use
Params = Mapping[str, Any]


def model_config(args: argparse.Namespace) -> dict[str, Any]:
    """A released variant, or the shapes of Qwen2.5 at a width that a CPU can carry."""
    if args.variant:
        return dict(variant=args.variant, dtype=args.dtype or "bfloat16")
    w = args.width
    return dict(
        image_size=56,
        dtype=args.dtype or "float32",
        vision=dict(image_size=56, patch=14, width=64, depth=1, heads=1, mlp=64),
        connector={},
        llm=dict(
            width=w,
            depth=8,
            heads=w // 64,
            kv_heads=w // 256,
            head_dim=64,
            mlp=w * 11 // 4,
            eps=1e-6,
            rope_theta=1e6,
            qkv_bias=True,
        ),
        vqvae=dict(ch=32),
        vocab=dict(base=8000, eos=7999),
    )


def random_params(model: ARGenSeg, dtype: jnp.dtype) -> Params:
    """Weights drawn on the host; matrices keep the size of what they multiply."""
    rng = np.random.default_rng(0)
    keep = jnp.dtype(dtype)

    def draw(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if name.endswith(("scale", "ls1", "ls2")):
            return np.ones(leaf.shape, np.float32)
        fan = leaf.shape[-2] if name.endswith(("kernel",)) and len(leaf.shape) < 4 else 2500
        if "/attn/" in name and name.startswith("llm"):
            fan = model.llm.width
        x = rng.standard_normal(leaf.shape, np.float32) * fan**-0.5
        return x if name.startswith("vqvae") else x.astype(keep)  # the VQ-VAE stays in f32

    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    params = trees.map_named(draw, shapes)
    for path, axis in (("embed/embedding", 0), ("lm_head/kernel", 1)):
        leaf = trees.flatten(params["llm"]).get(path)
        if leaf is not None:
            np.moveaxis(leaf, axis, 0)[model.vocab.size :] = 0
    return params


# ------------------------------------------------------------------------------------ our side


class Ours:
    """The engine's phases on one batch of equal prompts."""

    def __init__(self, model: ARGenSeg, params: Params, rows: int, text: int, picture: bool):
        self.engine, self.rows = Engine(model, params), rows
        self.model = self.engine.model
        self.tokens, self.lengths, self.tiles = prompt(model, rows, picture)
        self.text_tokens = text
        self.capacity = self.engine.capacity(self.tokens.shape[1], max(text, 1), 1)

    def start(self):
        """Prefill and text; every row then stands at a mask, whatever random weights would write."""
        answer = self.engine.prefill(
            self.tokens, self.lengths, self.tiles, DecodeConfig(), self.capacity, max(self.text_tokens, 1)
        )
        if self.text_tokens:
            answer = self.engine.text(answer)
        return answer.replace(at_mask=jnp.ones(self.rows, bool), ended=jnp.zeros(self.rows, bool))

    def mask(self) -> tuple[np.ndarray, np.ndarray]:
        """(codes, images), everything after the prompt."""
        _, mask = self.engine.mask(self.start())
        return np.asarray(mask["codes"]), np.asarray(mask["images"])

    def phases(self) -> dict[str, Callable[[], Any]]:
        """The parts of `mask` that can be run alone: all but the scales and <ge_end>."""
        draw = jax.jit(
            nn.apply(scale_decode.to_image, self.model), compiler_options=compiler_options(jax.default_backend())
        )
        f_hat = jnp.zeros((self.rows, self.model.scales.side, self.model.scales.side, self.model.vqvae.z_channels))
        return {
            "prefill_and_text": lambda: jax.block_until_ready(self.start()),
            "vqvae": lambda: jax.block_until_ready(draw({"params": self.engine.params}, f_hat)),
        }

    def timeline(self, phases: Mapping[str, float]) -> list[tuple[str, float, str]]:
        """From measured phases: (phase, seconds, remark) in order, each scale alone on a cache of its length."""
        model = self.model
        extend = jax.jit(functools.partial(model.apply, method="extend"))
        cache, seconds = self.start().cache, []
        for begin, end in model.scales.bounds:
            x = jnp.zeros((self.rows, end - begin, model.llm.width), model.llm.dtype)
            here = cache.replace(length=cache.length + begin)
            run = functools.partial(extend, {"params": self.engine.params}, x, jnp.zeros((*x.shape[:2], 2)), here)
            seconds.append(median(lambda: jax.block_until_ready(run())))
        sides = model.scales.patch_nums
        return [
            ("prefill", phases["prefill_and_text"], f"{self.tokens.shape[1]} places"),
            *((f"scale {k}", s, f"{pn} x {pn} codes") for k, (s, pn) in enumerate(zip(seconds, sides))),
            ("VQ-VAE", phases["vqvae"], f"{model.mask_size} px"),
        ]

    def one_by_one(self, count: int) -> Callable[[], Any]:
        """Behind a prefill: decodes so many codes in one jitted scan, each fed to predict the next."""
        model, first = self.model, self.model.vocab.first_code

        @jax.jit
        def run(params, cache):
            call = lambda method, *args: model.apply({"params": params}, *args, method=method)

            def step(carry, _):
                word, cache = carry
                x = call(lambda m, w: m.llm.embed_tokens(w), word[:, None])
                hidden, cache = call("extend", x, jnp.zeros((*x.shape[:2], 2)), cache)
                code = jnp.argmax(call("code_logits", hidden)[:, 0], axis=-1)
                return (code + first, cache), code

            word = jnp.full((self.rows,), model.vocab.ge_start)
            return jax.lax.scan(step, (word, cache), None, length=count)[1]

        cache = jax.block_until_ready(self.start().cache)
        return lambda: jax.block_until_ready(run(self.engine.params, cache))


def prompt(model: ARGenSeg, rows: int, picture: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(tokens, lengths, tiles): 300 random tokens, or an image and 40 tokens."""
    rng = np.random.default_rng(1)
    words = rng.integers(100, model.vocab.base, (rows, 40 if picture else PROMPT), np.int32)
    tiles = None
    if picture:
        slots = np.full((rows, model.image_tokens), model.vocab.img_context, np.int32)
        words = np.concatenate([slots, words], axis=1)
        tiles = rng.integers(0, 256, (rows, 1, model.image_size, model.image_size, 3), np.uint8)
    return words, np.full(rows, words.shape[1], np.int32), tiles


# ------------------------------------------------------------------------------------- the floor


def floor(model: ARGenSeg, params: Params, ours: Ours) -> dict[str, float]:
    """Seconds that the device needs at least: the larger of reading and of multiplying, by phase."""
    flops_s, bytes_s = device_speed(model.llm.dtype)
    flat = trees.flatten(params)
    size = lambda part: sum(x.size for n, x in flat.items() if n.startswith(part) and n.endswith("kernel"))
    width = jnp.dtype(model.llm.dtype).itemsize
    lm, rows, n = model.llm, ours.rows, model.scales.num_codes
    layers, codes = size("llm/layers"), lm.width * model.vocab.num_codes
    head, t0 = lm.width * model.vocab.padded_size, int(ours.lengths[0])

    def passes(places: list[int], begin: int, outputs: float) -> float:
        seconds = 0.0
        for t in places:
            keys = begin + t / 2
            flops = 2 * rows * t * (layers + outputs) + 4 * rows * t * keys * lm.heads * lm.head_dim * lm.depth
            read = layers + min(outputs, outputs * t) + rows * (begin + t) * 2 * lm.depth * lm.kv_heads * lm.head_dim
            seconds += max(flops / flops_s, read * width / bytes_s)
            begin += t
        return seconds

    vision = 0.0 if ours.tiles is None else 2 * rows * size("vision/layers") * (model.image_size // 14) ** 2 / flops_s
    image = (
        jax.jit(lambda p, f: model.apply({"params": p}, f, method=lambda m, f: m.vqvae.decode(f)))
        .lower(params, jnp.zeros((rows, model.scales.side, model.scales.side, model.vqvae.z_channels)))
        .compile()
        .cost_analysis()["flops"]
    )
    return {
        "prefill_and_text": vision + passes([t0], 0, head / t0) + passes([1] * ours.text_tokens, t0, head),
        "scales": passes([pn * pn for pn in model.scales.patch_nums], t0 + ours.text_tokens, codes)
        + passes([1], t0 + ours.text_tokens + n, head),
        "vqvae": image / device_speed(jnp.float32)[0],
    }


@functools.cache
def device_speed(dtype: Any) -> tuple[float, float]:
    """(FLOP/s, bytes/s), the best that a large product and a large sum reach here."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    product = jax.jit(jnp.dot)
    total = jax.jit(jnp.sum)
    many = jnp.ones((64 << 20,), dtype)
    fastest = lambda run: min(timed(run) for _ in range(6))
    return (
        2 * n**3 / fastest(lambda: jax.block_until_ready(product(a, a))),
        many.nbytes / fastest(lambda: jax.block_until_ready(total(many))),
    )


# ------------------------------------------------------------------------------------ measurement


def timed(run: Callable[[], Any]) -> float:
    begin = CLOCKS[0]()
    run()
    return CLOCKS[0]() - begin


def median(run: Callable[[], Any], rounds: int = 5) -> float:
    run()
    return statistics.median(timed(run) for _ in range(rounds))


def by_phase(parts: Mapping[str, Callable[[], Any]], whole: float, rounds: int) -> dict[str, float]:
    """Median seconds of the parts, and the scales with <ge_end> as what is left of the whole."""
    seconds = {name: median(run, rounds) for name, run in parts.items()}
    return {**seconds, "scales": max(whole - sum(seconds.values()), 0.0)}


def in_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, measure: Callable[[Callable[[], Any]], float] = timed
) -> dict[str, float]:
    """Median seconds of each, measured in turns after one warm-up."""
    for run in runs.values():
        run()
    times = [{name: measure(run) for name, run in runs.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in runs}


def peak_memory() -> float:
    """GiB: of our arrays on an accelerator, of the whole process on a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    used = stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return round(used / 2**30, 2)


def peers(model: ARGenSeg, params: Params, args: argparse.Namespace) -> dict[str, Any]:
    """{'eager': Peer, 'compile': Peer}; empty where PyTorch is absent."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        return {}
    import torch

    from argenseg_jax.interop.state_dict import to_torch
    from benchmarks.torch_peer import Peer

    torch.set_num_threads(args.threads)
    form = "qwen2"  # Llama's names are the same
    state = dict(to_torch(params, family=form, vocab_size=model.vocab.size, dtype=np.float32))
    make = functools.partial(
        Peer,
        model,
        state,
        "cuda" if jax.default_backend() == "gpu" else "cpu",
        getattr(torch, jnp.dtype(model.llm.dtype).name),
    )
    return {"eager": make(), **({"compile": make().compiled()} if args.compile else {})}


def measure(
    model: ARGenSeg, params: Params, rows: int, others: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of both sides at one batch size, by phase, and how far their codes agree."""
    picture, text = bool(args.variant), 10 if args.variant else 0
    rounds = max(1, round(args.rounds / rows**0.5))  # large batches take longer and vary less
    ours = Ours(model, params, rows, text, picture)
    runs, parts = {"ours": ours.mask}, {"ours": ours.phases()}
    out: dict[str, Any] = {}
    for name, peer in others.items():
        import torch

        tokens = torch.from_numpy(ours.tokens).long().to(peer.code_head.device)
        runs[name] = lambda peer=peer, tokens=tokens: [x.cpu() for x in peer.mask(tokens, text)]
        parts[name] = peer.phases(tokens, text)
    seconds = in_turns(runs, rounds)
    if others and not picture:
        same = np.mean(ours.mask()[0] == runs["eager"]()[0].numpy())
        out["codes_equal"] = round(float(same), 4)
    phases = {name: by_phase(parts[name], seconds[name], rounds) for name in runs}
    least = floor(model, params, ours)
    out |= {
        "rows": rows,
        "seconds": seconds,
        "masks_per_second": rows / seconds["ours"],
        "phases": phases,
        "floor": least,
        "floor_fraction": sum(least.values()) / seconds["ours"],
        "peak_gib": peak_memory(),
    }
    if rows == 1:
        out["one_by_one"] = one_by_one(ours, others, phases["ours"]["scales"], rounds)
        if args.figure:
            title = f"One mask, width {model.llm.width}, {model.llm.depth} layers, {jax.devices()[0].device_kind}"
            timeline.draw(title, ours.timeline(phases["ours"]), args.figure)
    return out


def one_by_one(ours: Ours, others: Mapping[str, Any], scales: float, rounds: int) -> dict[str, float]:
    """What the loop over scales saves, and our scan beside the peer's steps (fewer of them)."""
    few, n = 40, ours.model.scales.num_codes
    seconds = {"all": median(ours.one_by_one(n), max(1, rounds // 2))}
    runs = {"ours": ours.one_by_one(few)}
    if others:
        import torch

        peer = others["eager"]
        tokens = torch.from_numpy(ours.tokens).long().to(peer.code_head.device)
        runs["eager"] = peer.one_by_one(tokens, few)
    seconds |= in_turns(runs, rounds)
    out = {"seconds": seconds["all"], "saved_by_scales": seconds["all"] / scales}
    if others:
        out["ratio_peer"] = seconds["eager"] / seconds["ours"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="", help="a released size instead of --width, on a GPU")
    parser.add_argument("--width", type=int, default=512, help="of the decoder; a multiple of 256")
    parser.add_argument("--dtype", default="", help="float32 on CPUs, bfloat16 with --variant")
    parser.add_argument("--batches", default="1,8", help="rows; 32 too where there is time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the peer; jax takes every core")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts the seconds of all threads: on a machine that others use, pin one thread and take this",
    )
    parser.add_argument("--figure", default="", help="draw the timeline of batch 1 as this SVG")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="skip torch.compile")
    args = parser.parse_args()
    if args.clock == "cpu":
        CLOCKS[0] = time.process_time
    model = variants.build(model_config(args))
    params = random_params(model, model.llm.dtype)
    others = peers(model, params, args)
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "dtype": jnp.dtype(model.llm.dtype).name,
        "width": model.llm.width,
        "layers": model.llm.depth,
    }
    for rows in map(int, args.batches.split(",")):
        # torch.compile is measured at batch 1 only: it compiles anew, for minutes, at another.
        chosen = {n: p for n, p in others.items() if n == "eager" or rows == 1}
        part = measure(model, params, rows, chosen, args)
        print(json.dumps(rounded(part)), file=sys.stderr, flush=True)
        for name in chosen:
            result[f"ratio_peer_{name}_b{rows}"] = part["seconds"][name] / part["seconds"]["ours"]
        if rows == 1:
            result |= {
                "ratio_token_by_token": part["one_by_one"]["saved_by_scales"],
                "floor_fraction": part["floor_fraction"],
            }
            if others:
                result["ratio_peer_one_by_one"] = part["one_by_one"]["ratio_peer"]
        result[f"seconds_b{rows}"] = part["seconds"]["ours"]
        result[f"masks_per_second_b{rows}"] = part["masks_per_second"]
    print(json.dumps(rounded(result)), flush=True)


def rounded(tree: Any) -> Any:
    """Floats to four digits."""
    if isinstance(tree, dict):
        return {k: rounded(v) for k, v in tree.items()}
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree


if __name__ == "__main__":
    main()
