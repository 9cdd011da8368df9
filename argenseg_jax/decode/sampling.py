"""How the next token is chosen: greedy, by sampling, and under classifier-free guidance.

Axes: see models/__init__; B' sequences of the cache: B, or with guidance 2 B, where B + b is sequence b
with the unconditional prompt.
"""

from __future__ import annotations

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax.errors import UserError

Array = jax.Array
_CODES = 2**32 - 1  # folded into the keys of codes; no position is as large


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of sampling; without any the most likely token is taken.

    Attributes:
      temperature: 0 is greedy, and so is what divides logits beyond f32 (below 1e-30).
      top_k: only the k likeliest tokens, and those as likely as the last of them; 0 = all.
      top_p: only the likeliest of these that together have this probability among them; of equally likely
        ones at the limit those with the highest ids stay, as in transformers. 1 = all.
      seed: sequence b of a batch draws with seed + b, whatever its neighbours are.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf or not 0 <= self.top_k < 2**31 or not 0 < self.top_p <= 1:
            raise UserError(f"{self}: temperature and top_k are not negative, top_p is within 0..1")
        if not -(2**31) <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: a whole number of 32 bits is expected")

    def on_device(self, batch: int, kind: str = "tokens") -> SamplingParams | None:
        """For a batch, of its 'tokens' or 'codes'; None is greedy. Other settings compile nothing anew."""
        if self.temperature < 1e-30:
            return None
        return SamplingParams(
            np.float32(self.temperature),
            np.int32(self.top_k),
            np.float32(1 - self.top_p),
            (self.seed + np.arange(batch)).astype(np.uint32),
            kind,
        )


@flax.struct.dataclass
class SamplingParams:
    """Settings of sampling as arrays, so that other values compile nothing anew.

    Attributes:
      temperature, top_k: f32[], int32[], of Sampling.
      tail: f32[], 1 - top_p: the unlikeliest tokens that together have no more than this are left out.
      seeds: uint32[B], one per sequence.
      kind: 'tokens' or 'codes'; a token and a code that are chosen at the same position draw different noise.
    """

    temperature: Array
    top_k: Array
    tail: Array
    seeds: Array
    kind: str = flax.struct.field(pytree_node=False, default="tokens")


@flax.struct.dataclass
class DecodeConfig:
    """How a batch is answered.

    Attributes:
      text, codes: how tokens and codes are sampled; None is greedy.
      guidance: f32[], strength of classifier-free guidance, or None; with it the cache has cond and uncond sequences.
      reference: the uncond sequences are fed their own tokens instead of the answer's, as the PyTorch
        original does: a fault, kept for comparison with it.
    """

    text: SamplingParams | None = None
    codes: SamplingParams | None = None
    guidance: Array | None = None
    reference: bool = flax.struct.field(pytree_node=False, default=False)

    def duplicate_for_cfg(self, x: Array) -> Array:
        """[B, ...] -> [B', ...]: cond and uncond get the same."""
        return x if self.guidance is None else jnp.concatenate([x, x])

    def guide(self, logits: Array, strength: float) -> Array:
        """[B', ...] -> [B, ...]: away from the unconditional; strength: 0..1 of the guidance."""
        if self.guidance is None:
            return logits
        cond, uncond = jnp.split(logits, 2)
        t = self.guidance * strength
        return (1 + t) * cond - t * uncond

    def next_tokens(self, logits: Array, positions: Array) -> Array:
        """Tokens after positions int32[B'], from logits f32[B', V]: int32[B']."""
        if self.guidance is None:
            return sample_tokens(logits, self.text, positions)
        b = len(logits) // 2
        tokens = sample_tokens(logits[:b], self.text, positions[:b])
        uncond_tokens = sample_tokens(logits[b:], None, positions[b:])
        return jnp.concatenate([tokens, uncond_tokens if self.reference else tokens])


def sample_tokens(logits: Array, params: SamplingParams | None, positions: Array) -> Array:
    """Token ids int32[B, ...] from logits f32[B, ..., V]; the noise depends on seed, position and kind only."""
    if params is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def noise(seed: Array, positions: Array) -> Array:
        key = jax.random.key(seed)
        key = jax.random.fold_in(key, _CODES) if params.kind == "codes" else key
        keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(positions.reshape(-1))
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        return gumbel.reshape(*positions.shape, -1)

    logits = logits / params.temperature
    logits = jnp.where(allowed(logits, params.top_k, params.tail), logits, -jnp.inf)
    return jnp.argmax(logits + jax.vmap(noise)(params.seeds, positions), axis=-1).astype(jnp.int32)


def allowed(logits: Array, top_k: Array, tail: Array) -> Array:
    """bool[..., V]: the tokens that top_k and then top_p leave, as transformers' warpers do.

    Args:
      logits: f32[..., V].  top_k: int32[], 0 = all.  tail: f32[], 1 - top_p.
    """
    size = logits.shape[-1]
    ids = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), logits.shape)
    sorted_logits, order = jax.lax.sort((logits, ids), num_keys=1, is_stable=True)  # [..., V], ascending
    num_kept = jnp.where(top_k == 0, size, jnp.clip(top_k, 1, size))
    cutoff = jax.lax.dynamic_index_in_dim(sorted_logits, size - num_kept, axis=-1)  # all that tie with it stay
    in_top_k = jnp.where(sorted_logits >= cutoff, sorted_logits, -jnp.inf)
    cumprobs = jnp.cumsum(jax.nn.softmax(in_top_k, axis=-1), axis=-1)
    first = jnp.argmax((cumprobs > tail) | (jnp.arange(size) == size - 1), axis=-1, keepdims=True)
    # The tokens from `first` on, by value and then by id: no scatter back from the sorted ones.
    value, token = (jnp.take_along_axis(x, first, axis=-1) for x in (sorted_logits, order))
    in_top_p = (logits > value) | ((logits == value) & (ids >= token))
    return (logits >= cutoff) & ((tail <= 0) | in_top_p)
