"""Packed sequences: what goes into them, each sample once, resumed by any number of processes."""

import collections
import json

import numpy as np
import pytest

from argenseg_jax.data import packing
from argenseg_jax.errors import UserError
from argenseg_jax.vocab import IGNORE
from tests import tiny
from tests.data.test_pipeline import SHAPES, drain, equal, iterate, numbered, shards, tokenizer  # noqa: F401


def example(tokens, masks=0, tiles=0):
    number = np.arange(1, tokens + 1)
    return {
        "tokens": number * 10,
        "labels": number * 10,
        "tiles": np.full((tiles, 2, 2, 3), tokens, np.uint8),
        "masks": np.full((masks, 4, 4, 3), tokens, np.uint8),
    }


def test_the_oldest_then_the_longest_that_fits():
    capacity = {"tokens": 10, "masks": 2}
    sizes = [dict(tokens=t, masks=m) for t, m in ((4, 1), (6, 2), (5, 0), (5, 1))]
    assert packing.next_index(sizes, capacity, first=True) == 0
    rest = {"tokens": 6, "masks": 1}
    assert packing.next_index(sizes[1:], rest, first=False) == 1  # 6 tokens, but its masks are too many
    assert packing.next_index([dict(tokens=7, masks=0)], rest, first=False) is None


def test_a_sequence_by_hand():
    capacity = {"tokens": 8, "labels": 8, "tiles": 2, "masks": 3}
    sequence = packing.join([example(2, masks=1), example(4, masks=1, tiles=1)], capacity, pad=99)
    assert sequence["tokens"].tolist() == [10, 20, 10, 20, 30, 40, 99, 99]
    assert sequence["segment_ids"].tolist() == [1, 1, 2, 2, 2, 2, 0, 0]
    assert sequence["positions"].tolist() == [0, 1, 0, 1, 2, 3, 0, 0]
    assert sequence["labels"].tolist() == [IGNORE, 20, IGNORE, 20, 30, 40, IGNORE, IGNORE]
    assert sequence["masks"][:, 0, 0, 0].tolist() == [2, 4, 0] and sequence["tiles"][:, 0, 0, 0].tolist() == [4, 0]
    assert packing.size(example(4, masks=1)) == {"tokens": 4, "labels": 3, "tiles": 0, "masks": 1}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Chat, some lines invalid, and synthetic scenes with one or two masks: the section `data`."""
    chat = numbered(tmp_path_factory.mktemp("mixed"), [24], {(0, 3), (0, 9)})
    return {
        **SHAPES,
        "sources": (f"{chat[0]}*10", "shapes:simple:train:60"),
        "max_tokens": 200,
        "max_tiles": 2,
        "max_masks": 2,
        "sample_tiles": 1,
        "pack": 4,
        "max_broken": 1.0,
    }


def samples(batch):
    """The tokens of every sample, and the mask it learns from."""
    found = []
    for row in range(len(batch["tokens"])):
        masks = 0
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            count = (batch["labels"][row][here] == tiny.tokenizer().vocab.mask_context).sum() // 21
            found.append((batch["tokens"][row][here].tobytes(), batch["masks"][row, masks : masks + count].tobytes()))
            masks += count
    return found


def test_packed_sequences_have_the_samples_of_unpacked_ones(mixed, tokenizer):  # noqa: F811
    packed, plain = iterate(mixed, tokenizer), iterate({**mixed, "pack": 0}, tokenizer)
    rows = [next(packed) for _ in range(5)]
    have = [s for batch in rows for s in samples(batch)]
    want = collections.Counter(s for _ in range(60) for s in samples(next(plain)))
    assert len(have) > 5 * 4 * 1.6 and not collections.Counter(have) - want
    share = [np.mean(batch["segment_ids"] > 0) for batch in rows]
    assert min(share) > 0.75
    for batch in rows:
        used = batch["segment_ids"] > 0
        assert (batch["positions"][used & (np.diff(batch["segment_ids"], prepend=0) != 0)] == 0).all()
        context = (batch["tokens"] == tokenizer.vocab.img_context).sum(1) // 16
        assert (context <= 2).all() and (context == (batch["tiles"].max((2, 3, 4)) > 0).sum(1)).all()
    assert max(batch["segment_ids"].max() for batch in rows) > 2
    packed.close(), plain.close()


def test_resume_with_other_processes_and_workers(mixed, tokenizer):  # noqa: F811
    uninterrupted = iterate(mixed, tokenizer)
    want = [next(uninterrupted) for _ in range(12)]
    rows, state = [], None
    for processes, steps, workers in ((1, 3, 0), (2, 5, 0), (1, 4, 2)):
        shares = [iterate({**mixed, "workers": workers}, tokenizer, slots=slots) for slots in shards(processes, 4)]
        for iterator in shares:
            if state:
                iterator.set_state(json.loads(json.dumps(state)))
        for _ in range(steps):
            batches = [next(iterator) for iterator in shares]
            rows.append({key: np.concatenate([b[key] for b in batches]) for key in batches[0]})
        states = [iterator.get_state() for iterator in shares]
        state = {key: {k: v for s in states for k, v in s[key].items()} for key in states[0]}
        [iterator.close() for iterator in shares]
    assert all(map(equal, rows, want)) and state == uninterrupted.get_state()
    assert state["waiting"] and all(0 < len(w) <= 4 for w in state["waiting"].values())
    # Exactly once: what was consumed was returned, is pending, or was skipped.
    out = sum(int(batch["segment_ids"].max(1).sum()) for batch in rows)
    pending, skipped = (
        sum(map(len, state["waiting"].values())),
        sum(sum(reasons.values()) for reasons in state["broken"].values()),
    )
    assert sum(state["taken"].values()) == out + pending + skipped and skipped > 0
    uninterrupted.close()


def test_every_sample_once_an_epoch(tokenizer, tmp_path):  # noqa: F811
    config = {"sources": numbered(tmp_path, [24]), "max_tokens": 64, "system": "", "pack": 3}
    iterator = iterate(config, tokenizer, batch_size=2)
    texts = []
    while len(texts) < 40:
        batch = next(iterator)
        for row, segments in zip(batch["labels"], batch["segment_ids"]):
            texts += [
                tokenizer.decode(row[(segments == k) & (row != IGNORE)]).strip() for k in range(1, segments.max() + 1)
            ]
    iterator.close()
    counts = collections.Counter(texts)
    assert max(counts.values()) <= 3 and len(counts) == 24


def test_what_is_too_long_or_has_too_many_images_is_skipped(mixed, tokenizer):  # noqa: F811
    for change, fault in (
        ({"max_tokens": 40}, "tokens, data.max_tokens is 40"),
        ({"max_labels": 20}, "labels, data.max_labels is 20"),
        ({"max_masks": 0}, "1 masks, data.max_masks is 0"),
    ):
        with pytest.raises(UserError, match=fault):
            drain(
                iterate({**mixed, "sources": ("shapes:simple:train:60",), "max_broken": 0.01, **change}, tokenizer),
                tokenizer,
                1,
            )
