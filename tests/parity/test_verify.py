"""Parity with the recordings of the official PyTorch code; `verify` notices a difference."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from argenseg_jax.errors import UserError
from argenseg_jax.parity import recording
from argenseg_jax.parity.verify import verify
from tests.cli import command
from tests.parity import recorder

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir() and (p / "config.json").exists())
WHOLE = ("A_vqvae_256", "B_vqvae_512", "F_argenseg")


def assert_ok(folder):
    result, rows = verify(folder)
    assert result["ok"], recording.table([row for row in rows if not row.ok])


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c[0] in "EF" else c for c in CASES])
def test_recordings(case):
    assert_ok(GOLDEN / case)


@pytest.mark.golden_full
@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE)
def test_whole_recordings(case):
    assert_ok(pathlib.Path(os.environ["ARGENSEG_GOLDEN"]) / case)


@pytest.fixture
def copy(tmp_path):
    """A recording whose arrays may be changed: copy(change) -> folder."""

    def make(change, case="G_preprocess"):
        folder = tmp_path / case
        shutil.copytree(GOLDEN / case, folder)
        with np.load(folder / "io.npz") as arrays:
            arrays = dict(arrays)
        change(arrays)
        np.savez(folder / "io.npz", **arrays)
        return folder

    return make


def test_a_difference_is_a_miss_and_exit_code_1(copy, capsys):
    def change(arrays):
        arrays["tf/out112"][0, 1, 2] += 1e-2

    folder = copy(change)
    assert command.main("verify", f"--case={folder}") == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ok"] is False and result["misses"] == ["tf/out112"] and result["worst"] > 1


def test_integers_must_be_equal_and_unknown_arrays_are_listed(copy):
    def change(arrays):
        arrays["tile/tiles_u8"][0, 0, 0, 0] ^= 1
        arrays["unheard_of"] = np.zeros(3)

    result, _ = verify(copy(change))
    assert result["misses"] == ["tile/tiles_u8"] and result["unused"] == ["unheard_of"]


def test_groups_may_be_absent(copy):
    """What is left is compared, and nothing else is asked for."""

    def change(arrays):
        for name in list(arrays):
            if not name.startswith(("noprefix/chat_text/", "eval/pred_u8", "eval/plain_L_150x97")):
                del arrays[name]

    result, _ = verify(copy(change))
    assert result["ok"] and not result["unused"]
    assert {"noprefix/chat_text/input_ids", "eval/plain_L_150x97"} < set(result["errors"])


GE_START, GE_END, MASK_CONTEXT, IMG_CONTEXT = (recorder.TEXT + i for i in (10, 11, 12, 2))


@pytest.fixture(scope="module")
def without_images(tmp_path_factory):
    """Guidance without an image (text to image), rows of different lengths, two masks; such a batch."""
    made = recorder.Recorder({4: GE_START, GE_END: 5, 5: GE_START}, patch_nums=(1, 2))
    made.generate("infer_cfg", [[1, 2, 3, 4], [3, 4]], None, calls=3)
    mask = [GE_START, *[MASK_CONTEXT] * 4, GE_END]
    made.train(
        [[1, 2, 3, 4, 5, *mask, 6], [1, 2, 3, 4, 5, 6, 3]],
        None,
        made.rng.uniform(-1, 1, (1, 3, 2, 2)).astype(np.float32),
    )
    made.arrays["infer_cfg/made_up"] = np.zeros(2)
    return made, made.save(tmp_path_factory.mktemp("recording"))


def test_a_part_without_images(without_images):
    made, folder = without_images
    result, rows = verify(folder)
    assert result["ok"], recording.table([row for row in rows if not row.ok])
    assert result["unused"] == ["infer_cfg/made_up"]
    inputs = {"input_ids", "attention_mask", "position_ids", "labels", "masks", "made_up"}
    compared = {name for name in made.arrays if name.partition("/")[2] not in inputs}
    assert compared <= set(result["errors"])
    assert {f"infer_cfg/mask{j}_{kind} by decode/" for j in (0, 1) for kind in ("codes", "image_u8")} <= set(
        result["errors"]
    )


def test_masks_that_the_model_does_not_write_are_misses(without_images, tmp_path):
    """Nothing recorded of a mask is passed over because the replay never came to it."""
    made, _ = without_images
    other = recorder.Recorder({4: 6}, patch_nums=(1, 2))  # answers with text alone
    other.arrays = {name: x for name, x in made.arrays.items() if name.startswith("infer_cfg/")}
    result, _ = verify(other.save(tmp_path / "other"))
    assert {f"infer_cfg/mask{j}_{kind}" for j in (0, 1) for kind in ("codes", "code_logit_max", "image_u8")} <= set(
        result["misses"]
    )
    assert not result["ok"] and result["unused"] == ["infer_cfg/made_up"]


def test_shapes_and_nan_are_misses(copy):
    def change(arrays):
        arrays["tf/out112"] = arrays["tf/out112"][:1]
        arrays["tf/out2_56"][0, 0] = np.nan

    result, _ = verify(copy(change))
    assert result["misses"] == ["tf/out112", "tf/out2_56"]
    json.dumps(result, allow_nan=False)


def test_what_is_no_recording(tmp_path):
    with pytest.raises(UserError, match="config.json does not exist"):
        verify(tmp_path)
    (tmp_path / "config.json").write_text('{"case": "Z_unknown"}')
    with pytest.raises(UserError, match="io.npz does not exist"):
        verify(tmp_path)
    np.savez(tmp_path / "io.npz", x=np.zeros(1))
    with pytest.raises(UserError, match="'Z_unknown' is of no known kind"):
        verify(tmp_path)
    (tmp_path / "config.json").write_text('{"case": "E_other"}')
    with pytest.raises(UserError, match="no key 'variants'"):
        verify(tmp_path)


@pytest.mark.parametrize("measure,error", [("absolute", 2.0), ("scaled", 0.5), ("relative", 0.5), ("norm", 0.4)])
def test_measures(measure, error):
    got, want = np.array([3.0, 6.0]), np.array([3.0, 4.0])
    assert recording._error(got, want, measure) == pytest.approx(error)
