"""Whole steps count, the others are named and skipped; every stored file has a checksum that readers check."""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from argenseg_jax import trees
from argenseg_jax.ckpt import checksums, orbax_io, steps
from argenseg_jax.errors import UserError
from argenseg_jax.train import loop
from tests import bucket
from tests.train import toy

ONE = jax.devices()[:1]


def run(workdir, **kwargs):
    cfg = toy.config(steps=4, checkpoint_every=2, log_every=3, keep=9)
    return loop.run(cfg, str(workdir), toy.phases(cfg), toy.init, devices=ONE, **kwargs)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run: steps 2 and 4, each with ema, and what is frozen."""
    folder = tmp_path_factory.mktemp("made")
    run(folder)
    return folder


@pytest.fixture
def work(made, tmp_path):
    shutil.copytree(made, tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture(autouse=True)
def say_again():
    steps._log_once.cache_clear()


def cut(step, *names):
    for name in names:
        path = step / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


CUTS = {
    "params": "params",
    "params/_METADATA": "params",
    "train": "train",
    "train/_METADATA": "train",
    "ema": "ema",
    "meta": "a readable|a training run|meta",
    "meta/metadata": "meta",
}


@pytest.mark.parametrize("name, lacks", CUTS.items())
def test_a_step_that_lacks_an_item_is_named_and_skipped(work, capfd, name, lacks):
    cut(work / "checkpoints" / "4", name)
    assert steps.complete_steps(work) == [2] and steps.newest_step(work, training=True) == 2
    assert steps.find_step(work).name == "2"
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith(f"{work}/checkpoints: skipped: '4' lacks ")
    assert any(word in err[0] for word in lacks.split("|"))


def test_a_run_goes_round_a_step_that_is_not_whole(work):
    """Step 4 comes again, beside what was in its place."""
    cut(work / "checkpoints" / "4", "train")
    assert run(work)["step"] == 4
    assert steps.complete_steps(work) == [2, 4]
    assert (work / "checkpoints" / "4.incomplete-0").is_dir()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        '{"phase": 1, "data": {}}',
        '{"phase": "lm", "data": [1]}',
        '{"phase": "lm", "data": {}, "frozen": "2"}',
    ],
)
def test_damaged_facts_make_no_whole_step(work, content):
    (work / "checkpoints" / "4" / "meta" / "metadata").write_text(content)
    assert steps.complete_steps(work) == [2]


def test_names_that_are_no_numbers_of_steps(work, capfd):
    for name in ("²", "007", "٣", "9" * 30, "99999999999", "-1", "1.5", "notes", "6.orbax-checkpoint-tmp-1"):
        (work / "checkpoints" / name).mkdir()
    (work / "checkpoints" / "8").write_text("a file")
    assert steps.complete_steps(work) == [2, 4]
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "'²' is not a step" in err and "'8' is not a step" in err and "notes" not in err
    assert run(work)["step"] == 4


def test_an_interrupted_copy_beside_nothing_begins_anew(tmp_path, capfd):
    (tmp_path / "checkpoints" / "9" / "params").mkdir(parents=True)
    assert run(tmp_path)["step"] == 4
    assert "'9' lacks params" in capfd.readouterr().err
    assert steps.complete_steps(tmp_path) == [2, 4]


def test_no_whole_step_beside_metrics_is_refused(work):
    """A new run would overwrite what is left of the old one."""
    for step in ("2", "4"):
        cut(work / "checkpoints" / step, "train")
    with pytest.raises(UserError, match=r"has metrics up to step 4, but no step in checkpoints/ is complete"):
        run(work)
    assert steps.find_step(work).name == "4"  # its weights are there: `evaluate` may use them
    with pytest.raises(UserError, match="2 is not complete: it lacks ema"):
        cut(work / "checkpoints" / "2", "ema")
        steps.find_step(work / "checkpoints" / "2")


def test_weights_alone_are_no_run(tmp_path):
    orbax_io.save_params(tmp_path / "checkpoints" / "0", {"a": np.zeros(2)})
    assert steps.complete_steps(tmp_path) == [0] and steps.newest_step(tmp_path, training=True) is None
    with pytest.raises(UserError, match="step 0 holds weights alone.*init_from="):
        run(tmp_path)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints is a file"):
        run(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_a_bucket_keeps_what_is_frozen(tmp_path):
    """Orbax's own cleaning removes every folder there that it has not marked."""
    with bucket.in_memory():
        root = epath.Path("gs://bucket/w/checkpoints")
        for name in (
            "2/commit_success.txt",
            "2/params/_METADATA",
            "4/params/d/half",
            "frozen/2/params/_METADATA",
            "notes/a",
        ):
            (root / name).write_text("{}")
        orbax_io._clean_bucket(root)
        assert sorted(p.name for p in root.iterdir()) == ["2", "frozen", "notes"]


# ------------------------------------------------------------------------------------ checksums


def listed(folder):
    return json.loads((folder / "checksums-00000.json").read_text())["files"]


def test_every_stored_file_has_a_checksum(made):
    for folder in (made / "checkpoints" / "2", made / "checkpoints" / "4", made / "checkpoints" / "frozen" / "2"):
        found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        assert set(listed(folder)) == found - {"checksums-00000.json"} and len(found) > 5
        checksums.check(epath.Path(folder), os.listdir(folder))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


READERS = {
    "resume": lambda work, **options: run(work, **options),
    "restore": lambda work, **options: orbax_io.restore_params(work, **options),
    "lazily": lambda work, **options: orbax_io.open_params(work, **options),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "where", ["checkpoints/4/params", "checkpoints/4/ema", "checkpoints/4/meta", "checkpoints/frozen/2/params"]
)
def test_a_flipped_byte_is_one_line_that_names_the_file(work, reader, where):
    """The largest file of each part: the one that holds the arrays."""
    largest = max((p for p in (work / where).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    flip(largest)
    with pytest.raises(UserError) as caught:
        READERS[reader](work)
    assert str(caught.value).startswith(f"{largest} is damaged: its bytes do not match its checksum in ")
    assert "\n" not in str(caught.value)


def test_all_flips_are_found(work):
    """One byte of each file in turn; only the checksums say so."""
    step = epath.Path(work / "checkpoints" / "4")
    for name in sorted(listed(work / "checkpoints" / "4")):
        flip(pathlib.Path(step / name))
        with pytest.raises(UserError, match="is damaged"):
            checksums.check(step, os.listdir(step))
        flip(pathlib.Path(step / name))
    checksums.check(step, os.listdir(step))


def test_what_is_not_read_is_not_checked(work):
    flip(next((work / "checkpoints" / "4" / "train" / "d").iterdir()))
    orbax_io.restore_params(work)
    with pytest.raises(UserError, match="4/train/d/.* is damaged"):
        orbax_io.read_train(work)
    with pytest.raises(UserError, match="4/train/d/.* is damaged"):
        run(work)


def test_cut_and_missing_files_are_named(work):
    step = work / "checkpoints" / "4"
    first, _second = sorted((step / "params" / "ocdbt.process_0" / "d").iterdir())[:2]
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{first.name} is damaged"):
        orbax_io.restore_params(work)
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name} is missing"):
        orbax_io.restore_params(work)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("name", ["params/_METADATA", "params/manifest.ocdbt", "meta/metadata"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(work, name, checked):
    path = work / "checkpoints" / "4" / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="a device, pipe or socket"):
        orbax_io.restore_params(work / "checkpoints" / "4", checksums=checked)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "meta/metadata", "metrics/metrics"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_a_run_does_not_wait_for_a_pipe_in_place_of_a_step_s_notes(work, capfd, name, make):
    path = work / "checkpoints" / "4" / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    make(path)
    run(work)
    assert f"'4' lacks a readable {name.split('/')[0]}" in capfd.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"params/_METADATA": 3}}', "\x00"])
def test_damaged_checksums_are_one_line(work, content):
    (work / "checkpoints" / "4" / "checksums-00000.json").write_text(content)
    with pytest.raises(UserError, match="checksums-00000.json"):
        orbax_io.restore_params(work)
    orbax_io.restore_params(work, checksums=False)


def test_checksums_can_be_left_out_and_older_steps_have_none(work, tmp_path):
    run(tmp_path / "plain", checksums=False)
    assert not list((tmp_path / "plain").rglob("checksums-*"))
    want, got = (trees.flatten(orbax_io.restore_params(path)) for path in (work, tmp_path / "plain"))
    assert all(np.array_equal(want[name], got[name]) for name in want)
    for path in work.rglob("checksums-*"):
        path.unlink()
    assert run(work)["step"] == 4


def test_of_several_processes_each_lists_its_own(tmp_path):
    step = epath.Path(tmp_path)
    names = [
        "params/_METADATA",
        "params/d/a",
        "params/ocdbt.process_0/d/b",
        "params/ocdbt.process_1/d/c",
        "params/array_metadatas/process_1",
        "meta/metadata",
    ]
    for name in names:
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_text(name)
    for process in range(2):
        checksums.write(step, process, 2)
    second = json.loads((step / "checksums-00001.json").read_text())
    assert sorted(second["files"]) == ["params/array_metadatas/process_1", "params/ocdbt.process_1/d/c"]
    assert sorted(listed(tmp_path) | second["files"]) == sorted(names) and second["processes"] == 2


def test_a_shared_check_looks_at_every_file_once(tmp_path, monkeypatch):
    step = epath.Path(tmp_path)
    for k in range(7):
        (step / f"p{k}").write_text("x" * k)
    checksums.write(step)
    seen = []
    digest = checksums._digest
    monkeypatch.setattr(checksums, "_digest", lambda path: (seen.append(path.name), digest(path))[1])
    for share in range(3):
        checksums.check(step, [f"p{k}" for k in range(7)], (share, 3))
    assert sorted(seen) == [f"p{k}" for k in range(7)]
