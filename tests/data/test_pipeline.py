"""The pipeline: batch layout, order, resume, shards, mixtures, invalid samples."""

import collections
import json

import ml_collections
import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data import transforms
from argenseg_jax.data.augment import recolour
from argenseg_jax.data.nano_tokenizer import nano_tokenizer
from argenseg_jax.data.pipeline import DataConfig, Geometry, SampleEncoder, batch_shapes, train_iterator
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.synthetic import shapes
from argenseg_jax.errors import SampleError, UserError
from argenseg_jax.vocab import IGNORE

GEOMETRY = Geometry(image_size=32, image_tokens=16, mask_size=64, code_tokens=21)
SHAPES = {"sources": ("shapes:simple:train:500",), "max_tokens": 96, "system": "", "image_last": True}


@pytest.fixture(scope="module")
def tokenizer():
    return nano_tokenizer(16, shapes.corpus())


def iterate(config, tokenizer, batch_size=4, seed=0, **kw):
    return train_iterator(config, tokenizer, GEOMETRY, seed=seed, batch_size=batch_size, **kw)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def numbered(tmp_path, counts, invalid=()):
    """JSONL files of chat samples whose answers are their numbers; lines in `invalid` cannot be read."""
    names = []
    for k, count in enumerate(counts):
        records = [
            {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": f"{k} {i}"}]}
            for i in range(count)
        ]
        text = [("oops" if (k, i) in invalid else json.dumps(r)) + "\n" for i, r in enumerate(records)]
        (tmp_path / f"{k}.jsonl").write_text("".join(text))
        names.append(str(tmp_path / f"{k}.jsonl"))
    return names


def answers(batch, tokenizer):
    """The target text of every sequence, without the end mark."""
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
    assert layout == {
        "tokens": text,
        "labels": text,
        "positions": text,
        "segment_ids": text,
        "tiles": ((4, 1, 32, 32, 3), np.uint8),
        "masks": ((4, 1, 64, 64, 3), np.uint8),
    }
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
    sample = Sample(
        [{"from": "human", "value": "<image> and <image>: segment."}, {"from": "gpt", "value": "<mask><mask>"}],
        images,
        masks,
        {"line": "f:1"},
    )
    room = {"max_tokens": 300, "max_tiles": 6, "max_masks": 3, "system": ""}
    config = DataConfig(**room)
    example = SampleEncoder(config, GEOMETRY, tokenizer).training_example(sample, rng)
    assert example["tiles"].shape == (6, 32, 32, 3) and example["masks"].shape == (3, 64, 64, 3)
    np.testing.assert_array_equal(example["tiles"][:3], transforms.image_tiles(images[0], 32, 2))
    np.testing.assert_array_equal(example["tiles"][3:], transforms.image_tiles(images[1], 32, 2))
    assert (example["tokens"] == tokenizer.vocab.img_context).sum() == 6 * 16
    assert [m.max() for m in example["masks"]] == [255, 0, 0]
    for change, fault in (
        ({"max_tokens": 100}, "f:1: 1.. tokens, data.max_tokens is 100"),
        ({"max_labels": 40}, "f:1: .. labels, data.max_labels is 40"),
        ({"max_masks": 1}, "f:1: 2 masks, data.max_masks is 1"),
        ({"max_tiles": 1}, "f:1: 2 images, data.max_tiles is 1"),
    ):
        config = DataConfig(**{**room, **change})
        with pytest.raises(SampleError, match=fault):
            SampleEncoder(config, GEOMETRY, tokenizer).training_example(sample, rng)


def test_unconditional_prompts(tokenizer):
    sample = Sample(
        [{"from": "human", "value": "A red circle."}, {"from": "gpt", "value": "<mask>"}],
        masks=[np.zeros((64, 64), np.uint8)],
    )
    encoder = SampleEncoder(DataConfig(max_tokens=96, system="", prompt_drop=0.2), GEOMETRY, tokenizer)
    rng = np.random.default_rng(0)
    texts = [tokenizer.decode(encoder.training_example(sample, rng)["tokens"]) for _ in range(300)]
    assert 30 < sum("about nothing" in t for t in texts) < 95
    pictured = Sample(sample.conversations, (np.zeros((8, 8, 3), np.uint8),), sample.masks)
    dropping = DataConfig(max_tokens=96, system="", prompt_drop=1.0)
    assert "red circle" in tokenizer.decode(
        SampleEncoder(dropping, GEOMETRY, tokenizer).training_example(pictured, rng)["tokens"]
    )


def test_config():
    config = ml_collections.ConfigDict({"sources": ("a",), "system": None, "max_tokens": 5})
    assert DataConfig.from_config(config) == DataConfig(sources=("a",), max_tokens=5)
    with pytest.raises(UserError, match="unknown key data.max_token$"):
        DataConfig.from_config({"max_token": 5})


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


def shards(processes, size):
    """Slots of each process in a batch."""
    return [range(p * size // processes, (p + 1) * size // processes) for p in range(processes)]


@pytest.mark.parametrize("processes", [2, 4])
def test_shards_are_disjoint_and_complete(tokenizer, tmp_path, processes):
    config = {"sources": numbered(tmp_path, [24]), "max_tokens": 64, "system": ""}
    uninterrupted = drain(iterate(config, tokenizer, batch_size=8), tokenizer, 3)
    assert sorted(uninterrupted) == sorted(f"0 {i}" for i in range(24))
    rows = [
        drain(iterate(config, tokenizer, batch_size=8, slots=slots), tokenizer, 3) for slots in shards(processes, 8)
    ]
    share = 8 // processes
    for step in range(3):  # every global batch is the same for any number of processes
        mine = [row for shard in rows for row in shard[step * share : (step + 1) * share]]
        assert mine == uninterrupted[step * 8 : (step + 1) * 8]


def test_another_number_of_processes_resumes(tokenizer, tmp_path):
    """1, 4 and 2 processes in turn read what one reads, also with invalid samples."""
    bad = {(0, 3), (0, 4), (0, 17)}
    config = {"sources": numbered(tmp_path, [40], bad), "max_tokens": 64, "system": "", "max_broken": 1.0}
    uninterrupted = iterate(config, tokenizer, batch_size=4)
    want = [answers(next(uninterrupted), tokenizer) for _ in range(30)]
    rows, state = [], None
    for processes, steps in ((1, 5), (4, 13), (2, 12)):
        shares = [iterate(config, tokenizer, batch_size=4, slots=slots) for slots in shards(processes, 4)]
        for iterator in shares:
            if state:
                iterator.set_state(json.loads(json.dumps(state)))
        rows += [[row for i in shares for row in answers(next(i), tokenizer)] for _ in range(steps)]
        states = [iterator.get_state() for iterator in shares]
        state = {key: {k: v for s in states for k, v in s[key].items()} for key in states[0]}
        [iterator.close() for iterator in shares]
    assert rows == want and state == uninterrupted.get_state()
    uninterrupted.close()
    # Exactly once: what was consumed was returned or skipped.
    consumed, skipped = sum(state["taken"].values()), sum(sum(reasons.values()) for reasons in state["broken"].values())
    assert consumed - skipped == 120 and skipped >= 6
    epochs = collections.Counter(row for batch in rows for row in batch)
    assert len(epochs) == 37 and min(epochs.values()) >= 2 and max(epochs.values()) <= 4


def test_mixture_proportions(tokenizer, tmp_path):
    one, two, three = numbered(tmp_path, [30, 10, 20])
    config = {"sources": (one, f"{two}*6", f"{three}*0.5"), "max_tokens": 64, "system": ""}
    rows = drain(iterate(config, tokenizer, batch_size=10), tokenizer, 20)
    seen = collections.Counter(row[0] for row in rows)
    assert all(abs(seen[k] - 200 * share) <= 3 for k, share in (("0", 0.3), ("1", 0.6), ("2", 0.1)))
    assert {row for row in rows if row[0] == "2"} <= {f"2 {i}" for i in range(10)}


def test_worker_processes_change_nothing(tokenizer, tmp_path):
    config = {"sources": numbered(tmp_path, [24], {(0, 3)}), "max_tokens": 64, "system": "", "max_broken": 1.0}
    here = iterate(config, tokenizer)
    there = iterate({**config, "workers": 2}, tokenizer)
    for _ in range(8):
        assert equal(next(here), next(there)) and here.skipped == there.skipped
    state = there.get_state()
    want = next(here)
    resumed = iterate(config, tokenizer)  # the state is the same, whoever read
    resumed.set_state(state)
    assert equal(next(resumed), want)
    for iterator in (here, there, resumed):
        iterator.close()


# ---------------------------------------------------------------------------------- invalid samples


def test_broken_samples_are_skipped_and_counted(tokenizer, tmp_path):
    bad = {(0, 3), (0, 11)}
    config = {"sources": numbered(tmp_path, [24], bad), "max_tokens": 64, "system": "", "max_broken": 0.1}
    iterator = iterate(config, tokenizer, batch_size=12)
    rows = [row for _ in range(4) for row in answers(next(iterator), tokenizer)]
    assert "0 3" not in rows and "0 11" not in rows
    assert {f"0 {i}" for i in range(24) if (0, i) not in bad} == set(rows)
    assert [name.split(": ")[0].rsplit("/")[-1] for name in sorted(iterator.skipped)] == ["0.jsonl:12", "0.jsonl:4"]
    assert sum(iterator.skipped.values()) == sum(iterator.get_state()["taken"].values()) - 48 >= 4
    state, want = iterator.get_state(), next(iterator)
    resumed = iterate(config, tokenizer, batch_size=12)
    resumed.set_state(json.loads(json.dumps(state)))
    assert equal(next(resumed), want) and resumed.skipped == iterator.skipped
    iterator.close(), resumed.close()


def test_nothing_but_broken_samples_ends_the_run(tokenizer, tmp_path):
    config = {"sources": numbered(tmp_path, [5], {(0, i) for i in range(5)}), "max_tokens": 64, "system": ""}
    iterator = iterate(config, tokenizer)
    with pytest.raises(UserError, match=r"next \d+ samples are broken, one after another; the last: .*0.jsonl:"):
        next(iterator)
    iterator.close()


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


def test_photographs_end_to_end(tokenizer, tmp_path):
    """Files on disk with augmentation and padding, as configs for photographs use them."""
    rng = np.random.default_rng(0)
    mask = np.zeros((30, 50), np.uint8)
    mask[5:20, 10:40] = 255
    Image.fromarray(rng.integers(0, 255, (30, 50, 3), np.uint8)).save(tmp_path / "i.jpg")
    Image.fromarray(mask).convert("1").save(tmp_path / "m.png")
    record = {
        "image": "i.jpg",
        "mask": "m.png",
        "conversations": [
            {"from": "human", "value": "<image>\nSegment the car in the image."},
            {"from": "gpt", "value": "Sure, the segmentation result: <mask>."},
        ],
    }
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    config = {
        "sources": ("d.jsonl",),
        "root": str(tmp_path),
        "max_tokens": 96,
        "system": "",
        "augment": True,
        "pad_to_square": True,
    }
    iterator = iterate(config, tokenizer, batch_size=6)
    batch = next(iterator)
    iterator.close()
    assert len({row.tobytes() for row in batch["tiles"]}) == 6  # every repetition is another view
    assert (batch["masks"].max(axis=(1, 2, 3, 4)) > 200).all()


def test_shapes_of_a_batch_without_its_data(tokenizer):
    config = {**SHAPES, "max_tiles": 2, "max_masks": 3}
    batch = next(iterate(config, tokenizer))
    assert batch_shapes(config, GEOMETRY, 4) == {k: (x.shape, x.dtype) for k, x in batch.items()}


def test_any_fault_in_one_sample_is_a_broken_sample(tokenizer, tmp_path):
    """Also with what reads the texts before the prompt is checked, and with half an emoji."""
    turns = [
        [{"from": "human", "value": 5}],
        [{"value": "hello"}],
        "hello",
        [["human", "hello"]],
        [{"from": "human", "value": "half \ud83d"}, {"from": "gpt", "value": "an emoji"}],
        [{"from": ["human"], "value": "hello"}],
    ]
    good = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "you"}]
    lines = [{"conversations": t} for t in [good, *turns]]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {
        "sources": (str(tmp_path / "a.jsonl"),),
        "max_tokens": 64,
        "system": "",
        "max_broken": 1.0,
        "augment": True,
        "recolour": 1.0,
        "prompt_drop": 0.5,
    }
    iterator = iterate(config, tokenizer)
    next(iterator), next(iterator)
    assert {name.split(": ")[0].rsplit("/")[-1] for name in iterator.skipped} == {f"a.jsonl:{k}" for k in range(2, 8)}
    assert any("U+D83D" in name for name in iterator.skipped)
    iterator.close()


def test_user_turns_are_human_turns(tokenizer):
    """`prompt_drop` and `recolour` know both names."""
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for who in ("human", "user"):
        turns = [{"from": who, "value": "the red one"}, {"from": "gpt", "value": "<mask>"}]
        unchanged = recolour(Sample(turns, (image,)), np.random.default_rng(0))
        assert np.array_equal(unchanged.images[0], image)
        encoder = SampleEncoder(
            DataConfig.from_config({"max_tokens": 96, "system": "", "prompt_drop": 1.0}), GEOMETRY, tokenizer
        )
        example = encoder.example(Sample(turns, (), (image,)), np.random.default_rng(0))
        assert "about nothing" in tokenizer.decode(example["tokens"])


# ---------------------------------------------------------------------------------- data that changed


def read(iterator, tokenizer, batches):
    return [row for _ in range(batches) for row in answers(next(iterator), tokenizer)]


def resumed(config, tokenizer, state):
    iterator = iterate(config, tokenizer, batch_size=2)
    iterator.set_state(json.loads(json.dumps(state)))
    return iterator


def test_data_that_grew(tokenizer, tmp_path, capfd):
    """The current epoch ends as it began; all samples take part from the next one on."""
    config = {"sources": numbered(tmp_path, [10]), "max_tokens": 64, "system": ""}
    uninterrupted, first = (iterate(config, tokenizer, batch_size=2) for _ in range(2))
    want, seen = read(uninterrupted, tokenizer, 5), read(first, tokenizer, 3)
    state = first.get_state()
    assert state["order"] == {"0": {"spans": [[10, None]], "weight": 10}}
    capfd.readouterr()
    numbered(tmp_path, [20])
    grown = resumed(config, tokenizer, state)
    messages = capfd.readouterr().err.splitlines()
    assert len(messages) == 1 and "0.jsonl: 20 samples, 10 when this run was saved; the current epoch" in messages[0]
    assert read(grown, tokenizer, 2) == want[6:] and sorted(seen + want[6:]) == sorted(f"0 {k}" for k in range(10))
    middle = read(grown, tokenizer, 4)
    later = grown.get_state()
    assert later["order"]["0"]["spans"] == [[10, 10], [20, None]]
    rest = read(grown, tokenizer, 6)
    assert sorted(middle + rest) == sorted(f"0 {k}" for k in range(20))  # one epoch of all
    again = resumed(config, tokenizer, later)  # the state knows of both lengths
    assert read(again, tokenizer, 6) == rest and not capfd.readouterr().err
    for iterator in (uninterrupted, first, grown, again):
        iterator.close()


def test_one_part_of_a_mixture_grew(tokenizer, tmp_path):
    names = numbered(tmp_path, [6, 18])
    config = {"sources": names, "max_tokens": 64, "system": ""}
    uninterrupted, first = (iterate(config, tokenizer, batch_size=2) for _ in range(2))
    want, seen = read(uninterrupted, tokenizer, 12), read(first, tokenizer, 5)
    numbered(tmp_path, [6, 30])
    grown = resumed(config, tokenizer, first.get_state())
    rows = seen + read(grown, tokenizer, 7)
    assert rows == want  # one epoch of both components, as without the change
    later = collections.Counter(read(grown, tokenizer, 20))
    assert all(later[f"1 {k}"] == 1 for k in range(30)) and sum(n for r, n in later.items() if r[0] == "0") == 10
    for iterator in (uninterrupted, first, grown):
        iterator.close()


def test_data_that_shrank(tokenizer, tmp_path, capfd):
    """Missing samples are skipped; the rest keeps its order."""
    config = {"sources": numbered(tmp_path, [10]), "max_tokens": 64, "system": "", "max_broken": 0.5}
    uninterrupted, first = (iterate(config, tokenizer, batch_size=1) for _ in range(2))
    want = read(uninterrupted, tokenizer, 10)
    read(first, tokenizer, 2)
    numbered(tmp_path, [8])
    shrunk = iterate(config, tokenizer, batch_size=1)
    shrunk.set_state(first.get_state())
    assert "8 samples, 10 when this run was saved; the missing ones are skipped" in capfd.readouterr().err
    gone = {"0 8", "0 9"}
    left = [row for row in want[2:] if row not in gone]
    assert read(shrunk, tokenizer, len(left)) == left
    next(shrunk)
    assert sum(shrunk.skipped.values()) >= len(gone & set(want[2:]))
    for iterator in (uninterrupted, first, shrunk):
        iterator.close()


def test_damaged_orders_are_one_line(tokenizer, tmp_path):
    config = {"sources": numbered(tmp_path, [4]), "max_tokens": 64, "system": ""}
    iterator = iterate(config, tokenizer, batch_size=1)
    for order in (
        {"0": {"spans": [[0, None]], "weight": 1}},
        {"0": {"spans": [["x", None]], "weight": 1}},
        {"0": 5},
        {"0": {"spans": [], "weight": 1}},
        {"0": {"spans": [[4]], "weight": 1}},
        5,
    ):
        with pytest.raises(UserError, match="the saved iterator state"):
            iterator.set_state({**iterator.get_state(), "order": order})
    iterator.set_state({**iterator.get_state(), "order": {"0": {}, "1": {}}})  # of other sources
    iterator.close()
