"""How the next token is chosen: greedily, by sampling, and under classifier-free guidance.

Axes: B rows, T places, V words, R rows of the cache: B, or with guidance 2 B, where row B + b is
the unconditional twin of row b.
"""
from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax.errors import UserError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of sampling; without any the most likely word is taken.

    Attributes:
      temperature: 0 is greedy.
      top_k: only so many of the likeliest words; 0 = all.
      top_p: only the likeliest words that together have this probability.
      seed: row b of a batch draws with seed + b, whatever its neighbours are.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"{self}: temperature and top_k are not negative, top_p is within 0..1")

    def on_device(self, rows: int) -> Draw | None:
        """For a batch; None is greedy. Other values of the settings compile nothing anew."""
        if not self.temperature:
            return None
        return Draw(np.float32(self.temperature), np.int32(self.top_k), np.float32(self.top_p),
                    (self.seed + np.arange(rows)).astype(np.uint32))


@flax.struct.dataclass
class Draw:
    """Sampling on the device: scalars, and a seed uint32[B] for each row."""

    temperature: Array
    top_k: Array
    top_p: Array
    seeds: Array


@flax.struct.dataclass
class Rules:
    """How a batch is answered.

    Attributes:
      text, codes: how words and codes are drawn; None is greedily.
      guidance: f32[], strength of classifier-free guidance, or None; the cache then has twin rows.
      reference: the twin rows are fed words of their own instead of the answer's, as the PyTorch
        original does: a fault, kept for comparison with it.
    """

    text: Draw | None = None
    codes: Draw | None = None
    guidance: Array | None = None
    reference: bool = flax.struct.field(pytree_node=False, default=False)

    def paired(self, x: Array) -> Array:
        """[B, ...] -> [R, ...]: the twins get the same."""
        return x if self.guidance is None else jnp.concatenate([x, x])

    def guide(self, logits: Array, strength: float) -> Array:
        """[R, ...] -> [B, ...]: away from the unconditional; strength: 0..1 of the guidance."""
        if self.guidance is None:
            return logits
        with_prompt, without = jnp.split(logits, 2)
        t = self.guidance * strength
        return (1 + t) * with_prompt - t * without

    def next_words(self, logits: Array, places: Array) -> Array:
        """Words behind places int32[R], from logits f32[R, V]: int32[R]."""
        if self.guidance is None:
            return choose(logits, self.text, places)
        b = len(logits) // 2
        words = choose(logits[:b], self.text, places[:b])
        own = choose(logits[b:], None, places[b:])
        return jnp.concatenate([words, own if self.reference else words])


def choose(logits: Array, draw: Draw | None, places: Array) -> Array:
    """Words int32[B, ...] out of logits f32[B, ..., V]; noise depends on seed and place alone."""
    if draw is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / draw.temperature
    falling = -jnp.sort(-logits, axis=-1)
    chance = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(chance, axis=-1) - chance
    few = (draw.top_k == 0) | (jnp.arange(logits.shape[-1]) < draw.top_k)
    kept = jnp.where(few & (before < draw.top_p), falling, jnp.inf)
    least = jnp.min(kept, axis=-1, keepdims=True)

    def noise(seed: Array, places: Array) -> Array:
        keys = jax.vmap(lambda p: jax.random.fold_in(jax.random.key(seed), p))(places.reshape(-1))
        drawn = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        return drawn.reshape(*places.shape, -1)

    logits = jnp.where(logits < least, -jnp.inf, logits)
    return jnp.argmax(logits + jax.vmap(noise)(draw.seeds, places), axis=-1).astype(jnp.int32)
