"""How the next token is chosen: greedily, by sampling, and under classifier-free guidance.

Axes: B rows, T places, V words, R rows of the cache: B, or with guidance 2 B, where row B + b is
the unconditional twin of row b.
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
    """Settings of sampling; without any the most likely word is taken.

    Attributes:
      temperature: 0 is greedy, and so is what divides logits beyond f32 (below 1e-30).
      top_k: only so many of the likeliest words, and those as likely as the last of them; 0 = all.
      top_p: only the likeliest of these that together have this probability among them; of equally likely
        ones at the limit those with the highest ids stay, as in transformers. 1 = all.
      seed: row b of a batch draws with seed + b, whatever its neighbours are.
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

    def on_device(self, rows: int, of: str = "tokens") -> SamplingParams | None:
        """For a batch, of its 'tokens' or 'codes'; None is greedy. Other settings compile nothing anew."""
        if self.temperature < 1e-30:
            return None
        return SamplingParams(
            np.float32(self.temperature),
            np.int32(self.top_k),
            np.float32(1 - self.top_p),
            (self.seed + np.arange(rows)).astype(np.uint32),
            of,
        )


@flax.struct.dataclass
class SamplingParams:
    """Sampling on the device.

    Attributes:
      temperature, top_k: f32[], int32[], of Sampling.
      tail: f32[], 1 - top_p: the unlikeliest words that together have no more than this are left out.
      seeds: uint32[B], one for each row.
      of: 'tokens' or 'codes'; a word and a code that are chosen at the same position draw different noise.
    """

    temperature: Array
    top_k: Array
    tail: Array
    seeds: Array
    of: str = flax.struct.field(pytree_node=False, default="tokens")


@flax.struct.dataclass
class DecodeConfig:
    """How a batch is answered.

    Attributes:
      text, codes: how words and codes are drawn; None is greedily.
      guidance: f32[], strength of classifier-free guidance, or None; the cache then has twin rows.
      reference: the twin rows are fed words of their own instead of the answer's, as the PyTorch
        original does: a fault, kept for comparison with it.
    """

    text: SamplingParams | None = None
    codes: SamplingParams | None = None
    guidance: Array | None = None
    reference: bool = flax.struct.field(pytree_node=False, default=False)

    def duplicate_for_cfg(self, x: Array) -> Array:
        """[B, ...] -> [R, ...]: the twins get the same."""
        return x if self.guidance is None else jnp.concatenate([x, x])

    def guide(self, logits: Array, strength: float) -> Array:
        """[R, ...] -> [B, ...]: away from the unconditional; strength: 0..1 of the guidance."""
        if self.guidance is None:
            return logits
        with_prompt, without = jnp.split(logits, 2)
        t = self.guidance * strength
        return (1 + t) * with_prompt - t * without

    def next_tokens(self, logits: Array, places: Array) -> Array:
        """Words behind places int32[R], from logits f32[R, V]: int32[R]."""
        if self.guidance is None:
            return sample_tokens(logits, self.text, places)
        b = len(logits) // 2
        words = sample_tokens(logits[:b], self.text, places[:b])
        own = sample_tokens(logits[b:], None, places[b:])
        return jnp.concatenate([words, own if self.reference else words])


def sample_tokens(logits: Array, draw: SamplingParams | None, places: Array) -> Array:
    """Words int32[B, ...] out of logits f32[B, ..., V]; noise depends on seed, place and kind alone."""
    if draw is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def noise(seed: Array, places: Array) -> Array:
        key = jax.random.key(seed)
        key = jax.random.fold_in(key, _CODES) if draw.of == "codes" else key
        keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(places.reshape(-1))
        drawn = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        return drawn.reshape(*places.shape, -1)

    logits = logits / draw.temperature
    logits = jnp.where(allowed(logits, draw.top_k, draw.tail), logits, -jnp.inf)
    return jnp.argmax(logits + jax.vmap(noise)(draw.seeds, places), axis=-1).astype(jnp.int32)


def allowed(logits: Array, top_k: Array, tail: Array) -> Array:
    """bool[..., V]: the words that top_k and then top_p leave, as transformers' warpers do.

    Args:
      logits: f32[..., V].  top_k: int32[], 0 = all.  tail: f32[], 1 - top_p.
    """
    size = logits.shape[-1]
    ids = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), logits.shape)
    rising, order = jax.lax.sort((logits, ids), num_keys=1, is_stable=True)  # the likeliest last
    most = jnp.where(top_k == 0, size, jnp.clip(top_k, 1, size))
    least = jax.lax.dynamic_index_in_dim(rising, size - most, axis=-1)  # all that tie with it stay
    left = jnp.where(rising >= least, rising, -jnp.inf)
    below = jnp.cumsum(jax.nn.softmax(left, axis=-1), axis=-1)
    first = jnp.argmax((below > tail) | (jnp.arange(size) == size - 1), axis=-1, keepdims=True)
    # The words from `first` on, by value and then by id: no scatter back from the sorted ones.
    value, word = (jnp.take_along_axis(x, first, axis=-1) for x in (rising, order))
    inside = (logits > value) | ((logits == value) & (ids >= word))
    return (logits >= least) & ((tail <= 0) | inside)
