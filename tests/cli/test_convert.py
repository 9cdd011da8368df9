"""convert: there and back again without a changed byte, and nothing half-written."""
import functools
import json
import tracemalloc
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from argenseg_jax import trees
from argenseg_jax.ckpt import checkpoint, orbax_io, transfer
from argenseg_jax.cli import __main__ as cli
from argenseg_jax.data import shapes
from argenseg_jax.data.tokenizer import nano_tokenizer
from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_folder
from argenseg_jax.models import variants

CFG = {"variant": "nano"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An HF-style folder of a nano model."""
    root = tmp_path_factory.mktemp("convert")
    model = variants.build(CFG)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32),
                          dict(hf_folder.param_shapes(model)))
    params["llm"]["embed"]["embedding"][model.vocab.size:] = 0
    nano_tokenizer(model.vocab.num_codes, shapes.corpus()).save(root / "words")
    hf_folder.save_folder(root / "hf", params, CFG, hf_folder.tokenizer_files(root / "words"),
                          texts={checkpoint.RUN_CONFIG: json.dumps({"data": {"image_last": True}})})
    return root / "hf"


def convert(source, target, *more):
    return cli.main(["convert", f"--from={source}", f"--to={target}", "--save_dtype=float32",
                     *more])  # absl flags keep their values between tests


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
    monkeypatch.setattr(orbax_io, "_IN_FLIGHT_BYTES", 0)
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", 6 << 20)
    cfg = variants.resolve(CFG)
    cfg["llm"].update(depth=16, mlp=4096)
    model = variants.build(cfg)
    params = trees.map_named(
        lambda name, s: np.random.default_rng(0).standard_normal(s.shape).astype(
            "float16" if name.startswith("vision/") else "bfloat16"), hf_folder.param_shapes(model))
    hf_folder.save_folder(tmp_path / "a", params, cfg)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    del params
    for source, target in (("a", "b"), ("b", "c")):
        tracemalloc.start()
        move = transfer.to_hf if source == "b" else functools.partial(transfer.to_orbax,
                                                                      weights=tmp_path / "a")
        sizes = move(checkpoint.open_checkpoint(str(tmp_path / source)), target=tmp_path / target)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sizes["bytes"] == 2 * sizes["params"] > 0.9 * size and peak < 0.25 * size
    names = sorted(f.name for f in (tmp_path / "a").glob("*.safetensors"))
    assert len(names) > 4
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_an_interrupted_conversion_starts_again(folder, tmp_path, monkeypatch):
    stale = tmp_path / "w.partial" / "checkpoints" / "0"  # what a killed process leaves
    stale.mkdir(parents=True)
    (stale / "rest").write_text("x")
    source = checkpoint.open_checkpoint(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(orbax_io.ParamsWriter, "close", lambda self: 1 / 0)
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
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = dict(hf_folder.open_tensors(folder))
    tensors["pos_1LD"] = tensors.pop("pos_1LC")
    (broken / "model.safetensors").write_bytes(safetensors.numpy.save(tensors))
    capsys.readouterr()
    assert convert(broken, tmp_path / "x") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "'pos_1LD' has no place (nearest: 'pos_1LC')" in message and "visual/pos_embed" in message
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_the_released_parts_make_a_model_to_start_from(folder, tmp_path):
    """An InternVL folder from before the visual tokens, and the VQ-VAE in its own file."""
    model = variants.build(CFG)
    tensors = dict(hf_folder.open_tensors(folder))
    prefix, added = "image_tokenizer.", ("word_embed.weight", "word_embed.bias", "lvl_embed.weight",
                                         "pos_1LC")
    vae = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    rest = {k: v for k, v in tensors.items() if not k.startswith(prefix) and k not in added}
    old = model.vocab.base + 9
    rest["language_model.model.embed_tokens.weight"] = tensors[
        "language_model.model.embed_tokens.weight"][:old]
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((folder / "config.json").read_bytes())
    (base / "model.safetensors").write_bytes(safetensors.numpy.save(rest))
    (tmp_path / "vae.safetensors").write_bytes(safetensors.numpy.save(vae))
    assert convert(base, tmp_path / "w", f"--vqvae={tmp_path / 'vae.safetensors'}") == 0
    params = checkpoint.open_checkpoint(str(tmp_path / "w")).load_params()
    assert not any(x.any() for x in jax.tree.leaves(params["visual"]))
    embed = params["llm"]["embed"]["embedding"]
    np.testing.assert_allclose(embed[old:model.vocab.size],
                               np.tile(embed[:old].mean(0), (model.vocab.size - old, 1)), atol=1e-5)
    np.testing.assert_array_equal(params["vqvae"]["quantizer"]["codebook"],
                                  tensors[f"{prefix}quantize.embedding.weight"])
