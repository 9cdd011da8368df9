"""Samples -> numpy arrays, in one endless order: encode, mix, shuffle, repeat, with grain.

The order is a function of (seed, index) alone; data/batches.py distributes it over the slots of the
batch. A sample that cannot be used becomes an `InvalidSample`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain.python as grain
import numpy as np

from argenseg_jax.data import mixture, packing, prompt, transforms
from argenseg_jax.data.augment import Augment, recolour, recompress
from argenseg_jax.data.batches import Batch, BatchIterator, InvalidSample
from argenseg_jax.data.order import Component, Order
from argenseg_jax.data.reader import MIN_LIMIT, Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.tokenizer import Tokenizer
from argenseg_jax.errors import SampleError, UserError, brief
from argenseg_jax.vocab import IGNORE


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes that the model dictates.

    Attributes:
      image_size: S, side of a tile in pixels.
      image_tokens: n, `<IMG_CONTEXT>` tokens of a tile.
      mask_size: R, side of a mask in pixels.
      code_tokens: N, codes of a mask.
    """

    image_size: int
    image_tokens: int
    mask_size: int
    code_tokens: int

    def mask(self, codes: bool) -> tuple[tuple[int, ...], type]:
        """(shape, dtype) of a mask as the LM task reads it: an image, or its codes."""
        side = self.mask_size
        return ((self.code_tokens,), np.int32) if codes else ((side, side, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The config section `data`.

    Attributes:
      sources: names of sources, see data/mixture.py.
      max_tokens: T, length of a sequence; longer samples are skipped.
      max_labels: maximum number of positions of a sequence with a target, all that the head then reads;
        samples with more are skipped. 0 = max_tokens.
      image_last: moves `<image>` after the human text.
      system: system message; None = the official one, '' = none.
      workers: maximum number of grain worker processes (they divide the slots of the batch evenly); 0
        reads in threads of the training process.
      threads: number of these; 0 reads in the one thread that fills the batches, which is fastest for
        synthetic scenes, where threads only wait for one another.
      root: directory that relative paths of the sources start from.
      pack: several samples share a sequence; size of the buffer of examples from which each slot of the
        batch fills its next one. 0 = one sample per sequence.
      max_tiles: P, tiles of a sequence; an image is cut into as many as its grid has, at most P.
      sample_tiles: maximum number of tiles of one sample; 0 = max_tiles.
      max_masks: M, masks of a sequence.
      pad_to_square: keep the aspect ratio of images and masks, and pad them.
      window: (low, high), the values of images of more than 8 bits that become 0..255; () = found once
        per data set (data/reader.py).
      max_pixels: maximum number of pixels of an image file; 0 = 64 Mi.
      allow_outside: relative paths in data files may lead out of the folder that they start from.
      augment: change photographs (data/augment.py).
      recolour: share of the samples that get other colours, where the text names none.
      prompt_drop: share of text-to-image prompts replaced by the unconditional one.
      codes: sequences hold the codes that `prepare --codes` stored, in place of masks.
      max_broken: largest share of invalid samples; more of them end the run.
    """

    sources: Sequence[str] = ()
    max_tokens: int = 8192
    max_labels: int = 0
    image_last: bool = False
    system: str | None = None
    workers: int = 0
    threads: int = 2
    root: str = ""
    pack: int = 0
    max_tiles: int = 1
    sample_tiles: int = 0
    max_masks: int = 1
    pad_to_square: bool = False
    window: tuple[float, float] | tuple[()] = ()
    max_pixels: int = 0
    allow_outside: bool = False
    augment: bool = False
    recolour: float = 0.0
    prompt_drop: float = 0.0
    codes: bool = False
    max_broken: float = 0.01

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | DataConfig) -> DataConfig:
        """From a ConfigDict or dict; missing keys take defaults, an unknown key is an error."""
        if isinstance(config, DataConfig):
            return config
        unknown = sorted(set(config) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"config: unknown key data.{unknown[0]}")
        return cls(**dict(config))

    def reading(self) -> Reading:
        """How the files of the sources are read."""
        return Reading.from_config(
            dataclasses.asdict(self),
            max_images=max(self.max_tiles, MIN_LIMIT),
            max_masks=max(self.max_masks, MIN_LIMIT),
        )


# ---------------------------------------------------------------------------------- one sample


@dataclasses.dataclass(frozen=True)
class SampleEncoder:
    """Sample -> one sequence of a batch (the arrays of `train_iterator`, without their first axis)."""

    config: DataConfig
    geometry: Geometry
    tokenizer: Tokenizer | None = None  # the `vqvae` task has no text
    augment: Augment = Augment()

    @property
    def packing(self) -> packing.Packing:
        """How examples of the LM task become sequences."""
        if self.tokenizer is None:
            raise ValueError("the LM task needs a tokenizer")
        c = self.config
        capacity = {
            "tokens": c.max_tokens,
            "labels": c.max_labels or c.max_tokens,
            "tiles": c.max_tiles,
            "masks": c.max_masks,
        }
        pad = self.tokenizer.vocab.pad
        return packing.Packing(capacity, packing.size, lambda examples: packing.join(examples, capacity, pad), c.pack)

    def training_example(self, sample: Sample, rng: np.random.Generator) -> Batch:
        """A sequence of the LM task with one sample."""
        return self.packing.join([self.example(sample, rng)])

    def example(self, sample: Sample, rng: np.random.Generator) -> packing.Example:
        """A sample encoded for the LM task; SampleError where it does not fit into a sequence.

        Returns:
          tokens, labels i32[t], tiles u8[p, S, S, 3], masks u8[m, R, R, 3] or their codes i32[m, N].
        """
        if self.tokenizer is None:
            raise ValueError("the LM task needs a tokenizer")
        name, config, turns = sample.name, self.config, sample.conversations
        prompt.check_turns(turns, name)  # recolour reads the texts
        if config.recolour and rng.random() < config.recolour:
            sample = recolour(sample, rng)
        if config.prompt_drop and sample.masks and not sample.images:
            if rng.random() < config.prompt_drop:
                turns = [{**turn, "value": prompt.UNCONDITIONAL} if prompt.is_human(turn) else turn for turn in turns]
        tiles, per_image = self._tiles(sample, name)
        tokens, labels = prompt.encode_training(
            turns,
            self.tokenizer,
            per_image,
            num_masks=len(sample.masks),
            name=name,
            image_tokens=self.geometry.image_tokens,
            code_tokens=self.geometry.code_tokens,
            system=config.system,
            image_last=config.image_last,
        )
        if len(tokens) > config.max_tokens:
            raise SampleError(f"{name}: {len(tokens)} tokens, data.max_tokens is {config.max_tokens}")
        count = np.count_nonzero(labels[1:] != IGNORE)
        if 0 < config.max_labels < count:
            raise SampleError(f"{name}: {count} labels, data.max_labels is {config.max_labels}")
        if len(sample.masks) > config.max_masks:
            raise SampleError(f"{name}: {len(sample.masks)} masks, data.max_masks is {config.max_masks}")
        shape, dtype = self.geometry.mask(config.codes)
        masks = np.asarray(self._encode_masks(sample), dtype).reshape(-1, *shape)
        return {"tokens": tokens, "labels": labels, "tiles": tiles, "masks": masks}

    def mask_example(self, sample: Sample, rng: np.random.Generator) -> Batch:
        """An example of the VQ-VAE task: one of the sample's masks."""
        if not sample.masks:
            raise SampleError(f"{sample.name}: no mask to train the VQ-VAE on")
        masks = self._masks(sample)
        return {"masks": masks[rng.integers(len(masks))]}

    def change(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample augmented by data.augment and by `data_augment` of its meta JSON; for mixture.draw."""
        prompt.check_turns(sample.conversations, sample.name)  # what changes images reads the texts
        if self.config.augment:
            if self.config.codes:
                raise SampleError(
                    f"{sample.name}: its stored codes are those of unchanged masks; "
                    "switch data.augment or data.codes off"
                )
            sample = self.augment(sample, rng)
        return recompress(sample, rng) if sample.meta.get("augment") else sample

    def _tiles(self, sample: Sample, name: str) -> tuple[np.ndarray, list[int]]:
        """(tiles u8[p, S, S, 3]; tiles per image)."""
        config = self.config
        tiling = transforms.Tiling(
            self.geometry.image_size, config.max_tiles, config.sample_tiles, config.pad_to_square
        )
        return tiling(sample.images, sample.meta.get("max_tiles", 0), name)

    def _encode_masks(self, sample: Sample) -> Sequence[np.ndarray]:
        """The masks u8[R, R, 3], or their codes i32[N] where data.codes is set."""
        if not self.config.codes:
            return self._masks(sample)
        if sample.codes is None and sample.masks:
            raise SampleError(
                f"{sample.name}: no codes of its masks are stored; prepare it with --codes, or set data.codes=false"
            )
        return () if sample.codes is None else list(sample.codes)

    def _masks(self, sample: Sample) -> list[np.ndarray]:
        return [
            transforms.resize_target(m, self.geometry.mask_size, pad=self.config.pad_to_square)
            for m in transforms.targets(sample)
        ]


# ---------------------------------------------------------------------------------- training


def train_iterator(
    config: Mapping[str, Any] | DataConfig,
    tokenizer: Tokenizer | None,
    geometry: Geometry,
    *,
    seed: int,
    batch_size: int,
    slots: Sequence[int] | None = None,
    task: str = "lm",
) -> BatchIterator:
    """An endless iterator over this process's slots of the batches.

    Args:
      config: the section `data`.
      tokenizer: the vocabulary; unused by the task 'vqvae'.
      geometry: the model's sizes.
      seed: of the order and of everything random in the samples.
      batch_size: B, sequences of the global batch, over all processes.
      slots: which of these B sequences this process reads; None = all (see sharding.local_rows).
      task: 'lm' or 'vqvae'.

    Returns:
      An iterator with `get_state()`, `set_state(state)`, `skipped` and `close()`. Batches, of
      b = len(slots) sequences:
        lm     tokens, labels, positions, segment_ids i32[b, T] (segments 1, 2, ... of a sequence are
               its samples; 0 = padding, on the right), tiles u8[b, P, S, S, 3] and masks
               u8[b, M, R, R, 3] in the order of the samples, zero after the last one; with
               data.codes the masks are their codes, i32[b, M, N].
        vqvae  masks u8[b, R, R, 3].

    Raises:
      UserError: now, for sources that cannot be opened; later, for too many invalid samples.
    """
    config = DataConfig.from_config(config)
    encoder = SampleEncoder(config, geometry, tokenizer)
    if task == "lm":
        encode, rule = encoder.example, encoder.packing
    else:
        encode, rule = encoder.mask_example, packing.Packing({}, lambda _: {}, lambda examples: dict(examples[0]))
    components = mixture.open_mixture(config.sources, config.root, reading=config.reading())
    order = Order(
        [Component(mixture.name_of(c.source), c.length, c.weight) for c in components],
        lambda k, length, seed: _stream(components[k].source, length, encoder.change, encode, seed),
        seed,
    )
    return BatchIterator(
        order,
        rule,
        batch_size,
        range(batch_size) if slots is None else slots,
        max_broken=config.max_broken,
        workers=config.workers,
        threads=config.threads,
    )


def batch_shapes(
    config: Mapping[str, Any] | DataConfig, geometry: Geometry, batch_size: int
) -> dict[str, tuple[tuple[int, ...], type]]:
    """{array: (shape, dtype)} of a batch of the LM task; opens no source."""
    config = DataConfig.from_config(config)
    sequence, side = (batch_size, config.max_tokens), geometry.image_size
    mask, dtype = geometry.mask(config.codes)
    return {
        **dict.fromkeys(("tokens", "labels", "positions", "segment_ids"), (sequence, np.int32)),
        "tiles": ((batch_size, config.max_tiles, side, side, 3), np.uint8),
        "masks": ((batch_size, config.max_masks, *mask), dtype),
    }


def _stream(source: mixture.Source, length: int, change: mixture.Change, encode, seed: int) -> grain.MapDataset:
    """An endless shuffled stream of examples (or InvalidSample) of the first samples of one source."""

    def load(index: int, rng: np.random.Generator) -> packing.Example | InvalidSample:
        where = f"{mixture.name_of(source)}: sample {index}"
        try:
            sample = mixture.draw(source, index, rng, change)
            where = sample.name
            return encode(sample, rng)
        except SampleError as error:
            return InvalidSample(str(error))
        except UserError:
            raise  # not the sample's fault
        except Exception as error:  # one bad sample never ends a run; too many of them do
            return InvalidSample(f"{where}: not a sample ({type(error).__name__}: {brief(error)})")

    return grain.MapDataset.range(length).seed(seed).shuffle().random_map(load).repeat()
