"""Samples -> batches of numpy arrays, with grain: mix, shuffle, repeat, shard by process, batch.

The order is a function of (seed, index) alone, so a run that resumes sees what it would have seen.
A sample that cannot be used is skipped, counted by file and line, and too many of them end the run.
"""
from __future__ import annotations

import collections
import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain.python as grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from argenseg_jax.data import prompt, sources, transforms
from argenseg_jax.data.augment import Augment, recolour
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.tokenizer import Tokenizer
from argenseg_jax.errors import SampleError, UserError
from argenseg_jax.vocab import IGNORE

Batch = dict[str, np.ndarray]
QUERY_MULTIPLE = 64  # queries are padded to such lengths: few shapes, few compilations


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


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The config section `data`.

    Attributes:
      sources: names of sources, see data/sources.py.
      max_tokens: T, length of a row; longer samples count as broken.
      image_last: moves `<image>` behind the human text.
      system: system message; None = the official one, '' = none.
      workers: grain worker processes; 0 reads in threads of the training process.
      root: directory that relative paths of the sources start from.
      max_tiles: P, tiles of a row; a picture is cut into as many as its grid asks for, within P.
      max_masks: M, masks of a row.
      pad_to_square: keep the aspect ratio of images and masks, and pad them.
      augment: disturb photographs (data/augment.py).
      recolour: share of the samples that get other colours, where the text names none.
      prompt_drop: share of text-to-image prompts replaced by the unconditional one.
      max_broken: largest share of broken samples; more of them end the run.
    """

    sources: Sequence[str] = ()
    max_tokens: int = 8192
    image_last: bool = False
    system: str | None = None
    workers: int = 0
    root: str = ""
    max_tiles: int = 1
    max_masks: int = 1
    pad_to_square: bool = False
    augment: bool = False
    recolour: float = 0.0
    prompt_drop: float = 0.0
    max_broken: float = 0.01

    @classmethod
    def of(cls, config: Mapping[str, Any] | DataConfig) -> DataConfig:
        """From a ConfigDict or dict; missing keys take defaults, an unknown key is an error."""
        if isinstance(config, cls):
            return config
        unknown = sorted(set(config) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"config: unknown key data.{unknown[0]}")
        return cls(**dict(config.items()))


# ---------------------------------------------------------------------------------- one sample


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Sample -> one row of a batch (the arrays of `train_iterator`, without their first axis)."""

    config: DataConfig
    geometry: Geometry
    tokenizer: Tokenizer | None = None  # the `vqvae` task has no text
    augment: Augment = Augment()

    def training_row(self, sample: Sample, rng: np.random.Generator) -> Batch:
        """One row of the LM task; SampleError where the sample does not fit into it."""
        name, config, turns = _name(sample), self.config, sample.conversations
        sample = self._augmented(sample, rng)
        if config.prompt_drop and sample.masks and not sample.images:
            if rng.random() < config.prompt_drop:
                turns = [{**turn, "value": prompt.NOTHING} if turn["from"] == "human" else turn
                         for turn in turns]
        tiles, per_image = self._tiles(sample, name)
        tokens, labels = prompt.encode_training(
            turns, self.tokenizer, per_image, num_masks=len(sample.masks), name=name,
            image_tokens=self.geometry.image_tokens, code_tokens=self.geometry.code_tokens,
            system=config.system, image_last=config.image_last)
        if len(tokens) > config.max_tokens:
            raise SampleError(f"{name}: {len(tokens)} tokens, "
                              f"data.max_tokens is {config.max_tokens}")
        if len(sample.masks) > config.max_masks:
            raise SampleError(f"{name}: {len(sample.masks)} masks, "
                              f"data.max_masks is {config.max_masks}")
        masks = self._masks(sample)
        width, side = config.max_tokens, self.geometry.mask_size
        return {"tokens": _padded(tokens, width, self.tokenizer.vocab.pad),
                "labels": _padded(labels, width, IGNORE),
                "positions": _padded(np.arange(len(tokens), dtype=np.int32), width, 0),
                "segment_ids": _padded(np.ones(len(tokens), np.int32), width, 0),
                "tiles": tiles,
                "masks": _stacked(masks, config.max_masks, (side, side, 3))}

    def mask_row(self, sample: Sample, rng: np.random.Generator) -> Batch:
        """One row of the VQ-VAE task: one of the sample's masks."""
        if not sample.masks:
            raise SampleError(f"{_name(sample)}: no mask to train the VQ-VAE on")
        masks = self._masks(self._augmented(sample, rng))
        return {"masks": masks[rng.integers(len(masks))]}

    def query_row(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """(tokens i32[L], tiles u8[P, S, S, 3]) of the question before the first mask."""
        name = _name(sample)
        turns = prompt.query_turns(sample.conversations, name)
        tiles, per_image = self._tiles(sample, name)
        tokens = prompt.encode_query(turns, self.tokenizer, per_image, name=name,
                                     image_tokens=self.geometry.image_tokens,
                                     system=self.config.system, image_last=self.config.image_last)
        return tokens, tiles

    def _augmented(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if self.config.augment or sample.meta.get("augment"):
            sample = self.augment(sample, rng)
        if self.config.recolour and rng.random() < self.config.recolour:
            sample = recolour(sample, rng)
        return sample

    def _tiles(self, sample: Sample, name: str) -> tuple[np.ndarray, list[int]]:
        """(tiles u8[P, S, S, 3], zero beyond the used ones; tiles per image)."""
        room, side = self.config.max_tiles, self.geometry.image_size
        if len(sample.images) > room:
            raise SampleError(f"{name}: {len(sample.images)} images, data.max_tiles is {room}")
        share = room // max(len(sample.images), 1)
        # The thumbnail takes one place, and a grid of one tile has none.
        most = max(min(share - 1, sample.meta.get("max_tiles", share)), 1)
        cut = [transforms.image_tiles(i, side, most, pad=self.config.pad_to_square)
               for i in sample.images]
        tiles = [tile for of_image in cut for tile in of_image]
        return _stacked(tiles, room, (side, side, 3)), [len(of_image) for of_image in cut]

    def _masks(self, sample: Sample) -> list[np.ndarray]:
        return [transforms.resize_mask(m, self.geometry.mask_size, pad=self.config.pad_to_square)
                for m in sample.masks]


def _name(sample: Sample) -> str:
    meta = sample.meta
    return str(meta.get("line") or f"{meta.get('source', 'sample')}:{meta.get('id', '?')}")


def _padded(row: np.ndarray, length: int, fill: int) -> np.ndarray:
    return np.pad(row, (0, length - len(row)), constant_values=fill)


def _stacked(items: Sequence[np.ndarray], room: int, shape: tuple[int, ...]) -> np.ndarray:
    """u8[room, *shape]: the items, then zeros."""
    stacked = np.zeros((room, *shape), np.uint8)
    for k, item in enumerate(items):
        stacked[k] = item
    return stacked


# ---------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class _Broken:
    """Stands in the stream for a sample that cannot be used."""

    reason: str


def train_iterator(config: Mapping[str, Any] | DataConfig, tokenizer: Tokenizer | None,
                   geometry: Geometry, *, seed: int, batch_size: int, process_index: int = 0,
                   process_count: int = 1, task: str = "lm") -> BatchIterator:
    """An endless iterator over this process's batches.

    Args:
      config: the section `data`.
      tokenizer: the vocabulary; unused by the task 'vqvae'.
      geometry: the model's sizes.
      seed: of the order and of everything random in the samples.
      batch_size: B, rows per batch of this process.
      process_index: this process reads samples process_index, process_index + process_count, ...
      process_count: number of processes.
      task: 'lm' or 'vqvae'.

    Returns:
      An iterator with `get_state()`, `set_state(state)`, `broken` and `close()`. Batches:
        lm     tokens, labels, positions, segment_ids i32[B, T] (right padded; segment 0 = padding),
               tiles u8[B, P, S, S, 3] and masks u8[B, M, R, R, 3], zero beyond a row's own ones.
        vqvae  masks u8[B, R, R, 3].

    Raises:
      UserError: now, for sources that cannot be opened; later, for too many broken samples.
    """
    config = DataConfig.of(config)
    encoder = Encoder(config, geometry, tokenizer)
    encode = {"lm": encoder.training_row, "vqvae": encoder.mask_row}[task]
    parts = sources.open_mixture(config.sources, config.root)
    seeds = np.random.SeedSequence(seed).generate_state(len(parts))
    mixed = [_stream(part, encode, int(s)) for part, s in zip(parts, seeds)]
    dataset = (mixed[0] if len(mixed) == 1 else
               grain.MapDataset.mix(mixed, weights=[part.weight for part in parts]))
    dataset = dataset[process_index::process_count]
    reading = grain.ReadOptions(num_threads=0 if config.workers else 2,
                                prefetch_buffer_size=0 if config.workers else 2 * batch_size)
    dataset = dataset.to_iter_dataset(reading)
    if config.workers:
        if not flags.FLAGS.is_parsed():  # grain's workers read flags; a notebook has parsed none
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
    return BatchIterator(ThreadPrefetchIterDataset(_Batches(dataset, batch_size, config.max_broken),
                                                   prefetch_buffer_size=2))


def _stream(part: sources.Part, encode, seed: int) -> grain.MapDataset:
    """An endless shuffled stream of rows (or _Broken) of one source."""
    def load(index: int, rng: np.random.Generator) -> Batch | _Broken:
        try:
            return encode(sources.draw(part.source, index, rng), rng)
        except SampleError as error:
            return _Broken(str(error))

    return grain.MapDataset.range(part.length).seed(seed).shuffle().random_map(load).repeat()


class _Batches(grain.IterDataset):
    """Stacks rows into batches, skipping and counting what is broken."""

    def __init__(self, parent: grain.IterDataset, batch_size: int, max_broken: float):
        super().__init__(parent)
        self.batch_size, self.max_broken = batch_size, max_broken

    def __iter__(self) -> _BatchesIterator:
        return _BatchesIterator(self._parent.__iter__(), self.batch_size, self.max_broken)


class _BatchesIterator(grain.DatasetIterator):
    """State: that of the parent, the rows seen so far, and the broken ones among them by reason."""

    SMALL = 100  # the share is taken of at least so many rows: one early fault is no verdict

    def __init__(self, parent: grain.DatasetIterator, batch_size: int, max_broken: float):
        super().__init__(parent)
        self._batch_size, self._max_broken = batch_size, max_broken
        self._seen, self._broken = 0, collections.Counter()

    def __next__(self) -> tuple[Batch, dict[str, int]]:
        rows = []
        while len(rows) < self._batch_size:
            row = next(self._parent)
            self._seen += 1
            if isinstance(row, _Broken):
                self._broken[row.reason] += 1
                self._judge()
            else:
                rows.append(row)
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        return batch, dict(self._broken)

    def _judge(self) -> None:
        count = self._broken.total()
        if count > self._max_broken * max(self._seen, self.SMALL):
            raise UserError(f"{count} of {self._seen} samples are broken, more than data.max_broken"
                            f" = {self._max_broken:g}; the last: {next(reversed(self._broken))}")

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "seen": self._seen,
                "broken": dict(self._broken)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._seen, self._broken = state["seen"], collections.Counter(state["broken"])


class BatchIterator(Iterator[Batch]):
    """Iterates over batches, and remembers which samples were broken.

    Attributes:
      broken: {message that names file and line: times seen}, up to the last batch that came out.
      close: call it to end the reading threads and processes; otherwise they end with the iterator.
    """

    def __init__(self, dataset: grain.IterDataset):
        self._iterator = dataset.__iter__()
        self.broken: dict[str, int] = {}
        # Also at exit: grain's threads must not outlive the modules that they use.
        self.close = weakref.finalize(self, _close, self._iterator)

    def __next__(self) -> Batch:
        batch, self.broken = next(self._iterator)
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON-able state: set in an equal iterator, it goes on with the next batch."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where get_state was called."""
        self._iterator.set_state(state)


def _close(iterator: grain.DatasetIterator) -> None:
    iterator.close()
    iterator.close = lambda: None  # grain's __del__ closes again, which fails while Python exits


# ---------------------------------------------------------------------------------- evaluation


@dataclasses.dataclass(frozen=True)
class QueryBatch:
    """Questions ready for decoding.

    Attributes:
      tokens: i32[B, L], right padded.
      lengths: i32[B], tokens of each question; 1 in rows that only fill the batch up.
      tiles: u8[B, P, S, S, 3].
      valid: bool[B], False in rows that only fill the batch up.
      samples: the sample of each row, with its ground truth; None where not valid.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    tiles: np.ndarray
    valid: np.ndarray
    samples: tuple[Sample | None, ...]


def eval_batches(source: sources.Source, config: Mapping[str, Any] | DataConfig,
                 tokenizer: Tokenizer, geometry: Geometry, *, batch_size: int,
                 process_index: int = 0, process_count: int = 1, limit: int | None = None,
                 query_tokens: int | None = None) -> Iterator[QueryBatch]:
    """Every sample once, in order; each process gets its share and equally many batches.

    Args:
      source: from sources.open_source.
      config: the section `data`.
      tokenizer: the vocabulary.
      geometry: the model's sizes.
      batch_size: B, rows per batch of this process.
      process_index: this process takes samples process_index, process_index + process_count, ...
      process_count: number of processes.
      limit: only the first so many samples.
      query_tokens: L; None fits every batch. Several processes need it: their shapes must agree.

    Raises:
      SampleError: a broken sample; a score over the others would not be the data set's.
    """
    if query_tokens is None and process_count > 1:
        raise ValueError("several processes need query_tokens: their shapes must agree")
    encoder = Encoder(DataConfig.of(config), geometry, tokenizer)
    total = min(len(source), limit or len(source))
    most = -(-total // process_count)  # samples of the fullest process
    mine = range(process_index, total, process_count)
    for start in range(0, most, batch_size):
        samples = [source[i] for i in mine[start:start + batch_size]]
        rows = [(sample, *encoder.query_row(sample)) for sample in samples]
        yield _query_batch(rows, batch_size, encoder, query_tokens)


def _query_batch(rows, batch_size: int, encoder: Encoder, query_tokens: int | None) -> QueryBatch:
    longest = max([1, *(len(tokens) for _, tokens, _ in rows)])
    width = query_tokens or -(-longest // QUERY_MULTIPLE) * QUERY_MULTIPLE
    if longest > width:
        raise SampleError(f"a question of {longest} tokens does not fit into {width}")
    side, empty = encoder.geometry.image_size, batch_size - len(rows)
    pad = encoder.tokenizer.vocab.pad
    tokens = [_padded(tokens, width, pad) for _, tokens, _ in rows]
    tokens += [np.full(width, pad, np.int32)] * empty
    tiles = [tiles for *_, tiles in rows]
    return QueryBatch(
        tokens=np.stack(tokens),
        lengths=np.array([len(t) for _, t, _ in rows] + [1] * empty, np.int32),
        tiles=_stacked(tiles, batch_size, (encoder.config.max_tiles, side, side, 3)),
        valid=np.arange(batch_size) < len(rows),
        samples=(*(sample for sample, *_ in rows), *[None] * empty))
