"""init_from: whatever a checkpoint holds is loaded, the rest starts fresh and is listed."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from argenseg_jax import trees
from argenseg_jax.ckpt import checkpoint
from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_folder
from argenseg_jax.models import variants
from argenseg_jax.train import run
from tests import tiny

OLD_VOCAB = tiny.made()[0].vocab.base + 9  # before <mask> and the codes


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """{kind: path}: a workdir, its step, an HF folder, and a folder from before ARGenSeg."""
    root = tmp_path_factory.mktemp("sources")
    workdir = tiny.workdir(root / "run")
    folder, base = tiny.hf(root / "hf", workdir), root / "base"
    base.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (base / file).write_bytes((folder / file).read_bytes())
    tensors = {}
    for name, tensor in dict(hf_folder.open_tensors(folder)).items():
        if name.startswith(("vision_model.", "language_model.", "mlp1.")):
            is_table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            tensors[name] = tensor[:OLD_VOCAB] if is_table else tensor
    (base / "model.safetensors").write_bytes(safetensors.numpy.save(tensors))
    return {"workdir": workdir, "step": workdir / "checkpoints" / "1", "hf": folder, "base": base}


@pytest.mark.parametrize("kind", ["workdir", "step", "hf", "nano"])
def test_complete_checkpoints(sources, monkeypatch, capsys, kind):
    monkeypatch.setattr(checkpoint, "NANO", sources["hf"])
    model, params = tiny.made()
    source = checkpoint.open_checkpoint("nano" if kind == "nano" else str(sources[kind]))
    assert checkpoint.tokenizer_for(model, source).vocab == model.vocab
    known = run.known_weights(source, hf_folder.param_shapes(model))
    jax.tree.map(np.testing.assert_array_equal, dict(known), params)
    assert capsys.readouterr().err == ""


def test_a_released_folder_lacks_what_argenseg_adds(sources, capsys):
    """New tokens start as the mean of the old entries, tables and VQ-VAE fresh; all of it is listed."""
    model, params = tiny.made()
    source = checkpoint.open_checkpoint(str(sources["base"]))
    assert checkpoint.tokenizer_for(model, source).vocab == model.vocab
    known = trees.flatten(run.known_weights(source, hf_folder.param_shapes(model)))
    want = trees.flatten(params)
    assert {n.split("/")[0] for n in known} == {"vision", "connector", "llm"}
    for name, array in known.items():
        old = np.s_[:OLD_VOCAB] if "embedding" in name else np.s_[:, :OLD_VOCAB]
        where = old if name in ("llm/embed/embedding", "llm/lm_head/kernel") else ...
        np.testing.assert_array_equal(array[where], want[name][where])
    embed = known["llm/embed/embedding"]
    np.testing.assert_allclose(embed[OLD_VOCAB : model.vocab.size].std(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(embed[OLD_VOCAB], embed[:OLD_VOCAB].mean(0), atol=1e-5)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "these start fresh: visual/*, vqvae/*" in err


def test_a_bfloat16_checkpoint_trains_in_float32(tmp_path):
    model, params = tiny.made()
    half = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    source = checkpoint.open_checkpoint(str(tiny.workdir(tmp_path / "w", half)))
    known = run.known_weights(source, hf_folder.param_shapes(model))
    assert {x.dtype for x in jax.tree.leaves(known)} == {np.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)), dict(known), half)


def test_other_sizes_start_fresh_and_another_model_is_refused(sources, capsys):
    cfg = tiny.config()
    cfg["llm"]["mlp"] = 40
    source = checkpoint.open_checkpoint(str(sources["workdir"]))
    run.known_weights(source, hf_folder.param_shapes(variants.build(cfg)))
    assert (
        "fresh: llm/layers/mlp/down/kernel, llm/layers/mlp/gate/kernel, llm/layers/mlp/up/kernel"
        in capsys.readouterr().err
    )
    unexpected = {"other": {"kernel": jax.ShapeDtypeStruct((3,), np.float32)}}
    with pytest.raises(UserError, match="none of its parameters fits"):
        run.known_weights(source, unexpected)


def test_training_starts_from_a_released_folder(sources, tmp_path):
    """`train` with init_from; frozen vision is that of the folder."""
    from configs import common

    cfg = common.base().to_dict()
    cfg |= {"model": tiny.config(), "init_from": str(sources["base"])}
    cfg["data"] |= {"sources": ("shapes:simple:train",), "max_tokens": 96, "system": ""}
    cfg["train"] |= {"steps": 1, "global_batch": 8, "dtype": "float32", "remat": "none"}
    with pytest.raises(UserError, match=r"nothing loads or trains vqvae/\*: .*base lacks it; .*`convert --vqvae`"):
        run.train(cfg, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()
    cfg["train"]["allow_fresh"] = ("vqvae/.*",)
    assert run.train(cfg, str(tmp_path / "w"))["step"] == 1
    opened = checkpoint.open_checkpoint(str(tmp_path / "w"))
    trained, want = opened.load_params(), tiny.made()[1]
    jax.tree.map(np.testing.assert_array_equal, trained["vision"], want["vision"])
    assert np.any(trained["connector"]["fc1"]["kernel"] != want["connector"]["fc1"]["kernel"])
    assert opened.tokenizer().vocab == opened.model().vocab
    assert json.loads((tmp_path / "w" / "config.json").read_text())["init_from"] == cfg["init_from"]


def test_a_part_that_is_neither_loaded_nor_trained_is_an_error(sources):
    from configs import common

    cfg = common.base().to_dict() | {"model": tiny.config()}
    model = run.build_model(cfg)
    shapes = hf_folder.param_shapes(model)

    def left(known=None, allow=(), **changes):
        case = cfg | {"train": cfg["train"] | {"allow_fresh": allow}} | changes
        try:
            run.check_fresh(case, run.phases(case, model, None), shapes, known or {})
        except UserError as error:
            return str(error).partition("trains ")[2].partition(": ")[0]
        return ""

    vqvae = cfg["vqvae"] | {"steps": 3}
    everything = cfg["optim"] | {"freeze": ()}
    params = tiny.made()[1]
    assert left() == "vision/*, vqvae/*"  # the paper's recipe without init_from
    assert left(vqvae=vqvae) == "vision/*" and left(optim=everything) == "vqvae/*"
    assert left(vqvae=vqvae, optim=everything) == "" == left(params)
    assert left(allow=("vision/.*", "vqvae/.*")) == ""
    assert left({"vision": params["vision"]}, vqvae=vqvae) == ""
    frozen = cfg["optim"] | {"freeze": ("vision/.*", "llm/norm/.*", "connector/.*")}
    assert left({k: params[k] for k in ("vision", "vqvae")}, optim=frozen) == "connector/*, llm/norm/scale"


def test_a_resumed_run_needs_no_init_from(sources, tmp_path):
    """Weights and tokenizer are in the workdir: the checkpoint it began with may be gone."""
    from configs import common

    start = tmp_path / "start"
    shutil.copytree(sources["workdir"], start)
    cfg = common.base().to_dict()
    cfg |= {"model": tiny.config(), "init_from": str(start)}
    cfg["data"] |= {"sources": ("shapes:simple:train",), "max_tokens": 96, "system": ""}
    cfg["train"] |= {"steps": 1, "global_batch": 8, "dtype": "float32", "remat": "none"}
    cfg["optim"] |= {"schedule": "constant", "warmup": 0}
    run.train(cfg, str(tmp_path / "w"))
    shutil.rmtree(start)
    cfg["train"]["steps"] = 2
    assert run.train(cfg, str(tmp_path / "w"))["step"] == 2
    opened = checkpoint.open_checkpoint(str(tmp_path / "w"))
    jax.tree.map(np.testing.assert_array_equal, opened.load_params()["vision"], tiny.made()[1]["vision"])
    with pytest.raises(UserError, match="start: no such checkpoint"):
        run.train(cfg, str(tmp_path / "another"))
