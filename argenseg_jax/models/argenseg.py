"""The assembly: InternViT, connector, decoder, visual-token tables and the frozen VQ-VAE.

Axes: see models/__init__; T the text-and-code sequence, n image tokens per tile.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax import scales as scales_lib
from argenseg_jax.models import attention, decoder_lm, vqvae
from argenseg_jax.models.connector import Connector
from argenseg_jax.models.intern_vit import InternViT
from argenseg_jax.models.kv_cache import KVCache
from argenseg_jax.pixels import IMAGENET_MEAN, IMAGENET_STD
from argenseg_jax.vocab import Vocab

Array = jax.Array


class VisualEmbed(nn.Module):
    """Decoder inputs of the visual tokens: word_embed, lvl_embed and pos_1LC (paper section 3.2)."""

    width: int
    channels: int
    num_scales: int
    num_codes: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        zeros = nn.initializers.zeros  # the reference initialises all three tables with zeros
        self.word_embed = nn.Dense(self.width, dtype=self.dtype, kernel_init=zeros)
        self.lvl_embed = self.param("lvl_embed", zeros, (self.num_scales, self.width))
        self.pos_embed = self.param("pos_embed", zeros, (self.num_codes, self.width))

    def __call__(self, inputs: Array, levels: np.ndarray, positions: np.ndarray) -> Array:
        """Interpolated f_hat [B, T, C] at static levels[T], places[T] -> [B, T, D]."""
        tables = self.lvl_embed[levels] + self.pos_embed[positions]
        return self.word_embed(inputs) + tables.astype(self.dtype)


class ARGenSeg(nn.Module):
    """Multimodal LLM that writes masks as visual tokens. All state is passed in and out."""

    vision: InternViT
    connector: Connector
    llm: decoder_lm.DecoderLM
    vqvae: vqvae.VQVAE
    visual: VisualEmbed
    vocab: Vocab
    image_size: int = 448
    block_causal: bool = False  # VAR's own attention; released weights need plain causal

    @property
    def scales(self) -> scales_lib.Scales:
        return scales_lib.Scales(tuple(self.vqvae.patch_nums))

    @property
    def image_tokens(self) -> int:
        """n, decoder tokens of one tile."""
        return round((self.image_size // self.vision.patch * self.connector.ratio) ** 2)

    @property
    def mask_size(self) -> int:
        """Side of the masks that the VQ-VAE reads and writes, in pixels."""
        return self.vqvae.image_size

    def __call__(
        self, tokens: Array, positions: Array, segment_ids: Array, tiles: Array | None, masks: Array | None
    ) -> Array:
        """Everything once, so that `init` creates every parameter: logits f32[B, T, V]."""
        codes = None if masks is None else self.tokenize(masks)
        if masks is not None:
            self.decode_codes(codes.reshape(-1, codes.shape[-1]))
        features = None if tiles is None else self.encode_images(tiles)
        return self.logits(self.hidden(tokens, positions, segment_ids, features, codes))

    def encode_images(self, tiles: Array, *, deterministic: bool = True) -> Array:
        """Tiles u8[B, P, I, I, 3], or normalised floats, -> image features [B, P * n, D]."""
        if tiles.dtype == jnp.uint8:
            tiles = (tiles.astype(jnp.float32) / 255 - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
        b, p = tiles.shape[:2]
        x, _ = self.vision(tiles.reshape(b * p, *tiles.shape[2:]), deterministic=deterministic)
        return self.connector(x).reshape(b, -1, self.llm.width)

    def tokenize(self, masks: Array) -> Array:
        """Masks u8[B, M, R, R, 3], or floats in [-1, 1], -> codes int32[B, M, U]."""
        if masks.dtype == jnp.uint8:
            masks = masks.astype(jnp.float32) / 255 * 2 - 1
        b, m = masks.shape[:2]
        return self.vqvae.tokenize(masks.reshape(b * m, *masks.shape[2:])).reshape(b, m, -1)

    def decode_codes(self, codes: Array) -> Array:
        """Codes int32[B, U] -> images f32[B, R, R, 3] in [-1, 1]."""
        return self.vqvae.decode_codes(codes)

    def visual_inputs(self, codes: Array) -> Array:
        """Teacher-forced decoder inputs of the U - 1 positions after <ge_start>: [B, U - 1, D]."""
        positions = np.arange(1, self.scales.num_codes)
        return self.visual(self.vqvae.quantizer.teacher_inputs(codes), self.scales.levels[1:], positions)

    def scale_inputs(self, f_hat: Array, k: int) -> Array:
        """Decoder inputs of scale k >= 1 from f_hat [B, h, w, C]: [B, pn_k^2, D]."""
        begin, end = self.scales.bounds[k]
        positions = np.arange(begin, end)
        return self.visual(self.vqvae.quantizer.scale_input(f_hat, k), self.scales.levels[begin:end], positions)

    def embed(self, tokens: Array, features: Array | None = None, codes: Array | None = None) -> tuple[Array, Array]:
        """Tokens with their image and code positions filled: ([B, T, D], coords f32[B, T, 2]).

        The i-th <IMG_CONTEXT> of a sequence takes its i-th image feature, the i-th <MASK_CONTEXT> its
        i-th visual input (features [B, P * n, D], codes int32[B, M, U]); the data pipeline has
        checked that the counts agree.
        """
        x = self.llm.embed_tokens(tokens)
        coords = jnp.zeros((*tokens.shape, 2), jnp.float32)

        def fill(where: Array, values: Array, centers: np.ndarray) -> tuple[Array, Array]:
            index = jnp.cumsum(where, axis=1) - 1
            taken = jnp.take_along_axis(
                values.astype(x.dtype), jnp.clip(index, 0, values.shape[1] - 1)[..., None], axis=1
            )
            yx = jnp.asarray(centers)[jnp.maximum(index, 0) % len(centers)]
            return (jnp.where(where[..., None], taken, x), jnp.where(where[..., None], yx, coords))

        if features is not None:
            side = round(self.image_tokens**0.5)
            x, coords = fill(tokens == self.vocab.img_context, features, scales_lib.grid_centers(side))
        if codes is not None:
            b, m, n = codes.shape
            start = (tokens == self.vocab.ge_start)[..., None]  # the position of scale 0
            coords = jnp.where(start, jnp.asarray(self.scales.centers[0]), coords)
        if codes is not None and n > 1:
            inputs = self.visual_inputs(codes.reshape(b * m, n)).reshape(b, m * (n - 1), -1)
            x, coords = fill(tokens == self.vocab.mask_context, inputs, self.scales.centers[1:])
        return x, coords

    def hidden(
        self,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        features: Array | None = None,
        codes: Array | None = None,
        packed: bool = True,
    ) -> Array:
        """Teacher-forced pass over complete sequences: [B, T, D] after the final norm.

        tokens, positions, segment_ids: int32[B, T] (segment 0 = padding). packed: see attention.Mask.
        """
        x, coords = self.embed(tokens, features, codes)
        last = self.last_visible(tokens) if self.block_causal else None
        y, _, _ = self.llm(x, positions, mask=attention.Mask(segment_ids, last, packed), coords=coords)
        return y

    def last_visible(self, tokens: Array) -> Array:
        """int32[B, T]: the last position each query sees when scales are bidirectional inside."""
        if self.scales.num_codes == 1:  # no position but <ge_start>
            return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        index = (jnp.cumsum(tokens == self.vocab.mask_context, axis=1) - 1) % (self.scales.num_codes - 1)
        end = np.asarray([self.scales.bounds[k][1] for k in self.scales.levels[1:]], np.int32)
        left = jnp.asarray(end - 1 - np.arange(1, self.scales.num_codes, dtype=np.int32))
        position = jnp.arange(tokens.shape[1])[None]
        return jnp.where(tokens == self.vocab.mask_context, position + left[index], position)

    def extend(
        self, x: Array, coords: Array, cache: KVCache, num_valid: Array | None = None, block_mask: str = "causal"
    ) -> tuple[Array, KVCache]:
        """Appends T embedded positions to each sequence of the cache: (hidden [B, T, D], new cache)."""
        positions = cache.length[:, None] + jnp.arange(x.shape[1])[None]
        y, cache, _ = self.llm(x, positions, coords=coords, cache=cache, num_valid=num_valid, block_mask=block_mask)
        return y, cache

    def logits(self, hidden: Array) -> Array:
        """[..., D] -> f32[..., V]; the padding of the vocabulary is -inf."""
        return self.llm.logits(hidden)

    def head_matrix(self) -> Array:
        """The output head [D, V], as it is stored."""
        return self.llm.head_matrix()

    def code_logits(self, hidden: Array) -> Array:
        """[..., D] -> f32[..., num codes of the codebook]."""
        first = self.vocab.first_code
        head = self.llm.head_matrix()[:, first : first + self.vocab.num_codes].astype(self.llm.dtype)
        with jax.named_scope("head"):
            return jnp.einsum("...D,DV->...V", hidden.astype(head.dtype), head, preferred_element_type=jnp.float32)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        return self.llm.empty_cache(batch, capacity)


def init_params(model: ARGenSeg, rng: Array) -> dict:
    """Fresh parameters of the whole model; under `jax.eval_shape`, their shapes."""
    line = jnp.zeros((1, 8), jnp.int32)
    tiles = jnp.zeros((1, 1, model.image_size, model.image_size, 3), jnp.uint8)
    masks = jnp.zeros((1, 1, model.mask_size, model.mask_size, 3), jnp.uint8)
    return model.init(rng, line, line, line, tiles, masks)["params"]
