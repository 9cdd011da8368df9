"""`prepare`: the same bytes in any process, an interrupted job resumes, invalid samples are named."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from argenseg_jax import locks
from argenseg_jax.data import mixture, prepare, transforms
from argenseg_jax.data.nano_tokenizer import nano_tokenizer
from argenseg_jax.data.pipeline import Geometry, train_iterator
from argenseg_jax.data.prepare import Job
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import prepared
from argenseg_jax.data.statistics import Statistics, format_summary
from argenseg_jax.data.synthetic.shapes import ShapesSource, corpus
from argenseg_jax.errors import SampleError, UserError
from tests.data.synthetic.test_shapes import assert_same
from tests.hostile.folders import fill

SHAPES = "shapes:full:train:23"
TURNS = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]


def job(out, *names, **options):
    return Job(tuple(map(str, names or [SHAPES])), str(out), **{"shard_samples": 5, **options})


def chat(path, count, invalid=()):
    """A JSONL of chat samples whose answers are their numbers; those in `invalid` ask for a mask."""
    lines = [
        {"conversations": [TURNS[0], {"from": "gpt", "value": f"{i}" + " <mask>" * (i in invalid)}]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def shards(folder):
    return {s["file"]: s["sha256"] for s in prepared.read_manifest(folder)["shards"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 drawn scenes in 5 shards."""
    out = tmp_path_factory.mktemp("prepared") / "shapes"
    prepare.prepare(job(out))
    return out


def test_a_prepared_folder_is_the_source_that_it_was_made_of(folder):
    drawn = ShapesSource("full", "train", size=23)
    for name in (str(folder), f"prepared:{folder}"):
        read = mixture.open_source(name)
        assert len(read) == 23
        for index in (22, 0, 9):
            assert_same(read[index], drawn[index])
    with pytest.raises(IndexError):
        read[23]
    assert len(list(folder.glob("*.array_record-*-of-00005"))) == 5
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]


def test_tfds_opens_it_by_itself(folder):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    assert builder.info.splits["train"].shard_lengths == [5, 5, 5, 5, 3]
    record = builder.as_data_source(split="train")[7]
    want = ShapesSource("full", "train", size=23)[7]
    np.testing.assert_array_equal(record["images"][0], want.images[0])


def test_processes_write_the_same_bytes(folder, tmp_path):
    again = prepare.prepare(job(tmp_path / "again"), workers=2)
    assert shards(tmp_path / "again") == shards(folder)
    assert again == json.loads((folder / "summary.json").read_text())


@pytest.mark.beam
def test_beam_writes_the_same_bytes(folder, tmp_path):
    done = prepare.prepare(job(tmp_path / "beam"), runner="DirectRunner", beam_options=["direct_num_workers=1"])
    assert shards(tmp_path / "beam") == shards(folder) and done["samples"] == 23


@pytest.mark.beam
@pytest.mark.parametrize(
    "runner, option, says",
    [
        ("nosuch", "direct_num_workers=1", "Unexpected pipeline runner: nosuch"),
        ("DirectRunner", "direct_num_workers=x", "invalid int value: 'x'"),
        ("DirectRunner", "=", "name=value"),
    ],
)
def test_what_beam_refuses_is_one_line(tmp_path, capsys, runner, option, says):
    with pytest.raises(UserError, match=says):
        prepare.prepare(job(tmp_path / "x"), runner=runner, beam_options=[option])
    assert "usage:" not in capsys.readouterr().err


def test_a_runner_needs_beam(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 'argenseg_jax\[beam\]'"):
        prepare.prepare(job(tmp_path / "x"), runner="DirectRunner")


def test_a_folder_in_use_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with locks.Lock(out / locks.FILE, "x"):
        with pytest.raises(UserError, match=f"^--out: {out} is in use by process {os.getpid()} on "):
            prepare.prepare(job(out))
        assert os.listdir(out) == [locks.FILE]
    assert prepare.prepare(job(out))["samples"] == 23 and not (out / locks.FILE).exists()


def full(*_, **__):
    raise RuntimeError("INTERNAL: Failed to write: No space left on device")


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare.tfds.core.ExampleWriter, "write", full)
        with pytest.raises(
            UserError, match=r"array_record-00000-of-\d+ cannot be written \(No space left on device\)$"
        ):
            prepare.prepare(job(out))
    assert sorted(os.listdir(out)) == [prepare.PLAN]
    assert prepare.prepare(job(out))["samples"] == 23


def test_whole_shards_are_kept_and_others_written_again(folder, tmp_path):
    out = tmp_path / "out"
    prepare.prepare(job(out))
    intact, torn, lost = sorted(out.glob("*.array_record-*"))[:3]
    os.utime(intact, (1, 1))
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    lost.unlink()
    (out / f".{lost.name}.abc.tmp").write_bytes(b"half")
    (out / prepared.MANIFEST).unlink()
    with pytest.raises(UserError, match="has not finished it .5 shards so far.: run the same command"):
        mixture.open_source(str(out))
    prepare.prepare(job(out))
    assert shards(out) == shards(folder) and intact.stat().st_mtime == 1
    assert not list(out.glob(".*.tmp"))


def test_another_plan_is_refused(folder, tmp_path):
    for change in ({"resize": 32}, {"shard_samples": 6}):
        with pytest.raises(UserError, match=f"begun differently .{next(iter(change))}: "):
            prepare.prepare(job(folder, **change))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        prepare.prepare(job(tmp_path))
    with pytest.raises(UserError, match="an endless source"):
        prepare.prepare(job(tmp_path / "x", "shapes:full:train"))


@pytest.mark.slow
def test_a_killed_preparation_goes_on(tmp_path):
    """kill -9 in the middle; complete shards stay, and the result is that of one run."""
    big = {"shard_samples": 40}
    prepare.prepare(job(tmp_path / "whole", "shapes:full:train:400", **big))
    out = tmp_path / "out"
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                "from argenseg_jax.data import prepare; prepare.prepare(prepare.Job("
                f"('shapes:full:train:400',), {str(out)!r}, shard_samples=40))"
            ),
        ],
        stderr=subprocess.DEVNULL,
    )
    while len(list((out / "shards").glob("*.json"))) < 2:
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = sorted((out / "shards").glob("*.json"))
    assert 2 <= len(done) < 10 and not (out / prepared.MANIFEST).exists()
    times = {p: p.stat().st_mtime_ns for p in done}
    prepare.prepare(job(out, "shapes:full:train:400", **big))
    assert {p: p.stat().st_mtime_ns for p in done} == times
    assert shards(out) == shards(tmp_path / "whole") and not list(out.glob(".*.tmp"))


# ------------------------------------------------------------------------------- faults of a folder


@pytest.mark.parametrize(
    "fault, says",
    [
        (lambda p: p.unlink(), "missing shard"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "bytes, [0-9]+ were written"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"x"), "checksum mismatch"),
    ],
)
def test_faulty_shards_are_named(tmp_path, fault, says):
    prepare.prepare(job(tmp_path / "o", chat(tmp_path / "c.jsonl", 7)))
    shard = sorted((tmp_path / "o").glob("*.array_record-*"))[1]
    fault(shard)
    with pytest.raises(UserError, match=f"{shard.name}: .*{says}"):
        mixture.open_source(str(tmp_path / "o"))


def test_large_folders_are_not_hashed_when_opened(tmp_path, monkeypatch):
    """There a record that cannot be read is one invalid sample, with its shard."""
    out = tmp_path / "o"
    prepare.prepare(job(out, "shapes:full:train:5"))
    shard = next(out.glob("*.array_record-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 3 : len(content) // 2] = b"\0" * (len(content) // 2 - len(content) // 3)
    shard.write_bytes(content)
    monkeypatch.setattr(prepared, "_AT_ONCE", 0)
    source = mixture.open_source(str(out))
    with pytest.raises(SampleError, match=f"{shard.name}: sample . cannot be read"):
        [source[i] for i in range(5)]


def test_folders_that_are_no_data_set(tmp_path):
    with pytest.raises(UserError, match="looked for dataset_info.json.*prepared.json.*own:FOLDER"):
        mixture.open_source(str(tmp_path))
    with pytest.raises(UserError, match="no prepared data set; looked for prepared.json"):
        mixture.open_source(f"prepared:{tmp_path}")
    (tmp_path / "prepared.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="not a manifest as `prepare` writes it"):
        mixture.open_source(str(tmp_path))
    (tmp_path / "prepared.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        mixture.open_source(str(tmp_path))


# ------------------------------------------------------------------------------------ what it holds


def test_invalid_samples_are_skipped_and_named(tmp_path):
    source = chat(tmp_path / "c.jsonl", 12, invalid={2, 7})
    (tmp_path / "c.jsonl").write_text(source.read_text() + "oops\n")
    done = prepare.prepare(job(tmp_path / "o", source))
    assert (done["samples"], done["broken"], done["shards"]) == (10, 3, 3)
    reasons = [fault["reason"] for fault in done["broken_samples"]]
    assert [r.partition(": ")[0].rpartition("/")[2] for r in reasons] == ["c.jsonl:3", "c.jsonl:8", "c.jsonl:13"]
    assert "1 <mask> placeholders in the answers for 0 masks" in reasons[0] and "malformed JSON" in reasons[2]
    read = mixture.open_source(str(tmp_path / "o"))
    assert [read[i].conversations[1]["value"] for i in range(len(read))] == [
        str(i) for i in range(12) if i not in (2, 7)
    ]
    with pytest.raises(UserError, match="all 3 samples are broken; the first: .*c.jsonl:1"):
        prepare.prepare(job(tmp_path / "none", chat(tmp_path / "c.jsonl", 3, invalid={0, 1, 2})))


def test_statistics_add_up():
    samples = [ShapesSource("full", "test")[i] for i in range(9)] + [Sample(TURNS)]
    parts = [Statistics(), Statistics(), Statistics()]
    for i, sample in enumerate(samples):
        parts[i % 2].add(sample), parts[2].add(sample)
    added = Statistics.from_json(json.loads(json.dumps((parts[0] + parts[1]).to_json())))
    summary = added.summary()
    assert summary == parts[2].summary() and (summary["pictures"], summary["masks"]) == (9, 9)
    empty = sum(not s.masks[0].any() for s in samples[:9])
    assert summary["empty_masks"] == empty == summary["mask_area"].get("<= 0", 0)
    assert sum(summary["mask_area"].values()) == 9 and summary["without_picture"] == 1
    assert sum(summary["question_words"].values()) == sum(summary["classes"].values()) == 10
    assert summary["classes"]["Hello?"] == 1 and summary["answer_words"]["<= 1"] == 1
    assert summary["width"] == {"min": 64, "mean": 64.0, "max": 64}
    assert "9 images, 9 masks" in format_summary(summary) and "and 7 more" in format_summary(
        {**summary, "distinct_classes": 14}
    )


def test_a_mixture_stays_one(tmp_path):
    """Weights, components and their order: training on the prepared folder sees the same batches."""
    chat(tmp_path / "a.jsonl", 6), chat(tmp_path / "b.jsonl", 9)
    (tmp_path / "meta.json").write_text(
        json.dumps(
            {
                "a": {"root": ".", "annotation": "a.jsonl", "repeat_time": 0.5},
                "b": {"root": ".", "annotation": "b.jsonl", "repeat_time": 2},
            }
        )
    )
    names = (f"{tmp_path}/meta.json", "shapes:full:train:8*3")
    prepare.prepare(job(tmp_path / "o", *names))
    want, got = mixture.open_mixture(names), mixture.open_mixture((str(tmp_path / "o"),))
    assert [p[1:] for p in got] == [p[1:] for p in want] == [(3, 3.0), (9, 18.0), (8, 24.0)]
    config = {"max_tokens": 96, "system": ""}
    tokenizer, size = nano_tokenizer(16, corpus()), Geometry(32, 16, 64, 21)
    first, second = (
        train_iterator({**config, "sources": s, "workers": w}, tokenizer, size, seed=0, batch_size=4)
        for s, w in ((names, 0), ((str(tmp_path / "o"),), 2))
    )
    for _ in range(6):
        one, two = next(first), next(second)
        assert all(np.array_equal(one[key], two[key]) for key in one)
    first.close(), second.close()
    with pytest.raises(UserError, match="above 0"):
        mixture.open_mixture((f"{tmp_path}/o*0",))


def test_draws(tmp_path):
    """Sources that leave something to chance are written several times, others once."""
    names = ("interactive:point:shapes:full:train:4:cs=1,rel=0,none=0", "shapes:full:train:3")
    done = prepare.prepare(job(tmp_path / "o", *names, draws=3))
    assert done["samples"] == 3 * 4 + 3
    read = mixture.open_source(str(tmp_path / "o"))
    asked = [read[k].conversations[0]["value"] for k in (0, 4, 8)]
    assert len(set(asked)) > 1  # another point of the same scene
    np.testing.assert_array_equal(read[0].masks[0], read[4].masks[0])
    parts = mixture.open_mixture((str(tmp_path / "o"),))
    assert [(p.length, p.weight) for p in parts] == [(12, 4.0), (3, 3.0)]


def test_resized(tmp_path):
    prepare.prepare(job(tmp_path / "o", resize=32))
    read, drawn = mixture.open_source(str(tmp_path / "o")), ShapesSource("full", "train", size=23)
    for index in (0, 5):
        small, original = read[index], drawn[index]
        np.testing.assert_array_equal(  # what a model with tiles of 32 sees, to the bit
            transforms.image_tiles(small.images[0], 32), transforms.image_tiles(original.images[0], 32)
        )
        share = [np.mean(s.masks[0] > 0) for s in (small, original)]
        assert small.masks[0].shape == (32, 32) == small.meta["all_objects_mask"].shape
        assert share[0] == pytest.approx(share[1], abs=0.01)
        assert set(np.unique(small.masks[0])) <= {0, 255}
    colour = Sample([], (), (np.zeros((8, 6, 3), np.uint8),), {"crowds": [np.ones((8, 6), np.uint8) * 255]})
    small = prepare.resize_sample(colour, 4)
    assert small.masks[0].shape == (4, 4, 3) and small.meta["crowds"][0].tolist() == [[255] * 4] * 4


@dataclasses.dataclass(frozen=True)
class Areas:
    """Stands for a mask tokenizer: the codes of a mask are its area."""

    num_codes: int = 3

    def identity(self):
        return {"vqvae": "areas"}

    def __call__(self, masks):
        assert len(masks) <= prepare.GROUP
        return np.stack([np.full(self.num_codes, np.count_nonzero(m), np.int32) for m in masks])


def test_codes_are_kept_beside_the_masks(tmp_path):
    names = (SHAPES, chat(tmp_path / "c.jsonl", 2))
    prepare.prepare(job(tmp_path / "o", *names, coder=Areas(), resize=16, shard_samples=20))
    read, drawn = mixture.open_source(str(tmp_path / "o")), ShapesSource("full", "train", size=23)
    assert read.codes == {"vqvae": "areas"}
    for index in (0, 15, 16, 22):  # of the masks before they were resized
        assert read[index].codes.tolist() == [[np.count_nonzero(drawn[index].masks[0])] * 3]
    assert read[23].codes.shape == (0, 3)
    size = Geometry(image_size=16, image_tokens=4, mask_size=64, code_tokens=3)
    config = {"sources": (str(tmp_path / "o"),), "max_tokens": 96, "system": "", "codes": True}
    tokenizer = nano_tokenizer(16, corpus())
    iterator = train_iterator(config, tokenizer, size, seed=0, batch_size=4)
    masks = next(iterator)["masks"]
    iterator.close()
    assert masks.shape == (4, 1, 3) and masks.dtype == np.int32
    for change, says in (
        ({"augment": True}, "its stored codes are those of unchanged masks"),
        ({"sources": (SHAPES,)}, "no codes of its masks are stored; prepare it with --codes"),
    ):
        iterator = train_iterator({**config, **change}, tokenizer, size, seed=0, batch_size=4)
        with pytest.raises(UserError, match=says):
            next(iterator)
        iterator.close()


# ------------------------------------------------------------------- as training reads it directly


def test_what_is_stored_is_what_is_read_directly(tmp_path):
    """Every kind of source; also the arrays that scores need."""
    names = [name.format(tmp_path / "in") for name in fill(tmp_path / "in")]
    names += ["shapes:simple:train:3", "shapes-draw:full:train:3", "shapes-chat:full:train:3"]
    prepare.prepare(prepare.Job(tuple(names), str(tmp_path / "out")))
    stored = iter(mixture.open_source(str(tmp_path / "out"))[k] for k in range(10**6))
    for component in mixture.open_mixture(names):
        for k in range(component.length):
            want, found = component.source[k], next(stored)
            assert [dict(turn) for turn in want.conversations] == list(found.conversations)
            assert len(want.images) == len(found.images) and len(want.masks) == len(found.masks)
            for a, b in zip((*want.images, *want.masks), (*found.images, *found.masks), strict=True):
                assert a.dtype == b.dtype and np.array_equal(a, b)
            assert want.meta.keys() == found.meta.keys()
            for key, value in want.meta.items():
                if isinstance(value, (np.ndarray, list)):
                    assert np.array_equal(value, found.meta[key]), key
                else:
                    assert value == found.meta[key], key


def test_broken_samples_write_the_same_bytes_every_time(tmp_path):
    """F29: messages held the addresses of objects in memory."""
    fill(tmp_path / "in")
    (tmp_path / "in/own/images/a.png").write_bytes(b"no picture")
    names = (f"own:{tmp_path / 'in/own'}", f"own:{tmp_path / 'in/masks'}")
    for out in ("one", "two"):
        prepare.prepare(prepare.Job(names, str(tmp_path / out)))
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 7
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    """F30: every builder of TFDS left an empty folder there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    prepare.prepare(prepare.Job(("shapes:simple:test:4",), str(tmp_path / "out"), shard_samples=2))
    mixture.open_source(str(tmp_path / "out"))[0]
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("name", ("plan.json", "shards/00000.json"))
@pytest.mark.parametrize("content", ("[]", "null", "{", "5", "{}", '{"samples": "x"}', "[" * 10**5))
def test_damaged_notes_are_one_line(tmp_path, name, content):
    job = prepare.Job(("shapes:simple:test:4",), str(tmp_path / "out"), shard_samples=2)
    prepare.prepare(job)
    (tmp_path / "out/prepared.json").unlink()
    (tmp_path / "out" / name).write_text(content)
    try:
        prepare.prepare(job)  # a damaged note of a shard: the shard is written again
    except UserError as error:
        assert name.startswith("plan") and "\n" not in str(error)
    else:
        assert len(mixture.open_source(str(tmp_path / "out"))) == 4
