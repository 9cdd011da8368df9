"""Weight files of strangers: the right tensors or one line; never other bytes, and no more memory than the file."""

import io
import json
import lzma
import pickle
import re
import resource
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_folder, tensor_files, torch_file
from argenseg_jax.interop import state_dict as convert
from tests.hostile import mutated

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "c": np.array(7, np.float64),
    "e": np.zeros((0, 3), np.float32),
}
WHOLE = safetensors.numpy.save(ARRAYS)
LENGTH = int.from_bytes(WHOLE[:8], "little")
HEADER, DATA = json.loads(WHOLE[8 : 8 + LENGTH]), WHOLE[8 + LENGTH :]


def packed(header, data=DATA):
    content = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "replace")
    return struct.pack("<Q", len(content)) + content + data


def read(path):
    """{key: array}, or None where the file is refused with one line that names it."""
    try:
        tensors = tensor_files.open_file(path)
        return {key: tensors[key] for key in tensors}
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700 and path.name in str(error)
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


def agrees_with_the_official_reader(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    got = read(path)
    try:
        want = safetensors.numpy.load(content)
    except Exception:  # SafetensorError, or numpy's about a dtype
        assert got is None
        return
    if got is not None:
        assert got.keys() == want.keys()
        for key, array in want.items():
            assert (got[key].dtype, got[key].shape) == (array.dtype, array.shape)
            assert got[key].tobytes() == array.tobytes()
    (folder / "model.safetensors.xz").write_bytes(lzma.compress(content, preset=0))
    again = read(folder / "model.safetensors.xz")
    assert (again is None) == (got is None)
    assert got is None or all(again[key].tobytes() == got[key].tobytes() for key in got)


@given(mutated(HEADER))
def test_headers_changed_field_by_field(folder, header):
    agrees_with_the_official_reader(folder, packed(header))


@given(st.data())
def test_bytes_changed_anywhere(folder, data):
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    agrees_with_the_official_reader(folder, bytes(content))


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, data, says",
    [
        ({"a": entry(), "b": entry()}, bytes(24), "'b' begins at byte 0 of the tensors, not at 24"),
        ({"a": entry(offsets=(-16, 8))}, bytes(24), r"'a' has the data_offsets \[-16, 8\]"),
        ({"a": entry(offsets=(-(10**9), 24 - 10**9))}, bytes(24), "data_offsets"),
        ({"a": entry(offsets=(0.0, 24.0))}, bytes(24), "data_offsets"),
        ({"a": entry(offsets=(24, 0))}, b"", "data_offsets"),
        ({"a": entry(shape=(2.0, 3))}, bytes(24), "the shape"),
        ({"a": entry(shape=(True, 6))}, bytes(24), "the shape"),
        ({"a": entry(shape=(-2, -3))}, bytes(24), "the shape"),
        ({"a": entry(shape=(2, 4))}, bytes(24), "has 24 bytes; F32"),
        ({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}, b"", "the shape"),
        ({"a": entry(offsets=(8, 32))}, bytes(32), "begins at byte 8"),
        ({"a": entry()}, bytes(25), "longer than its header"),
        ({"a": entry()}, bytes(23), "cut off"),
        ({"a": entry(dtype="F4")}, bytes(24), "unknown dtype 'F4'"),
        ({"a": entry(dtype=["F32"])}, bytes(24), "unknown dtype"),
        ({"a": 3}, b"", "has no dtype"),
        ([], b"", "no JSON object"),
        (b'{"a":{},"a":{}}', b"", "'a' occurs twice"),
        (b"[" * 100000, b"", "no JSON object"),
        (b'{"a":' * 100000 + b"1" + b"}" * 100000, b"", "nested more than"),
        ({str(i): entry(shape=(0,), offsets=(0, 0)) for i in range(11)}, b"", "11 tensors"),
        (b"\xef\xbb\xbf{}", b"", "no JSON object"),
        (b"", b"", "no JSON object"),
    ],
)
def test_lying_headers(tmp_path, monkeypatch, header, data, says):
    monkeypatch.setattr(tensor_files, "MAX_TENSORS", 10)
    (tmp_path / "x.safetensors").write_bytes(packed(header, data))
    with pytest.raises(UserError, match=says):
        tensor_files.open_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "less than 8 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "such as a page"),
        (struct.pack("<Q", 40 * 2**30) + b"{", "at most 100000000 are read"),
        (struct.pack("<Q", 50) + b"{}", "cut off"),
    ],
)
def test_what_is_no_weight_file(tmp_path, content, says):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=says):
        tensor_files.open_file(tmp_path / "x.safetensors")


def test_bombs_cost_no_memory(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (tmp_path / "sparse.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 40 * 2**30))
        file.truncate(50 * 2**30)
    size = 2**30
    whole = struct.pack("<Q", 100) + json.dumps({"a": entry(shape=(size // 4,), offsets=(0, size))}).encode().ljust(100)
    compressor = lzma.LZMACompressor(preset=0)
    with (tmp_path / "zeros.safetensors.xz").open("wb") as file:
        file.write(compressor.compress(whole))
        for _ in range(64):  # more than is free of the ratio is enough
            file.write(compressor.compress(bytes(2**20)))
        file.write(compressor.flush())
    (tmp_path / "header.safetensors.xz").write_bytes(lzma.compress(bytes(200 * 2**20), preset=0))
    for name, says in (
        ("sparse.safetensors", "at most 100000000"),
        ("zeros.safetensors.xz", "would become 1073741824"),
        ("header.safetensors.xz", "no JSON object"),
    ):
        with pytest.raises(UserError, match=says):
            tensor_files.open_file(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB; most is the test's own


def test_xz_in_several_streams_cut_and_with_more_behind_it(tmp_path):
    path = tmp_path / "x.safetensors.xz"
    path.write_bytes(lzma.compress(WHOLE[:50]) + bytes(8) + lzma.compress(WHOLE[50:]))
    np.testing.assert_array_equal(read(path)["a"], ARRAYS["a"])
    for content in (lzma.compress(WHOLE)[:-20], lzma.compress(WHOLE[:-1]), lzma.compress(WHOLE + b"x"), b"xz", WHOLE):
        path.write_bytes(content)
        assert read(path) is None


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "config.json",
        "gs://b/x.safetensors",
        "a\0.safetensors",
        5,
        None,
        ["x.safetensors"],
    ],
)
def test_an_index_names_files_of_its_own_folder(tmp_path, name):
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "x.safetensors").write_bytes(WHOLE)
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="index.json: 'a' is in .*no weight file of this folder"):
        hf_folder.open_tensors(inside)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, None, 5])
def test_an_index_without_a_map(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no weight_map"):
        hf_folder.open_tensors(tmp_path)


# ------------------------------------------------------------------ PyTorch's own files


def nested_key():
    return b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."


def doubled_key():
    """t = (t, t) forty times, as a key: 2 ** 40 hashes."""
    return b"\x80\x02})" + b"q\x00h\x00\x86" * 40 + b"K\x01s."


@pytest.mark.torch
@pytest.mark.parametrize(
    "content, says",
    [
        (nested_key(), "nested more than 32 deep"),
        (doubled_key(), "again and again"),
        (pickle.dumps(print, 2), "exhausted"),
        (pickle.dumps({"a": 1}, 4), "does not begin as"),
        (b"", "does not begin"),
        (b"PK\3\4", "cut off"),
        (b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\1\x85R.", "calls __builtin__ bytearray"),
        (b"\x80\x02(", "too early|exhausted"),
        (b"\x80\x020.", "opcode POP"),
        (b"\x80\x02\x86.", "empty stack"),
        (b"\x80\x02h\x05.", "5"),
    ],
)
def test_pickles_that_torch_would_choke_on(tmp_path, content, says):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=f"x.pth cannot be read as PyTorch weights.*({says})"):
        tensor_files.open_file(tmp_path / "x.pth")


def saved(path, state, **options):
    import torch

    torch.save(state, path, **options)
    return path.read_bytes()


@pytest.mark.torch
def test_contents_that_are_no_state_dict(tmp_path):
    import torch

    path = tmp_path / "x.pth"
    for state, says in (
        ({"a": 1}, "no tensors"),
        ([torch.zeros(3)], "no tensors"),
        ({1: torch.zeros(3)}, "under 1, which is no name"),
        ({"a": np.zeros(3)}, "as weights never do"),
        (torch.nn.Linear(2, 2), "more than weights"),
        ({"a": torch.eye(3).to_sparse()}, "as weights never do"),
        ({"state_dict": {"model": {}}}, "no tensors"),
        ({"a": torch.empty(3, device="meta")}, "as weights never do"),
    ):
        saved(path, state)
        with pytest.raises(UserError, match=says):
            tensor_files.open_file(path)
    shared = torch.randn(3, 4)
    saved(
        path,
        {
            "module": {
                "a": shared,
                "b": shared,
                "c": shared.T,
                "d": torch.nn.Parameter(shared[1:, 2]),
                "e": torch.tensor(2.0),
                "f": torch.arange(3),
            },
            "epoch": 3,
            "betas": (0.9, 0.99),
        },
    )
    got = read(path)
    np.testing.assert_array_equal(got["c"], shared.numpy().T)
    np.testing.assert_array_equal(got["d"], shared.numpy()[1:, 2])
    assert list(got) == list("abcdef") and got["e"] == 2 and got["f"].dtype == np.int64


@pytest.mark.torch
def test_zips_that_lie(tmp_path):
    """Storages that are larger than their part, would read the next one; tensors beyond their storage likewise."""
    import torch

    path = tmp_path / "x.pth"
    saved(path, {"a": torch.arange(6.0), "b": torch.zeros(6)})
    with zipfile.ZipFile(path) as parts:
        content = {name: parts.read(name) for name in parts.namelist()}
    data = next(name for name in content if name.endswith("data.pkl"))
    first = next(name for name in content if name.endswith("data/0"))

    def written(method=zipfile.ZIP_STORED, **changes):
        with zipfile.ZipFile(path, "w", method) as parts:
            for name, part in {**content, **changes}.items():
                parts.writestr(name, part)
        with pytest.raises(UserError) as error:
            tensor_files.open_file(path)
        return str(error.value)

    assert "compressed" in written(zipfile.ZIP_DEFLATED)
    assert "data/0 of 24 bytes has 20" in written(**{first: content[first][:20]})
    longer = content[data].replace(b"K\x06tq", b"K\x09tq", 1)  # elements of the storage
    assert longer != content[data] and "data/0 of 36 bytes has 24" in written(**{data: longer})
    shape = content[data].replace(b"K\x00K\x06\x85", b"K\x00K\x07\x85", 1)
    assert shape != content[data] and "larger than its array of 6" in written(**{data: shape})
    offset = content[data].replace(b"K\x00K\x06\x85", b"K\x01K\x06\x85", 1)
    assert offset != content[data] and "larger than its array of 6" in written(**{data: offset})
    assert "cannot be read" in written(**{data: b""})


@pytest.fixture(scope="module")
def pytorch_files(folder):
    """A state dict in both forms; made once, as torch writes a random id into each."""
    import torch

    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).bfloat16(), "c": {"x": (1, 2)}}
    return [saved(folder / "whole.pth", state, _use_new_zipfile_serialization=new) for new in (False, True)]


@pytest.mark.torch
@given(st.data())
def test_pytorch_files_changed_anywhere(folder, pytorch_files, data):
    path, content = folder / "x.pth", bytearray(data.draw(st.sampled_from(pytorch_files)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path.write_bytes(content)
    got = read(path)
    assert got is None or all(array.nbytes <= len(content) for array in got.values())


def test_a_pickle_is_gone_through_without_being_built():
    plain = pickle.dumps({"a": [1, 2.0, "x", None, True, (1, 2)], "b": {"c": ()}}, 2)
    assert torch_file.check_pickle(io.BytesIO(plain)) == {}
    with pytest.raises(ValueError, match="opcode"):
        torch_file.check_pickle(io.BytesIO(pickle.dumps(re.compile("x"), 5)))


def test_ints_are_no_weights():
    """The same bytes under another dtype would become other numbers."""
    for dtype in (np.int32, np.uint32, np.int64, np.bool_, ml_dtypes.float8_e4m3fn):
        lazy = tensor_files.Lazy.of(np.ones((4, 3), dtype))
        shapes = {"connector": {"fc2": {"kernel": np.zeros((3, 4), np.float32)}}}
        with pytest.raises(UserError, match=f"'mlp1.3.weight' is {np.dtype(dtype).name}; weights are float64, float32"):
            convert.Import(tensor_files.Tensors({"mlp1.3.weight": lazy}), shapes)
