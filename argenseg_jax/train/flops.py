"""Floating-point operations of a training step, counted by hand from the parameters' shapes.

Model FLOPs as in "model FLOPs utilisation": a matrix product has 2 operations per multiply-add,
attention is counted where the mask is true, and recomputation by remat is not counted. XLA's own count
takes the body of a scan once and a Pallas kernel as zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from argenseg_jax import trees
from argenseg_jax.models.argenseg import ARGenSeg


def lm_step(
    model: ARGenSeg,
    shapes: Mapping[str, Any],
    trainable: Callable[[str], bool],
    *,
    batch: int,
    length: int,
    tiles: int,
    masks: int,
    with_remat: bool = False,
) -> dict[str, float]:
    """{part: operations} of one step of the lm phase, forward and backward.

    Args:
      shapes: the whole model's parameters (anything with .shape).
      trainable: path -> whether the step changes it.
      batch, length: B sequences of T tokens.
      tiles, masks: per sequence, padding included (it is computed as well).
      with_remat: also count what full remat recomputes; not part of "model FLOPs".
    """
    kernels = {
        path: math.prod(leaf.shape)
        for path, leaf in trees.flatten(shapes).items()
        if path.endswith(("/kernel", "/lora_a", "/lora_b")) or path == "llm/embed/embedding"
    }
    vit, llm = model.vision, model.llm
    if not llm.tied:
        del kernels["llm/embed/embedding"]  # a look-up, unless it is also the head
    patches = (vit.image_size // vit.patch) ** 2 + 1
    uses = {  # input vectors that each kernel of the part is multiplied with
        "vision": batch * tiles * patches,
        "connector": batch * tiles * model.image_tokens,
        "llm": batch * length,
        "visual": batch * masks * model.scales.num_codes,
    }
    attention = {
        "vision": 4 * batch * tiles * vit.depth * patches**2 * vit.width,
        "llm": 2 * batch * llm.depth * length**2 * llm.heads * llm.head_dim,
    }  # causal: half of the positions
    total = {}
    for part, count in uses.items():
        is_trained = any(trainable(path) for path in kernels if path.startswith(f"{part}/"))
        recomputed = with_remat and part in ("llm", "vision")

        def passes(trained: bool, path: str = "") -> int:
            """Products per kernel: forward, gradient of the input, gradient of the kernel; the forward one twice
            with remat, except for the head and a layer's last product, whose result is not needed."""
            if part == "vision" and not is_trained:
                return 1  # nothing before it is trained
            return 2 + trained + (recomputed and not re.search("(mlp/down|mlp/fc2|lm_head)/kernel|embedding", path))

        total[part] = attention.get(part, 0) * passes(True) + 2 * count * sum(
            size * passes(trainable(path), path) for path, size in kernels.items() if path.startswith(f"{part}/")
        )
    total["vqvae"] = batch * masks * encoder(model, shapes["vqvae"])
    return {part: float(value) for part, value in total.items()}


def encoder(model: ARGenSeg, shapes: Mapping[str, Any]) -> float:
    """Operations to encode one mask: the VQ-VAE's encoder and the distances to its codes."""
    side, levels = model.mask_size // model.vqvae.patch_size, len(model.vqvae.ch_mult)
    total = _convolutions(
        shapes,
        r"(encoder/.*|quant_conv)/kernel",
        r"encoder/down_(\d+)/|encoder/(conv_in)",
        lambda level: side >> level,
        side >> (levels - 1),
    )
    return total + 2 * sum(n * n for n in model.vqvae.patch_nums) * math.prod(shapes["quantizer"]["codebook"].shape)


def decoder(model: ARGenSeg, shapes: Mapping[str, Any]) -> float:
    """Operations to decode one mask from its latent: the VQ-VAE's decoder."""
    side, levels = model.mask_size // model.vqvae.patch_size, len(model.vqvae.ch_mult)
    return _convolutions(
        shapes,
        r"(decoder/.*|post_quant_conv)/kernel",
        r"decoder/up_(\d+)/|decoder/(conv_out)",
        lambda level: side >> level,
        side >> (levels - 1),
    )


def _convolutions(
    shapes: Mapping[str, Any], which: str, level_of: str, side_at: Callable[[int], int], lowest: int
) -> float:
    """Operations of the convolutions and attentions of the VQ-VAE's encoder or decoder, for one image.

    Kernel taps on the padding are not counted: on a grid of 16 they are one in twelve.
    """
    total = 0.0
    for path, leaf in trees.flatten(shapes).items():
        if not re.fullmatch(which, path):
            continue
        level = re.search(level_of, path)
        side, taps = side_at(int(level[1] or 0)) if level else lowest, leaf.shape[0]
        if path.endswith("/downsample/kernel"):
            hits = taps * (side // 2) - 1  # stride 2, padded on the right
        else:
            side *= 2 if path.endswith("/upsample/kernel") else 1
            hits = taps * side - (taps * taps - 1) // 4  # both sides lose 1 + 2 + ... + taps // 2
        total += 2 * hits**2 * math.prod(leaf.shape[2:])
        if path.endswith("/proj_out/kernel"):  # one attention over all positions
            total += 4 * side**4 * leaf.shape[-1]
    return total
