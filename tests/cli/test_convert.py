"""convert: there and back again without a changed byte, and nothing half-written."""

import functools
import json
import pathlib
import tracemalloc
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from argenseg_jax import trees
from argenseg_jax.ckpt import checkpoint, params_writer, transfer
from argenseg_jax.data.nano_tokenizer import nano_tokenizer
from argenseg_jax.data.synthetic import shapes
from argenseg_jax.data.tokenizer import Tokenizer
from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_folder
from argenseg_jax.models import variants
from tests import tiny
from tests.cli import command

CFG = {"variant": "nano"}
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "G_preprocess"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An HF-style folder of a nano model."""
    root = tmp_path_factory.mktemp("convert")
    model = variants.build(CFG)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.standard_normal(s.shape).astype(np.float32), dict(hf_folder.param_shapes(model))
    )
    params["llm"]["embed"]["embedding"][model.vocab.size :] = 0
    nano_tokenizer(model.vocab.num_codes, shapes.corpus()).save(root / "words")
    hf_folder.save_folder(
        root / "hf",
        params,
        CFG,
        hf_folder.tokenizer_files(root / "words"),
        texts={checkpoint.RUN_CONFIG: json.dumps({"data": {"image_last": True}})},
    )
    return root / "hf"


def convert(source, target, *more):
    return command.main("convert", f"--from={source}", f"--to={target}", "--save_dtype=float32", *more)


def test_there_and_back_again(folder, tmp_path, capsys):
    assert convert(folder, tmp_path / "workdir") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["unmatched"] == 0 and result["params"] * 4 == result["bytes"]
    made = checkpoint.open_checkpoint(str(tmp_path / "workdir"))
    assert made.model() == variants.build(CFG) and made.config["data"] == {"image_last": True}
    assert made.tokenizer().vocab == made.model().vocab

    assert convert(tmp_path / "workdir", tmp_path / "again") == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    run = json.loads((tmp_path / "again" / checkpoint.RUN_CONFIG).read_text())
    assert run["data"] == {"image_last": True}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "workdir"]


def test_memory_holds_a_tensor_and_not_the_model(tmp_path, monkeypatch):
    """Both directions, and dtypes are kept: the peak is far below the size of the weights."""
    monkeypatch.setattr(params_writer, "_IN_FLIGHT_BYTES", 0)
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", 6 << 20)
    cfg = variants.resolve(CFG)
    cfg["llm"].update(depth=16, mlp=4096)
    model = variants.build(cfg)
    params = trees.map_named(
        lambda name, s: (
            np.random.default_rng(0)
            .standard_normal(s.shape)
            .astype("float16" if name.startswith("vision/") else "bfloat16")
        ),
        hf_folder.param_shapes(model),
    )
    hf_folder.save_folder(tmp_path / "a", params, cfg)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    del params
    for source, target in (("a", "b"), ("b", "c")):
        tracemalloc.start()
        move = transfer.to_hf if source == "b" else functools.partial(transfer.to_orbax, weights=tmp_path / "a")
        sizes = move(checkpoint.open_checkpoint(str(tmp_path / source)), target=tmp_path / target)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sizes["bytes"] == 2 * sizes["params"] > 0.9 * size
        assert peak < 0.5 * size  # it would be more than 1 with a whole copy; jax takes some, too
    names = sorted(f.name for f in (tmp_path / "a").glob("*.safetensors"))
    assert len(names) > 4
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_an_interrupted_conversion_starts_again(folder, tmp_path, monkeypatch):
    stale = tmp_path / f".w.argenseg-{'0' * 32}" / "checkpoints" / "0"  # what a killed process leaves
    stale.mkdir(parents=True)
    (stale / "rest").write_text("x")
    source = checkpoint.open_checkpoint(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_copy_tokenizer", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transfer.to_orbax(source, folder, tmp_path / "w")
    assert not list(tmp_path.iterdir())
    stale.mkdir(parents=True)
    transfer.to_orbax(source, folder, tmp_path / "w")
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
    assert not list((tmp_path / "w").rglob("rest"))
    with monkeypatch.context() as patch:
        patch.setattr(hf_folder.tensor_files, "write_safetensors", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transfer.to_hf(checkpoint.open_checkpoint(str(tmp_path / "w")), tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_no_room_is_told_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="0.0 GB are free"):
        transfer.to_orbax(checkpoint.open_checkpoint(str(folder)), folder, tmp_path / "w")
    assert not list(tmp_path.iterdir())


def test_a_weight_file_and_another_dtype(folder, tmp_path):
    assert convert(folder / "model.safetensors", tmp_path / "w", "--save_dtype=bfloat16") == 0
    params = checkpoint.open_checkpoint(str(tmp_path / "w")).load_params()
    assert all(str(x.dtype) == "bfloat16" for x in jax.tree.leaves(params))


def test_user_errors(folder, tmp_path, capsys):
    assert convert(folder, folder) == 2
    assert "exists already" in capsys.readouterr().err
    assert convert(tmp_path / "absent", tmp_path / "x") == 2
    assert convert(folder, tmp_path / "x", "--vqvae=vae.pth") == 2
    assert f"{folder} has a VQ-VAE: leave --vqvae=vae.pth out" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = dict(hf_folder.open_tensors(folder))
    tensors["pos_1LD"] = tensors.pop("pos_1LC")
    (broken / "model.safetensors").write_bytes(safetensors.numpy.save(tensors))
    capsys.readouterr()
    assert convert(broken, tmp_path / "x") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "unexpected key 'pos_1LD' (nearest: 'pos_1LC')" in message and "visual/pos_embed" in message
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_the_released_parts_make_a_model_to_start_from(tmp_path):
    """An InternVL folder from before the visual tokens, and the VQ-VAE in its own file."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.model").write_bytes((GOLDEN / "spm_prefix.model").read_bytes())
    (tmp_path / "base" / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    words = Tokenizer.load(tmp_path / "base", tiny.NUM_CODES).vocab
    cfg = {**tiny.config("internlm2"), "vocab": {"base": words.base, "eos": words.eos, "pad": words.pad}}
    model = variants.build(cfg)
    params = tiny.params(model)
    hf_folder.save_folder(tmp_path / "whole", params, cfg)
    tensors = dict(hf_folder.open_tensors(tmp_path / "whole"))
    old = words.base + 9
    prefix = "image_tokenizer."
    vae = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    rest = {k: v for k, v in tensors.items() if not k.startswith(hf_folder.OWN_PARTS)}
    for key in ("language_model.model.tok_embeddings.weight", "language_model.output.weight"):
        rest[key] = rest[key][:old].astype("bfloat16")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    config["llm_config"]["vocab_size"] = old
    config["argenseg"]["vocab"]["eos"] = 7  # the tokenizer knows better
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "model.safetensors").write_bytes(safetensors.numpy.save(rest))
    (tmp_path / "vae.safetensors").write_bytes(safetensors.numpy.save(vae))

    source = checkpoint.open_checkpoint(str(tmp_path / "base"))
    with pytest.raises(UserError, match="has no VQ-VAE.*--vqvae"):
        transfer.to_orbax(source, tmp_path / "base", tmp_path / "w")
    transfer.to_orbax(source, tmp_path / "base", tmp_path / "w", vqvae=tmp_path / "vae.safetensors")
    made = checkpoint.open_checkpoint(str(tmp_path / "w"))
    assert made.model() == model and made.tokenizer().vocab == words
    got = made.load_params()
    assert not any(x.any() for x in jax.tree.leaves(got["visual"]))
    head, embed = got["llm"]["lm_head"]["kernel"], got["llm"]["embed"]["embedding"]
    assert head.dtype == embed.dtype == "bfloat16"  # kept
    for rows in (head.T, embed):
        mean = np.tile(rows[:old].astype(np.float64).mean(0).astype("bfloat16"), (words.size - old, 1))
        np.testing.assert_array_equal(rows[old : words.size], mean)
        assert not rows[words.size :].any()
    np.testing.assert_array_equal(head.T[:old], rest["language_model.output.weight"])
    np.testing.assert_array_equal(got["vqvae"]["quantizer"]["codebook"], tensors[f"{prefix}quantize.embedding.weight"])

    # Back to PyTorch: the whole key set, and the tokenizer's files with the added words.
    transfer.to_hf(made, tmp_path / "hf")
    assert set(hf_folder.open_tensors(tmp_path / "hf")) == set(tensors)
    assert Tokenizer.load(tmp_path / "hf").vocab == words
    listed = json.loads((tmp_path / "hf" / "added_tokens.json").read_text())
    assert listed["<MASK_CONTEXT>"] == words.mask_context and len(listed) == 2 + 13 + tiny.NUM_CODES
    assert (tmp_path / "hf" / "special_tokens_map.json").exists()


def test_a_tokenizer_of_another_model(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["argenseg"]["vocab"]["base"] += 1
    (tmp_path / "a").mkdir()
    for file in folder.iterdir():
        (tmp_path / "a" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its tokenizer has <img> at \d+, its config.json at \d+"):
        transfer.to_orbax(checkpoint.open_checkpoint(str(tmp_path / "a")), folder, tmp_path / "w")
