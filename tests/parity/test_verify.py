"""Parity with the recordings of the official PyTorch code; `verify` notices a difference."""
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from argenseg_jax.cli import __main__ as cli
from argenseg_jax.errors import UserError
from argenseg_jax.parity import recording
from argenseg_jax.parity.verify import verify

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir() and (p / "config.json").exists())
WHOLE = ("A_vqvae_256", "B_vqvae_512", "F_argenseg")


def assert_ok(folder):
    result, rows = verify(folder)
    assert result["ok"], recording.table([row for row in rows if not row.ok])


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c[0] in "EF" else c
                                  for c in CASES])
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
    assert cli.main(["verify", f"--case={folder}"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ok"] is False and result["misses"] == ["tf/out112"] and result["worst"] > 1


def test_integers_must_be_equal_and_unknown_arrays_are_misses(copy):
    def change(arrays):
        arrays["tile/tiles_u8"][0, 0, 0, 0] ^= 1
        arrays["unheard_of"] = np.zeros(3)

    result, _ = verify(copy(change))
    assert result["misses"] == ["tile/tiles_u8", "unheard_of"]


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


@pytest.mark.parametrize("measure,error", [("absolute", 2.0), ("scaled", 0.5), ("relative", 0.5),
                                           ("norm", 0.4)])
def test_measures(measure, error):
    got, want = np.array([3.0, 6.0]), np.array([3.0, 4.0])
    assert recording._error(got, want, measure) == pytest.approx(error)
