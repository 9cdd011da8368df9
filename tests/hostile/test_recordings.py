"""Recordings of strangers: `verify` compares, lists what it does not know, or says in one line what is wrong."""

import io
import json
import pathlib
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argenseg_jax.errors import UserError
from argenseg_jax.parity import decoding, end_to_end, recording, verify
from tests.hostile import changed, mutated, places
from tests.parity.recorder import PAD, TEXT, Recorder

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
OPERATORS = GOLDEN / "C_quant_ops"
IMG_CONTEXT, GE_START = TEXT + 2, TEXT + 10


def one_line(error: UserError, folder: pathlib.Path) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 900 and str(folder) in text, text


def report(folder: pathlib.Path) -> dict | None:
    """The result, checked to be whole; None where the recording was refused in one line."""
    try:
        result, rows = verify.verify(folder)
    except UserError as error:
        one_line(error, folder)
        return None
    json.dumps(result, allow_nan=False)
    recording.table(rows)
    seen = set(result["errors"]) | set(result["unused"])
    outputs = [name for name in np.load(folder / "io.npz") if name.startswith(("area", "bicubic", "phi_out"))]
    assert set(outputs) <= seen
    return result


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """(folder, config, arrays) of a small recording of operators, to be written anew."""
    folder = tmp_path_factory.mktemp("recordings") / "C"
    folder.mkdir()
    arrays = dict(np.load(OPERATORS / "io.npz"))
    keep = {
        name: arrays[name]
        for name in (
            "x_16",
            "area_16_to_2",
            "small_16_2",
            "bicubic_2_to_16",
            "areaM_16_to_2",
            "phi_in",
            "phi_weight",
            "phi_bias",
            "phi_out",
            "nearest2x_in",
            "nearest2x_out",
        )
    }
    config = json.loads((OPERATORS / "config.json").read_text())
    config["phi"] = {"2": config["phi"]["2"]}
    return folder, config, keep


def written(folder, config, arrays) -> pathlib.Path:
    (folder / "config.json").write_text(json.dumps(config))
    np.savez(folder / "io.npz", **arrays)
    return folder


def test_the_recording_that_is_damaged_below(operators):
    assert report(written(*operators))["ok"]


@given(st.data())
@settings(max_examples=settings.default.max_examples // 2)
def test_odd_configs(operators, data):
    folder, config, arrays = operators
    report(written(folder, data.draw(mutated(config)), arrays))


ODD_ARRAYS = {
    "gone": lambda x: None,
    "empty": lambda x: x[:0],
    "a scalar": lambda x: x.reshape(-1)[0],
    "nan": lambda x: x * np.nan,
    "inf": lambda x: x + np.inf,
    "whole numbers": lambda x: x.astype(np.int64),
    "half": lambda x: x.astype(np.float16),
    "an axis more": lambda x: x[None],
    "flat": lambda x: x.reshape(-1),
    "bools": lambda x: x > 0,
    "bytes": lambda x: x.astype(np.float16).view("V2"),
}


@given(st.data())
@settings(max_examples=settings.default.max_examples // 2)
def test_odd_arrays(operators, data):
    folder, config, arrays = operators
    name = data.draw(st.sampled_from(sorted(arrays)))
    odd = ODD_ARRAYS[data.draw(st.sampled_from(sorted(ODD_ARRAYS)))](arrays[name])
    others = {k: x for k, x in arrays.items() if k != name}
    result = report(written(folder, config, others if odd is None else {**others, name: odd}))
    if odd is not None and result and name.startswith("area"):
        assert name in result["misses"]


def npz(**entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(array) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


FILES = {
    "empty": (b"", "io.npz cannot be read"),
    "text": (b"x" * 99, "io.npz cannot be read"),
    "one array": (npy([1.0]), "io.npz cannot be read"),
    "cut off": (npz(**{"x.npy": npy(np.ones(99))})[:-40], "io.npz cannot be read"),
    "a pickle": (npz(**{"x.npy": npy(np.asarray([None], object))}), "array 'x' cannot be read.*[Oo]bject"),
    "texts": (npz(**{"x.npy": npy(["a"])}), "array 'x' cannot be read: it holds <U1, not numbers"),
    "records": (npz(**{"x.npy": npy(np.zeros(2, "i4,f4"))}), "array 'x' cannot be read: it holds .*not numbers"),
    "complex": (npz(**{"x.npy": npy([1j])}), "array 'x' cannot be read: it holds complex128"),
    "no array": (npz(**{"x.npy": b"nonsense"}), "array 'x' cannot be read"),
    "cut array": (npz(**{"x.npy": npy(np.ones(99))[:-5]}), "array 'x' cannot be read"),
    "a huge shape": (npz(**{"x.npy": npy(np.ones(1)).replace(b"(1,)", b"(9" + b"9" * 12 + b",)")}), "array 'x'"),
    "no .npz": (None, "io.npz does not exist"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_arrays(tmp_path, name):
    content, why = FILES[name]
    (tmp_path / "config.json").write_text('{"case": "C_x"}')
    if content is not None:
        (tmp_path / "io.npz").write_bytes(content)
    with pytest.raises(UserError, match=why) as caught:
        verify.verify(tmp_path)
    one_line(caught.value, tmp_path)


def test_archives_that_unpack_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "_MAX_ARRAYS", 1000)
    written(tmp_path, {"case": "C_x"}, {"x": np.zeros(10**4)})
    with pytest.raises(UserError, match="unpacks to .* bytes; at most 1000 are read"):
        verify.verify(tmp_path)


# ---- kind F: what is wrong is found before anything compiles


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(recorder, folder) of a model with one text prompt, one with an image, and a training batch."""
    made = Recorder(patch_nums=(1, 2))
    made.arrays = {
        "infer/input_ids": np.asarray([[PAD, IMG_CONTEXT, 3]]),
        "infer/attention_mask": np.asarray([[0, 1, 1]]),
        "infer/pixel_values": made.pixels(1),
        "infer/generated_tokens": np.asarray([[5, 6]]),
        "infer/call_kinds_1_is_mask": np.zeros(2, int),
        "train/input_ids": np.asarray([[1, IMG_CONTEXT, GE_START, 5]]),
        "train/labels": np.full((1, 4), 5),
        "train/pixel_values": made.pixels(1),
        "train/masks": np.zeros((1, 3, 2, 2), np.float32),
    }
    return made, made.save(tmp_path_factory.mktemp("recording"))


def opened(tiny, **arrays):
    """Reads the prompts and the batch of the recording with some arrays changed; None takes one out."""
    made, folder = tiny
    content = {name: x for name, x in {**made.arrays, **arrays}.items() if x is not None}
    np.savez(folder / "io.npz", **content)
    record = recording.Recording(folder)
    return decoding._Replay(record, made.model, made.params, "infer/", None), end_to_end._batch(record, made.model)


def test_what_may_be_absent(tiny):
    """Masks of attention, positions and kinds of calls follow from the rest; a prompt needs no image."""
    replay, batch = opened(tiny, **{"infer/attention_mask": None, "infer/call_kinds_1_is_mask": None})
    assert replay.real.all() and replay.text_calls == 2 and replay.num_masks == 0
    assert replay.tiles.shape == (1, 1, 16, 16, 3) and batch["tiles"].shape == (1, 1, 16, 16, 3)
    replay, batch = opened(
        tiny,
        **{
            "infer/input_ids": np.asarray([[1, 2, 3]]),
            "infer/pixel_values": None,
            "train/pixel_values": None,
            "train/input_ids": np.asarray([[1, 2, 3, 5]]),
            "train/masks": None,
        },
    )
    assert replay.tiles is None and batch["tiles"].shape[1] == batch["masks"].shape[1] == 0
    assert batch["positions"].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    "name, value, why",
    [
        ("infer/input_ids", np.asarray([[PAD, 999, 3]]), "has values of 3 to 999; ids are 0 to 37"),
        ("infer/input_ids", np.asarray([[PAD, -1, 3]]), "has values of -1 to 8"),
        ("infer/input_ids", np.asarray([PAD, IMG_CONTEXT, 3]), r"has the shape \(3,\), not 2 axes"),
        ("infer/input_ids", np.ones((1, 3)), "is float64, not whole numbers"),
        ("infer/input_ids", np.asarray([[PAD, IMG_CONTEXT, IMG_CONTEXT]]), "has 1 tiles for the 2 in"),
        ("infer/attention_mask", np.asarray([[0, 0, 0]]), "leaves nothing of a row"),
        ("infer/attention_mask", np.ones((1, 2), int), "does not fit the input_ids"),
        ("infer/pixel_values", None, "io.npz has no array 'infer/pixel_values'"),
        ("infer/pixel_values", np.zeros((1, 3, 8, 8), np.float32), r"not \(any, 3, 16, 16\)"),
        ("infer/pixel_values", np.zeros((2, 3, 16, 16), np.float32), "has 2 tiles for the 1 in the prompts"),
        ("infer/pixel_values", np.zeros((1, 3, 16, 16), int), "is int64, not floats"),
        ("infer/call_kinds_1_is_mask", np.asarray([0, 7]), "has values of 0 to 7"),
        ("train/labels", None, "has no array 'train/labels'"),
        ("train/labels", np.zeros((1, 3), int), "not that of the input_ids"),
        ("train/masks", np.zeros((1, 3, 4, 4), np.float32), r"not \(any, 3, 2, 2\)"),
        ("train/masks", np.zeros((2, 3, 2, 2), np.float32), "has 2 masks for the 1 in the rows"),
        ("train/image_flags", np.zeros(1, int), "train/pixel_values' has 0 tiles for the 1"),
        ("train/mask_flags", np.zeros(3, int), "has 3 flags for 1 masks"),
    ],
)
def test_arrays_that_do_not_fit_each_other(tiny, name, value, why):
    with pytest.raises(UserError, match=why) as caught:
        opened(tiny, **{name: value})
    one_line(caught.value, tiny[1])
    assert name in str(caught.value) or "pixel_values" in str(caught.value)


@given(st.data())
@settings(max_examples=settings.default.max_examples // 4)
def test_odd_sizes_of_a_model(tiny, data):
    """Every place of config.json; sizes that fit the weights are those of the recording."""
    made, folder = tiny
    path = data.draw(st.sampled_from([p for p in places(made.config) if p]))
    value = data.draw(st.sampled_from([None, True, 0, -1, 3, 0.5, 2**31, "x", [], [1], {}, [2**31], [0], [1] * 99]))
    (folder / "config.json").write_text(json.dumps(changed(made.config, path, value)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_to_end, "compare_training", lambda *args: None)
        patch.setattr(end_to_end, "compare_decoding", lambda *args: None)
        report(folder)
    (folder / "config.json").write_text(json.dumps(made.config))
