"""The pipeline: batch layout, order, resume, shards, mixtures, broken samples, evaluation."""
import collections
import json

import ml_collections
import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data import pipeline, shapes, sources, transforms
from argenseg_jax.data.pipeline import DataConfig, Encoder, Geometry, eval_batches, train_iterator
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.tokenizer import nano_tokenizer
from argenseg_jax.errors import SampleError, UserError
from argenseg_jax.vocab import IGNORE

GEOMETRY = Geometry(image_size=32, image_tokens=16, mask_size=64, code_tokens=21)
SHAPES = {"sources": ("shapes:simple:train:500",), "max_tokens": 96, "system": "",
          "image_last": True}


@pytest.fixture(scope="module")
def tokenizer():
    return nano_tokenizer(16, shapes.corpus())


def iterate(config, tokenizer, batch_size=4, seed=0, **kw):
    return train_iterator(config, tokenizer, GEOMETRY, seed=seed, batch_size=batch_size, **kw)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def numbered(tmp_path, counts, broken=()):
    """JSONL files of chat samples whose answers are their numbers; lines in `broken` are faulty."""
    names = []
    for k, count in enumerate(counts):
        records = [{"conversations": [{"from": "human", "value": "?"},
                                      {"from": "gpt", "value": f"{k} {i}"}]} for i in range(count)]
        text = [("oops" if (k, i) in broken else json.dumps(r)) + "\n"
                for i, r in enumerate(records)]
        (tmp_path / f"{k}.jsonl").write_text("".join(text))
        names.append(str(tmp_path / f"{k}.jsonl"))
    return names


def answers(batch, tokenizer):
    """The target text of every row, without the end mark."""
    return [tokenizer.decode(row[row != IGNORE]).strip() for row in batch["labels"]]


def drain(iterator, tokenizer, steps):
    rows = [row for _ in range(steps) for row in answers(next(iterator), tokenizer)]
    iterator.close()
    return rows


# ---------------------------------------------------------------------------------- layout


def test_lm_batch(tokenizer):
    iterator = iterate(SHAPES, tokenizer)
    batch = next(iterator)
    iterator.close()
    layout = {k: (v.shape, v.dtype) for k, v in batch.items()}
    text = ((4, 96), np.int32)
    assert layout == {"tokens": text, "labels": text, "positions": text, "segment_ids": text,
                      "tiles": ((4, 1, 32, 32, 3), np.uint8),
                      "masks": ((4, 1, 64, 64, 3), np.uint8)}
    vocab, used = tokenizer.vocab, batch["segment_ids"] == 1
    assert (np.diff(used.astype(int)) <= 0).all() and (batch["segment_ids"][~used] == 0).all()
    assert (batch["tokens"][~used] == vocab.pad).all() and (batch["labels"][~used] == IGNORE).all()
    np.testing.assert_array_equal(batch["positions"], np.arange(96) * used)
    assert ((batch["tokens"] == vocab.img_context).sum(1) == 16).all()
    assert ((batch["tokens"] == vocab.mask_context).sum(1) == 20).all()
    assert ((batch["labels"] == vocab.mask_context).sum(1) == 21).all()
    assert set(np.unique(batch["masks"])) <= {0, 255}


def test_vqvae_batch():
    iterator = iterate(SHAPES, None, task="vqvae")
    batch = next(iterator)
    iterator.close()
    assert {k: v.shape for k, v in batch.items()} == {"masks": (4, 64, 64, 3)}


def test_rows_with_several_images_and_masks(tokenizer):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (40, 80, 3), np.uint8) for _ in range(2)]
    masks = [np.full((40, 80), v, np.uint8) for v in (255, 0)]
    sample = Sample([{"from": "human", "value": "<image> and <image>: segment."},
                     {"from": "gpt", "value": "<mask><mask>"}], images, masks, {"line": "f:1"})
    room = {"max_tokens": 300, "max_tiles": 6, "max_masks": 3, "system": ""}
    config = DataConfig(**room)
    row = Encoder(config, GEOMETRY, tokenizer).training_row(sample, rng)
    assert row["tiles"].shape == (6, 32, 32, 3) and row["masks"].shape == (3, 64, 64, 3)
    np.testing.assert_array_equal(row["tiles"][:3], transforms.image_tiles(images[0], 32, 2))
    np.testing.assert_array_equal(row["tiles"][3:], transforms.image_tiles(images[1], 32, 2))
    assert (row["tokens"] == tokenizer.vocab.img_context).sum() == 6 * 16
    assert [m.max() for m in row["masks"]] == [255, 0, 0]
    for change, fault in (({"max_tokens": 100}, "f:1: 1.. tokens, data.max_tokens is 100"),
                          ({"max_masks": 1}, "f:1: 2 masks, data.max_masks is 1"),
                          ({"max_tiles": 1}, "f:1: 2 images, data.max_tiles is 1")):
        config = DataConfig(**{**room, **change})
        with pytest.raises(SampleError, match=fault):
            Encoder(config, GEOMETRY, tokenizer).training_row(sample, rng)


def test_unconditional_prompts(tokenizer):
    sample = Sample([{"from": "human", "value": "A red circle."},
                     {"from": "gpt", "value": "<mask>"}],
                    masks=[np.zeros((64, 64), np.uint8)])
    encoder = Encoder(DataConfig(max_tokens=96, system="", prompt_drop=0.2), GEOMETRY, tokenizer)
    rng = np.random.default_rng(0)
    texts = [tokenizer.decode(encoder.training_row(sample, rng)["tokens"]) for _ in range(300)]
    assert 30 < sum("about nothing" in t for t in texts) < 95
    pictured = Sample(sample.conversations, (np.zeros((8, 8, 3), np.uint8),), sample.masks)
    row = DataConfig(max_tokens=96, system="", prompt_drop=1.0)
    assert "red circle" in tokenizer.decode(
        Encoder(row, GEOMETRY, tokenizer).training_row(pictured, rng)["tokens"])


def test_config():
    config = ml_collections.ConfigDict({"sources": ("a",), "system": None, "max_tokens": 5})
    assert DataConfig.of(config) == DataConfig(sources=("a",), max_tokens=5)
    with pytest.raises(UserError, match="unknown key data.max_token$"):
        DataConfig.of({"max_token": 5})


# ---------------------------------------------------------------------------------- order


def test_order_follows_the_seed(tokenizer):
    batches = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        iterator = iterate(SHAPES, tokenizer, seed=seed)
        batches[name] = [next(iterator) for _ in range(3)]
        iterator.close()
    assert all(map(equal, batches["one"], batches["again"]))
    assert not any(map(equal, batches["one"], batches["other"]))


@pytest.mark.parametrize("augment", [False, True])
def test_resume(tokenizer, augment):
    config = {**SHAPES, "augment": augment}
    straight = iterate(config, tokenizer)
    first = [next(straight) for _ in range(3)]
    state = json.loads(json.dumps(straight.get_state()))
    rest = [next(straight) for _ in range(3)]
    straight.close()
    resumed = iterate(config, tokenizer)
    next(resumed)  # a state also replaces what was read before
    resumed.set_state(state)
    assert all(equal(next(resumed), batch) for batch in rest)
    resumed.close()
    assert not equal(first[0], rest[0])


def test_every_sample_once_an_epoch_and_reshuffled(tokenizer, tmp_path):
    config = {"sources": numbered(tmp_path, [24]), "max_tokens": 64, "system": ""}
    rows = drain(iterate(config, tokenizer, batch_size=6), tokenizer, 8)
    first, second = rows[:24], rows[24:]
    assert sorted(first) == sorted(second) == sorted(f"0 {i}" for i in range(24))
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shards_are_disjoint_and_complete(tokenizer, tmp_path, processes):
    config = {"sources": numbered(tmp_path, [24]), "max_tokens": 64, "system": ""}
    whole = drain(iterate(config, tokenizer, batch_size=8), tokenizer, 3)
    rows = [drain(iterate(config, tokenizer, batch_size=8 // processes, process_index=p,
                          process_count=processes), tokenizer, 3) for p in range(processes)]
    share = 8 // processes
    for step in range(3):  # every global batch holds the same rows for any number of processes
        mine = [row for shard in rows for row in shard[step * share:(step + 1) * share]]
        assert sorted(mine) == sorted(whole[step * 8:(step + 1) * 8])


def test_mixture_proportions(tokenizer, tmp_path):
    one, two, three = numbered(tmp_path, [30, 10, 20])
    config = {"sources": (one, f"{two}*6", f"{three}*0.5"), "max_tokens": 64, "system": ""}
    rows = drain(iterate(config, tokenizer, batch_size=10), tokenizer, 20)
    seen = collections.Counter(row[0] for row in rows)
    assert all(abs(seen[k] - 200 * share) <= 3 for k, share in (("0", 0.3), ("1", 0.6), ("2", 0.1)))
    assert {row for row in rows if row[0] == "2"} <= {f"2 {i}" for i in range(10)}


def test_worker_processes_change_nothing(tokenizer, tmp_path):
    config = {"sources": numbered(tmp_path, [24], {(0, 3)}), "max_tokens": 64, "system": "",
              "max_broken": 1.0}
    here = iterate(config, tokenizer)
    there = iterate({**config, "workers": 2}, tokenizer)
    for _ in range(8):
        assert equal(next(here), next(there)) and here.broken == there.broken
    state = there.get_state()
    want = next(here)
    resumed = iterate({**config, "workers": 2}, tokenizer)
    resumed.set_state(state)
    assert equal(next(resumed), want)
    for iterator in (here, there, resumed):
        iterator.close()


# ---------------------------------------------------------------------------------- broken samples


def test_broken_samples_are_skipped_and_counted(tokenizer, tmp_path):
    bad = {(0, 3), (0, 11)}
    config = {"sources": numbered(tmp_path, [24], bad), "max_tokens": 64, "system": "",
              "max_broken": 0.1}
    iterator = iterate(config, tokenizer, batch_size=11)
    rows = [row for _ in range(2) for row in answers(next(iterator), tokenizer)]
    assert sorted(rows) == sorted(f"0 {i}" for i in range(24) if (0, i) not in bad)
    rows += [row for _ in range(2) for row in answers(next(iterator), tokenizer)]
    assert [name.split(": ")[0].rsplit("/")[-1] for name in sorted(iterator.broken)] == [
        "0.jsonl:12", "0.jsonl:4"]
    assert set(iterator.broken.values()) == {2}
    state, want = iterator.get_state(), next(iterator)
    resumed = iterate(config, tokenizer, batch_size=11)
    resumed.set_state(json.loads(json.dumps(state)))
    assert equal(next(resumed), want) and resumed.broken == iterator.broken
    iterator.close(), resumed.close()


def test_too_many_broken_samples_end_the_run(tokenizer, tmp_path):
    bad = {(0, i) for i in range(12)}
    config = {"sources": numbered(tmp_path, [24], bad), "max_tokens": 64, "system": ""}
    iterator = iterate(config, tokenizer)
    with pytest.raises(UserError, match=r"broken, more than data.max_broken = 0.01.*0.jsonl:"):
        for _ in range(6):
            next(iterator)
    iterator.close()


def test_samples_that_do_not_fit_are_broken(tokenizer):
    iterator = iterate({**SHAPES, "max_tokens": 40}, tokenizer)
    with pytest.raises(UserError, match=r"shapes:\d+: \d+ tokens, data.max_tokens is 40"):
        next(iterator)
    iterator.close()


def test_chat_has_no_mask_for_the_vqvae(tmp_path):
    iterator = iterate({"sources": numbered(tmp_path, [24])}, None, task="vqvae")
    with pytest.raises(UserError, match="no mask to train the VQ-VAE on"):
        next(iterator)
    iterator.close()


# ---------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_eval_counts_every_sample_once(tokenizer, processes):
    source = sources.open_source("shapes:simple:test")
    seen, shapes_seen = [], []
    for p in range(processes):
        batches = list(eval_batches(source, SHAPES, tokenizer, GEOMETRY, batch_size=4, limit=10,
                                    process_index=p, process_count=processes, query_tokens=64))
        shapes_seen.append([(b.tokens.shape, b.tiles.shape) for b in batches])
        for batch in batches:
            assert [s is not None for s in batch.samples] == batch.valid.tolist()
            assert not batch.tiles[~batch.valid].any() and (batch.lengths[~batch.valid] == 1).all()
            seen += [s.meta["id"] for s in batch.samples if s is not None]
    assert sorted(seen) == list(range(10))
    # Otherwise the processes would wait for each other.
    assert all(s == shapes_seen[0] for s in shapes_seen)


def test_eval_queries(tokenizer):
    source = sources.open_source("shapes:simple:test")
    (batch,) = eval_batches(source, SHAPES, tokenizer, GEOMETRY, batch_size=3, limit=3)
    assert batch.tokens.shape == (3, 64)
    for row, length, sample in zip(batch.tokens, batch.lengths, batch.samples):
        ask = sample.conversations[0]["value"].removeprefix("<image>\n")
        assert tokenizer.decode(row[:length]) == f"user\n{ask}\n\nassistant\n"
        assert (row[length:] == tokenizer.vocab.pad).all()


def test_eval_stops_at_a_broken_sample(tokenizer, tmp_path):
    (name,) = numbered(tmp_path, [5], {(0, 4)})
    source = sources.open_source(name)
    batches = eval_batches(source, {"system": ""}, tokenizer, GEOMETRY, batch_size=4)
    assert next(batches).valid.all()
    with pytest.raises(SampleError, match="0.jsonl:5: malformed JSON"):
        next(batches)
    long = eval_batches(source, {}, tokenizer, GEOMETRY, batch_size=2, query_tokens=8)
    with pytest.raises(SampleError, match="does not fit into 8"):
        next(long)


def test_photographs_end_to_end(tokenizer, tmp_path):
    """Files on disk with augmentation and padding, as configs for photographs use them."""
    rng = np.random.default_rng(0)
    mask = np.zeros((30, 50), np.uint8)
    mask[5:20, 10:40] = 255
    Image.fromarray(rng.integers(0, 255, (30, 50, 3), np.uint8)).save(tmp_path / "i.jpg")
    Image.fromarray(mask).convert("1").save(tmp_path / "m.png")
    record = {"image": "i.jpg", "mask": "m.png", "conversations": [
        {"from": "human", "value": "<image>\nSegment the car in the image."},
        {"from": "gpt", "value": "Sure, the segmentation result: <mask>."}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    config = {"sources": ("d.jsonl",), "root": str(tmp_path), "max_tokens": 96, "system": "",
              "augment": True, "pad_to_square": True}
    iterator = iterate(config, tokenizer, batch_size=6)
    batch = next(iterator)
    iterator.close()
    assert len({row.tobytes() for row in batch["tiles"]}) == 6  # every repetition is another view
    assert (batch["masks"].max(axis=(1, 2, 3, 4)) > 200).all()
