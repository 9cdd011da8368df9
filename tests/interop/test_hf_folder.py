"""HF-style folders: what is written is read back; broken and foreign files are named."""

import json
import lzma
import pathlib
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from argenseg_jax import trees
from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_config, hf_folder, tensor_files, torch_file, weight_map
from argenseg_jax.interop import state_dict as torch_convert
from argenseg_jax.models import variants
from argenseg_jax.parity import end_to_end, recording

CFG = {"variant": "nano"}
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def nano():
    model = variants.build(CFG)
    rng = np.random.default_rng(1)
    flat = {
        name: rng.standard_normal(s.shape).astype(np.float32)
        for name, s in trees.flatten(hf_folder.param_shapes(model)).items()
    }
    flat["llm/embed/embedding"][model.vocab.size :] = 0
    return model, trees.unflatten(flat)


def same(a, b):
    a, b = trees.flatten(a), trees.flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("shard", [1 << 30, 300_000])
def test_folder_round_trip(nano, tmp_path, monkeypatch, shard):
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", shard)
    model, params = nano
    words = tmp_path / "tokenizer.json"
    words.write_text("{}")
    out = tmp_path / "out"
    hf_folder.save_folder(out, params, CFG, [words], texts={"note.txt": "x"})
    names = sorted(f.name for f in out.iterdir())
    assert {"config.json", "note.txt", "tokenizer.json"} <= set(names)
    assert (hf_folder.INDEX in names) == (shard < 1 << 30)
    assert not [f for f in tmp_path.iterdir() if "partial" in f.name]
    assert hf_folder.is_hf(out) and variants.build(hf_folder.model_cfg(out)) == model
    assert same(hf_folder.load_params(out, model), params)
    with pytest.raises(UserError, match="exists already"):
        hf_folder.save_folder(out, params, CFG)


def test_a_failed_write_leaves_nothing(nano, tmp_path):
    with pytest.raises(UserError, match="absent.json: cannot be read"):
        hf_folder.save_folder(tmp_path / "out", nano[1], CFG, [tmp_path / "absent.json"])
    assert not list(tmp_path.iterdir())


def test_bfloat16_on_disk(nano, tmp_path):
    model, params = nano
    hf_folder.save_folder(tmp_path / "out", params, CFG, dtype="bfloat16")
    assert hf_folder.read_config(tmp_path / "out")["torch_dtype"] == "bfloat16"
    tensors = hf_folder.open_tensors(tmp_path / "out")
    assert tensors["pos_1LC"].dtype == ml_dtypes.bfloat16
    back = trees.flatten(hf_folder.load_params(tmp_path / "out", model))
    for name, leaf in trees.flatten(params).items():
        want = leaf.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(back[name], want)


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_config_round_trip(name):
    config = json.loads(json.dumps(hf_config.model_cfg_to_hf({"variant": name})))
    assert variants.build(hf_config.model_cfg_from_hf(config)) == variants.build({"variant": name})
    assert (hf_config.OWN in config) == (name == "nano")  # released models need official names only


def test_config_of_a_checkpoint_before_the_visual_tokens():
    """InternVL2.5 as released: nine special tokens, no codes."""
    config = hf_config.model_cfg_to_hf({"variant": "8b"})
    config["llm_config"]["vocab_size"] = 92553
    assert hf_config.model_cfg_from_hf(config)["vocab"]["base"] == 92544


@pytest.mark.parametrize(
    "change,message",
    [
        ({"select_layer": -2}, "select_layer"),
        ({"vision_config": None}, "vision_config"),
        ({"llm_config": {"architectures": ["MistralForCausalLM"]}}, "not supported"),
        ({"llm_config": {"rope_scaling": {"type": "yarn", "factor": 4}}}, "yarn"),
    ],
)
def test_foreign_configs_are_refused(change, message):
    config = hf_config.model_cfg_to_hf({"variant": "2b"})
    for key, value in change.items():
        if value is None:
            del config[key]
        elif isinstance(value, dict):
            config[key] = {**config[key], **value}
        else:
            config[key] = value
    with pytest.raises(UserError, match=message):
        hf_config.model_cfg_from_hf(config)


def test_bad_files_are_named(tmp_path):
    arrays = {"a": np.arange(6.0), "b": np.ones((2, 3), np.float32)}
    good = safetensors.numpy.save(arrays)
    (tmp_path / "cut.safetensors").write_bytes(good[:-5])
    (tmp_path / "no.safetensors.xz").write_bytes(b"no xz")
    (tmp_path / "yes.safetensors.xz").write_bytes(lzma.compress(good))
    assert np.array_equal(hf_folder.open_tensors(tmp_path / "yes.safetensors.xz")["a"], arrays["a"])
    for name in ("cut.safetensors", "no.safetensors.xz", "absent.safetensors"):
        with pytest.raises(UserError, match=name):
            hf_folder.open_tensors(tmp_path / name)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match="holds no weights"):
        hf_folder.open_tensors(folder)
    (folder / hf_folder.INDEX).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(UserError, match="gone.safetensors"):
        hf_folder.open_tensors(folder)
    with pytest.raises(UserError, match="config.json"):
        hf_folder.read_config(folder)


def test_safetensors_as_the_library_has_them(tmp_path):
    """Our reader and writer against the library, for every dtype and shape of tensor."""
    rng = np.random.default_rng(0)
    arrays = {
        f"{dtype}{shape}": rng.integers(0, 2, shape).astype(dtype)
        for dtype in ("float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool")
        for shape in ((), (3,), (2, 3), (0, 4))
    }
    arrays["transposed"] = rng.standard_normal((300, 200)).T
    (tmp_path / "theirs.safetensors").write_bytes(
        safetensors.numpy.save({k: np.ascontiguousarray(a).reshape(a.shape) for k, a in arrays.items()})
    )
    tensor_files.write_safetensors(
        tmp_path / "ours.safetensors", {k: tensor_files.Lazy.of(a) for k, a in arrays.items()}
    )
    for back in (
        safetensors.numpy.load_file(tmp_path / "ours.safetensors"),
        hf_folder.open_tensors(tmp_path / "theirs.safetensors"),
        hf_folder.open_tensors(tmp_path / "ours.safetensors"),
    ):
        assert set(back) == set(arrays)
        for key, array in arrays.items():
            assert back[key].dtype == array.dtype and back[key].shape == array.shape
            assert back[key].tobytes() == array.tobytes(), key


@pytest.mark.parametrize(
    "shape,axes",
    [((300, 200), (1, 0)), ((130, 7, 40), (1, 2, 0)), ((130, 7, 40), (2, 0, 1)), ((6, 5, 4), (1, 0, 2)), ((9,), (0,))],
)
def test_contiguous_copies(shape, axes):
    array = np.random.default_rng(0).standard_normal(shape).transpose(axes)
    got = tensor_files.contiguous(array, np.float32)
    assert got.flags.c_contiguous and np.array_equal(got, array.astype(np.float32))


def test_golden_f_goes_out_as_it_came(tmp_path):
    """The recorded model of the official code: same keys, shapes, dtypes, bits, and config fields."""
    record = recording.Recording(GOLDEN / "F_argenseg")
    cfg, official = end_to_end.model_section(record.config), record.weights()
    params = torch_convert.to_jax(official, hf_folder.param_shapes(variants.build(cfg)))
    hf_folder.save_folder(tmp_path / "out", params, cfg)
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert set(file.keys()) == set(official)
        for key in file.keys():
            got, want = file.get_tensor(key), official[key]
            assert (got.dtype, got.shape) == (want.dtype, want.shape), key
            assert key == weight_map.HITS or got.tobytes() == want.tobytes(), key
    written = hf_folder.read_config(tmp_path / "out")
    unread = {"use_flash_attn", "attn_implementation", "eos_token_id"}  # ours: id of <|im_end|>
    for part in ("vision_config", "llm_config"):
        for field, value in record.config[part].items():
            assert field in unread or written[part][field] == value, field


@pytest.mark.torch
def test_pytorch_files(tmp_path, monkeypatch):
    import pickle

    import torch

    state = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
        "b": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    }
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    tensors = hf_folder.open_tensors(tmp_path / "x.pth")
    assert set(tensors) == {"a", "b"} and tensors["b"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensors["a"], state["a"].numpy())
    np.testing.assert_array_equal(tensors["b"].astype(np.float32), [1.5, -2.25])
    monkeypatch.setattr(torch_file, "_MAPPED_BYTES", 0)  # the file is mapped anew each time
    again = hf_folder.open_tensors(tmp_path / "x.pth")
    assert all(np.array_equal(again[key], tensors[key]) for key in "abba")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert np.array_equal(hf_folder.open_tensors(tmp_path / "old.bin")["a"], tensors["a"])

    class Evil:
        def __reduce__(self):
            return print, ("unpickled",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(UserError, match="evil.pth"):
        hf_folder.open_tensors(tmp_path / "evil.pth")


def test_pytorch_files_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pth").write_bytes(b"")
    with pytest.raises(UserError, match="x.pth needs PyTorch.*pip install torch"):
        hf_folder.open_tensors(tmp_path / "x.pth")


@pytest.mark.torch
def test_linear_layouts_agree_with_torch(nano):
    """A kernel [in, out] here is a torch Linear's weight [out, in]; convolutions likewise."""
    import torch

    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((2, 5, 5, 3)), rng.standard_normal((4, 3, 3, 3))
    (kernel,) = weight_map.CONV.to_jax(w, ((3, 3, 3, 4),))
    want = torch.nn.functional.conv2d(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(w))
    got = np.einsum(
        "bhwijc,ijco->bohw",
        np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2)).transpose(0, 1, 2, 4, 5, 3),
        kernel,
    )
    np.testing.assert_allclose(got, want.numpy(), atol=1e-12)
